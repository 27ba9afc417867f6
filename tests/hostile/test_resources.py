"""Notebooks that take all there is: memory, processes, descriptors, disk, processor time, output, and the patience of whoever waits."""

from __future__ import annotations

import pytest

from safe_exec.model.verdict import Activity, CauseKind, Status
from tests.hostile.arena import Attack, Who, fight, rounds

S, K = Status, CauseKind
SMALL = ("--memory", "150M")
BRIEF = ("--cell-timeout", "2")

OUT_OF_MEMORY = ((S.KERNEL_DIED, K.OUT_OF_MEMORY),)
REFUSED = ((S.CELL_ERROR, K.MEMORY_ERROR),)
DISK_FULL = ((S.CELL_ERROR, K.DISK_FULL),)
TIME_OUT = ((S.TIMEOUT, K.CELL_TIMEOUT),)
PASSED = ((S.PASSED, None),)
MANY = ((S.CELL_ERROR, K.TOO_MANY_PROCESSES),)
OUT_OF_SPACE = ((S.CELL_ERROR, K.MEMORY_ERROR), (S.KERNEL_DIED, K.ABORT))

HOG = "hog = []\nwhile True:\n    hog.append(b'x' * (8 << 20))"
LEAK = "kept = globals().get('kept', [])\nkept.append(bytearray(b'x') * (30 << 20))"
WORKER = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'hog = []\\nwhile True: hog.append(b\"x\" * (8 << 20))'], check=True)"
SPARSE = """
import os
with open("sparse", "wb") as file:
    file.truncate(1000 << 20)
with open("sparse", "rb") as file:
    while file.read(1 << 20):
        pass
os.unlink("sparse")
with open("written", "wb") as file:
    for _ in range(150):
        file.write(bytes(1 << 20))
os.unlink("written")
print("read and written")
"""
MEMFD = """
import os
held = []
while True:
    fd = os.memfd_create("hog")
    held.append(fd)
    for _ in range(40):
        os.write(fd, b"x" * (1 << 20))
"""
SHARED = """
import mmap
hog = mmap.mmap(-1, 1 << 30)
for at in range(0, 1 << 30, 4096):
    hog[at] = 1
"""
RESERVE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
if libc.mmap(None, 1 << 40, 3, 0x4022, -1, 0) == ctypes.c_void_p(-1).value:  # PRIVATE, ANONYMOUS, NORESERVE
    raise MemoryError(os.strerror(ctypes.get_errno()))
