"""One fix for a weakness: what to do, in commands that can be pasted. Pure.

Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct


class Fix(Struct, frozen=True, kw_only=True):
    """A remedy: ``steps`` are commands or lines of a file, with "# ..." where place or user change.

    ``note`` is what it costs, or when it holds.
    """

    title: str
    steps: tuple[str, ...]
    note: str = ""


def delegate_command(group: Path | None, controllers: Iterable[str]) -> str:
    """Return the command with which a cgroup delegates controllers to its children."""
    return f'echo "{" ".join(f"+{name}" for name in controllers)}" > {group}/cgroup.subtree_control'
