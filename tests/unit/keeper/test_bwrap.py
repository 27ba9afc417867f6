"""The keeper's side of a kernel inside bubblewrap, without bubblewrap: who speaks is known by credentials, and a disk by its size."""

from __future__ import annotations

import contextlib
import errno
import json
import marshal
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safe_exec.keeper import bwrap, child, file_tree, mounts
from safe_exec.keeper.bwrap import Bubblewrap, KernelEnding
from safe_exec.keeper.child import KernelCommand, Walls
from safe_exec.keeper.protocol import BwrapSetup, DiscardedPlace, LimitedDisk

SPEAK = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(sys.argv[2].encode())"


SETUP = BwrapSetup(
    argv=("/usr/bin/bwrap",),
    python="/usr/bin/python3",
    package_root="/srv",
    sockets="/run/x",
    disk=None,
    discarded=(DiscardedPlace(name="~", kind="home", path="/home/me"),),
    devices=(),
)


@pytest.fixture
def inner() -> Iterator[Bubblewrap]:
    found = Bubblewrap(SETUP)
    yield found
    found.status.close()
    found._init_end.close()
    for fd in (found._release_r, found._release_w):
        with contextlib.suppress(OSError):  # closed as it went on
            os.close(fd)


def speak(inner: Bubblewrap, text: str | dict[str, Any]) -> None:
    """As this process."""
    inner._init_end.send((text if isinstance(text, str) else json.dumps(text)).encode())


def speak_as_another(inner: Bubblewrap, text: dict[str, Any]) -> int:
    """As another process that got hold of the socket; its id."""
    fd = inner._init_end.fileno()
    other = subprocess.Popen(
        [sys.executable, "-c", SPEAK, str(fd), json.dumps(text)], pass_fds=[fd]
    )
    assert other.wait(30) == 0
    return other.pid


def test_init_and_kernel_are_known_by_who_spoke(inner: Bubblewrap) -> None:
    speak(inner, {"who": "init"})
    kernel = speak_as_another(inner, {"who": "kernel"})
    assert inner.await_kernel() == kernel != os.getpid()
    assert (inner.init_pid, inner.kernel_pid) == (os.getpid(), kernel)


@pytest.mark.parametrize("last", ["", "no json", "[1]"])
def test_an_end_before_the_kernel_was_met_is_refused(inner: Bubblewrap, last: str) -> None:
    speak(inner, {"who": "init"})
    if last:
        speak(inner, last)
    else:
        inner._init_end.shutdown(socket.SHUT_WR)
    with pytest.raises(child.SetupFailed) as caught:
        inner.await_kernel()
    assert caught.value.stage == "sandbox"


def test_silence_is_refused(inner: Bubblewrap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bwrap, "START_SECONDS", 0.05)
    with pytest.raises(child.SetupFailed, match="nothing started"):
        inner.await_kernel()
    inner.init_pid = os.getpid()
    with pytest.raises(child.SetupFailed, match="did not get to its command"):
        inner.release()


def test_it_goes_on_once_the_init_says_that_the_kernel_runs(inner: Bubblewrap) -> None:
    inner.init_pid = os.getpid()
    speak_as_another(inner, {"failed": "command not heard"})
    speak(inner, {"executed": True})
    inner.release()
    assert os.read(inner._release_r, 10) == b"g"
    assert inner.status.getblocking() is False


@pytest.mark.parametrize(
    ("said", "stage", "words"),
    [
        ({"failed": "command FileNotFoundError: x"}, "command", "FileNotFoundError: x"),
        ({"failed": "sandbox OSError: y"}, "sandbox", "OSError: y"),
        ({"hello": 1}, "sandbox", "bubblewrap ended"),
        (None, "sandbox", "bubblewrap ended"),
    ],
)
def test_why_the_kernel_was_not_executed(
    inner: Bubblewrap, said: dict[str, Any] | None, stage: str, words: str
) -> None:
    inner.init_pid = os.getpid()
    if said is not None:
        speak(inner, said)
    else:
        inner._init_end.shutdown(socket.SHUT_WR)
    with pytest.raises(child.SetupFailed) as caught:
        inner.release()
    assert (caught.value.stage, caught.value.message) == (stage, words)


def test_the_directory_of_the_sockets_comes_from_the_init_alone(
    inner: Bubblewrap, tmp_path: Path
) -> None:
    theirs = os.open(tmp_path, os.O_PATH)
    socket.send_fds(inner._init_end, [b'{"who":"init"}'], [theirs])
    for _ in range(3):
        socket.send_fds(inner._init_end, [b'{"who":"kernel"}'], [theirs])
    assert inner.await_kernel() and os.readlink(f"/proc/self/fd/{inner.sockets}") == str(tmp_path)
    inner.status.setblocking(False)
    assert inner.kernel_ending() is None
    held = [
        fd
        for fd in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{fd}") == str(tmp_path)
    ]
    assert sorted(held) == sorted(map(str, (theirs, inner.sockets))), "what came later is closed"
    os.close(inner.sockets)
    os.close(theirs)


