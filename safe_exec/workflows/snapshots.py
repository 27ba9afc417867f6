"""Decides whether a run leaves sleeping copies of its kernel, to go on after a failure."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from safe_exec.kernel.launch import find_spec
from safe_exec.sandbox.keeper_process import runtime_directory

if TYPE_CHECKING:
    from pathlib import Path

    from safe_exec.kernel.snapshots import KernelSnapshots
    from safe_exec.model.limits import Limits
    from safe_exec.sandbox.plan import SpawnPlan
    from safe_exec.workflows.job import Job, PreparedJob

# A copy takes two processes for a moment, and one for as long as it sleeps.
LEAST_PROCESSES = 64


def leaves_snapshots(job: Job, plan: SpawnPlan, limits: Limits, kernel_name: str) -> bool:
    """Whether the kernels of a run leave copies of themselves, with ``--keep-going``."""
    return (
        job.keep_going
        and sys.platform == "linux"
        # The init of bubblewrap ends with the first kernel, and all processes with it.
        and not plan.enclosed
        and not plan.walls
        # A copy would read the answers from the first one again, and measure no lines.
        and job.inputs.stdin is None
        and job.coverage is None
        and (limits.processes is None or limits.processes >= LEAST_PROCESSES)
        and find_spec(kernel_name) is not None
    )


def snapshots_of(prepared: PreparedJob, cwd: Path) -> KernelSnapshots:
    """Return a receiver for the copies of a kernel that runs in ``cwd``."""
    from safe_exec.kernel.snapshots import KernelSnapshots
    from safe_exec.workflows.bisect import documents_of

    base, name = os.path.split(runtime_directory(prepared.run_id))
    ours = [os.path.join(base, name.partition("-")[0]), *map(str, documents_of(prepared))]
    return KernelSnapshots([str(cwd.resolve())], [*ours, *_own_output()])


def _own_output() -> list[str]:
    """Return the paths of the files that this process's output goes to (``safe-exec ... > log``)."""
    paths = []
    for number in (1, 2):
        with contextlib.suppress(OSError):
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in paths if path.startswith("/")]
