"""A process that fills its memory and exits at once never passes the limit unnoticed: the run ends, or the verdict says what was not seen.

Without control groups, as root and as an ordinary user, so that the watchdog alone holds the limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import NOBODY, make_notebook, ordinary_user, private_directory, run_notebook

pytestmark = [pytest.mark.kills, pytest.mark.bed("ordinary-user")]

OPTIONS = ("--memory", "160M", "--mechanisms", "rlimit,watchdog", "--no-bisect")
FILL = "block = bytearray(b'x') * ({} << 20)"
PROGRAM = FILL.format(170)
FOR_A_MOMENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-IS", "-c", {PROGRAM!r}], check=True)
"""
IN_GRANDCHILDREN = f"""
import subprocess, sys
subprocess.run([sys.executable, "-IS", "-c", {(FOR_A_MOMENT * 3)!r}], check=True)
"""
IN_AN_ORPHAN = f"""
import os, sys
reader, writer = os.pipe()
os.set_inheritable(writer, True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-IS", "-c", {PROGRAM!r}])
    os._exit(0)
os.wait()
os.close(writer)
os.read(reader, 1)  # until it has ended
"""
OF_THE_KERNEL = "kept = bytearray(b'x') * (110 << 20)\ndel kept"
SHARED_BY_FORKS = """
import os
kept = bytearray(b"x") * (90 << 20)
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        sum(kept[::4096])
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.fixture(params=["root", "user"])
def who(request: pytest.FixtureRequest) -> list[str]:
    return ordinary_user() if request.param == "user" else []


@pytest.fixture
def folder() -> Iterator[Path]:
    with private_directory() as path:
        os.chown(path, NOBODY, NOBODY)
        yield path


def verdict_of(folder: Path, who: list[str], cell: str) -> dict[str, object]:
    path = make_notebook(folder / "nb.ipynb", "x = 1", cell, "import time\ntime.sleep(0.1)")
    os.chown(path, NOBODY, NOBODY)
    home = {"HOME": str(folder)}
    verdict: dict[str, object] = run_notebook(path, *OPTIONS, prefix=who, env=home).verdict
    return verdict


@pytest.mark.parametrize(
    "cell", [FOR_A_MOMENT, IN_GRANDCHILDREN, IN_AN_ORPHAN], ids=["child", "grandchildren", "orphan"]
)
def test_a_short_peak_is_seen_or_told(folder: Path, who: list[str], cell: str) -> None:
    verdict = verdict_of(folder, who, cell)
    if verdict["status"] == "passed":
        assert verdict["usage"]["memory_lower_bound"]  # type: ignore[index]
        assert "for a moment" in " ".join(verdict["warnings"])  # type: ignore[arg-type]
    else:
        cause = verdict["cause"]
        assert (verdict["status"], cause["kind"]) == ("kernel_died", "out_of_memory")  # type: ignore[index]


@pytest.mark.parametrize(
    "cell", [OF_THE_KERNEL, SHARED_BY_FORKS], ids=["kernel", "shared with forks"]
)
def test_nobody_is_suspected_below_the_limit(folder: Path, who: list[str], cell: str) -> None:
    verdict = verdict_of(folder, who, cell)
    assert verdict["status"] == "passed" and verdict["warnings"] == []
    assert not verdict["usage"]["memory_lower_bound"]  # type: ignore[index]
