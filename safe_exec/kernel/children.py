"""Remembers a kernel's children, so that a hang can name those that have ended."""

from __future__ import annotations

from typing import NamedTuple

from safe_exec.keeper import procfs
from safe_exec.kernel.processes import command_text, read_bytes
from safe_exec.model.observed import EndedChild

MOST_KNOWN = 256
# Processes per look: a notebook that starts thousands must not starve everything else.
MOST_AT_ONCE = 32


class Known(NamedTuple):
    """A process that was seen alive, with its start time, since process ids are reused."""

    pid: int
    started: int
    local_pid: int
    command: str
    forked: bool


class ChildHistory:
    """The descendants of one kernel that were seen during the current cell."""

    def __init__(self) -> None:
        self._children: dict[int, Known] = {}

    def begin_cell(self) -> None:
        """Forget the children that have ended."""
        self._children = {pid: child for pid, child in self._children.items() if _lives(child)}

    def note(self, kernel: int) -> None:
        """Add the living children."""
        queue, count = procfs.children(kernel), 0
        while queue and count < MOST_AT_ONCE:
            pid = queue.pop(0)
            count += 1
            queue += procfs.children(pid)
            # The start time tells a reused pid from the child that had it before.
            status = procfs.stat(pid)
            if (
                status is None
                or status.state in "ZX"
                or self._is_known(pid, status.started)
                or len(self._children) >= MOST_KNOWN
            ):
                continue
            cmdline = read_bytes(f"/proc/{pid}/cmdline")
            self._children[pid] = Known(
                pid=pid,
                started=status.started,
                local_pid=procfs.innermost_pid(pid) or pid,
                command=command_text(cmdline),
                forked=cmdline == read_bytes(f"/proc/{kernel}/cmdline"),
            )

    def _is_known(self, pid: int, started: int) -> bool:
        return pid in self._children and self._children[pid].started == started

    def known(self) -> dict[int, EndedChild]:
        """Return all children by their process id in our namespace."""
        # /proc shows no command line for a zombie; this keeps the earlier one.
        return {pid: _as_ended(child) for pid, child in self._children.items()}

    def ended(self) -> tuple[EndedChild, ...]:
        """Return the children that have ended."""
        # Zombies are left out: their parent has not read their status yet.
        return tuple(
            _as_ended(child) for child in self._children.values() if not _lives(child, zombies=True)
        )


def _as_ended(child: Known) -> EndedChild:
    return EndedChild(local_pid=child.local_pid, command=child.command, forked=child.forked)


def _lives(child: Known, *, zombies: bool = False) -> bool:
    status = procfs.stat(child.pid)
    return (
        status is not None
        and status.started == child.started
        and (zombies or status.state not in "ZX")
    )
