"""A trial of the culprits that is watched for the holders of memory. It answers no query."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.rerun import RerunFailed, isolated_request
from safe_exec.experiments.workspace import WorkspaceFactory
from safe_exec.kernel.allocation_file import AllocationFile
from safe_exec.trial.request import TrialRequest, TrialResult
from safe_exec.trial.run import Trial


class ObservedTrial(Struct, frozen=True, kw_only=True):
    """A trial that was run to observe its memory, and its request."""

    result: TrialResult
    request: TrialRequest


async def observe_memory(
    subject: Subject, workspaces: WorkspaceFactory, node: Any, time_budget: float
) -> ObservedTrial | None:
    """Run a notebook once more with a thorough census of the memory, and recorded allocations.

    ``None`` if it cannot be run. It answers no query: recording takes time and memory.
    """
    try:
        template = isolated_request(subject.request, workspaces, node=node)
        timeout = template.limits.timeout
        budget = time_budget if timeout is None else min(timeout, time_budget)
        # The reader of the record is native code, and runs outside of the walls.
        records = not template.plan.walls
        with AllocationFile(workspaces.snapshot.scratch, records=records) as allocations:
            limits = replace(template.limits, timeout=budget)
            request = replace(template, allocations=allocations, limits=limits)
            result = await Trial(request).run()
    except (OSError, RerunFailed):
        # No space for the file or the folder. The culprits are known all the same.
        return None
    return ObservedTrial(result=result, request=template)
