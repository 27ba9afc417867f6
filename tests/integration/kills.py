"""The table of kills: what a notebook does, under what, and what must be said of it."""

from __future__ import annotations

from dataclasses import dataclass

from safe_exec.model.limits import LimitName, Mechanism
from safe_exec.model.verdict import CauseKind, Status

SMALL = ("--memory", "300M")
QUICK = ("--cell-timeout", "20")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One row. ``limit`` held ``by`` a mechanism is asserted from the verdict; ``saved`` must stand in the outputs."""

    id: str
    cells: tuple[str, ...]
    status: Status
    cause: CauseKind | None
    options: tuple[str, ...] = ()
    mechanisms: tuple[str, ...] = ()
    user: bool = False
    limit: LimitName | None = None
    by: Mechanism | None = None
    activity: str | None = None
    cell: int | None = None
    line: int | None = None
    saved: str | None = None
    kernel: str = "python3"
    language: str = "python"
    startup: str = ""
    needs_small_disk: bool = False

    @property
    def beds(self) -> tuple[str, ...]:
        """What a machine must have for this row (tests/beds.py)."""
        needs = {
            "ordinary-user": self.user,
            "cgroup-v1-root": Mechanism.CGROUP_V1 in self.mechanisms,
            "mount": self.needs_small_disk,
            "bubblewrap": self.by is Mechanism.BUBBLEWRAP
            or self.cause is CauseKind.NETWORK_BLOCKED,
            self.kernel: self.language != "python",
        }
        return tuple(bed for bed, needed in needs.items() if needed)


HOG = "print('hogging')\nhog = []\nwhile True:\n    hog.append(b'x' * (16 << 20))"
WORKER = "import subprocess, sys\nprint('worker')\nsubprocess.run([sys.executable, '-c', 'b = b\"x\" * (900 << 20)'], check=True)"
THREADS = "import threading, time\nfor n in range(400):\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
SPIN = "n = 0\nwhile True:\n    n += 1"
NULL = "print('about to crash')\nimport ctypes\nctypes.string_at(0)"
OVERFLOW = "from itertools import chain\nrows = iter(())\nfor n in range(400_000):\n    rows = chain(rows, [n])\nprint('built')\nnext(rows)"
SECCOMP = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
import platform
number = {"x86_64": 110, "aarch64": 173}[platform.machine()]  # getppid
program = b"".join(
    struct.pack("HBBI", *row)
    for row in [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
)
buffer = ctypes.create_string_buffer(program)
fprog = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(fprog), 0, 0) == 0
print("filtered")
import os
os.getppid()
""".strip()


def _row(
    id: str,  # noqa: A002
    cells: tuple[str, ...] | str,
    status: Status,
    cause: CauseKind | None,
    **more: object,
) -> Kill:
    sources = (cells,) if isinstance(cells, str) else cells
    given = more.pop("options", ())
    options: tuple[str, ...] = tuple(given) if isinstance(given, tuple) else ()
    if "--cell-timeout" not in options:
        options = (*options, *QUICK)
    return Kill(id=id, cells=sources, status=status, cause=cause, options=options, **more)  # type: ignore[arg-type]


V1, RL, WD = ("cgroup-v1",), ("rlimit",), ("watchdog",)
M, K, L, S = Mechanism, CauseKind, LimitName, Status

