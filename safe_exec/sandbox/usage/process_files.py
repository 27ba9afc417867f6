"""Reads one process from /proc (proc(5)): memory, processor time, threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time

from msgspec import Struct

from safe_exec.keeper.procfs import TICKS

# A process can end at any moment. Then opening its files fails (ENOENT), or reading them (ESRCH);
# the files of a zombie are empty.

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
DEAD = "ZX"
KCMP = {"x86_64": 312, "aarch64": 272}.get(platform.machine())
KCMP_VM = 1
MOST_BYTES = 8192


# Where the addresses of code and stack stand behind the command's name in ``stat``. Linux draws
# both anew at each execve(2), and a fork keeps them. Without the right to trace the process, and
# for a zombie, the second one is 0.
CODE_FIELD, STACK_FIELD = 23, 25


def _image(fields: list[bytes]) -> tuple[bytes, bytes] | None:
    """Return what identifies the execution that made an address space, ``None`` if unreadable."""
    if len(fields) <= STACK_FIELD or fields[STACK_FIELD] == b"0":
        return None
    return fields[CODE_FIELD], fields[STACK_FIELD]


def _path(pid: int, task: int, name: str) -> str:
    return f"{pid}/task/{task}/{name}" if task else f"{pid}/{name}"


class Member(Struct, frozen=True, kw_only=True):
    """One process as last read.

    ``started`` is in clock ticks since boot; ``cpu`` and ``cpu_waited`` (of children that it has
    waited for) are in seconds, all memory in bytes. ``shmem`` is shared memory that is not a file
    on a disk. ``task`` is the thread through which its memory is read, if not the first one.
    ``image`` identifies the execution (execve(2)) that made the address space, ``None`` if unknown.
    """

    pid: int
    parent: int
    started: int
    state: str = "S"
    threads: int = 1
    cpu: float = 0.0
    cpu_waited: float = 0.0
    task: int = 0
    size: int = 0
    shared: int = 0
    anonymous: int = 0
    shmem: int = 0
    image: tuple[bytes, bytes] | None = None

    @property
    def resident(self) -> int:
        """The resident memory in bytes, pages of files included."""
        return self.shared + self.anonymous

    @property
    def key(self) -> tuple[int, int]:
        """Identify the process, even if its id is reused."""
        return self.pid, self.started


class ProcessFiles:
    """Reads the files of processes; tests replace it."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._known_shmem: dict[tuple[int, int], tuple[int, int]] = {}

    def now(self) -> float:
        """Return the clock ticks since boot, the unit of process start times."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS

    def pids(self) -> list[int]:
        """List the processes that /proc shows."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]

    def text(self, path: str) -> bytes:
        """Read a short file below /proc. Raises OSError."""
        fd = os.open(f"/proc/{path}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, MOST_BYTES)
        finally:
            os.close(fd)

    def read(self, member: Member, name: str) -> bytes:
        """Read a file of a process through a live thread. Raises OSError."""
        return self.text(_path(member.pid, member.task, name))

    def parent(self, pid: int) -> int | None:
        """Return the id of the parent, ``None`` if the process has ended."""
        try:
            return int(self.text(f"{pid}/stat").rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            return None

    def measure(self, pid: int) -> Member | None:
        """Return the use of a process, ``None`` if it has ended."""
        try:
            text = self.text(f"{pid}/stat")
        except OSError:
            return None
        # The command's name may contain spaces and parentheses, so split only the part after the
        # last ")".
        fields = text.rpartition(b")")[2].split()
        started, state, threads = int(fields[19]), fields[0].decode(), int(fields[17])
        task = self._live_task(pid) if state in DEAD and threads > 1 else 0
        size, resident, shared = self._memory_map(pid, task)
        return Member(
            pid=pid,
            parent=int(fields[1]),
            started=started,
            state=state,
            threads=threads,
            cpu=(int(fields[11]) + int(fields[12])) / TICKS,
            cpu_waited=(int(fields[13]) + int(fields[14])) / TICKS,
            task=task,
            size=size,
            shared=shared,
            anonymous=max(0, resident - shared),
            shmem=self._shared_memory(pid, started, task, shared) if shared else 0,
            image=_image(fields),
        )

    def _live_task(self, pid: int) -> int:
        """Return a live thread of a process whose first thread has ended; 0 if there is none."""
        # After the end of the first thread the files of the process itself are empty.
        with contextlib.suppress(OSError):
            return next(
                (task for name in os.listdir(f"/proc/{pid}/task") if (task := int(name)) != pid), 0
            )
        return 0

    def _memory_map(self, pid: int, task: int) -> tuple[int, int, int]:
        """Return the bytes of address space, resident memory, and resident file and shared pages.

        All are zero if the process has ended.
        """
        try:
            size, resident, shared = self.text(_path(pid, task, "statm")).split()[:3]
        except (OSError, ValueError):
            return 0, 0, 0
        return int(size) * PAGE, int(resident) * PAGE, int(shared) * PAGE

    def _shared_memory(self, pid: int, started: int, task: int, shared: int) -> int:
        """Return the bytes of shared memory that is not a file on a disk."""
        # Only ``status`` contains it, which is the slowest of these files. So read it only after
        # the sum with file pages has changed.
        cached = self._known_shmem.get((pid, started))
        if cached is not None and cached[0] == shared:
            return cached[1]
        shmem = 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            _, mark, value = self.text(_path(pid, task, "status")).partition(b"\nRssShmem:")
            shmem = int(value.split(None, 1)[0]) * 1024 if mark else 0
        self._known_shmem[pid, started] = (shared, shmem)
        return shmem

    def forget(self, member: Member) -> None:
        """Drop the cached entries of a process that has ended."""
        self._known_shmem.pop(member.key, None)

    def anonymous(self, pid: int, task: int = 0) -> int:
        """Return the bytes of anonymous memory now; 0 if the process has ended."""
        _, resident, shared = self._memory_map(pid, task)
        return max(0, resident - shared)

    def has_ended(self, member: Member) -> bool:
        """Whether the process has ended or has given up its memory."""
        # A process frees its memory a moment before it becomes a zombie (do_exit in Linux). Until
        # then its state is still R.
        current = self.measure(member.pid)
        return current is None or current.started != member.started or not current.size

    def same_memory(self, one: int, other: int) -> bool:
        """Whether two processes share an address space (kcmp(2))."""
        # Between vfork(2) and exec a child runs in its parent's address space.
        if KCMP is None:
            return False
        return int(self._libc.syscall(KCMP, one, other, KCMP_VM, 0, 0)) == 0