print("reserved")
"""
HELD_BY_DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in (1, 2):
            os.dup2(os.open("/dev/null", os.O_WRONLY), fd)
        hog = bytearray(b"x") * (60 << 20)
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(1)
print("left a daemon")
"""
FORKS = "import os\nwhile True:\n    os.fork()"
SHELL_BOMB = (
    "import subprocess\nsubprocess.run(['sh', '-c', 'b() { b | b & }; b; sleep 3'], check=True)"
)
# Where each session has a scheduling group of its own, nice values do not hold them back.
SESSIONS = """
import os
for n in range(100):
    if os.fork() == 0:
        os.setsid()
        while True:
            pass
while True:
    pass
"""
SESSIONS_EVERYWHERE = SESSIONS.replace(
    "            pass\n", "            os.sched_setaffinity(0, range(64))\n"
)
DAEMONS = """
import os
while True:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for _ in range(10_000_000):
                pass
        os._exit(0)
    os.wait()
"""
THREADS = "import threading, time\nfor _ in range(10000):\n    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
FILES = "files = []\nwhile True:\n    files.append(open('/dev/null'))"
PIPES = "import os\npipes = []\nwhile True:\n    pipes.append(os.pipe())"
SMALL_FILES = "import os\nfor n in range(1_000_000):\n    os.close(os.open(f'f{n}', os.O_CREAT | os.O_WRONLY))"
FILL = "import os\nfd = os.open('{}', os.O_CREAT | os.O_WRONLY)\nwhile True:\n    os.write(fd, b'x' * 65536)"
FILL_ALL = """
import errno, os
wrote, refused = 0, set()
for place in (".", "/tmp", os.path.expanduser("~"), "/dev", "/run", "/var/tmp", "/root", "/home", "/dev/shm", "/", "/proc", "/sys"):
    try:
        fd = os.open(f"{place}/big", os.O_CREAT | os.O_WRONLY)
        for _ in range(99):
            wrote += os.write(fd, bytes(1 << 20))
    except OSError as error:
        refused.add(errno.errorcode[error.errno])
print(refused)
assert wrote <= (16 + 8 + 1) << 20, wrote >> 20
"""
RUNTIME = """
import os, re
mounts = [line.split()[4] for line in open("/proc/self/mountinfo")]
runtime, = (path for path in mounts if re.search("/safe-exec-[0-9a-f]{12}$", path))
"""
FILL_RUNTIME = (
    RUNTIME
    + """
fd = os.open(f"{runtime}/big", os.O_CREAT | os.O_WRONLY)
for _ in range(99):
    os.write(fd, bytes(1 << 20))
"""
)
BUS = """
import mmap, os
fd = os.open("/dev/shm/@OURS@", os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 64 << 20)
full = mmap.mmap(fd, 64 << 20)
for at in range(0, 64 << 20, 4096):
    full[at] = 1
"""
SPREAD = """
import os, subprocess, sys
spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
for process in spin:
    process.wait()
"""
DEAF = """
import signal, time
for number in range(1, signal.NSIG):
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""
FOREVER_C = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(b"\\xeb\\xfe" if __import__("platform").machine() == "x86_64" else b"\\x00\\x00\\x00\\x14")  # a jump to itself
ctypes.PYFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""

ATTACKS = (
    # Memory. Without control groups an ordinary user's is held for each process alone, and watched for all.
    Attack(name="allocate", cells=("x = 1", HOG), ends=OUT_OF_MEMORY, cell=1, who="root", options=SMALL),
    Attack(name="allocate", cells=("x = 1", HOG), ends=OUT_OF_MEMORY + REFUSED, cell=1, who="user", options=SMALL),
    Attack(name="leak", cells=(LEAK,) * 8, ends=OUT_OF_MEMORY, who="root", options=SMALL),
    Attack(name="leak", cells=(LEAK,) * 20, ends=OUT_OF_MEMORY + REFUSED, who="user", options=SMALL),
    Attack(name="worker", cells=("x = 1", WORKER, "y = 1"), ends=((S.CELL_ERROR, K.WORKER_OUT_OF_MEMORY),), cell=1, who="root",
           options=SMALL),
    Attack(name="worker", cells=("x = 1", WORKER), ends=(*OUT_OF_MEMORY, (S.CELL_ERROR, K.EXCEPTION)), cell=1, who="user", options=SMALL),
    Attack(name="worker-unseen", cells=(WORKER.replace("True)", "False)"), "y = 1"), ends=((S.LIMIT_EXCEEDED, K.WORKER_OUT_OF_MEMORY),),
           cell=0, who="root", options=SMALL),
    Attack(name="page-cache", cells=SPARSE, ends=PASSED, profile="ci", options=("--memory", "100M"), says=("read and written",)),
    Attack(name="shm-limit", cells=FILL.format("/dev/shm/@OURS@"), ends=DISK_FULL, cell=0, options=("--shm", "8M")),
    Attack(name="shm-memory", cells=FILL.format("/dev/shm/@OURS@"), ends=OUT_OF_MEMORY, cell=0, who="root",
           options=(*SMALL, "--shm", "1G", "--file-size", "1G")),
    Attack(name="memfd", cells=MEMFD, ends=OUT_OF_MEMORY, cell=0, options=SMALL),
    Attack(name="shared", cells=SHARED, ends=OUT_OF_MEMORY, cell=0, options=SMALL),
    Attack(name="reserve", cells=RESERVE, ends=PASSED + REFUSED, options=SMALL),
    Attack(name="daemon-holds", cells=(HELD_BY_DAEMON, "y = 1"), ends=PASSED, says=("left a daemon",), options=("--memory", "250M")),
    Attack(name="daemons-hold", cells=(HELD_BY_DAEMON,) * 4, ends=((S.LIMIT_EXCEEDED, K.WORKER_OUT_OF_MEMORY), *OUT_OF_MEMORY), who="root",
           options=SMALL),
    # Processes, threads, descriptors.
    Attack(name="forks", cells=FORKS, ends=MANY + TIME_OUT, cell=0, options=("--cell-timeout", "8", "--processes", "40"), who="root"),
    # To the watch pages that processes share since a fork count for each of them.
    Attack(name="forks", cells=FORKS, ends=(*MANY, *TIME_OUT, (S.LIMIT_EXCEEDED, K.TOO_MANY_PROCESSES)), cell=0, who="user",
           options=("--cell-timeout", "8", "--processes", "40", "--memory", "4G")),
    Attack(name="forks-of-shell", cells=SHELL_BOMB, ends=(*PASSED, *MANY, (S.CELL_ERROR, K.EXCEPTION), *TIME_OUT),
           options=("--cell-timeout", "8")),
    Attack(name="sessions", cells=("x = 1", SESSIONS), ends=TIME_OUT, cell=1, options=BRIEF, seconds=60),
    Attack(name="sessions-everywhere", cells=("x = 1", SESSIONS_EVERYWHERE), ends=TIME_OUT, cell=1, who="user", options=BRIEF, seconds=60),
    Attack(name="daemons", cells=("x = 1", DAEMONS), ends=(*MANY, *TIME_OUT, (S.TIMEOUT, K.TOO_MANY_PROCESSES)), cell=1, who="user",
           options=BRIEF, seconds=60),
    # The stacks of threads count towards RLIMIT_DATA. Where only that bounds the memory, as for users without control groups,
    # Python may have none left to report the refused thread: it raises a MemoryError, or aborts ("Cannot recover from MemoryErrors").
    Attack(name="threads", cells=("x = 1", THREADS), ends=MANY, cell=1, who="root"),
    Attack(name="threads", cells=("x = 1", THREADS), ends=(*MANY, *OUT_OF_SPACE), cell=1, who="user"),
    Attack(name="descriptors", cells=("x = 1", FILES), ends=((S.CELL_ERROR, K.TOO_MANY_OPEN_FILES),), cell=1),
    Attack(name="pipes", cells=("x = 1", PIPES), ends=((S.CELL_ERROR, K.TOO_MANY_OPEN_FILES),), cell=1, who="user"),
    # Disk.
    Attack(name="disk", cells=("x = 1", FILL.format("big")), ends=DISK_FULL, cell=1, options=("--disk", "16M")),
    Attack(name="disk-of-tmp", cells=("x = 1", FILL.format("/tmp/big")), ends=DISK_FULL, cell=1, options=("--disk", "16M")),
    Attack(name="disk-everywhere", cells=FILL_ALL, ends=PASSED, options=("--disk", "16M", "--shm", "8M")),
    Attack(name="disk-everywhere-strict", cells=FILL_ALL, ends=PASSED, options=("--disk", "16M", "--shm", "8M"), who="root",
           profile="strict"),
    Attack(name="disk-of-sockets", cells=FILL_RUNTIME, ends=DISK_FULL, options=("--disk", "16M")),
    Attack(name="sockets-without-disk", cells=FILL_RUNTIME, ends=DISK_FULL, profile="ci"),
    Attack(name="inodes", cells=SMALL_FILES, ends=DISK_FULL, cell=0, options=("--disk", "16M")),
    Attack(name="file-size", cells=FILL.format("big"), ends=((S.CELL_ERROR, K.FILE_TOO_LARGE),), cell=0, options=("--file-size", "1M")),
    Attack(name="full-tmpfs-mapped", cells=BUS, ends=((S.KERNEL_DIED, K.BUS_ERROR),), cell=0, options=("--shm", "8M")),
    # Time and output.
    Attack(name="sleep", cells=("x = 1", "import time\ntime.sleep(600)"), ends=TIME_OUT, cell=1, options=BRIEF, activity=Activity.SLEEPING),
    Attack(name="deaf", cells=("x = 1", DEAF), ends=TIME_OUT, cell=1, options=BRIEF, activity=Activity.SLEEPING, seconds=30),
    Attack(name="holds-interpreter", cells=("x = 1", FOREVER_C), ends=TIME_OUT, cell=1, options=BRIEF, activity=Activity.NATIVE_CODE,
           seconds=30),
    Attack(name="loop", cells=("x = 1", "while True: pass"), ends=TIME_OUT, cell=1, options=BRIEF, activity=Activity.PYTHON_LOOP),
    # In the first cell: on a busy machine the kernel's start alone may take so long.
    Attack(name="notebook-time", cells="import time\ntime.sleep(600)", ends=((S.TIMEOUT, K.NOTEBOOK_TIMEOUT),), cell=0, who="user",
           options=("--timeout", "6")),
    Attack(name="processor-time", cells=("x = 1", SPREAD), ends=((S.KERNEL_DIED, K.CPU_TIME),), cell=1, options=("--cpu-time", "3s")),
    Attack(name="print", cells=("x = 1", "while True:\n    print('flood' * 2000)"), ends=((S.LIMIT_EXCEEDED, K.OUTPUT_FLOOD),), cell=1,
           options=("--cell-output", "200k")),
    Attack(name="print-past-python", cells="import os\nwhile True:\n    os.write(1, b'flood' * 2000)",
           ends=((S.LIMIT_EXCEEDED, K.OUTPUT_FLOOD),), cell=0, options=("--cell-output", "200k")),
    Attack(name="exit-hook", cells="import atexit, time\natexit.register(time.sleep, 600)", ends=PASSED, warns="exit hook", seconds=30),
)  # fmt: skip


@pytest.mark.hostile
@pytest.mark.parametrize(("attack", "who"), rounds(ATTACKS))
def test_attack(attack: Attack, who: Who) -> None:
    fight(attack, who)