LIMITS: tuple[Kill, ...] = (
    _row("memory-v1", ("x = 1", HOG), S.KERNEL_DIED, K.OUT_OF_MEMORY, options=SMALL, mechanisms=V1, limit=L.MEMORY,
         by=M.CGROUP_V1, cell=1, line=4, saved="hogging"),
    _row("memory-watchdog", ("x = 1", HOG), S.KERNEL_DIED, K.OUT_OF_MEMORY, options=SMALL, mechanisms=WD, limit=L.MEMORY,
         by=M.WATCHDOG, cell=1, line=4, saved="hogging"),
    _row("memory-watchdog-user", ("x = 1", HOG), S.KERNEL_DIED, K.OUT_OF_MEMORY, options=SMALL, mechanisms=WD, user=True,
         limit=L.MEMORY, by=M.WATCHDOG, cell=1, line=4, saved="hogging"),
    _row("memory-rlimit", HOG, S.CELL_ERROR, K.MEMORY_ERROR, options=SMALL, mechanisms=RL, limit=L.MEMORY, by=M.RLIMIT,
         cell=0, line=4, saved="hogging"),
    _row("memory-rlimit-user", HOG, S.CELL_ERROR, K.MEMORY_ERROR, options=SMALL, mechanisms=RL, user=True, limit=L.MEMORY,
         by=M.RLIMIT, cell=0, line=4),
    _row("memory-user", HOG, S.KERNEL_DIED, K.OUT_OF_MEMORY, options=SMALL, user=True, limit=L.MEMORY, by=M.RLIMIT, cell=0),
    _row("worker-v1", ("x = 1", WORKER, "print('after')"), S.CELL_ERROR, K.WORKER_OUT_OF_MEMORY, options=SMALL, mechanisms=V1,
         limit=L.MEMORY, by=M.CGROUP_V1, cell=1, line=3, saved="worker"),
    _row("worker-unseen-v1", ("x = 1", WORKER.replace("check=True", "check=False"), "print('after')"), S.LIMIT_EXCEEDED,
         K.WORKER_OUT_OF_MEMORY, options=SMALL, mechanisms=V1, cell=1, saved="after"),
    _row("processes-v1", THREADS, S.CELL_ERROR, K.TOO_MANY_PROCESSES, options=("--processes", "64"), mechanisms=V1,
         limit=L.PROCESSES, by=M.CGROUP_V1, cell=0, line=3),
    _row("processes-watchdog", THREADS + "\ntime.sleep(20)", S.LIMIT_EXCEEDED, K.TOO_MANY_PROCESSES, options=("--processes", "64"),
         mechanisms=WD, limit=L.PROCESSES, by=M.WATCHDOG, cell=0),
    _row("processes-rlimit-user", THREADS, S.CELL_ERROR, K.TOO_MANY_PROCESSES, options=("--processes", "64"), mechanisms=RL,
         user=True, limit=L.PROCESSES, by=M.RLIMIT, cell=0, line=3),
    _row("cpu-time-rlimit", ("x = 1", SPIN), S.KERNEL_DIED, K.CPU_TIME, options=("--cpu-time", "2s"), mechanisms=RL,
         limit=L.CPU_TIME, by=M.RLIMIT, cell=1),
    _row("cpu-time-watchdog", ("x = 1", SPIN), S.KERNEL_DIED, K.CPU_TIME, options=("--cpu-time", "2s"), mechanisms=WD,
         limit=L.CPU_TIME, by=M.WATCHDOG, cell=1),
    _row("cpu-time-tree", ("x = 1", "import subprocess, sys\nfor n in range(9):\n    subprocess.run([sys.executable, '-c', 'sum(range(10**8))'])"),
         S.KERNEL_DIED, K.CPU_TIME, options=("--cpu-time", "2s"), mechanisms=V1 + WD, cell=1),
    _row("cpu-time-user", ("x = 1", SPIN), S.KERNEL_DIED, K.CPU_TIME, options=("--cpu-time", "2s"), user=True, cell=1),
    _row("open-files", ("x = 1", "files = []\nwhile True:\n    files.append(open('/dev/null'))"), S.CELL_ERROR,
         K.TOO_MANY_OPEN_FILES, options=("--open-files", "128"), limit=L.OPEN_FILES, by=M.RLIMIT, cell=1, line=3),
    _row("open-files-user", "files = []\nwhile True:\n    files.append(open('/dev/null'))", S.CELL_ERROR,
         K.TOO_MANY_OPEN_FILES, options=("--open-files", "128"), user=True, limit=L.OPEN_FILES, by=M.RLIMIT, cell=0, line=3),
    _row("file-size", "with open('big', 'wb') as f:\n    f.write(b'x' * (4 << 20))", S.CELL_ERROR, K.FILE_TOO_LARGE,
         options=("--file-size", "1M"), limit=L.FILE_SIZE, by=M.RLIMIT, cell=0),
    _row("file-size-signal", "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nopen('big', 'wb').write(b'x' * (4 << 20))",
         S.KERNEL_DIED, K.FILE_TOO_LARGE, options=("--file-size", "1M"), user=True, limit=L.FILE_SIZE, by=M.RLIMIT, cell=0, line=3),
    _row("cell-timeout", ("x = 1", "print('looping')\n" + SPIN), S.TIMEOUT, K.CELL_TIMEOUT, options=("--cell-timeout", "2"),
         limit=L.CELL_TIMEOUT, by=M.RUNNER, activity="python_loop", cell=1, saved="looping"),
    _row("cell-timeout-user", ("x = 1", "import time\ntime.sleep(60)"), S.TIMEOUT, K.CELL_TIMEOUT, options=("--cell-timeout", "2"),
         user=True, limit=L.CELL_TIMEOUT, by=M.RUNNER, activity="sleeping", cell=1, line=2),
    _row("notebook-timeout", ("x = 1", "import time\ntime.sleep(60)"), S.TIMEOUT, K.NOTEBOOK_TIMEOUT, options=("--timeout", "8"),
         limit=L.TIMEOUT, by=M.RUNNER, cell=1, line=2),
    _row("start-timeout", "x = 1", S.START_FAILED, K.KERNEL_START_FAILED, options=("--start-timeout", "3"),
         startup="import time\ntime.sleep(60)", limit=L.START_TIMEOUT, by=M.RUNNER),
    _row("output-flood", ("x = 1", "while True:\n    print('flood' * 2000)"), S.LIMIT_EXCEEDED, K.OUTPUT_FLOOD,
         options=("--cell-output", "200k"), limit=L.CELL_OUTPUT, by=M.RUNNER, cell=1, line=2, saved="output cut here"),
    _row("output-flood-displays", "from IPython.display import display\nwhile True:\n    display('flood' * 20000)", S.LIMIT_EXCEEDED,
         K.OUTPUT_FLOOD, options=("--output", "200k"), limit=L.OUTPUT, by=M.RUNNER, cell=0, user=True),
    _row("cpus", "import os\nfor n in range(3):\n    if os.fork() == 0:\n        while True: pass\nimport time\ntime.sleep(3)", S.PASSED, None,
         options=("--cpus", "0.5"), mechanisms=V1, limit=L.CPUS, by=M.CGROUP_V1),
)  # fmt: skip

