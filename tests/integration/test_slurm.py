"""A real Slurm of one node: the commands of docs/cluster.md as written, and jobs that dask-jobqueue starts."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.slurm import OneNodeSlurm
from tests.support import EXECUTABLE, make_notebook, private_directory, wait_until

DOCS = Path(__file__).resolve().parents[2] / "docs/cluster.md"
STATUSES = {
    "notebooks/a.ipynb": "passed",
    "notebooks/b.ipynb": "cell_error",
    "notebooks/c.ipynb": "passed",
    "notebooks/d.ipynb": "kernel_died",
}


@pytest.fixture(scope="module")
def slurm() -> Iterator[OneNodeSlurm]:
    with private_directory() as base, OneNodeSlurm(base) as running:
        path = f"{EXECUTABLE.parent}:{running.env['PATH']}"
        running.env |= {"PATH": path, "XDG_CACHE_HOME": str(base / "cache")}
        yield running


@pytest.fixture
def project(tmp_path: Path) -> Path:
    endings = {"b": "raise ValueError('meant')", "d": "import os\nos._exit(3)"}
    (tmp_path / "notebooks").mkdir()
    for path in STATUSES:
        make_notebook(tmp_path / path, "x = 1", endings.get(Path(path).stem, "print(x)"))
    return tmp_path


def statuses(out: Path) -> dict[str, str]:
    summary = json.loads((out / "summary.json").read_text())
    return {row["path"]: row["status"] for row in summary["notebooks"]}


@pytest.mark.kills
@pytest.mark.bed("slurm")
def test_an_array_job_and_merge(slurm: OneNodeSlurm, project: Path) -> None:
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", DOCS.read_text(), re.DOTALL)
    assert script
    (project / "array.sh").write_text(script[1])
    for line in ("sbatch --wait array.sh", "safe-exec merge shards/* --out safe-exec-out"):
        assert f"    {line}\n" in DOCS.read_text()
        done = subprocess.run(
            line,
            shell=True,
            cwd=project,
            env=slurm.env,
            capture_output=True,
            timeout=200,
            check=False,
        )
    # The worst notebook of all shards.
    assert done.returncode == 3, done.stderr
    assert statuses(project / "safe-exec-out") == STATUSES


@pytest.mark.kills
@pytest.mark.bed("slurm")
def test_jobs_of_dask(slurm: OneNodeSlurm, project: Path) -> None:
    (project / "dask").mkdir()
    (project / "dask/jobqueue.yaml").write_text(
        "jobqueue: {slurm: {cores: 2, memory: 3GiB, processes: 1, walltime: '00:10:00', "
        "interface: lo, local-directory: /tmp}}\n"
    )
    argv = [str(EXECUTABLE), "batch", "notebooks/", "--cluster", "slurm:1", "--limits", "ci"]
    env = slurm.env | {"DASK_CONFIG": str(project / "dask")}
    done = subprocess.run(argv, cwd=project, env=env, capture_output=True, timeout=200, check=False)
    assert done.returncode == 3, done.stderr
    assert statuses(project / "safe-exec-out") == STATUSES
    # The jobs end with the batch.
    wait_until(lambda: slurm.run("squeue", "-h") == "", 60, "the end of the jobs")
