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
from safe_exec.keeper.bwrap import Enclosed

SPEAK = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(sys.argv[2].encode())"


@pytest.fixture
def inner() -> Iterator[Enclosed]:
    found = Enclosed()
    yield found
    found.status.close()
    found._theirs.close()
    for fd in (found._go_r, found._go_w):
        with contextlib.suppress(OSError):  # closed as it went on
            os.close(fd)


def speak(inner: Enclosed, text: str | dict[str, Any]) -> None:
    """As this process."""
    inner._theirs.send((text if isinstance(text, str) else json.dumps(text)).encode())


def speak_as_another(inner: Enclosed, text: dict[str, Any]) -> int:
    """As another process that got hold of the socket; its id."""
    fd = inner._theirs.fileno()
    other = subprocess.Popen(
        [sys.executable, "-c", SPEAK, str(fd), json.dumps(text)], pass_fds=[fd]
    )
    assert other.wait(30) == 0
    return other.pid


def test_init_and_kernel_are_known_by_who_spoke(inner: Enclosed) -> None:
    speak(inner, {"who": "init"})
    kernel = speak_as_another(inner, {"who": "kernel"})
    assert inner.meet() == kernel != os.getpid()
    assert (inner.init, inner.kernel) == (os.getpid(), kernel)


@pytest.mark.parametrize("last", ["", "no json", "[1]"])
def test_an_end_before_the_kernel_was_met_is_refused(inner: Enclosed, last: str) -> None:
    speak(inner, {"who": "init"})
    if last:
        speak(inner, last)
    else:
        inner._theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(child.Refused) as caught:
        inner.meet()
    assert caught.value.stage == "sandbox"


def test_silence_is_refused(inner: Enclosed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bwrap, "MEET_SECONDS", 0.05)
    with pytest.raises(child.Refused, match="nothing started"):
        inner.meet()
    inner.init = os.getpid()
    with pytest.raises(child.Refused, match="did not get to its command"):
        inner.go()


def test_it_goes_on_once_the_init_says_that_the_kernel_runs(inner: Enclosed) -> None:
    inner.init = os.getpid()
    speak_as_another(inner, {"failed": "command not heard"})
    speak(inner, {"executed": True})
    inner.go()
    assert os.read(inner._go_r, 10) == b"g"
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
    inner: Enclosed, said: dict[str, Any] | None, stage: str, words: str
) -> None:
    inner.init = os.getpid()
    if said is not None:
        speak(inner, said)
    else:
        inner._theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(child.Refused) as caught:
        inner.go()
    assert (caught.value.stage, caught.value.message) == (stage, words)


def test_the_directory_of_the_sockets_comes_from_the_init_alone(
    inner: Enclosed, tmp_path: Path
) -> None:
    theirs = os.open(tmp_path, os.O_PATH)
    socket.send_fds(inner._theirs, [b'{"who":"init"}'], [theirs])
    for _ in range(3):
        socket.send_fds(inner._theirs, [b'{"who":"kernel"}'], [theirs])
    assert inner.meet() and os.readlink(f"/proc/self/fd/{inner.sockets}") == str(tmp_path)
    inner.status.setblocking(False)
    assert inner.ending() is None
    held = [
        fd
        for fd in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{fd}") == str(tmp_path)
    ]
    assert sorted(held) == sorted(map(str, (theirs, inner.sockets))), "what came later is closed"
    os.close(inner.sockets)
    os.close(theirs)


def test_nobody_but_the_init_says_how_the_kernel_ended(inner: Enclosed) -> None:
    inner.init = os.getpid()
    inner.status.setblocking(False)
    assert inner.ending() is None
    speak_as_another(inner, {"status": 0, "cpu": 0, "maxrss": 0})
    assert inner.ending() is None
    speak(inner, "rubbish")
    speak(inner, {"who": "init"})
    speak(inner, {"status": 9, "cpu": 1.5, "maxrss": 7})
    assert inner.ending() == {"status": 9, "cpu": 1.5, "maxrss": 7}
    assert not inner.over
    inner._theirs.shutdown(socket.SHUT_WR)
    assert inner.ending() is None
    assert inner.over, "nobody is to wait for more"


def test_the_init_is_told_what_it_needs_and_no_more(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {
        "argv": ["x"], "env": {"A": "\udce9"}, "cwd": "/", "rlimits": [[1, 2, 3]], "open_files_soft": 5, "walls": {"uid": 7},
        "sockets": "/run/x", "discarded": ["/home/me"],
    }  # fmt: skip
    fd = os.open(tmp_path / "config", os.O_RDWR | os.O_CREAT)
    bwrap._write_config(fd, {**wanted, "cgroup_joins": ["/x"], "enclosure": {}, "keeper": 1})
    assert marshal.loads(os.pread(fd, 9999, 0)) == wanted
    os.close(fd)


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


def disk_of(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    folder, base = tmp_path / "folder", tmp_path / "base"
    folder.mkdir()
    base.mkdir()
    (folder / "file").write_bytes(b"x" * 5000)
    (folder / "inner").mkdir()
    return {
        "base": str(base),
        "folder": str(folder),
        "size": 1 << 20,
        "inodes": 1024,
        "owner": None,
        **changes,
    }


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
