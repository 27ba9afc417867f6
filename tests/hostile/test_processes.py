"""Notebooks that crash, leave, stop, hide or kill: themselves, those around them, and those who watch them."""

from __future__ import annotations

import pytest

from safe_exec.model.verdict import Activity, CauseKind, Status
from tests.hostile.arena import Attack, Ending, Who, fight, rounds

S, K = Status, CauseKind
BRIEF = ("--cell-timeout", "3")
TIME_OUT = ((S.TIMEOUT, K.CELL_TIMEOUT),)
PASSED = ((S.PASSED, None),)
REFUSED = ((S.CELL_ERROR, K.EXCEPTION),)


def died(*kinds: CauseKind) -> tuple[Ending, ...]:
    return tuple((S.KERNEL_DIED, kind) for kind in kinds)


NULL = "import ctypes\nctypes.string_at(0)"
OVERFLOW = "from itertools import chain\nrows = iter(())\nfor n in range(400_000):\n    rows = chain(rows, [n])\nnext(rows)"
HEAP = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(40) for _ in range(64)]
for block in blocks:
    ctypes.memset(block - 16, 0x41, 80)
libc.free.argtypes = [ctypes.c_void_p]
for block in blocks:
    libc.free(block)
"""
ILLEGAL = """
import ctypes, mmap, platform
code = mmap.mmap(-1, 4096, prot=7)
code.write(b"\\x0f\\x0b" if platform.machine() == "x86_64" else bytes(4))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""
TRUNCATED = """
import mmap, os
fd = os.open("/dev/shm/@OURS@", os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 8192)
mapped = mmap.mmap(fd, 8192)
os.ftruncate(fd, 10)
mapped[5000]
"""
CHILD_CRASHES = "import subprocess, sys\nassert subprocess.run([sys.executable, '-c', 'import ctypes; ctypes.string_at(0)']).returncode == -11"

SIGNAL = "import os, signal, time\nos.kill(os.getpid(), signal.{})\ntime.sleep(9)"
KILL_PARENT = "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(1)\nprint('still here')"
STOP_PARENT = "import os, signal\nassert os.getppid() == 1\nos.kill(os.getppid(), signal.SIGSTOP)\nos._exit(0)"
KILL_ALL = """
import os, signal, time
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) != os.getpid():
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(int(name), number)
                print("sent to", name)
            except OSError:
                pass
time.sleep(2)
print("still here")
"""
KILL_EVERYBODY = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "60"])
os.kill(-1, 9)
assert child.wait() == -9
print("still here")
"""
KILL_BY_NUMBER = """
import os
for pid in range(max(1000, @PID@ - 5000), @PID@ + 5000):  # threads have numbers too, our own begin at 3
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        pass
print("nobody there")
"""
LOWER_PARENT = """
import resource, os, time
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))
resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))
for _ in range(20_000):  # it works for its end: it buries orphans
    if os.fork() == 0:
        if os.fork():
            os._exit(0)
        os._exit(0)
    os.wait()
"""
DAEMON = """
import os, time
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.chdir("/")
        for fd in (1, 2):
            os.dup2(os.open("/dev/null", os.O_WRONLY), fd)
        os.write(w, b"%d" % os.getpid())
        while True:
            time.sleep(60)
    os._exit(0)
os.wait()
print("left", os.read(r, 20))
"""
DAEMON_HOLDS_ALL = DAEMON.replace(
    '        for fd in (1, 2):\n            os.dup2(os.open("/dev/null", os.O_WRONLY), fd)\n', ""
)
CHAIN = """
import os, time
if os.fork() == 0:
    while True:  # each is gone before anybody can look
        if os.fork() != 0:
            os._exit(0)
        time.sleep(0.001)
time.sleep(1)
print("running ahead")
"""
ZOMBIES = """
import os
for _ in range(10_000):
    if os.posix_spawn("/bin/true", ["true"], {}) and _ % 50 == 49:
        for _ in range(50):
            os.wait()
print("buried")
"""
ZOMBIES_LEFT = """
import errno, os
left = 0
try:
    for _ in range(10_000):
        if os.fork() == 0:
            os._exit(0)
        left += 1
