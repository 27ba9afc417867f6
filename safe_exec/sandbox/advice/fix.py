"""One fix for a weak limit or wall, in commands that can be pasted. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct


class Fix(Struct, frozen=True, kw_only=True):
    """A fix: ``steps`` are commands or lines of a file; ``note`` names its cost or condition.

    A step "# ..." tells in which file, or as which user, the following ones belong.
    """

    title: str
    steps: tuple[str, ...]
    note: str = ""


def delegate_command(group: Path | None, controllers: Iterable[str]) -> str:
    """Return the command with which a cgroup delegates controllers to its children."""
    return f'echo "{" ".join(f"+{name}" for name in controllers)}" > {group}/cgroup.subtree_control'
