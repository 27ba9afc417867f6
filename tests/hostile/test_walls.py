"""Notebooks that look for a way out: to files, secrets, other hosts, other processes, more rights, and to whoever gives the verdict."""

from __future__ import annotations

import pytest

from safe_exec.model.verdict import CauseKind, Status
from safe_exec.sandbox.host.seccomp_policy import CLONE3, JUDGED, NEVER, NEWEST, PROBED
from tests.hostile.arena import Attack, Who, fight, rounds

S, K = Status, CauseKind
PASSED = ((S.PASSED, None),)
HELD = ("all held",)

# Attacks try one thing after the other with ``refused``, and fail where one succeeds.
REFUSED = """
import errno, os
def refused(what, *arguments, but=(), **more):
    try:
        done = what(*arguments, **more)
    except OSError as error:
        assert not but or errno.errorcode[error.errno] in but, (getattr(what, "__name__", what), arguments, error)
    else:
        raise AssertionError(f"{getattr(what, '__name__', what)}{arguments} gave {done!r}"[:500])
def readable(path):
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError:
        return b""
"""
SECRETS = (
    REFUSED
    + """
for path in ("@HOME@/.ssh/id_test", "@HOME@/.config/token", "@BESIDE@", "/etc/shadow", "/etc/ssh/ssh_host_rsa_key"):
    for root in ("", "/proc/self/root", "/proc/1/root", "/proc/1/cwd/../../../..", "/proc/@PID@/root", "/dev/fd/../../../.."):
        print(readable(root + path))
found = []
for top, names, files in os.walk("@HOME@"):
    found += names + files
print(found)
assert not {"id_test", "token", ".ssh"} & set(found), found
for name in os.listdir("/proc"):
    if name.isdigit():
        for what in ("environ", "cmdline", "fd/0"):
            print(readable(f"/proc/{name}/{what}"))
print(dict(os.environ), readable("/proc/@PID@/environ"))
print("all held")
"""
)
INHERITED = """
import os
for name in os.listdir("/proc/self/fd"):
    try:
        target = os.readlink(f"/proc/self/fd/{name}")
        if "memfd" in target or target.startswith("/"):
            assert "config" not in target
            print(name, target, os.pread(int(name), 1 << 16, 0).strip(b"\\0"))
    except OSError:
        pass
for line in open("/proc/self/maps"):  # what the processes before this one had in memory
    start, _, end = line.split()[0].partition("-")
    if "rw" in line and "/" not in line:
        with open("/proc/self/mem", "rb") as memory:
            memory.seek(int(start, 16))
            try:
                data = memory.read(int(end, 16) - int(start, 16))
            except OSError:
                continue
        word = b"SECRET" + b"environment"
        if word in data:
            print(data[data.index(word):][:60])
print("all held")
"""
WRITES = (
    REFUSED
    + """
import shutil, sys
for path in ("/etc/passwd", "/etc/ld.so.preload", "/usr/bin/true", "@SYSTEM@/canary", "@SYSTEM@/new", "/new", "/boot/new", "/opt/new", "/root/new",
             "/home/new", "/run/new", "/var/tmp/new", "/var/lib/new", "/dev/new", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname",
             "/proc/sys/vm/drop_caches", "/proc/sys/user/max_user_namespaces", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper",
             "/sys/fs/cgroup/new", "/sys/power/pm_test", f"{sys.prefix}/new", f"{sys.base_prefix}/new", sys.executable, "/proc/1/mem",
             "/proc/self/exe", *sys.modules["ipykernel"].__path__):
    for flags in (os.O_WRONLY | os.O_CREAT, os.O_WRONLY, os.O_WRONLY | os.O_APPEND):
        refused(os.open, path, flags)
for path in ("/", "/etc", "/etc/passwd", "/usr", "/tmp/../etc", "@SYSTEM@", "@SYSTEM@/canary", "/dev/null", "/dev/full", "/dev/tty", "/dev", "/run",
             "/sys", "/proc/sys", sys.executable):
    refused(os.chmod, path, 0o777, but=("EROFS", "EPERM", "EACCES"))
    refused(os.utime, path, (1, 1), but=("EROFS", "EPERM", "EACCES"))
    refused(os.setxattr, path, "user.x", b"x")
for path in ("@SYSTEM@/canary", "/etc/passwd", "/usr/bin/true"):
    refused(os.unlink, path)
    refused(os.rename, path, path + ".old")
    refused(os.link, path, "linked")
    refused(os.truncate, path, 0)
for path in ("@SYSTEM@/new", "/etc/new", "/sys/fs/cgroup/memory/new", "/sys/fs/cgroup/new"):
    refused(os.mkdir, path)
    refused(os.symlink, "/", path)
    refused(os.mkfifo, path)
print("all held")
"""
)
GROUPS = (
    REFUSED
    + """
import glob
files = glob.glob("/sys/fs/cgroup/**/cgroup.procs", recursive=True) + glob.glob("/sys/fs/cgroup/**/tasks", recursive=True)
files += glob.glob("/sys/fs/cgroup/**/*limit*", recursive=True) + glob.glob("/sys/fs/cgroup/**/*.max", recursive=True)
assert files or not os.path.exists("/sys/fs/cgroup/memory")
for path in files:
    refused(os.open, path, os.O_WRONLY)
print("all held")
"""
)
DEVICES = (
    REFUSED
    + """
import stat, fcntl
names = set(os.listdir("/dev"))
allowed = {"null", "zero", "full", "random", "urandom", "tty", "console", "pts", "ptmx", "shm", "fd", "stdin", "stdout", "stderr", "core"}
assert names <= allowed, names - allowed
refused(os.mknod, "disk", 0o600 | stat.S_IFBLK, os.makedev(254, 0))
refused(os.mknod, "/dev/shm/@OURS@", 0o600 | stat.S_IFCHR, os.makedev(1, 1))
refused(os.open, "/dev/tty", os.O_RDWR, but=("ENXIO",))  # no terminal is ours
refused(fcntl.ioctl, 0, 0x5412, b"x", but=("EPERM",))  # TIOCSTI, which types
for path in ("/dev/kmsg", "/dev/mem", "/dev/vda", "/dev/sda", "/dev/kvm", "/dev/fuse", "/dev/net/tun", "/proc/kmsg", "/proc/kcore"):
    assert readable(path) == b"", path
assert os.write(os.open("/dev/null", os.O_WRONLY), b"x") == 1 and len(os.urandom(8)) == 8 and readable("/dev/full")[:1] == b"\\0"
print("all held")
"""
)
RIGHTS = (
    REFUSED
    + """
import ctypes, resource, subprocess
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
sets = {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd")}
if open("/proc/self/uid_map").read().split()[2] != str(2**32 - 1):
    del sets["CapBnd"]  # an ordinary user's namespace: he has no right to empty it, and nothing outside counts it
assert not any(sets.values()), sets
assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", status
own = subprocess.run(["/usr/bin/id"], capture_output=True, text=True).stdout
assert "euid" not in own
assert subprocess.run(["@SYSTEM@/id"], capture_output=True, text=True).stdout == own, "a set-user-id program gave its rights"
for number in range(16):
    soft, hard = resource.getrlimit(number)
    if hard != resource.RLIM_INFINITY:
        try:
            resource.setrlimit(number, (soft, hard + 1))
        except (ValueError, OSError):
            pass
        else:
            raise AssertionError(f"limit {number} was raised")
    try:
        resource.prlimit(0, number, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        pass
    else:
        assert hard == resource.RLIM_INFINITY, number
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
if subprocess.run(["sh", "-c", "kill -QUIT $$"]).returncode != -3 or [name for name in os.listdir() if "core" in name]:
    raise AssertionError("a core was dumped")
if os.getuid() != 0:
    refused(os.setuid, 0)
    refused(os.setgid, 0)
    refused(os.setgroups, [0])
refused(os.chown, os.getcwd(), 0 if os.getuid() else 5, -1)
refused(os.setpriority, os.PRIO_PROCESS, 0, -5)
refused(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(10))
with open("/proc/self/oom_score_adj", "w") as file:
    refused(os.write, file.fileno(), b"-1000")
print("all held")
"""
)
CALLS = (
    REFUSED
    + f"""
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
column = ["x86_64", "aarch64"].index(platform.machine())
calls = {{**{NEVER!r}, **{PROBED!r}}}
def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, [*arguments, 0, 0, 0, 0, 0, 0][:6])) == -1:
        raise OSError(ctypes.get_errno(), "no")
tried = [name for name, numbers in calls.items() if numbers[column] is not None]
for name in tried:
    refused(call, calls[name][column], but=("EPERM",))
judged = {JUDGED!r}
for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):  # new namespaces
    refused(call, judged["clone"][column], flag | 17, but=("EPERM",))
    refused(call, calls["unshare"][column], flag, but=("EPERM",))
for number in ({CLONE3}, {NEWEST} + 1, 999):
    refused(call, number, but=("ENOSYS",))
refused(call, calls["ptrace"][column], 16, 1, but=("EPERM",))  # PTRACE_ATTACH
refused(call, calls["mount"][column], 0, 0, 0, 0x1000, but=("EPERM",))
refused(call, calls["keyctl"][column], 0, -3, 1, but=("EPERM",))  # the session's keyring
for family in (15, 17, 38, 40, 44):
    refused(call, judged["socket"][column], family, 3, 0, but=("EPERM",))
refused(call, judged["socket"][column], 2, 3, 1, but=("EPERM", "EACCES"))  # raw packets
print(len(tried), "refused; all held")
"""
)
PROCESSES = (
    REFUSED
    + """
import ctypes, signal
seen = {int(name): readable(f"/proc/{name}/cmdline") for name in os.listdir("/proc") if name.isdigit()}
assert os.getppid() == 1 and set(seen) == {1, os.getpid()}, seen
assert not os.path.exists("/proc/@PID@")
refused(os.kill, @PID@, 0, but=("ESRCH",))
refused(os.pidfd_open, @PID@, but=("ESRCH",))
refused(os.getpgid, @PID@, but=("ESRCH",))
for name in ("mem", "environ", "maps", "auxv", "syscall", "stack", "pagemap", "io", "fd/0", "cwd/x", "root/etc/passwd", "exe"):
    assert readable(f"/proc/1/{name}") == b"", name
refused(os.open, "/proc/1/mem", os.O_RDWR)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.ptrace(16, 1, 0, 0) == -1 and libc.ptrace(0x4206, 1, 0, 0) == -1
assert os.uname().nodename == "sandbox", os.uname()
for kind in ("shm", "sem", "msg"):
    assert len(open(f"/proc/sysvipc/{kind}").readlines()) == 1, kind
print("all held")
"""
)
# What would run outside of every limit and filter: code of ours in the first process of the namespace, at the place where it waits.
FIRST_PROCESS = """
import os, time
place = os.getcwd() + "/evil"
with open(place, "w") as file:
    file.write("#!/bin/sh\\ngrep Seccomp: /proc/self/status > proof\\ncat /proc/self/cgroup >> proof\\n")
os.chmod(place, 0o755)
path = place.encode() + b"\\0"
code = b"\\x48\\x8d\\x3d\\x16\\x00\\x00\\x00\\x31\\xd2\\x52\\x57\\x48\\x89\\xe6\\xb8\\x3b\\x00\\x00\\x00\\x0f\\x05" + bytes([0x90]) * 8 + path
try:
    where = int(open("/proc/1/syscall").read().split()[-1], 16)
    os.pwrite(os.open("/proc/1/mem", os.O_RDWR), code, where)
except OSError as error:
    print("all held:", error)
else:
    if os.fork() == 0:
        os.fork()
        os._exit(0)
    os.wait()
    time.sleep(1)
    raise AssertionError(open("proof").read())
"""
NETWORK_OFF = (
    REFUSED
    + """
import socket
def connect(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as tried:
        tried.settimeout(3)
        tried.connect(address)
        if kind == socket.SOCK_DGRAM:
            tried.send(b"x")
refused(connect, socket.AF_UNIX, "\\0@ABSTRACT@", but=("ECONNREFUSED",))
refused(connect, socket.AF_UNIX, "@SOCKET@", but=("ENOENT",))
refused(connect, socket.AF_INET, ("127.0.0.1", @PORT@), but=("ECONNREFUSED",))
for address in ("169.254.169.254", "8.8.8.8", "10.0.0.1", "172.17.0.1", "192.168.0.1", "255.255.255.255"):
    for kind, port in ((socket.SOCK_STREAM, 80), (socket.SOCK_DGRAM, 53)):
        refused(connect, socket.AF_INET, (address, port), kind, but=("ENETUNREACH", "EACCES"))
for address in ("fd00:ec2::254", "2001:4860:4860::8888", "fe80::1"):
    refused(connect, socket.AF_INET6, (address, 80), but=("ENETUNREACH", "EADDRNOTAVAIL", "EINVAL"))
for path in ("/run/docker.sock", "/var/run/docker.sock", "/run/dbus/system_bus_socket", "/run/systemd/private", "/tmp/.X11-unix/X0"):
    refused(connect, socket.AF_UNIX, path, but=("ENOENT",))
refused(socket.getaddrinfo, "example.com", 80)
assert [name for _, name in socket.if_nameindex()] == ["lo"], socket.if_nameindex()
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 3) as client:
    client.send(b"inside")
    assert server.accept()[0].recv(9) == b"inside"
print("all held")
"""
)
NETWORK_ON = """
import socket
with socket.socket(socket.AF_UNIX) as tried:
    tried.connect("\\0@ABSTRACT@")
socket.create_connection(("127.0.0.1", @PORT@), 3).close()
try:
    with socket.socket(socket.AF_UNIX) as tried:
        tried.connect("@SOCKET@")
except FileNotFoundError:
    print("all held but what the network gives")
"""
# Every word that the init or the keeper say, on every descriptor there is; then an end that contradicts them.
FORGED = (
    REFUSED
    + """
import json, signal, socket
for pid in (1, os.getppid()):
    refused(os.open, f"/proc/{pid}/fd/0", os.O_RDWR)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            refused(os.open, f"/proc/{pid}/fd/{name}", os.O_RDWR)
            refused(os.readlink, f"/proc/{pid}/fd/{name}")
    except PermissionError:
        pass
words = [{"status": 0, "cpu": 0, "caught": None}, {"who": "init"}, {"who": "kernel"}, {"executed": True}, {"failed": "no"},
         {"type": "exited", "at": 1.0, "status": 0, "reason": None, "cpu_seconds": 0.0, "counters": {}, "fault_text": "", "fault": None,
          "caught_signals": None, "stderr": "", "bursts": [], "oomd_killed": None, "disk_free": None},
         {"type": "cleaned_up", "surviving_pids": [], "remaining_paths": []}, {"type": "finish"}, {"type": "kill", "reason": "memory"}]
for name in sorted(map(int, os.listdir("/proc/self/fd"))):
    if name <= 2:
        continue
    try:
        target = os.readlink(f"/proc/self/fd/{name}")
        if "event" in target or "memfd" in target or name in ZMQ:
            continue
        os.set_blocking(name, False)
        for word in words:
            os.write(name, json.dumps(word).encode() + b"\\n")
    except OSError:
        pass
os.kill(os.getpid(), signal.SIGKILL)
"""
)
# libzmq's own sockets and the shared page are left out here: to write there is to speak with the client, not with the keeper.
ZMQ = """
import os, socket, stat, sys
ours = {int(word) for word in open("/proc/self/cmdline").read().split("\\0") if word.isdigit()}
ZMQ = {int(n) for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}") and stat.S_ISSOCK(os.fstat(int(n)).st_mode)} - ours
"""
CHANNELS = """
import os, socket
words = [int(word) for word in open("/proc/self/cmdline").read().split("\\0") if word.isdigit()]
page, facts, fault = words[:3]
"""
FLOOD_FAULT = (
    CHANNELS
    + """
import time
until = time.monotonic() + 4
for _ in range(3):
    os.fork()
while time.monotonic() < until:
    os.write(fault, b"\\xff" * 4096)
"""
)
FLOOD_FACTS = (
    CHANNELS
    + """
import json, time
told = socket.socket(fileno=os.dup(facts))
told.setblocking(True)
until, n = time.monotonic() + 4, 0
while time.monotonic() < until:
    n += 1
    told.send(json.dumps({"file": f"{n}" + "x" * 60000, "cell": 1}).encode())
"""
)
FLOOD_STDERR = """
import os, time
until = time.monotonic() + 3
while time.monotonic() < until:
    for pipe in pipes:
        try:
            os.write(pipe, b"terminate called " * 200)
        except OSError:
            pass
"""
STDERR = """
import os, stat
there = [n for n in map(int, os.listdir("/proc/self/fd")) if n > 2 and os.path.exists(f"/proc/self/fd/{n}")]
pipes = [n for n in there if stat.S_ISFIFO(os.fstat(n).st_mode)]  # one of them is the stderr that the keeper reads
for pipe in pipes:
    os.set_blocking(pipe, False)
"""
RUNTIME = """
import os, re
mounts = [line.split()[4] for line in open("/proc/self/mountinfo")]
runtime, = (path for path in mounts if re.search("/safe-exec-[0-9a-f]{12}$", path))
"""
LINK_FOR_CHMOD = (
    RUNTIME
    + """
for name in ("work", "upper", "folder"):
    try:
        os.mkdir(f"{runtime}/{name}")
        os.symlink("@SYSTEM@", f"{runtime}/{name}/{name}")
    except OSError:
        pass
os.symlink("@SYSTEM@", f"{runtime}/link")
"""
)
DEEP = (
    RUNTIME
    + """
os.chdir(runtime)
for _ in range(1200):  # deeper than Python's own recursion goes
    os.mkdir("d")
    os.chdir("d")
"""
)
CLOSED = (
    RUNTIME
    + """
os.makedirs(f"{runtime}/closed/inner/most")
for path in ("closed/inner/most", "closed/inner", "closed"):
    os.chmod(f"{runtime}/{path}", 0)
"""
)
LITTER = (
    RUNTIME
    + """
import socket
for n in range(500):
    try:
        os.mkfifo(f"{runtime}/{n}")
    except OSError:
        break
for name in (b"\\xff\\xfe", b"a\\nb", b"--help", b"\\x1b[2J"):
    try:
        os.mkdir(os.fsencode(runtime) + b"/" + name)
    except OSError:
        pass
with socket.socket(socket.AF_UNIX) as made:
    try:
        made.bind(f"{runtime}/sock")
    except OSError:
        pass
"""
)
NO_SOCKETS = (
    RUNTIME
    + """
for name in os.listdir(runtime):
    try:
        os.unlink(f"{runtime}/{name}")
        os.symlink("@SOCKET@", f"{runtime}/{name}")
    except OSError:
        pass
"""
)

