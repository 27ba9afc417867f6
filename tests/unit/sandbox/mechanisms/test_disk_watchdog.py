"""What is counted of what a run writes, and when it is passed on; and what is held open and shown by no directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safe_exec.sandbox.mechanisms.disk_watchdog import PAGE, DiskWatch, free_of, size_of
from safe_exec.sandbox.usage.open_files import hidden_usage
from safe_exec.sandbox.usage.process_tree import ProcessTree
from tests.support import wait_until

MIB = 1 << 20
HOLDER = """
import os, sys
memory = os.memfd_create("hog")
os.write(memory, bytes(8 << 20))
os.dup(memory)
removed = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
os.write(removed, b"x" * (4 << 20))
os.unlink(sys.argv[1])
there = open(sys.argv[1] + "-there", "wb")
there.write(b"x" * (4 << 20))
if os.fork() == 0:  # it holds the same
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
os.wait()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", HOLDER, str(tmp_path / "file")]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_what_is_held_open_counts_once(holder: subprocess.Popen[str]) -> None:
    child = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
    found = hidden_usage([holder.pid, child, 1 << 30])
    assert list(found.memory.values()) == [8 * MIB]
    assert sum(found.removed.values()) == pytest.approx(4 * MIB, abs=64 << 10), (
        "of files that are there directories tell"
    )


def test_files_in_memory_count_as_memory_without_being_mapped(
    holder: subprocess.Popen[str],
) -> None:
    tree = ProcessTree(os.getpid())
    use = tree.read()
    assert use.memory > 8 * MIB
    exact = tree.count().memory
    assert exact > 8 * MIB


def test_size_of_a_place(tmp_path: Path) -> None:
    assert size_of([str(tmp_path)]) == 0
    (tmp_path / "a").write_bytes(b"x" * (3 * PAGE))
    os.link(tmp_path / "a", tmp_path / "a-again")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "empty").touch()
    (tmp_path / "elsewhere").symlink_to("/usr")
    assert size_of([str(tmp_path)]) == pytest.approx((3 + 4) * PAGE, abs=2 * PAGE)
    assert size_of([str(tmp_path), str(tmp_path / "deep"), "/nonesuch"]) == size_of([str(tmp_path)])
    assert free_of([str(tmp_path), "/nonesuch"]) > 0


def test_it_tells_once_when_too_much_has_come(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(b"x" * (5 * MIB))
    told: list[int] = []
    watch = DiskWatch(os.getpid(), (str(tmp_path),), 2 * MIB, told.append)
    watch.start()
    wait_until(lambda: watch._free > 0, 30, "what was there is known")
    (tmp_path / "new").write_bytes(b"x" * (3 * MIB))
    wait_until(lambda: told, 30, "it is told")
    watch.join(30)
    assert len(told) == 1 and told[0] >= 3 * MIB and not watch.is_alive()


def test_it_stops_when_told_to(tmp_path: Path) -> None:
    watch = DiskWatch(
        os.getpid(), (str(tmp_path),), 2 * MIB, lambda _used: pytest.fail("nothing was written")
    )
    watch.start()
    watch.stop()
    assert not watch.is_alive()
