"""A kernel that is started while another trial's cells run, for the trial that comes next."""

from __future__ import annotations

import os

import psutil
from msgspec import Struct
from msgspec.structs import replace

from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.rerun import isolated_request
from safe_exec.experiments.workspace import WorkspaceFactory
from safe_exec.trial.request import TrialRequest
from safe_exec.trial.run import Trial

# With a single processor a second kernel would only slow down the running trial.
TWO_PROCESSORS = 2
# What must be free beside the limit on memory (beside as much again, where there is none) before a
# second kernel is started: it only starts.
ROOM_BYTES = 1 << 30


class StartedTrial(Struct, frozen=True, kw_only=True):
    """A trial whose kernel is starting, and the request that created its sandbox."""

    trial: Trial
    request: TrialRequest


class SpareKernel:
    """The kernel of the next trial, in a sandbox and folder of its own. ``close()`` ends it."""

    def __init__(self, subject: Subject, workspaces: WorkspaceFactory) -> None:
        self._subject, self._workspaces = subject, workspaces
        self._next: StartedTrial | None = None

    def has_room(self) -> bool:
        """Tell whether the machine has room for one more kernel."""
        required_bytes = (self._subject.request.limits.memory or ROOM_BYTES) + ROOM_BYTES
        processors = os.cpu_count() or 1
        return processors >= TWO_PROCESSORS and psutil.virtual_memory().available > required_bytes

    def take(self) -> StartedTrial:
        """Return the spare kernel, or a new one, so that no sandbox is ever used twice.

        Raises RerunFailed.
        """
        started, self._next = self._next or self._start(), None
        return started

    async def prepare(self) -> None:
        """Start the kernel while others run, if the machine has room. Raises RerunFailed."""
        if self._next is None and self.has_room():
            self._next = self._start()

    async def close(self) -> None:
        """End the kernel if no query has taken it."""
        started, self._next = self._next, None
        if started is not None:
            await started.trial.discard()

    def _start(self) -> StartedTrial:
        subject = self._subject
        request = isolated_request(subject.request, self._workspaces, node=subject.node)
        request = replace(request, before_cells=self.prepare)
        trial = Trial(request)
        trial.warm()
        return StartedTrial(trial=trial, request=request)