DEATHS: tuple[Kill, ...] = (
    _row("segfault", ("x = 1", NULL), S.KERNEL_DIED, K.SEGFAULT, cell=1, line=3, saved="about to crash"),
    _row("segfault-user", ("x = 1", NULL), S.KERNEL_DIED, K.SEGFAULT, user=True, cell=1, line=3, saved="about to crash"),
    _row("stack-overflow", ("x = 1", OVERFLOW), S.KERNEL_DIED, K.STACK_OVERFLOW, cell=1, line=6, saved="built"),
    _row("stack-overflow-user", ("x = 1", OVERFLOW), S.KERNEL_DIED, K.STACK_OVERFLOW, user=True, cell=1, line=6),
    _row("abort", "print('aborting')\nimport os\nos.abort()", S.KERNEL_DIED, K.ABORT, cell=0, line=3, saved="aborting"),
    _row("illegal-instruction", "import ctypes, mmap\ncode = mmap.mmap(-1, 4096, prot=7)\ncode.write(b'\\x0f\\x0b')\n"
         "at = ctypes.addressof(ctypes.c_char.from_buffer(code))\nctypes.CFUNCTYPE(None)(at)()", S.KERNEL_DIED,
         K.ILLEGAL_INSTRUCTION, cell=0, line=5),
    _row("bus-error", "import mmap\nwith open('m', 'wb') as f:\n    f.write(b'x' * 8192)\nf = open('m', 'r+b')\nm = mmap.mmap(f.fileno(), 8192)\n"
         "f.truncate(10)\nm[5000]", S.KERNEL_DIED, K.BUS_ERROR, cell=0, line=7),
    _row("floating-point", "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.div(7, 0)", S.KERNEL_DIED, K.FLOATING_POINT_EXCEPTION,
         cell=0, line=3),
    _row("exit-0", ("x = 1", "print('leaving')\nimport os\nos._exit(0)", "y = 1"), S.KERNEL_DIED, K.EXIT, cell=1, line=3, saved="leaving"),
    _row("exit-137", "import os\nos._exit(137)", S.KERNEL_DIED, K.EXIT, cell=0, line=2, user=True),
    _row("exit-quit", ("x = 1", "quit()"), S.KERNEL_DIED, K.EXIT, cell=1),
    _row("killed", ("x = 1", "print('bye')\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)"), S.KERNEL_DIED, K.KILLED, cell=1,
         line=3, saved="bye"),
    _row("killed-with-keeper", "import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(9)", S.KERNEL_DIED, K.KILLED, cell=0),
    _row("terminated", ("x = 1", "print('asked')\nimport os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nimport time\ntime.sleep(9)"),
         S.KERNEL_DIED, K.TERMINATED, cell=1, saved="asked", user=True),
    _row("bad-system-call", SECCOMP, S.KERNEL_DIED, K.BAD_SYSTEM_CALL, cell=0, saved="filtered"),
    _row("unresponsive", ("x = 1", "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)'])"),
         S.TIMEOUT, K.UNRESPONSIVE, options=("--cell-timeout", "3"), cell=1, line=2),
    _row("stdin", ("x = 1", "input('name? ')"), S.CELL_ERROR, K.STDIN, cell=1, line=1),
    _row("stdin-bash", ("x=1", "read answer"), S.TIMEOUT, K.STDIN, kernel="bash", language="bash", options=("--cell-timeout", "4"),
         cell=1, line=1),
    _row("disk-full", ("x = 1", "f = open('big', 'wb', buffering=0)\nwhile True:\n    f.write(b'x' * 4096)"), S.CELL_ERROR, K.DISK_FULL,
         needs_small_disk=True, cell=1, line=3),
    _row("disk", ("x = 1", "f = open('big', 'wb', buffering=0)\nwhile True:\n    f.write(b'x' * 4096)"), S.CELL_ERROR, K.DISK_FULL,
         options=("--disk", "16M"), limit=L.DISK, by=M.BUBBLEWRAP, cell=1, line=3),
    _row("shm", "f = open('/dev/shm/big', 'wb', buffering=0)\nwhile True:\n    f.write(b'x' * 4096)", S.CELL_ERROR, K.DISK_FULL,
         options=("--shm", "16M"), limit=L.SHM, by=M.BUBBLEWRAP, cell=0, line=3),
    _row("network-blocked", ("x = 1", "import urllib.request\nurllib.request.urlopen('http://192.0.2.1/')"), S.CELL_ERROR,
         K.NETWORK_BLOCKED, options=("--no-network",), cell=1, line=2),
    _row("exception", ("x = 1", "1 / 0", "print('no')"), S.CELL_ERROR, K.EXCEPTION, cell=1, line=1),
    _row("exception-user", ("x = 1", "1 / 0"), S.CELL_ERROR, K.EXCEPTION, cell=1, line=1, user=True),
    _row("no-such-kernel", "x = 1", S.START_FAILED, K.KERNEL_START_FAILED, kernel="no-such-kernel",
         options=("--kernel-fallback", "never")),
    _row("no-such-command", "x = 1", S.START_FAILED, K.KERNEL_START_FAILED, kernel="broken"),
    _row("start-exit", "x = 1", S.START_FAILED, K.KERNEL_START_FAILED, startup="import os\nos._exit(4)"),
    _row("required", "x = 1", S.INTERNAL_ERROR, K.UNKNOWN, options=("--memory", "1G", "--require", "memory"), mechanisms=WD),
    _row("passes", ("x = 1", "print(x)"), S.PASSED, None, saved="1"),
    _row("passes-user", ("x = 1", "print(x)"), S.PASSED, None, saved="1", user=True),
)  # fmt: skip

KILLS = LIMITS + DEATHS

OPEN_CAUSES: dict[CauseKind, str] = {
    CauseKind.OUTPUT_DIFFERS: "no cell fails: test_compare.py",
}
"""Causes that cannot be had here, each with its reason."""

OPEN_MECHANISMS = {
    Mechanism.CGROUP_V2: "in a machine made for it: test_unified.py, test_v2_notebooks.py",
    Mechanism.SYSTEMD: "in a machine made for it: test_v2_notebooks.py",
    Mechanism.LANDLOCK: "holds walls, no limit",
    Mechanism.SECCOMP: "holds walls, no limit",
    Mechanism.KERNEL: "holds walls, no limit",
}
"""Mechanisms that hold no limit where the controllers are those of version 1."""
