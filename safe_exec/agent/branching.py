"""Tells whether the state of a process survives a fork, as far as /proc shows it.

Only the forking thread lives on in a child. Open files share their offset with it, timers are lost,
and libraries with threads or devices of their own fail or hang.
"""

import asyncio
import os
import signal
import sys

# Libraries that hang or abort in a child once they have been used, or that hold a device.
UNFORKABLE = ("torch", "jax", "jaxlib", "polars", "tensorflow", "cupy", "nest_asyncio", "pyspark")
LIBRARIES = ("libcuda", "libnvidia", "libtpu", "libjvm")
# Their library has them start again in a child: jemalloc (background_thread_postfork_child), which
# pyarrow brings along.
RENEWED_THREADS = ("jemalloc_bg_thd",)
# More files than that take too long to look at after each run.
MOST_FILES = 20_000
# Python writes bytecode when a module is imported; no cell reads it.
BYTECODE = "__pycache__"
HARMLESS = (os.devnull, "/dev/zero", "/dev/random", "/dev/urandom")


class OwnState:
    """The descriptors and shared mappings of a process before the notebook opens any."""

    def __init__(self, descriptors, mappings):
        self.descriptors, self.mappings = descriptors, mappings


def inherited_state(channel):
    """Return the current descriptors, except ``channel``, and the current shared mappings.

    If a fork finds further ones, the notebook has opened them.
    """
    return OwnState(descriptors() - {channel}, shared_mappings())


def descriptors():
    """Return the open descriptors."""
    numbers = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            # This is the descriptor by which the directory itself is read.
            continue
        numbers.add(int(name))
    return numbers


def shared_mappings():
    """Return the mappings whose content a parent and its child share (proc(5))."""
    with open("/proc/self/maps") as file:
        return {line.split(None, 5)[0] for line in file if line.split(None, 2)[1][3] == "s"}


def threads():
    """Count the threads that a fork would lose, native ones included."""
    count = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open("/proc/self/task/{}/comm".format(task)) as file:
                count += file.read().strip() not in RENEWED_THREADS
        except OSError:
            # The thread has just ended.
            continue
    return count


def why_not_branchable(own, loop, channel, is_kernels=None):
    """Return why the process cannot be forked, in a few words; empty if it can.

    ``is_kernels`` tells the tasks and timers of the loop that a kernel makes for itself. Threads
    are not checked here: count them after a fork, because some libraries end their threads before
    one.
    """
    checks = (
        lambda: next((name for name in UNFORKABLE if name in sys.modules), ""),
        library,
        lambda: "child processes" if has_children() else "",
        lambda: "a timer" if has_timer() else "",
        lambda: "asyncio tasks" if has_tasks(loop, is_kernels) else "",
        lambda: "sub-interpreters" if has_interpreters() else "",
        lambda: open_files(own, loop, channel),
        lambda: "shared memory" if shared_mappings() - own.mappings else "",
    )
    for check in checks:
        reason = check()
        if reason:
            return reason
    return ""


def library():
    """Return a loaded library that does not survive a fork; empty if there is none."""
    with open("/proc/self/maps") as file:
        text = file.read()
    return next((name for name in LIBRARIES if "/" + name in text), "")


def has_children():
    """Tell whether the process has a child that runs or was not reaped."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def has_tasks(loop, is_kernels=None):
    """Tell whether the notebook left tasks or timers in the event loop."""
    things = [*asyncio.all_tasks(loop), *(t for t in loop._scheduled if not t.cancelled())]
    return any(is_kernels is None or not is_kernels(thing) for thing in things)


def has_timer():
    """Tell whether a timer of setitimer(2) or alarm(2) is running."""
    timers = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
    return any(signal.getitimer(timer)[0] for timer in timers)


def has_interpreters():
    """Tell whether the notebook created a subinterpreter."""
    # Until Python 3.12 the module has another name.
    module = sys.modules.get("_interpreters") or sys.modules.get("_xxsubinterpreters")
    return module is not None and len(module.list_all()) > 1


def open_files(own, loop, channel):
    """Describe a descriptor that the notebook opened: ``an open socket``.

    Returns an empty text if there is none.
    """
    # The loop's own: each process that runs cells makes itself a new one.
    ours = {channel, loop._selector.fileno(), loop._ssock.fileno(), loop._csock.fileno()}
    for fd in sorted(descriptors() - own.descriptors - ours):
        target = os.readlink("/proc/self/fd/{}".format(fd))
        if target not in HARMLESS:
            return "an open " + target.partition(":")[0] if target[:1] != "/" else "an open file"
    return ""


def files_in(folders, unwatched, most=None):
    """Return the size and time of every file in some folders; ``None`` if there are too many.

    Mounted file systems in them are left out: other programs may change those at any time.
    """
    files = {}
    mounted = mount_points()
    waiting = list(folders)
    while waiting:
        waiting += look_at(waiting.pop(), mounted, unwatched, files)
        if len(files) > (most or MOST_FILES):
            return None
    return files


def mount_points():
    """Return the paths at which file systems or parts of them are mounted (proc(5))."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return {line.split(None, 5)[4].replace("\\040", " ") for line in file}


def look_at(folder, mounted, unwatched, files):
    """Add the files of one folder to ``files``; return the folders in it."""
    below = []
    try:
        entries = list(os.scandir(folder))
    except OSError:
        # The folder has been removed, or we may not read it.
        return below
    for entry in entries:
        # In a run's own directory lie the kernel's sockets, and perhaps a folder to watch.
        is_ours = entry.path.startswith(unwatched) and not folder.startswith(unwatched)
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if is_ours or entry.name == BYTECODE or entry.path in mounted:
            continue
        if entry.is_dir(follow_symlinks=False):
            # Its time changes when bytecode is written.
            files[entry.path] = None
            below.append(entry.path)
        else:
            files[entry.path] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return below
