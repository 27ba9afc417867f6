"""The keeper's side of bubblewrap: start it, wait for init and kernel, read the kernel's ending.

Linux puts the sender's credentials on each message of the status socket, with process ids of our
own namespace, whatever namespace the sender is in (unix(7), SCM_CREDENTIALS). So the keeper learns
which process is the kernel, and only the init can report how the kernel ended. Standard library
only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import marshal
import os
import select
import socket
import stat
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

from safe_exec.keeper import child, file_tree, mounts, protocol
from safe_exec.keeper.child import KernelCommand, SetupFailed
from safe_exec.keeper.protocol import BwrapSetup, LimitedDisk

SO_PASSCRED, SCM_CREDENTIALS = 16, 2
MNT_DETACH = 2
MS_RDONLY, MS_REMOUNT, MS_BIND = 0x1, 0x20, 0x1000
_UCRED, _INT = struct.Struct("3i"), struct.Struct("i")
START_SECONDS = 20.0
MESSAGE_BYTES = 4096
# The most descriptors in one message.
MOST_DESCRIPTORS = 8
PAGE = 4096
COPY_BYTES = 256 << 20
SPARE_INODES = 8
BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from safe_exec.keeper.bwrap_init import main; "
    "main(*map(int, sys.argv[2:]))"
)


class ChildEnds(NamedTuple):
    """The descriptors for the keeper's child: its stderr, a pipe for its error, the kernel's."""

    stderr: int
    error: int
    kernel: dict[str, int]


class KernelEnding(NamedTuple):
    """The kernel's ending, as the init reported it.

    ``orphans_peak`` is 0 if the init reaped no orphan.
    """

    status: int
    cpu_seconds: float
    resident_peak: int | None
    orphans_peak: int
    caught_signals: int | None


class Bubblewrap:
    """One bubblewrap with its init and its kernel, by their process ids outside of the sandbox.

    ``sockets`` is a descriptor of the directory of the kernel's sockets. ``discarded`` are
    descriptors of the directories whose files disappear with the sandbox. ``is_closed`` is true
    once nobody can send a message any more.
    """

    def __init__(self, setup: BwrapSetup, *, restorable: bool = False) -> None:
        self._setup, self._restorable = setup, restorable
        self.status, self._init_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.status.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        self._release_r, self._release_w = os.pipe2(os.O_CLOEXEC)
        self.pid = 0
        self.init_pid = 0
        self.kernel_pid = 0
        self.sockets = -1
        self.discarded: list[int] = []
        self.is_closed = False

    # --- in the keeper's child ------------------------------------------------------------------

    def execute(self, command: KernelCommand, ends: ChildEnds) -> None:
        """Execute bubblewrap, with the init in it. Never returns."""
        try:
            setup = self._setup
            ours = {
                "status": self._init_end.fileno(),
                "release": self._release_r,
                "config": os.memfd_create("safe-exec"),
            }
            argv, placed = child.place_descriptors(
                command.argv, ends.stderr, {**ends.kernel, **ours}
            )
            _write_config(
                placed["config"], command.with_argv(argv), setup, restorable=self._restorable
            )
            _protect_devices(setup.devices)
            init = [setup.python, "-I", "-S", "-c", BOOT, setup.package_root]
            init += [str(placed[name]) for name in ours]
            bwrap_argv = [*setup.argv, *init]
            os.execve(bwrap_argv[0], bwrap_argv, {"PATH": os.defpath})  # noqa: S606 - bubblewrap
        except BaseException as error:  # noqa: BLE001 - reported to the keeper
            child.report_failure(ends.error, "sandbox", error)

    # --- in the keeper --------------------------------------------------------------------------

    def started(self, pid: int) -> None:
        """Record the child's pid, and close our copies of its ends of sockets and pipes."""
        self.pid = pid
        self._init_end.close()
        os.close(self._release_r)

    def await_kernel(self) -> int:
        """Wait for the kernel's process, which then waits for ``release``; return its pid outside.

        Raises SetupFailed if bubblewrap ends before that.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self.kernel_pid:
            if not self._wait_until(deadline):
                raise SetupFailed("sandbox", "nothing started inside bubblewrap")
            message, pid = self.receive()
            if not message:
                raise SetupFailed("sandbox", "bubblewrap could not build it")
            if message.get("who") == "init":
                self.init_pid = pid
            elif message.get("who") == "kernel":
                self.kernel_pid = pid
        return self.kernel_pid

    def release(self) -> None:
        """Let the kernel's process continue, and wait until it has executed the kernel.

        Raises SetupFailed.
        """
        os.write(self._release_w, b"g")
        os.close(self._release_w)
        deadline = time.monotonic() + START_SECONDS
        while True:
            if not self._wait_until(deadline):
                raise SetupFailed("sandbox", "the kernel's process did not get to its command")
            message, pid = self.receive()
            if not message or pid == self.init_pid:
                break
        if not message or "executed" not in message:
            failure = str(message.get("failed", "sandbox bubblewrap ended"))
            stage, _, text = failure.partition(" ")
            raise SetupFailed(stage, text)
        self.status.setblocking(False)

    def _wait_until(self, deadline: float) -> bool:
        seconds = max(0.0, deadline - time.monotonic())
        return bool(select.select([self.status], [], [], seconds)[0])

    def receive(self) -> tuple[dict[str, Any], int]:
        """Return a message, and its sender's pid as seen outside the sandbox."""
        # The message is empty at the end of the socket, and for anything that the init does not
        # send.
        room = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(MOST_DESCRIPTORS * _INT.size)
        data, ancillary, _, _ = self.status.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        credentials = (
            packed[: _UCRED.size] for _, kind, packed in ancillary if kind == SCM_CREDENTIALS
        )
        pid = next((_UCRED.unpack(packed)[0] for packed in credentials), 0)
        self.is_closed = not data and not pid
        rights = b"".join(packed for _, kind, packed in ancillary if kind == socket.SCM_RIGHTS)
        complete = rights[: len(rights) - len(rights) % _INT.size]
        self._store_descriptors([fd for (fd,) in _INT.iter_unpack(complete)])
        with contextlib.suppress(ValueError):
            message = json.loads(data)
            if isinstance(message, dict):
                return message, pid
        return {}, pid

    def _store_descriptors(self, fds: list[int]) -> None:
        # The first ones are the init's: it sends them before anything else runs inside.
        if fds and self.sockets < 0 and not self.init_pid:
            self.sockets, *self.discarded = fds
        else:
            for fd in fds:
                os.close(fd)

    def follow(self, pid: int, innermost_pid: int) -> None:
        """Have the init report the ending of another process, by its number in the namespace.

        Raises OSError if the init has ended.
        """
        self.kernel_pid = pid
        self.status.send(b"%d" % innermost_pid)

    def kernel_ending(self) -> KernelEnding | None:
        """Return the kernel's ending once the init has reported it; other senders are ignored."""
        while not self.is_closed:
            try:
                message, pid = self.receive()
            except BlockingIOError:
                return None
            except ConnectionError:
                self.is_closed = True
                return None
            if pid == self.init_pid and "status" in message:
                return KernelEnding(
                    message["status"],
                    message["cpu"],
                    message["resident"],
                    message["orphans"],
                    message["caught"],
                )
        return None


