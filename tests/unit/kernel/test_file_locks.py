"""Locks that an error is about, found in the real /proc: own ones, a child's, and a stranger's."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from safe_exec.kernel.file_locks import named_lock

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another(path: Path) -> Iterator[int]:
    """A process that holds a lock on a file; its pid."""
    argv = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder.pid
        holder.communicate()


@pytest.mark.parametrize(
    ("words", "source"),
    [
        ("[Errno 11] unable to lock file, name = 'core.hdf'", ""),
        ("Could not set lock on file '/x/core.hdf': Conflicting lock is held in python", ""),
        ("[Errno 13] Permission denied: b'core.hdf'", ""),
        # HDF5 does not name the file, but the cell does.
        ("Unable to synchronously create file (unable to lock file)", "h5py.File('core.hdf', 'w')"),
        ("unable to truncate a file which is already open", "h5py.File('core.hdf', 'w')"),
    ],
)
def test_a_lock_of_another_process(tmp_path: Path, words: str, source: str) -> None:
    path = tmp_path / "core.hdf"
    with held_by_another(path) as holder:
        lock = named_lock(words, source, os.getpid(), [holder])
    assert lock is not None
    assert (lock.path, lock.holder, lock.own) == (str(path), holder, False)
    assert lock.command is not None
    assert "fcntl.flock" in lock.command


def test_a_lock_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "run.nc"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        lock = named_lock("PermissionError: Permission denied: 'run.nc'", "", os.getpid(), [])
    assert lock is not None
    assert (lock.path, lock.own) == (str(path), True)
    assert named_lock("PermissionError: Permission denied: 'run.nc'", "", os.getpid(), []) is None


def test_a_lock_of_a_stranger_on_a_file_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shop.duckdb"
    monkeypatch.chdir(tmp_path)
    with held_by_another(path) as holder:
        for name in ("shop.duckdb", path):
            lock = named_lock(f'Could not set lock on file "{name}"', "", os.getpid(), [])
            assert lock is not None
            assert (lock.holder, lock.own) == (holder, False)
        # Links are not followed: the notebook may set them.
        (tmp_path / "link").symlink_to(path)
        assert named_lock('Could not set lock on file "link"', "", os.getpid(), []) is None


@pytest.mark.parametrize(
    ("words", "source"),
    [
        # Words of another kind, or about another file.
        ("FileNotFoundError: No such file or directory: 'core.hdf'", ""),
        ("Could not set lock on file 'other.hdf'", ""),
        ("Could not set lock on file 'my-core.hdf'", ""),
        # A refused access that names no file says nothing of the cell's other files.
        ("PermissionError: Permission denied", "open('core.hdf')"),
    ],
)
def test_an_error_about_something_else(tmp_path: Path, words: str, source: str) -> None:
    with held_by_another(tmp_path / "core.hdf") as holder:
        assert named_lock(words, source, os.getpid(), [holder]) is None
