"""One fix for a weakness: what to do, in commands that can be pasted. Pure; imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct


class Fix(Struct, frozen=True, kw_only=True):
    """``what`` is done by ``steps``, commands or lines of a file, with ``# ...`` between them where place or user change.

    ``note`` is what it costs, or when it holds.
    """

    title: str
    steps: tuple[str, ...]
    note: str = ""


def delegate_command(group: Path | None, controllers: Iterable[str]) -> str:
    """The command by which a group of the unified tree hands controllers on to the groups below it."""
    return f'echo "{" ".join(f"+{name}" for name in controllers)}" > {group}/cgroup.subtree_control'
