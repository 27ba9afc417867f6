"""Which children a kernel has had: noted a few times a second, so that a hang can name those that are gone. May import model, procfs, processes."""

from __future__ import annotations

from typing import NamedTuple

from safe_exec.keeper import procfs
from safe_exec.kernel.processes import command_text, read_bytes
from safe_exec.model.observed import EndedChild

MOST_KNOWN = 256
MOST_AT_ONCE = 32
"""Processes that are taken in at one look: a notebook that starts thousands must not keep us from all else."""


class Known(NamedTuple):
    """A process that was seen alive; its start tells it from a later one with the same id."""

    pid: int
    started: int
    local_pid: int
    command: str
    forked: bool


class ChildHistory:
    """The children of one kernel, and theirs, that were seen while the current cell ran."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}

    def begin_cell(self) -> None:
        """Forget those that have ended by now."""
        self._known = {pid: known for pid, known in self._known.items() if _lives(known)}

    def note(self, kernel: int) -> None:
        """Take in those that live now."""
        queue, count = procfs.children(kernel), 0
        while queue and count < MOST_AT_ONCE:
            pid = queue.pop(0)
            count += 1
            queue += procfs.children(pid)
            found = procfs.stat(pid)
            if (
                found is None
                or found.state in "ZX"
                or self._is_known(pid, found.started)
                or len(self._known) >= MOST_KNOWN
            ):
                continue
            cmdline = read_bytes(f"/proc/{pid}/cmdline")
            self._known[pid] = Known(
                pid=pid,
                started=found.started,
                local_pid=procfs.innermost_pid(pid) or pid,
                command=command_text(cmdline),
                forked=cmdline == read_bytes(f"/proc/{kernel}/cmdline"),
            )

    def _is_known(self, pid: int, started: int) -> bool:
        return pid in self._known and self._known[pid].started == started

    def known(self) -> dict[int, EndedChild]:
        """All that were seen, by process id outside: of a zombie /proc no longer shows the command."""
        return {pid: _as_ended(known) for pid, known in self._known.items()}

    def ended(self) -> tuple[EndedChild, ...]:
        """Those that were seen alive and are gone, zombies left out: their parent has not read their status yet."""
        return tuple(
            _as_ended(known) for known in self._known.values() if not _lives(known, zombies=True)
        )


def _as_ended(known: Known) -> EndedChild:
    return EndedChild(local_pid=known.local_pid, command=known.command, forked=known.forked)


def _lives(known: Known, *, zombies: bool = False) -> bool:
    found = procfs.stat(known.pid)
    return (
        found is not None
        and found.started == known.started
        and (zombies or found.state not in "ZX")
    )