ATTACKS = (
    # What is not to be read.
    Attack(name="secrets", cells=SECRETS, ends=PASSED, says=HELD),
    Attack(name="secrets-strict", cells=SECRETS.replace('"/etc/shadow", "/etc/ssh/ssh_host_rsa_key"', ""), ends=PASSED, says=HELD,
           who="root", profile="strict"),
    Attack(name="inherited", cells=INHERITED, ends=PASSED, says=HELD),
    # What is not to be written.
    Attack(name="writes", cells=WRITES, ends=PASSED, says=HELD),
    Attack(name="writes-strict", cells=WRITES, ends=PASSED, says=HELD, who="root", profile="strict"),
    Attack(name="writes-ci", cells=WRITES, ends=PASSED, says=HELD, profile="ci"),
    Attack(name="groups", cells=GROUPS, ends=PASSED, says=HELD),
    Attack(name="groups-strict", cells=GROUPS, ends=PASSED, says=HELD, who="root", profile="strict"),
    Attack(name="devices", cells=DEVICES, ends=PASSED, says=HELD),
    Attack(name="devices-strict", cells=DEVICES, ends=PASSED, says=HELD, who="root", profile="strict"),
    # Rights.
    Attack(name="rights", cells=RIGHTS, ends=PASSED, says=HELD),
    Attack(name="rights-ci", cells=RIGHTS, ends=PASSED, says=HELD, who="root", profile="ci"),
    Attack(name="rights-strict", cells=RIGHTS, ends=PASSED, says=HELD, who="root", profile="strict"),
    Attack(name="calls", cells=CALLS, ends=PASSED, says=HELD),
    Attack(name="calls-strict", cells=CALLS, ends=PASSED, says=HELD, who="root", profile="strict"),
    Attack(name="processes", cells=PROCESSES, ends=PASSED, says=HELD),
    Attack(name="processes-strict", cells=PROCESSES, ends=PASSED, says=HELD, who="root", profile="strict"),
    Attack(name="first-process", cells=FIRST_PROCESS, ends=PASSED, says=HELD),
    Attack(name="first-process-strict", cells=FIRST_PROCESS, ends=PASSED, says=HELD, who="root", profile="strict"),
    # Other hosts. Abstract sockets belong to the network: where it is on, those outside can be reached, as can loopback.
    Attack(name="network-off", cells=NETWORK_OFF, ends=PASSED, says=HELD),
    Attack(name="network-off-ci", cells=NETWORK_OFF, ends=PASSED, says=HELD, who="user", profile="ci", options=("--no-network",)),
    Attack(name="network-on", cells=NETWORK_ON, ends=PASSED, says=HELD, profile="ci", reaches=("abstract socket", "tcp port")),
    # Whoever gives the verdict.
    Attack(name="forged-end", cells=("x = 1", ZMQ, FORGED), ends=((S.KERNEL_DIED, K.KILLED),), cell=2),
    Attack(name="forged-end-strict", cells=("x = 1", ZMQ, FORGED), ends=((S.KERNEL_DIED, K.KILLED),), cell=2, who="root", profile="strict"),
    Attack(name="flood-of-faults", cells=FLOOD_FAULT, ends=PASSED, who="root"),
    Attack(name="flood-of-facts", cells=FLOOD_FACTS, ends=PASSED, who="root"),
    Attack(name="flood-of-stderr", cells=(STDERR, FLOOD_STDERR), ends=PASSED, who="user"),
    # The directory of the sockets, which whoever is outside removes.
    Attack(name="link-for-chmod", cells=LINK_FOR_CHMOD, ends=PASSED),
    Attack(name="link-for-chmod-ci", cells=LINK_FOR_CHMOD, ends=PASSED, profile="ci"),
    Attack(name="deep", cells=DEEP, ends=PASSED),
    Attack(name="closed", cells=CLOSED, ends=PASSED, who="user"),
    Attack(name="closed-ci", cells=CLOSED, ends=PASSED, profile="ci"),
    Attack(name="litter", cells=LITTER, ends=PASSED, who="user"),
    Attack(name="links-for-sockets", cells=(NO_SOCKETS, "x = 1"), ends=PASSED, who="root"),
)  # fmt: skip


@pytest.mark.hostile
@pytest.mark.parametrize(("attack", "who"), rounds(ATTACKS))
def test_attack(attack: Attack, who: Who) -> None:
    fight(attack, who)
