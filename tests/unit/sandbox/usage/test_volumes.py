"""The free space of directories, read through a process's root and kept at its lowest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from safe_exec.sandbox.usage.volumes import Volumes


class Figures:
    """What statvfs(2) says."""

    def __init__(self, *, free: int, inodes: int = 10, counted: int = 100) -> None:
        self.f_blocks, self.f_frsize, self.f_bavail = 16, 1024, free
        self.f_files, self.f_favail = counted, inodes


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figures]:
    """What is measured next; the last stays."""
    queue = [Figures(free=16)]
    monkeypatch.setattr(
        "safe_exec.sandbox.usage.volumes.os.fstatvfs",
        lambda _fd: queue.pop(0) if len(queue) > 1 else queue[0],
    )
    return queue


def test_the_lowest_free_space_is_kept(tmp_path: Path, figures: list[Figures]) -> None:
    volumes = Volumes(os.getpid(), [str(tmp_path)])
    for free in (3, 9):
        figures[:] = [Figures(free=free)]
        volumes.measure()
    assert [volume.free for volume in volumes.lowest()] == [3 * 1024]
    volumes.begin()
    assert volumes.lowest() == ()
    volumes.close()


def test_without_an_inode_there_is_no_room(tmp_path: Path, figures: list[Figures]) -> None:
    volumes = Volumes(os.getpid(), [str(tmp_path)])
    figures[:] = [Figures(free=9, inodes=0)]
    volumes.measure()
    assert [volume.free for volume in volumes.lowest()] == [0]
    figures[:] = [Figures(free=9, inodes=0, counted=0)]
    volumes.begin()
    volumes.measure()
    assert [volume.free for volume in volumes.lowest()] == [9 * 1024]
    volumes.close()


def test_directories_of_one_file_system_are_one_volume(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    volumes = Volumes(
        os.getpid(), [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "missing"), str(tmp_path)]
    )
    volumes.measure()
    (volume,) = volumes.lowest()
    assert volume.places == (str(tmp_path), str(tmp_path / "a"))
    assert not volume.own
    assert volume.size == os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    volumes.close()


def test_the_machines_own_are_not_looked_at_all_the_time(tmp_path: Path) -> None:
    volumes = Volumes(os.getpid(), [str(tmp_path)])
    volumes.measure(own=True)
    assert volumes.lowest() == ()
    volumes.close()


def test_a_process_that_is_gone_has_none(tmp_path: Path) -> None:
    volumes = Volumes(2**22 + 1, [str(tmp_path)])
    volumes.measure()
    assert volumes.lowest() == ()
    volumes.close()
    volumes.close()


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    volumes = Volumes(os.getpid(), [str(tmp_path), "/", str(tmp_path)])
    volumes.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
