"""The output of a dying kernel process: its own stderr, and the stacks of its fault handler.

A dying kernel waits for the keeper. The fault handler writes to a stream socket whose send buffer
is as small as Linux allows, so it blocks after a few short writes until the keeper reads. When the
first byte arrives, the process still has its stack: /proc shows how far the main thread's stack had
grown, and the registers at the fault can be read (``signal_frame``). Both tell a stack overflow
from another segmentation fault. If the runner wants to read its native stack, the process is held
there for a moment longer. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from safe_exec.keeper import procfs, signal_frame
from safe_exec.keeper.protocol import FaultingThread, ProcessAtFault

TAIL_BYTES = 64 * 1024
FAULT_BYTES = 256 * 1024
FATAL = b"Fatal Python error"
STACK_WAIT_SECONDS = 0.2
QUIET_SECONDS = 0.02
# Writes that follow each other more closely than this are one burst.
BURST_PAUSE_SECONDS = 0.1
BURSTS = 8
BURST_BYTES = 8 * 1024
NEXT_SECONDS = 0.002
PIECE = 65536


class CrashOutput:
    """Reads the kernel's stderr and fault socket.

    ``on_fault`` is called with each piece of a fault report of a living process, ``on_hold`` once
    with the state of a dying process that is held until ``release``. Parameters named
    ``living_pid`` are the kernel's process id, ``None`` after its end.
    """

    def __init__(
        self, on_fault: Callable[[str], None], on_hold: Callable[[FaultingThread], None]
    ) -> None:
        self.tail = b""
        self.bursts: list[tuple[float, bytes]] = []
        self.fault_text = b""
        self.process_at_fault: ProcessAtFault | None = None
        self.hold_seconds = 0.0
        self._hold: tuple[int, float] | None = None
        self._on_fault = on_fault
        self._on_hold = on_hold
        self._stderr = -1
        self._fault: socket.socket | None = None
        self._kernel_end: socket.socket | None = None
        self._dump_signal: int | None = None
        self._keeps_kernel_end = False

    def open(
        self, dump_signal: int | None, *, restorable: bool = False
    ) -> tuple[int, socket.socket]:
        """Return the descriptors for the kernel: its stderr, and the socket of its fault handler.

        At ``dump_signal`` the kernel writes stacks to the socket without dying. With ``restorable``
        a copy of the kernel may write to both after its death.
        """
        self._keeps_kernel_end = restorable
        self._dump_signal = dump_signal
        self._stderr, stderr = os.pipe2(os.O_CLOEXEC)
        self._fault, fault = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # Linux rounds up to its smallest buffer.
        fault.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self._kernel_end = fault.dup()
        os.set_blocking(self._stderr, False)
        self._fault.setblocking(False)
        return stderr, fault

    def close(self) -> None:
        """Stop reading: another process takes the place of the one that has ended."""
        self._hold = None
        self._close_kernel_end()
        if self._fault is not None:
            self._fault.close()
            self._fault = None
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1

    def begin_again(self) -> None:
        """Forget the output of a dead kernel: a snapshot of it goes on with both descriptors."""
        self.tail = self.fault_text = b""
        self.bursts = []
        self.process_at_fault = self._hold = None
        assert self._kernel_end is not None
        self._kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    def sources(self) -> tuple[int, ...]:
        """Return the descriptors to read: stderr, and the fault socket if no process is held."""
        fault = self._fault.fileno() if self._fault and self._hold is None else -1
        return tuple(fd for fd in (self._stderr, fault) if fd >= 0)

    def read(self, fd: int, living_pid: int | None) -> None:
        """Read from one of the sources. A source that has ended is closed and removed."""
        if fd == self._stderr:
            self.read_stderr()
        else:
            self.read_fault(living_pid)

    def read_rest(self) -> None:
        """Read everything that a dead process has written."""
        self._hold = None
        self._close_kernel_end()
        while self._fault is not None and self.read_fault(None):
            pass
        while self._stderr >= 0 and self.read_stderr():
            pass

    def read_stderr(self) -> bool:
        """Read from the kernel's stderr and keep its tail; false if there was nothing."""
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
        # The last lines of stderr may be much older than the death: note when each burst came.
        time_read = time.monotonic()
        if self.bursts and time_read - self.bursts[-1][0] <= BURST_PAUSE_SECONDS:
            data = self.bursts.pop()[1] + data
        self.bursts = [*self.bursts, (time_read, data[-BURST_BYTES:])][-BURSTS:]

    def read_fault(self, living_pid: int | None) -> bool:
        """Read from the fault handler; false if there was nothing, or the process is held."""
        assert self._fault is not None
        try:
            # Inspect a dying process first: it is blocked only until its buffer is read.
            if living_pid is not None and FATAL in self._fault.recv(PIECE, socket.MSG_PEEK):
                self._inspect(living_pid)
                if self._hold is not None:
                    return False
            data = self._fault.recv(PIECE) + self._read_following()
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            self._fault.close()
            self._fault = None
            return False
        # Stacks that we asked for come before a fatal one, so the end is what matters.
        self.fault_text = (self.fault_text + data)[-FAULT_BYTES:]
        if living_pid is not None:
            self._on_fault(data.decode("utf-8", "replace"))
        return True

    def _inspect(self, pid: int) -> None:
        """Record the state of a process at its fault, and hold it if the runner asked for that."""
        if self._kernel_end is None or self.process_at_fault is not None:
            return
        inode = os.fstat(self._kernel_end.fileno()).st_ino
        self.process_at_fault = ProcessAtFault(
            at=time.monotonic(),
            stack_bytes=procfs.status_bytes(pid, "VmStk"),
            stack_limit=procfs.soft_limit(pid, "Max stack size"),
            thread=signal_frame.read(pid, inode, self._dump_signal),
        )
        thread = self.process_at_fault.thread
        if self.hold_seconds and thread is not None:
            # Its other threads must not run meanwhile: the fault handler has begun to follow their
            # stacks.
            procfs.signal_one(pid, signal.SIGSTOP)
            self._hold = (pid, time.monotonic() + self.hold_seconds)
            self._on_hold(thread)
        else:
            self._let_write()

    def hold_remaining(self) -> float | None:
        """Return the seconds for which a dying process is still held, ``None`` if none is."""
        return None if self._hold is None else max(0.0, self._hold[1] - time.monotonic())

    def release(self) -> None:
        """Let a held process write its report and die."""
        if self._hold is not None:
            pid, _ = self._hold
            self._hold = None
            self._let_write()
            procfs.signal_one(pid, signal.SIGCONT)

    def _let_write(self) -> None:
        """Let a dying process write the rest of its report at once."""
        assert self._kernel_end is not None
        # The fault handler follows the stacks of threads that may still run. The longer it is held
        # up among them, the likelier one changes under it and it crashes itself: seen once in 15
        # deaths on a busy machine. With a large buffer it finishes at once.
        self._kernel_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FAULT_BYTES)
        self._close_kernel_end()

    def _close_kernel_end(self) -> None:
        # Our copy of the kernel's end would keep us from seeing the end of the stream.
        # A snapshot has the kernel's end too, so the stream does not end with the kernel.
        if self._kernel_end is not None and not self._keeps_kernel_end:
            self._kernel_end.close()
            self._kernel_end = None

    def _read_following(self) -> bytes:
        """Read the pieces that follow at once, except a fatal report before its inspection."""
        # The handler writes a few dozen bytes and waits until they are read. Telling the runner of
        # each write, and checking the memory in between, took longer than the rest of a death.
        assert self._fault is not None
        data, deadline = b"", time.monotonic() + STACK_WAIT_SECONDS
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while (
                len(data) < FAULT_BYTES
                and time.monotonic() < deadline
                and _is_readable(self._fault, NEXT_SECONDS)
            ):
                if FATAL in self._fault.recv(PIECE, socket.MSG_PEEK):
                    break
                piece = self._fault.recv(PIECE)
                if not piece:
                    break
                data += piece
        return data

    def wait_for_stack(self, living_pid: int) -> None:
        """Read the stack that a dump signal requested, until the handler stops writing."""
        deadline = time.monotonic() + STACK_WAIT_SECONDS
        while (
            self._fault is not None
            and time.monotonic() < deadline
            and _is_readable(self._fault, QUIET_SECONDS)
        ):
            if not self.read_fault(living_pid):
                return


def _is_readable(source: socket.socket, seconds: float) -> bool:
    return bool(select.select([source], [], [], seconds)[0])
