"""However an interactive kernel ends, nothing of it is left: processes, control groups, directories."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_interactive import READY_SECONDS, SEGFAULT, Manager
from tests.support import MARK, marked_processes, wait_until

pytestmark = pytest.mark.kills
RUNTIME_DIRECTORY = re.compile(rb"/[^\0]*/safe-exec-[0-9a-f]{12}(?=/)")
GROUP = re.compile(r":(/\S*safe-exec-\S*)")


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 20, "no process is left")


def places(mark: str) -> set[str]:
    """Control groups and runtime directories of the kernels that run now."""
    found: set[str] = set()
    for pid in marked_processes(mark):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            found |= {directory.decode() for directory in RUNTIME_DIRECTORY.findall(command)}
            for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
                for group in GROUP.findall(line):
                    controllers = line.split(":")[1].removeprefix("name=")
                    found |= {f"/sys/fs/cgroup/{controllers or 'unified'}{group}"}
    return found


def keeper_of(mark: str, launcher: int) -> int:
    for pid in marked_processes(mark):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == launcher:
                return pid
    raise AssertionError("no keeper")


class Started:
    """A kernel that is up."""

    def __init__(self, manager: Manager, client: Any, mark: str) -> None:
        self.manager, self.client, self.mark = manager, client, mark

    @property
    def launcher(self) -> int:
        return int(self.manager.provisioner.process.pid)


async def shut_down(started: Started) -> None:
    await started.manager.shutdown_kernel()


async def kill_launcher(started: Started) -> None:
    os.kill(started.launcher, signal.SIGKILL)


async def terminate_launcher(started: Started) -> None:
    os.kill(started.launcher, signal.SIGTERM)


async def kill_keeper(started: Started) -> None:
    os.kill(keeper_of(started.mark, started.launcher), signal.SIGKILL)


async def crash(started: Started) -> None:
    started.client.execute(SEGFAULT)


async def leave(started: Started) -> None:
    started.client.execute("exit()")


async def kill_during_a_cell(started: Started) -> None:
    started.client.execute("import subprocess\nsubprocess.run(['sleep', '600'])")
    await asyncio.sleep(0.2)
    os.kill(started.launcher, signal.SIGKILL)


async def restart(started: Started) -> None:
    await started.manager.restart_kernel(now=True)
    await started.client.wait_for_ready(timeout=READY_SECONDS)
    await started.manager.shutdown_kernel(now=True)


WAYS = (
    shut_down,
    kill_launcher,
    terminate_launcher,
    kill_keeper,
    crash,
    leave,
    kill_during_a_cell,
    restart,
)


async def end(folder: Path, mark: str, way: Callable[[Started], Awaitable[None]]) -> set[str]:
    """Start a kernel and end it; the places it had."""
    manager = Manager(connection_file=str(folder / f"{secrets.token_hex(4)}.json"))
    await manager.use("--memory", "300M", "--no-history").start_kernel(cwd=str(folder))
    client = manager.client()
    try:
        client.start_channels()
        await client.wait_for_ready(timeout=READY_SECONDS)
        had = places(mark)
        await way(Started(manager, client, mark))
        async with asyncio.timeout(30):
            while await manager.is_alive():  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.02)
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)
    return had


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_is_left(
    tmp_path: Path, mark: str, way: Callable[[Started], Awaitable[None]]
) -> None:
    had = asyncio.run(end(tmp_path, mark, way))
    assert had, "a kernel has a directory at least"
    wait_until(lambda: not [place for place in had if os.path.exists(place)], 20, f"{had} are gone")
