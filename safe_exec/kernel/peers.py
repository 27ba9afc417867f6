"""Finds the other hosts that a sandbox's sockets are connected to."""

from __future__ import annotations

from safe_exec.keeper import procfs
from safe_exec.sandbox.usage import sockets


class PeerWatch:
    """The connections of one kernel and its children.

    ``instrumented``: the agent in the kernel reports the kernel's own connections.
    """

    def __init__(self, keeper_pid: int, pid: int, *, instrumented: bool) -> None:
        self._keeper_pid, self._pid, self._instrumented = keeper_pid, pid, instrumented
        self._ancestors: frozenset[int] = frozenset()

    def peers(self) -> set[str]:
        """Return the hosts; none while the agent sees all connections."""
        # The agent reports connections of the kernel process only, not of its children. Reading the
        # tables of a busy machine takes milliseconds, so not while there are no children.
        if self._instrumented and not self._has_children():
            return set()
        return sockets.peers(self._keeper_pid, self._pid)

    def _has_children(self) -> bool:
        """Whether a process besides the kernel and its ancestors runs in the sandbox."""
        # A daemon's parent is the init of its pid namespace, or the keeper.
        if not self._ancestors:
            self._ancestors = frozenset(procfs.ancestors(self._pid))
        queue = procfs.children(self._keeper_pid)
        if not queue:
            # The system does not tell children.
            return True
        while queue:
            pid = queue.pop()
            if pid != self._pid and pid not in self._ancestors:
                return True
            queue += procfs.children(pid)
        return False
