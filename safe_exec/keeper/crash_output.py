"""What a kernel process says on its way out: its own stderr, and the stacks of its fault handler. Standard library only.

A dying kernel waits at our door. The fault handler writes to a stream socket whose send buffer is as small as the system allows; after a
few short writes it blocks until we read. So when the first byte shows up, the process still stands with its stack as it was: /proc tells how
far the main thread's stack had grown, and the registers at the fault can be read (signal_frame.py). Both tell a stack overflow from another
segmentation fault.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from safe_exec.keeper import procfs, signal_frame

TAIL_BYTES = 64 * 1024
FAULT_BYTES = 256 * 1024
FATAL = b"Fatal Python error"
STACK_WAIT_SECONDS = 0.2
QUIET_SECONDS = 0.02
PAUSE_SECONDS = 0.1
"""What follows so soon was written in one go."""
BURSTS = 8
BURST_BYTES = 8 * 1024
NEXT_SECONDS = 0.002
PIECE = 65536


class LastWords:
    """Takes in what comes; ``tell`` is called with each part of a fault report of a process that lives.

    Where ``alive`` is asked for: the process's id, ``None`` once it has ended.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tail = b""
        self.bursts: list[tuple[float, bytes]] = []
        self.fault_text = b""
        self.seen: dict[str, Any] = {}
        self._tell = tell
        self._stderr = -1
        self._fault: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._dump_signal: int | None = None

    def open(self, dump_signal: int | None) -> tuple[int, socket.socket]:
        """The kernel's ends: its stderr, and where its fault handler writes.

        ``dump_signal`` is the one at which it writes stacks there without being about to die.
        """
        self._dump_signal = dump_signal
        self._stderr, stderr = os.pipe2(os.O_CLOEXEC)
        self._fault, fault = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        fault.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 1
        )  # the system rounds up to its smallest
        self._channel = fault.dup()
        os.set_blocking(self._stderr, False)
        self._fault.setblocking(False)
        return stderr, fault

    def sources(self) -> tuple[int, ...]:
        """The descriptors to wait on."""
        return tuple(
            fd for fd in (self._stderr, self._fault.fileno() if self._fault else -1) if fd >= 0
        )

    def read(self, fd: int, alive: int | None) -> None:
        """Take what stands at one of them; at its end it is closed, and no source any more."""
        if fd == self._stderr:
            self.read_stderr()
        else:
            self.read_fault(alive)

    def read_rest(self) -> None:
        """All that a process which has ended left behind."""
        self._close_channel()
        while self._fault is not None and self.read_fault(None):
            pass
        while self._stderr >= 0 and self.read_stderr():
            pass

    def read_stderr(self) -> bool:
        """Keep the tail of what the kernel process writes to its own stdout and stderr; whether there was anything."""
        try:
            data = os.read(self._stderr, PIECE)
        except BlockingIOError:
            return False
        if not data:
            os.close(self._stderr)
            self._stderr = -1
            return False
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        self._note_burst(data)
        return True

    def _note_burst(self, data: bytes) -> None:
        """Note when it came: what stands at the end may have been written long before it."""
        now = time.monotonic()
        if self.bursts and now - self.bursts[-1][0] <= PAUSE_SECONDS:
            data = self.bursts.pop()[1] + data
        self.bursts = [*self.bursts, (now, data[-BURST_BYTES:])][-BURSTS:]

    def read_fault(self, alive: int | None) -> bool:
        """Take what the fault handler writes; whether there was anything.

        At a fatal report look at the process first, while the full buffer holds it up.
        """
        assert self._fault is not None
        try:
            if alive is not None and FATAL in self._fault.recv(PIECE, socket.MSG_PEEK):
                self._look(alive)
            data = self._fault.recv(PIECE) + self._close_behind()
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            self._fault.close()
            self._fault = None
            return False
        # The end is what counts: stacks that were asked for stand before a fatal one.
        self.fault_text = (self.fault_text + data)[-FAULT_BYTES:]
        if alive is not None:
            self._tell(data.decode("utf-8", "replace"))
        return True

    def _look(self, pid: int) -> None:
        """See how the process stands; then let it write the rest at once.

        The fault handler follows the stacks of threads that may be running meanwhile. The longer it is held up
        among them, the likelier one changes under it, and it crashes itself (seen once in 15 on a busy machine).
        """
        if self._channel is None:
            return
        inode = os.fstat(self._channel.fileno()).st_ino
        self.seen = {
            "at": time.monotonic(),
            **_see_stack(pid),
            "site": signal_frame.read(pid, inode, self._dump_signal),
        }
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FAULT_BYTES)
        self._close_channel()

    def _close_channel(self) -> None:
        """Close our copy of the kernel's end, which would keep us from seeing the end of the stream."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _close_behind(self) -> bytes:
        """What is written next, one piece close behind the other, up to a fatal report that is still to be looked at.

        The handler writes a few dozen bytes and waits until they are taken. To tell the runner of each, and to look at the memory between,
        took longer than the rest of a death.
        """
        assert self._fault is not None
        found, deadline = b"", time.monotonic() + STACK_WAIT_SECONDS
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while (
                len(found) < FAULT_BYTES
                and time.monotonic() < deadline
                and _comes(self._fault, NEXT_SECONDS)
            ):
                if FATAL in self._fault.recv(PIECE, socket.MSG_PEEK):
                    break
                piece = self._fault.recv(PIECE)
                if not piece:
                    break
                found += piece
        return found

    def wait_for_stack(self, alive: int) -> None:
        """Take a stack that was asked for, until nothing more comes for a moment."""
        deadline = time.monotonic() + STACK_WAIT_SECONDS
        while (
            self._fault is not None
            and time.monotonic() < deadline
            and _comes(self._fault, QUIET_SECONDS)
        ):
            if not self.read_fault(alive):
                return


def _comes(source: socket.socket, seconds: float) -> bool:
    return bool(select.select([source], [], [], seconds)[0])


def _see_stack(pid: int) -> dict[str, int | None]:
    """How far the main thread's stack has grown, and how far it may."""
    return {
        "stack": procfs.status_bytes(pid, "VmStk"),
        "stack_limit": procfs.soft_limit(pid, "Max stack size"),
    }