except BlockingIOError as error:
    print("refused after", left)
assert left < 200, left
"""
VFORK = """
import ctypes, os, platform, threading, time
# A child that shares our memory; whoever made it is held up until the child is gone (vfork).
source = "import os, time\\nos.posix_spawn('/bin/sleep', ['sleep', '600'], {})"
exec(source)
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
CLONE_VM, CLONE_VFORK = 0x100, 0x4000
def held():
    if libc.syscall(number, CLONE_VFORK | 17, 0, 0, 0, 0) == 0:
        libc.sleep(600)
threading.Thread(target=held, daemon=True).start()
time.sleep(0.5)
state = [open(f"/proc/self/task/{tid}/stat").read().rpartition(")")[2].split()[0] for tid in os.listdir("/proc/self/task")]
print("held up" if "D" in state else state)
"""
HEADLESS = """
import os, time
source = '''
import ctypes, threading, time
threading.Thread(target=lambda: time.sleep(600)).start()
time.sleep(0.2)
ctypes.CDLL(None).syscall(60, 0)  # exit(2): this thread alone, which is the first one
'''
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", source.replace("60", "60" if os.uname().machine == "x86_64" else "93")], start_new_session=True)
time.sleep(1)
print("state", open(f"/proc/{child.pid}/stat").read().rpartition(")")[2].split()[0])
"""
OWN_HEAD = (
    "import ctypes, os\nctypes.CDLL(None).syscall(60 if os.uname().machine == 'x86_64' else 93, 0)"
)
EXEC = "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)'])"
STOPPED_CHILDREN = """
import os, signal, subprocess
for _ in range(20):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    child.send_signal(signal.SIGSTOP)
print("stopped")
"""
TRACED = """
import ctypes, os, time
# Traced by its parent by its own wish, if that were allowed: a traced process is stopped at each signal.
libc = ctypes.CDLL(None, use_errno=True)
assert libc.ptrace(0, 0, 0, 0) == -1 and ctypes.get_errno() == 1
print("refused")
"""
SHARED_THINGS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.shmget(0x5AFE, 4096, 0o1666) >= 0 and libc.semget(0x5AFE, 1, 0o1666) >= 0 and libc.msgget(0x5AFE, 0o1666) >= 0
queue = libc.mq_open(b"/@OURS@", os.O_CREAT | os.O_RDWR, 0o666, None)
assert queue >= 0, os.strerror(ctypes.get_errno())
open("/dev/shm/@OURS@", "w").write("x")
print("made")
"""