def _protect_devices(paths: tuple[str, ...]) -> None:
    """Bind-mount devices onto themselves, read-only.

    bubblewrap's own mounts of them inherit the flag.
    """
    if not paths:
        return
    binds = [{"kind": "bind", "source": path, "target": path} for path in paths]
    mounts.enter(binds, user_namespace=False)
    libc = ctypes.CDLL(None, use_errno=True)
    for path in paths:
        # A remount replaces all flags. These have the same numbers in statvfs(3) and mount(2).
        flags = os.statvfs(path).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)
        flags |= MS_REMOUNT | MS_BIND | MS_RDONLY
        if libc.mount(b"none", os.fsencode(path), None, ctypes.c_ulong(flags), None) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot mount {path} read-only: {os.strerror(number)}")


def _write_config(fd: int, command: KernelCommand, setup: BwrapSetup, *, restorable: bool) -> None:
    # marshal is built in: the init would spend longer on importing json than on all else.
    config = {
        "command": protocol.as_plain(command),
        "sockets": setup.sockets,
        "discarded": [place.path for place in setup.discarded],
        "restorable": restorable,
    }
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(marshal.dumps(config))


# --- a folder of limited size -------------------------------------------------------------------


def make_disk(disk: LimitedDisk) -> file_tree.ConcurrentChanges:
    """Make the file system that a run writes to, in a mount namespace of the keeper.

    It holds the folder's present content, a /tmp, a home and a directory for sockets. The result
    later tells which files others changed in the folder. Raises OSError if the folder is too large
    to copy.
    """
    owner, base, folder = disk.owner, Path(disk.base), Path(disk.folder)
    changes = file_tree.ConcurrentChanges(since=file_tree.now())
    # With the folder as the lower layer of an overlay only written data counts. Where there are no
    # overlays, or another user shall own everything, the folder is copied, and the copy gets room
    # of its own.
    if owner is not None or not _mount_overlay(folder, base, disk):
        size, entries = _measure(folder)
        _mount_disk(base, disk.size + size, disk.inodes + entries)
        copies = file_tree.copy_tree(folder, base / "folder", owner=owner)
        changes = file_tree.ConcurrentChanges(copies=copies)
    for name, mode in (("tmp", 0o1777), ("home", 0o755), ("sockets", 0o755)):
        directory = base / name
        directory.mkdir()
        directory.chmod(mode)
        if owner is not None:
            os.chown(directory, owner, owner)
    return changes


