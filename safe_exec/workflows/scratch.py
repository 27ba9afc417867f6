"""Runs of a notebook that leave nothing beside it: each in a copy of its folder, no document written.

May import pipeline, culprit and what is below. ``probe`` and ``replay`` run notebooks this way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from safe_exec.errors import SandboxError
from safe_exec.sandbox.stale_runs import sweep
from safe_exec.workflows.prepare import PreparedJob
from safe_exec.workflows.run import request_for, signals

if TYPE_CHECKING:
    from safe_exec.experiments.rerun import Rerunner
    from safe_exec.model.limits import Limits
    from safe_exec.trial.request import Cancellation


class ScratchRuns(Struct, frozen=True, kw_only=True):
    """A notebook that is ready to be run as often as one likes. ``gaps`` say what a run may still see of an earlier one."""

    prepared: PreparedJob
    rerunner: Rerunner
    cancellation: Cancellation

    @property
    def gaps(self) -> tuple[str, ...]:
        """What could not be kept apart."""
        return self.rerunner.workspaces.gaps

    @property
    def cell_limits(self) -> Callable[[Any], Limits]:
        """The limits of each cell as the user set them."""
        return self.rerunner.template.cell_limits


@contextlib.asynccontextmanager
async def open_scratch(prepared: PreparedJob) -> AsyncIterator[ScratchRuns]:
    """Keep the folder as it is now, and run in copies of it. Signals end the run under way and are told to whoever asks.

    Raises SandboxError where the folder cannot be kept.
    """
    from safe_exec.experiments.rerun import Rerunner
    from safe_exec.experiments.trial_cache import cache_root, claim_folder, release_folder, tidy
    from safe_exec.experiments.workspace import take, workspace_factory
    from safe_exec.trial.request import Cancellation
    from safe_exec.workflows.bisect import repository_of

    cancellation = Cancellation()
    ours = frozenset(path.resolve() for path in prepared.paths.documents)
    with signals(cancellation.arrive), contextlib.ExitStack() as stack:
        sweep()
        try:
            tidy(cache_root())
            scratch = claim_folder(cache_root(), prepared.run_id)
            stack.callback(release_folder, scratch)
            snapshot = await asyncio.to_thread(
                take, prepared.paths.cwd, scratch, ours=ours, repository=repository_of(prepared)
            )
            workspaces = workspace_factory(snapshot, ours=ours, insist=True)
        except OSError as error:
            raise SandboxError(
                f"{prepared.paths.cwd}: the folder cannot be kept as it is: {error}"
            ) from error
        plan = prepared.plan()
        template = request_for(prepared, plan, prepared.node, cancellation, lambda _event: None)
        yield ScratchRuns(
            prepared=prepared, rerunner=Rerunner(template, workspaces), cancellation=cancellation
        )
