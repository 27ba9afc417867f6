"""The keeper's side of a kernel inside bubblewrap: start it, meet the init and the kernel, hear of the end. Standard library only.

Who speaks is known by the credentials that the system puts on each message: the process ids arrive as they are out here, whatever namespace
the speaker is in (unix(7), SCM_CREDENTIALS). That is how the keeper learns which process is the kernel, and why nobody but the init can say
how the kernel ended.
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
from typing import Any

from safe_exec.keeper import child, file_tree, mounts

SO_PASSCRED, SCM_CREDENTIALS = 16, 2
MNT_DETACH = 2
MS_RDONLY, MS_REMOUNT, MS_BIND = 0x1, 0x20, 0x1000
_UCRED, _INT = struct.Struct("3i"), struct.Struct("i")
MEET_SECONDS = 20.0
MESSAGE_BYTES = 4096
MOST_DESCRIPTORS = 8
"""In one message."""
PAGE = 4096
COPY_BYTES = 256 << 20
BOOT = "import sys; sys.path.append(sys.argv[1]); from safe_exec.keeper.bwrap_init import main; main(*map(int, sys.argv[2:]))"


class Enclosed:
    """One bubblewrap and what is in it."""

    def __init__(self) -> None:
        self.status, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.status.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        self._go_r, self._go_w = os.pipe2(os.O_CLOEXEC)
        self.bubblewrap = 0
        self.init = 0
        self.kernel = 0
        self.sockets = -1
        self.discarded: list[int] = []
        self.over = False

    # --- in the keeper's child ----------------------------------------------------------------------------------

    def become_bubblewrap(
        self, plan: dict[str, Any], stderr_fd: int, given: dict[str, int], error_fd: int
    ) -> None:
        """Execute bubblewrap, with the init in it. Never returns."""
        try:
            enclosure = plan["enclosure"]
            placed = child.place_descriptors(
                plan,
                stderr_fd,
                {
                    **given,
                    "status": self._theirs.fileno(),
                    "go": self._go_r,
                    "config": os.memfd_create("safe-exec"),
                },
            )
            discarded = [place["path"] for place in enclosure["discarded"]]
            _write_config(
                placed["config"], {**plan, "sockets": enclosure["sockets"], "discarded": discarded}
            )
            _close_devices(enclosure["devices"])
            inner = [enclosure["python"], "-I", "-S", "-c", BOOT, enclosure["root"]]
            inner += [str(placed[name]) for name in ("status", "go", "config")]
            argv = [*enclosure["argv"], *inner]
            os.execve(argv[0], argv, {"PATH": os.defpath})  # noqa: S606 - bubblewrap, found and tried before
        except BaseException as error:  # noqa: BLE001 - told to the keeper; nothing may run on in this process
            child.tell(error_fd, "sandbox", error)

    # --- in the keeper ------------------------------------------------------------------------------------------

    def started(self, pid: int) -> None:
        """The child is on its way; its ends of things are its own now."""
        self.bubblewrap = pid
        self._theirs.close()
        os.close(self._go_r)

    def meet(self) -> int:
        """Wait for the kernel's process, which waits for us; its id out here. Raises Refused when bubblewrap ends before.

        ``sockets`` is the directory of the kernel's sockets from then on, as a descriptor.
        """
        deadline = time.monotonic() + MEET_SECONDS
        while not self.kernel:
            if not select.select([self.status], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise child.Refused("sandbox", "nothing started inside bubblewrap")
            message, pid = self.receive()
            if not message:
                raise child.Refused("sandbox", "bubblewrap could not build it")
            if message.get("who") == "init":
                self.init = pid
            elif message.get("who") == "kernel":
                self.kernel = pid
        return self.kernel

    def go(self) -> None:
        """Let the kernel's process go on; wait until it has executed the kernel. Raises Refused when it could not."""
        os.write(self._go_w, b"g")
        os.close(self._go_w)
        deadline = time.monotonic() + MEET_SECONDS
        while True:
            if not select.select([self.status], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise child.Refused("sandbox", "the kernel's process did not get to its command")
            message, pid = self.receive()
            if not message or pid == self.init:
                break
        if not message or "executed" not in message:
            stage, _, words = str(message.get("failed", "sandbox bubblewrap ended")).partition(" ")
            raise child.Refused(stage, words)
        self.status.setblocking(False)

    def receive(self) -> tuple[dict[str, Any], int]:
        """A message and who sent it, by process id out here; an empty one at the end, and for what is no message of ours."""
        room = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(MOST_DESCRIPTORS * _INT.size)
        data, ancillary, _, _ = self.status.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        pid = next(
            (
                _UCRED.unpack(found[: _UCRED.size])[0]
                for _, kind, found in ancillary
                if kind == SCM_CREDENTIALS
            ),
            0,
        )
        self.over = not data and not pid
        rights = b"".join(packed for _, kind, packed in ancillary if kind == socket.SCM_RIGHTS)
        self._take_descriptors(
            [fd for (fd,) in _INT.iter_unpack(rights[: len(rights) - len(rights) % _INT.size])]
        )
        with contextlib.suppress(ValueError):
            message = json.loads(data)
            if isinstance(message, dict):
                return message, pid
        return {}, pid

    def _take_descriptors(self, fds: list[int]) -> None:
        """The first ones are the init's, the directory of the sockets before the others: it speaks before anything else lives in there."""
        if fds and self.sockets < 0 and not self.init:
            self.sockets, *self.discarded = fds
        else:
            for fd in fds:
                os.close(fd)

    def ending(self) -> dict[str, Any] | None:
        """How the kernel ended, once the init has said so. What others say there is not heard; ``over`` when nobody can say any more."""
        while not self.over:
            try:
                message, pid = self.receive()
            except BlockingIOError:
                return None
            except ConnectionError:
                self.over = True
                return None
            if pid == self.init and "status" in message:
                return message
        return None


def _close_devices(paths: list[str]) -> None:
    """Devices that bubblewrap is to show, mounted read-only on themselves: its own mounts of them inherit that."""
    if not paths:
        return
    mounts.enter(
        [{"kind": "bind", "source": path, "target": path} for path in paths], user_namespace=False
    )
    libc = ctypes.CDLL(None, use_errno=True)
    for path in paths:
        kept = os.statvfs(path).f_flag & (
            os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
        )  # the same numbers in mount(2)
        if (
            libc.mount(
                b"none",
                os.fsencode(path),
                None,
                ctypes.c_ulong(MS_REMOUNT | MS_BIND | MS_RDONLY | kept),
                None,
            )
            != 0
        ):
            number = ctypes.get_errno()
            raise OSError(number, f"cannot mount {path} read-only: {os.strerror(number)}")


def _write_config(fd: int, plan: dict[str, Any]) -> None:
    wanted = ("argv", "env", "cwd", "rlimits", "open_files_soft", "walls", "sockets", "discarded")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(marshal.dumps({name: plan[name] for name in wanted}))


# --- a folder of limited size -----------------------------------------------------------------------------------


def make_disk(disk: dict[str, Any]) -> file_tree.Meanwhile:
    """The file system that a run writes to: its folder as it is, a /tmp, a home and a place for sockets. In a mount namespace of our own.

    The folder is the lower layer of an overlay, so that only what is written counts; where that cannot be, or all is to belong to another
    user, it is a copy, for which there is room besides. Returns what will tell later what others made of the folder. Raises OSError with what
    is too large.
    """
    owner, base = disk["owner"], Path(disk["base"])
    folder = Path(disk["folder"])
    meanwhile = file_tree.Meanwhile(since=file_tree.now())
    copied = None if owner is None and _overlays(folder, base, disk) else _measure(folder)
    if copied is not None:
        size, entries = copied
        _mount_disk(base, disk["size"] + size, disk["inodes"] + entries)
        meanwhile = file_tree.Meanwhile(
            marks=file_tree.copy_tree(folder, base / "folder", owner=owner)
        )
    for name, mode in (("tmp", 0o1777), ("home", 0o755), ("sockets", 0o755)):
        made = base / name
        made.mkdir()
        made.chmod(mode)
        if owner is not None:
            os.chown(made, owner, owner)
    return meanwhile


def _mount_disk(base: Path, size: int, inodes: int) -> None:
    mounts.make(
        {
            "kind": "tmpfs",
            "target": str(base),
            "options": f"size={size},nr_inodes={inodes},mode=0755",
        }
    )


def _overlays(folder: Path, base: Path, disk: dict[str, Any]) -> bool:
    """Lay the folder under a layer of limited size; whether that can be had here."""
    _mount_disk(base, disk["size"], disk["inodes"])
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
    """Where the files are that a run has changed in its folder of limited size, beside others in a copy."""
    upper = os.path.join(base, "upper")
    return upper if os.path.isdir(upper) else os.path.join(base, "folder")


def _measure(folder: Path) -> tuple[int, int]:
    """What a copy of a folder takes: bytes in whole pages, and entries. Raises OSError where it is too much to copy."""
    size = entries = 0
    for _, status in file_tree.walk(folder):
        entries += 1
        size += -(-status.st_size // PAGE) * PAGE if stat.S_ISREG(status.st_mode) else PAGE
        if size > COPY_BYTES:
            raise OSError(
                errno.EFBIG,
                f"the folder {folder} is too large to be copied ({COPY_BYTES >> 20} MiB); run in a smaller one (--cwd)",
            )
    return size, entries + 8


def unmount(path: str) -> bool:
    """Detach what is mounted on a path; whether nothing is any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    for mounted in (os.path.join(path, "folder"), path):
        libc.umount2(os.fsencode(mounted), MNT_DETACH)
    return not os.path.ismount(path)