ATTACKS = (
    # Crashes: they end the kernel, and nothing else.
    Attack(name="null", cells=("x = 1", NULL), ends=died(K.SEGFAULT), cell=1),
    Attack(name="stack-overflow", cells=("x = 1", OVERFLOW), ends=died(K.STACK_OVERFLOW), cell=1),
    Attack(name="heap", cells=("x = 1", HEAP), ends=died(K.ABORT, K.SEGFAULT), cell=1),
    Attack(name="illegal", cells=("x = 1", ILLEGAL), ends=died(K.ILLEGAL_INSTRUCTION), cell=1),
    Attack(name="truncated", cells=("x = 1", TRUNCATED), ends=died(K.BUS_ERROR), cell=1, who="user"),
    Attack(name="child-crashes", cells=CHILD_CRASHES, ends=PASSED, who="user"),
    # Leaving.
    Attack(name="exit-0", cells=("x = 1", "import os\nos._exit(0)", "y = 1"), ends=died(K.EXIT), cell=1, exit_code=0),
    Attack(name="exit-137", cells=("x = 1", "import os\nos._exit(137)", "y = 1"), ends=died(K.EXIT), cell=1, exit_code=137),
    Attack(name="quit", cells=("x = 1", "quit()", "y = 1"), ends=died(K.EXIT), cell=1),
    Attack(name="killed", cells=("x = 1", SIGNAL.format("SIGKILL")), ends=died(K.KILLED), cell=1),
    Attack(name="terminated", cells=("x = 1", SIGNAL.format("SIGTERM")), ends=died(K.TERMINATED), cell=1, who="user"),
    Attack(name="stopped", cells=("x = 1", SIGNAL.format("SIGSTOP")), ends=TIME_OUT, cell=1, options=BRIEF, activity=Activity.STOPPED),
    Attack(name="replaced", cells=("x = 1", EXEC), ends=((S.TIMEOUT, K.UNRESPONSIVE),), cell=1, options=BRIEF),
    Attack(name="first-thread-leaves", cells=("x = 1", OWN_HEAD), ends=(*TIME_OUT, (S.TIMEOUT, K.UNRESPONSIVE)), cell=1, options=BRIEF,
           seconds=30),
    # Killing: those who watch are not to be seen. The init inside is the first process there, and takes no signal from inside; what it is
    # told by other means ends it only where it belongs to the same user, and the kernel with it.
    Attack(name="kill-parent", cells=("x = 1", KILL_PARENT), ends=REFUSED, cell=1, who="root", says=("PermissionError",)),
    Attack(name="kill-parent-strict", cells=("x = 1", KILL_PARENT), ends=PASSED, who="root", profile="strict", says=("still here",)),
    Attack(name="kill-parent", cells=("x = 1", KILL_PARENT), ends=PASSED, who="user", says=("still here",)),
    Attack(name="stop-parent", cells=("x = 1", STOP_PARENT), ends=died(K.EXIT), cell=1, who="user", exit_code=0),
    Attack(name="stop-parent-strict", cells=("x = 1", STOP_PARENT), ends=died(K.EXIT), cell=1, who="root", profile="strict", exit_code=0),
    Attack(name="lower-parent", cells=LOWER_PARENT, ends=REFUSED, who="root", says=("PermissionError",)),
    Attack(name="lower-parent", cells=LOWER_PARENT, ends=died(K.KILLED, K.EXIT), who="user"),
    Attack(name="kill-all-seen", cells=("x = 1", KILL_ALL), ends=PASSED, says=("still here",)),
    Attack(name="kill-everybody", cells=("x = 1", KILL_EVERYBODY), ends=PASSED, says=("still here",)),
    Attack(name="kill-by-number", cells=KILL_BY_NUMBER, ends=PASSED, says=("nobody there",)),
    # Outliving.
    Attack(name="daemon", cells=DAEMON, ends=PASSED, says=("left",)),
    Attack(name="daemon-without-disk", cells=DAEMON, ends=PASSED, says=("left",), profile="ci"),
    Attack(name="daemon-holds-all", cells=DAEMON_HOLDS_ALL, ends=PASSED, says=("left",)),
    Attack(name="daemon-of-dead", cells=(DAEMON, NULL), ends=died(K.SEGFAULT), cell=1),
    Attack(name="running-ahead", cells=CHAIN, ends=PASSED, who="root", says=("running ahead",)),
    Attack(name="stopped-children", cells=STOPPED_CHILDREN, ends=PASSED, who="user", says=("stopped",)),
    Attack(name="zombies", cells=ZOMBIES, ends=PASSED, who="root", says=("buried",), options=("--cell-timeout", "60")),
    Attack(name="zombies-left", cells=ZOMBIES_LEFT, ends=PASSED, who="root", says=("refused after",)),
    Attack(name="zombies-left", cells=ZOMBIES_LEFT, ends=(*PASSED, (S.LIMIT_EXCEEDED, K.TOO_MANY_PROCESSES)), who="user"),
    Attack(name="vfork", cells=VFORK, ends=PASSED, says=("held up",)),
    Attack(name="headless", cells=HEADLESS, ends=PASSED, says=("state Z",)),
    Attack(name="shared-things", cells=SHARED_THINGS, ends=PASSED, says=("made",)),
    Attack(name="traced", cells=TRACED, ends=PASSED, who="user", says=("refused",)),
)  # fmt: skip


@pytest.mark.hostile
@pytest.mark.parametrize(("attack", "who"), rounds(ATTACKS))
def test_attack(attack: Attack, who: Who) -> None:
    fight(attack, who)