def test_nobody_but_the_init_says_how_the_kernel_ended(inner: Bubblewrap) -> None:
    inner.init_pid = os.getpid()
    inner.status.setblocking(False)
    assert inner.kernel_ending() is None
    speak_as_another(inner, {"status": 0, "cpu": 0, "resident": 0, "orphans": 0, "caught": None})
    assert inner.kernel_ending() is None
    speak(inner, "rubbish")
    speak(inner, {"who": "init"})
    speak(inner, {"status": 9, "cpu": 1.5, "resident": 4096, "orphans": 8192, "caught": 7})
    assert inner.kernel_ending() == KernelEnding(
        status=9, cpu_seconds=1.5, resident_peak=4096, orphans_peak=8192, caught_signals=7
    )
    assert not inner.is_closed
    inner._init_end.shutdown(socket.SHUT_WR)
    assert inner.kernel_ending() is None
    assert inner.is_closed, "nobody is to wait for more"


def test_the_init_gets_the_command_and_its_directories(tmp_path: Path) -> None:
    command = KernelCommand(
        argv=("x",),
        env={"A": "\udce9"},
        cwd="/",
        rlimits=((1, 2, 3),),
        open_files_soft=5,
        walls=Walls(uid=7),
    )
    fd = os.open(tmp_path / "config", os.O_RDWR | os.O_CREAT)
    bwrap._write_config(fd, command, SETUP, restorable=False)
    config = marshal.loads(os.pread(fd, 9999, 0))
    os.close(fd)
    assert (config["sockets"], config["discarded"]) == ("/run/x", ["/home/me"])
    received = child.command_from(config["command"])
    assert (list(received.argv), received.env, received.cwd) == (["x"], {"A": "\udce9"}, "/")
    assert ([list(row) for row in received.rlimits], received.open_files_soft) == ([[1, 2, 3]], 5)
    assert received.walls is not None
    assert (received.walls.uid, received.walls.landlock, received.walls.seccomp) == (7, None, None)


# --- a folder of limited size -----------------------------------------------------------------------------------


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The mounts that were asked for; overlays are not to be had."""
    found: list[dict[str, Any]] = []

    def make(mount: dict[str, Any]) -> None:
        found.append(mount)
        if mount["kind"] == "overlay":
            raise OSError(errno.EINVAL, "no overlays")

    def unmount(path: str) -> bool:
        found.append({"kind": "unmount", "target": path})
        assert file_tree.remove_tree(path)
        os.mkdir(path)
        return True

    monkeypatch.setattr(mounts, "make", make)
    monkeypatch.setattr(bwrap, "unmount", unmount)
    return found


def disk_of(tmp_path: Path, owner: int | None = None) -> LimitedDisk:
    folder, base = tmp_path / "folder", tmp_path / "base"
    folder.mkdir()
    base.mkdir()
    (folder / "file").write_bytes(b"x" * 5000)
    (folder / "inner").mkdir()
    return LimitedDisk(
        base=str(base),
        folder=str(folder),
        size=1 << 20,
        inodes=1024,
        write_back=True,
        owner=owner,
    )


def test_where_there_are_no_overlays_the_folder_is_copied_and_has_room_besides(
    tmp_path: Path, mounted: list[dict[str, Any]]
) -> None:
    bwrap.make_disk(disk_of(tmp_path))
    assert [mount["kind"] for mount in mounted] == ["tmpfs", "overlay", "unmount", "tmpfs"]
    assert mounted[0]["options"] == f"size={1 << 20},nr_inodes=1024,mode=0755"
    assert (
        mounted[-1]["options"]
        == f"size={(1 << 20) + 2 * 4096 + 4096},nr_inodes={1024 + 2 + 8},mode=0755"
    )
    base = tmp_path / "base"
    assert (base / "folder" / "file").stat().st_size == 5000
    assert [(base / name).stat().st_mode & 0o7777 for name in ("tmp", "home")] == [0o1777, 0o755]


def test_for_another_user_it_is_always_a_copy(
    tmp_path: Path, mounted: list[dict[str, Any]]
) -> None:
    bwrap.make_disk(disk_of(tmp_path, owner=os.getuid()))
    assert [mount["kind"] for mount in mounted] == ["tmpfs"]
    assert (tmp_path / "base" / "folder" / "file").stat().st_uid == os.getuid()


def test_an_overlay_costs_nothing_of_the_size(
    tmp_path: Path, mounted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "make", mounted.append)
    bwrap.make_disk(disk_of(tmp_path))
    assert [mount["kind"] for mount in mounted] == ["tmpfs", "overlay"]
    assert mounted[1]["lower"] == str(tmp_path / "folder") and mounted[1]["target"] == str(
        tmp_path / "base" / "folder"
    )


def test_what_is_too_large_is_not_copied(
    tmp_path: Path, mounted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bwrap, "COPY_BYTES", 5000)
    with pytest.raises(OSError, match=r"too large to be copied .*--cwd") as caught:
        bwrap.make_disk(disk_of(tmp_path, owner=os.getuid()))
    assert caught.value.errno == errno.EFBIG and mounted == []


def test_sizes_are_whole_pages(tmp_path: Path) -> None:
    for name, size in (("a", 0), ("b", 1), ("c", 4096), ("d", 4097)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "link").symlink_to("a")
    assert bwrap._measure(tmp_path) == ((0 + 1 + 1 + 2 + 1) * 4096, 5 + 8)
