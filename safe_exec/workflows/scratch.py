"""Run a notebook in copies of its folder, without documents, for ``probe`` and ``replay``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from safe_exec.errors import SandboxError
from safe_exec.sandbox.stale_runs import sweep
from safe_exec.workflows.job import PreparedJob
from safe_exec.workflows.run import request_for
from safe_exec.workflows.signals import signals

if TYPE_CHECKING:
    from safe_exec.experiments.rerun import Rerunner
    from safe_exec.model.limits import Limits
    from safe_exec.trial.request import Cancellation


class ScratchRuns(Struct, frozen=True, kw_only=True):
    """A notebook that can run any number of times, each time in a new copy of its folder."""

    prepared: PreparedJob
    rerunner: Rerunner
    cancellation: Cancellation

    @property
    def gaps(self) -> tuple[str, ...]:
        """The places where a run may see files of an earlier run."""
        return self.rerunner.workspaces.gaps

    @property
    def cell_limits(self) -> Callable[[Any], Limits]:
        """The limits of each cell, as the user set them."""
        return self.rerunner.template.cell_limits


@contextlib.asynccontextmanager
async def open_scratch(prepared: PreparedJob) -> AsyncIterator[ScratchRuns]:
    """Copy the folder as it is now; each run uses a new copy of that copy.

    A signal ends the current run; ``cancellation`` prevents later ones. Raises SandboxError if the
    folder cannot be copied.
    """
    from safe_exec.cache import cache_root
    from safe_exec.experiments.rerun import Rerunner
    from safe_exec.experiments.trial_cache import claim_folder, release_folder, tidy
    from safe_exec.experiments.workspace import take, workspace_factory
    from safe_exec.trial.request import Cancellation
    from safe_exec.workflows.bisect import repository_of

    cancellation = Cancellation()
    ours = frozenset(path.resolve() for path in prepared.paths.documents)
    with signals(cancellation.arrive), contextlib.ExitStack() as stack:
        sweep()
        try:
            # Copies can be large: those of searches that nobody continued are deleted first.
            tidy(cache_root())
            scratch = claim_folder(cache_root(), prepared.run_id)
            stack.callback(release_folder, scratch)
            snapshot = await asyncio.to_thread(
                take, prepared.paths.cwd, scratch, ours=ours, repository=repository_of(prepared)
            )
            # A copy that is not fully independent is accepted; ``gaps`` reports it.
            workspaces = workspace_factory(snapshot, ours=ours, insist=True)
        except OSError as error:
            raise SandboxError(
                f"{prepared.paths.cwd}: the folder cannot be copied: {error}"
            ) from error
        plan = prepared.plan()
        # The events of these runs are reported by the caller, one line per run.
        template = request_for(prepared, plan, prepared.node, cancellation, lambda _event: None)
        yield ScratchRuns(
            prepared=prepared, rerunner=Rerunner(template, workspaces), cancellation=cancellation
        )