def _mount_disk(base: Path, size: int, inodes: int) -> None:
    options = f"size={size},nr_inodes={inodes},mode=0755"
    mounts.make({"kind": "tmpfs", "target": str(base), "options": options})


def _mount_overlay(folder: Path, base: Path, disk: LimitedDisk) -> bool:
    """Mount an overlay of limited size over the folder; false if the file system allows none."""
    _mount_disk(base, disk.size, disk.inodes)
    for name in ("upper", "work", "folder"):
        (base / name).mkdir()
    layers = {
        "lower": str(folder),
        "upper": str(base / "upper"),
        "work": str(base / "work"),
        "target": str(base / "folder"),
    }
    try:
        mounts.make({"kind": "overlay", **layers})
    except OSError:
        unmount(str(base))
        return False
    return True


def changed_files(base: str) -> str:
    """Return the directory with the files that a run changed.

    If the folder was copied, the directory has all other files too.
    """
    upper = os.path.join(base, "upper")
    return upper if os.path.isdir(upper) else os.path.join(base, "folder")


def _measure(folder: Path) -> tuple[int, int]:
    """Return the bytes (in whole pages) and inodes that a copy takes.

    Raises OSError if too large.
    """
    size = entries = 0
    for _, status in file_tree.walk(folder):
        entries += 1
        size += -(-status.st_size // PAGE) * PAGE if stat.S_ISREG(status.st_mode) else PAGE
        if size > COPY_BYTES:
            raise OSError(
                errno.EFBIG,
                f"the folder {folder} is too large to be copied ({COPY_BYTES >> 20} MiB); "
                "run in a smaller one (--cwd)",
            )
    return size, entries + SPARE_INODES


def unmount(path: str) -> bool:
    """Detach the mounts on a path and its overlay; true if nothing is mounted there any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    for mounted in (os.path.join(path, "folder"), path):
        libc.umount2(os.fsencode(mounted), MNT_DETACH)
    return not os.path.ismount(path)
