"""A dask cluster for tests: a scheduler and workers as real processes on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.support import wait_until

SCHEDULER = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
WORKER = [sys.executable, "-m", "distributed.cli.dask_worker"]
MEMORY = "1GiB"


class DaskCluster:
    """A scheduler and workers; a context manager that kills all of them at the end.

    ``directory`` holds logs and the scheduler file; ``env`` is the environment of all processes.
    """

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        self.directory, self.env = directory, dict(env)
        # Two schedulers of a test in a row must not find each other's file.
        self.file = directory / "scheduler.json"
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.start_scheduler()
        return self

    def __exit__(self, *_: object) -> None:
        for name in tuple(self.workers):
            self.kill_worker(name)
        self.kill_scheduler()

    @property
    def address(self) -> str:
        """The scheduler's address."""
        return str(json.loads(self.file.read_text())["address"])

    def start_scheduler(self, address: str = "tcp://127.0.0.1:0") -> None:
        """Start a scheduler and wait until it listens."""
        self.file.unlink(missing_ok=True)
        argv = [*SCHEDULER, "--host", address, "--no-dashboard", "--scheduler-file", str(self.file)]
        self.scheduler = self._start(argv, "scheduler")
        # dask writes it in place: for a moment it is there and empty.
        wait_until(self._is_announced, 60, "the scheduler's file")

    def _is_announced(self) -> bool:
        return self.file.exists() and self.file.read_text().endswith("}")

    def start_worker(
        self,
        name: str,
        *arguments: str,
        machine: str | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        """Start a worker without a nanny; ``machine`` is its host name (needs root).

        ``prefix`` is a command that starts it elsewhere, such as in a namespace.
        """
        argv = [
            *prefix,
            *WORKER,
            self.address,
            *("--name", name, "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"),
            *("--nthreads", "1", "--memory-limit", MEMORY),
            *("--local-directory", str(self.directory / name)),
            *arguments,
        ]
        if machine is not None:
            # A host name of its own makes this worker another machine.
            script = 'hostname "$0" && exec "$@"'
            argv = ["unshare", "--uts", "sh", "-c", script, machine, *argv]
        self.workers[name] = self._start(argv, name)

    def kill_worker(self, name: str, number: int = signal.SIGKILL) -> None:
        """Kill a worker, and nothing else."""
        process = self.workers.pop(name)
        process.send_signal(number)
        process.wait(60)

    def kill_scheduler(self) -> None:
        """Kill the scheduler."""
        if self.scheduler is not None:
            self.scheduler.kill()
            self.scheduler.wait(60)
            self.scheduler = None

    def log(self, name: str) -> str:
        """Return the output of a process."""
        return (self.directory / f"{name}.log").read_text()

    def _start(self, argv: list[str], name: str) -> subprocess.Popen[bytes]:
        env = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
        env |= self.env
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(argv, env=env, stdout=log, stderr=log, cwd=self.directory)
