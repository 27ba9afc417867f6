"""A Slurm of one node for tests, from the system's packages: munged, slurmctld and slurmd as processes of the test."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Self

from tests.support import wait_until

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP
"""


class OneNodeSlurm:
    """A context manager; ``env`` is the environment for sbatch and the others. Needs root.

    ``base`` is an empty directory with a short path.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.env = {**os.environ, "SLURM_CONF": str(base / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for name in ("state", "spool"):
            (self.base / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(host=host, base=self.base, ports=[_free_port(), _free_port()])
        (self.base / "slurm.conf").write_text(text)
        key = self.base / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        munge = {name: f"{self.base}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
        self._start(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={munge['socket']}",
            f"--pid-file={munge['pid']}",
            f"--log-file={munge['log']}",
            f"--seed-file={munge['seed']}",
        )
        wait_until(lambda: Path(munge["socket"]).exists(), 30, "munge")
        self._start("slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        self._start("slurmd", "-D", "-f", self.env["SLURM_CONF"])
        wait_until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%t"), 60, "the node")
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user", "root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(30)

    def run(self, *argv: str) -> str:
        """Run a command of Slurm and return its output, whatever its exit status."""
        return subprocess.run(
            argv, env=self.env, capture_output=True, text=True, timeout=120, check=False
        ).stdout

    def _start(self, *argv: str) -> None:
        with (self.base / f"{argv[0]}.out").open("wb") as log:
            self._daemons.append(subprocess.Popen(argv, env=self.env, stdout=log, stderr=log))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
