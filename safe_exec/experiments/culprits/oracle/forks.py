"""Answers queries of the culprit search in forks of a live kernel.

One kernel is started for the whole search. It runs no cell itself: it forks a process for each
query. These processes leave sleeping snapshots behind, from which later queries continue. So no
cell runs twice after the same cells, unless its state does not survive a fork.

An answer decides only which trial comes next. Anything unusual ends the use of forks, and the
search continues from scratch. May import trial, kernel, sandbox and the pure parts of this package.
"""

from __future__ import annotations

import asyncio
import copy
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import nbformat
from msgspec.structs import replace

from safe_exec.experiments.culprits.oracle.fork_answers import (
    MOST_SNAPSHOTS,
    Cells,
    ForkAnswer,
    ForkCell,
    ForkEnding,
    answer_of,
    can_ask,
    cells_of_one_process,
    cells_with_files,
    nearest,
    positions_to_keep,
    seconds_allowed,
)
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.culprits.protocol import Outcome
from safe_exec.experiments.rerun import isolated_request
from safe_exec.experiments.workspace import SHM, TMP, WorkspaceFactory
from safe_exec.files import one_line
from safe_exec.kernel.fork_channel import ForkChannel, RootHandover
from safe_exec.kernel.launch import find_spec
from safe_exec.sandbox.keeper_process import runtime_directory
from safe_exec.trial.request import Cancellation, TrialRequest, TrialResult
from safe_exec.trial.run import Trial

# A kernel that does not serve forks by then is not used for it.
READY_SECONDS = 20.0
# Beyond the time that a run may take, until the process that waits for it tells so.
REPORT_SECONDS = 5.0
# How often a signal to us is looked for.
LOOK_SECONDS = 0.2
CLOSE_SECONDS = 5.0
# Runs that took too long, before forks are given up.
MOST_LATE = 2
# Processes that a limit must leave room for beside the snapshots: the kernel's threads, and ours.
OTHER_PROCESSES = 48
MOST_REASONS, LONGEST_REASON = 5, 100
# Why forks are given up when a trial contradicts one of them.
REFUTED = "a run from scratch ended in another way"
# The text of the kernel's only cell. It runs when the forks are no longer needed.
NOTHING = "pass"


class ForksFailed(Exception):  # noqa: N818 - the search goes on without forks
    """The forks cannot be used any longer; the text says why."""


class Forks:
    """The forks of one search. ``close()`` ends the kernel that they come from."""

    def __init__(self, subject: Subject, workspaces: WorkspaceFactory) -> None:
        self._subject, self._workspaces = subject, workspaces
        cells = subject.node.cells[: subject.failure.cell + 1]
        self._sources = {
            index: str(cell.source)
            for index, cell in enumerate(cells)
            if _is_run(cell) and index not in subject.request.skipped
        }
        self._with_files = cells_with_files(self._sources)
        self._of_one_process = cells_of_one_process(self._sources)
        # Why there are none, or no more.
        self.ended: str | None = self._why_never()
        # A failure was seen in a fork: then the others can be told by them too.
        self.has_failed = False
        # States that were not kept, since they do not survive a fork.
        self._unbranchable: dict[str, None] = {}
        self._late = 0
        self._handover: RootHandover | None = None
        self._task: asyncio.Task[TrialResult] | None = None
        # The channels to root and snapshots, by the cells that they have run; last used last.
        self._channels: dict[Cells, ForkChannel] = {}
        # The numbers under which the forks know cells, and those that each of them knows.
        self._numbers: dict[ForkCell, int] = {}
        self._received: dict[ForkChannel, set[int]] = {}

    def _why_never(self) -> str | None:
        request = self._subject.request
        if sys.platform != "linux" or find_spec(request.kernel_name) is None:
            return "this kind of kernel"
        if not can_ask(self._subject.failure):
            return "this kind of failure"
        if request.allow_errors or request.strict_shell or request.stdin_lines is not None:
            return "the options of the run"
        return None

    @property
    def note(self) -> str | None:
        """The reason why the forks do not answer, else the states that do not survive a fork."""
        if self.ended is not None:
            return self.ended
        states = ", ".join(self._unbranchable)
        return f"states that do not survive a fork: {states}" if states else None

    def cells_of(self, indexes: Sequence[int], sources: Sequence[str] = ()) -> Cells:
        """Return the cells to run, as they are in the notebook, or with parts of their sources."""
        texts = sources or [self._sources.get(index, "") for index in indexes]
        return tuple(
            ForkCell(index=index, source=text, may_raise=self._may_raise(index))
            for index, text in zip(indexes, texts, strict=True)
            if index in self._sources
        )

    async def answer(self, cells: Sequence[ForkCell], time_budget: float) -> ForkAnswer | None:
        """Run cells in a fork.

        Returns ``None`` if only a trial from scratch can tell how they end.
        """
        if self.ended is not None:
            return None
        if not self.may_answer(cells):
            self._unbranchable["files that cells write"] = None
            return None
        try:
            if self._task is None:
                await self._start()
            deadline = time.monotonic() + time_budget
            answer = await self._run_and_judge(cells, time_budget)
            if answer is not None and not (self.is_believed(answer) or self._with_files):
                await self._prove(deadline - time.monotonic())
        except ForksFailed as reason:
            await self.end(str(reason))
            return None
        return answer

    def may_answer(self, cells: Sequence[ForkCell]) -> bool:
        """Tell whether forks may run these cells: no fork may find the files of another one."""
        return self.ended is None and not any(cell.index in self._with_files for cell in cells)

    def is_believed(self, answer: ForkAnswer) -> bool:
        """Tell whether an answer counts without a trial from scratch."""
        # Before any run has failed in a fork, nobody knows whether this failure can.
        return self.has_failed or bool(answer.names)

    async def _prove(self, time_budget: float) -> None:
        """Run all cells in a fork, to check that the failure occurs there too.

        Raises ForksFailed if not.
        """
        await self._run_and_judge(self.cells_of(sorted(self._sources)), time_budget)
        if not self.has_failed:
            raise ForksFailed("all cells together do not fail in a fork")

    async def _run_and_judge(
        self, cells: Sequence[ForkCell], time_budget: float
    ) -> ForkAnswer | None:
        """Run cells in a fork, record whether the failure occurred, and return the answer.

        Raises ForksFailed.
        """
        if self.ended is not None:
            raise ForksFailed(self.ended)
        answer = answer_of(self._subject.failure, await self._run(cells, time_budget))
        if answer is not None and answer.outcome is Outcome.FAIL:
            self.has_failed = True
        return answer

    @property
    def is_running(self) -> bool:
        """Whether there is a kernel to fork from."""
        return self._task is not None

    async def end(self, reason: str) -> None:
        """Give up the forks for the rest of the search."""
        self.ended = self.ended or reason
        await self.close()

    async def close(self) -> None:
        """End all forks and the kernel that they come from."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._received.clear()
        if self._handover is not None:
            self._handover.close()
        task, self._task = self._task, None
        if task is None:
            return
        # The kernel's cell ends when the root has ended.
        await asyncio.wait({task}, timeout=CLOSE_SECONDS)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            # It did not end in time, and was cancelled above.
            pass
        except Exception as error:  # noqa: BLE001 - the search has its answers from scratch
            self.ended = self.ended or f"their kernel failed: {one_line(error)}"

    # --- the kernel -------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Start the kernel and its root. Raises ForksFailed."""
        handover = self._handover = RootHandover()
        request = self._request(handover)
        self._task = asyncio.create_task(Trial(request).run())
        base, name = os.path.split(runtime_directory(request.run_id))
        watched = dict.fromkeys((str(request.cwd), str(TMP), str(SHM)))
        start = {"watch": list(watched), "except": [os.path.join(base, name.partition("-")[0])]}
        channel = handover.channel
        await channel.send(REPORT_SECONDS, **start)
        ready = await self._receive(channel, time.monotonic() + READY_SECONDS)
        if not ready.fields.get("files"):
            raise ForksFailed("too many files to watch")
        self._channels[()] = channel
        self._received[channel] = set()

    def _may_raise(self, index: int) -> bool:
        tags = self._subject.node.cells[index].metadata.get("tags", [])
        return index in self._subject.request.may_raise or "raises-exception" in tags

    async def _hand_over(self, channel: ForkChannel, cells: Sequence[ForkCell]) -> list[int]:
        """Send the sources that a fork does not know; return the cells' numbers.

        Raises ForksFailed.
        """
        received = self._received[channel]
        numbers = [self._numbers.setdefault(cell, len(self._numbers)) for cell in cells]
        for number, cell in zip(numbers, cells, strict=True):
            fields = {"cell": number, "source": cell.source, "may_raise": cell.may_raise}
            if number not in received and not await channel.send(REPORT_SECONDS, **fields):
                raise ForksFailed("a cell is too long")
            received.add(number)
        return numbers

    def _request(self, handover: RootHandover) -> TrialRequest:
        node: Any = copy.deepcopy(self._subject.node)
        node.cells = [nbformat.v4.new_code_cell(NOTHING)]
        request = isolated_request(self._subject.request, self._workspaces, node=node)
        # The search has a budget of its own, and each run in a fork its time.
        limits = replace(request.limits, timeout=None, cell_timeout=None)
        return replace(
            request,
            limits=limits,
            cell_limits=lambda _cell: limits,
            forks=handover,
            cells=None,
            skipped=frozenset(),
            # A signal ends the trial that is running; this kernel is closed with the search.
            cancellation=Cancellation(),
        )

    # --- one run ----------------------------------------------------------------------------------

    async def _run(self, cells: Sequence[ForkCell], time_budget: float) -> ForkEnding:
        """Run cells in a fork of the nearest snapshot. Raises ForksFailed."""
        prefix = nearest(self._channels, cells)
        channel = self._channels[prefix] = self._channels.pop(prefix)
        remaining = cells[len(prefix) :]
        seconds = [self._subject.seconds.get(cell.index, 0.0) for cell in remaining]
        allowed = seconds_allowed(seconds, time_budget)
        keep = positions_to_keep(seconds, self._room(), self._last_to_keep(remaining))
        numbers = await self._hand_over(channel, remaining)
        if not await channel.send(REPORT_SECONDS, cells=numbers, keep=keep, seconds=allowed):
            raise ForksFailed("a fork does not answer")
        return await self._ending(
            channel, tuple(cells), len(prefix), time.monotonic() + allowed + REPORT_SECONDS
        )

    def _last_to_keep(self, cells: Sequence[ForkCell]) -> int:
        """Return the position of the first cell that depends on its own process.

        Returns the last position if no cell does.
        """
        positions = (n for n, c in enumerate(cells) if c.index in self._of_one_process)
        return next(positions, len(cells) - 1)

    def _room(self) -> int:
        """Return how many snapshots the next run may leave; close the oldest to make room."""
        processes = self._subject.request.limits.processes
        most = MOST_SNAPSHOTS
        if processes is not None:
            most = max(0, min(most, processes - OTHER_PROCESSES))
        snapshots = [cells for cells in self._channels if cells]
        for cells in snapshots[: max(0, len(snapshots) - most * 2 // 3)]:
            channel = self._channels.pop(cells)
            del self._received[channel]
            channel.close()
        return most - sum(1 for cells in self._channels if cells)

    async def _ending(
        self, channel: ForkChannel, cells: Cells, skipped: int, deadline: float
    ) -> ForkEnding:
        """Handle the messages of a run until it ends; return its ending. Raises ForksFailed."""
        ending = ForkEnding(cell=None, status=None)
        while True:
            message = await self._receive(channel, deadline)
            fields = message.fields
            if message.channel is not None:
                prefix = cells[: skipped + _number(fields, "snapshot")]
                self._add_snapshot(message.channel, prefix, self._received[channel])
            if "unbranchable" in fields and len(self._unbranchable) < MOST_REASONS:
                self._unbranchable[str(fields["unbranchable"])[:LONGEST_REASON]] = None
            elif "begins" in fields:
                ending = replace(ending, cell=self._index_of(_number(fields, "begins")))
            elif "error" in fields:
                ending = replace(ending, error=_error(fields))
            elif "passed" in fields:
                ending = replace(ending, passed=True)
            elif "odd" in fields:
                ending = replace(ending, odd=str(fields["odd"]))
            elif "status" in fields:
                return await self._finish(ending, fields)

    def _index_of(self, number: int) -> int:
        index = next((cell.index for cell, n in self._numbers.items() if n == number), None)
        if index is None:
            raise ForksFailed("a fork tells nonsense")
        return index

    def _add_snapshot(self, channel: ForkChannel, cells: Cells, received: set[int]) -> None:
        if cells in self._channels or len(self._channels) > MOST_SNAPSHOTS:
            channel.close()
        else:
            self._channels[cells] = channel
            self._received[channel] = set(received)

    async def _finish(self, ending: ForkEnding, fields: Mapping[str, Any]) -> ForkEnding:
        """Complete the ending of a run whose process has ended.

        End all forks if cells change files.
        """
        if fields.get("late"):
            self._late += 1
            if self._late >= MOST_LATE:
                raise ForksFailed("runs in forks took too long")
            return replace(ending, odd="took too long")
        if fields.get("changed"):
            # The run itself began with the files as they were.
            await self.end("cells change files")
        status, line = fields["status"], fields.get("line")
        return replace(
            ending,
            status=status if isinstance(status, int) else None,
            line=line if isinstance(line, int) and line > 0 else None,
        )

    async def _receive(self, channel: ForkChannel, deadline: float) -> Any:
        """Return the next message.

        Raises ForksFailed if none arrives in time, or the channel has ended.
        """
        assert self._task is not None
        while not self._subject.request.cancellation.signals:
            remaining = deadline - time.monotonic()
            # Looked at before each message: a notebook can send them without end.
            if remaining <= 0:
                raise ForksFailed("a fork does not answer")
            try:
                message = await channel.receive(min(LOOK_SECONDS, remaining))
            except TimeoutError:
                if self._task.done():
                    raise ForksFailed("the kernel of the forks has ended") from None
                continue
            if message is None:
                raise ForksFailed("a fork has ended")
            return message
        raise ForksFailed("a signal")


def _is_run(cell: Any) -> bool:
    tagged = "skip-execution" in cell.metadata.get("tags", [])
    return bool(cell.cell_type == "code" and cell.source.strip() and not tagged)


def _number(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or value < 0:
        raise ForksFailed("a fork tells nonsense")
    return value


def _error(fields: Mapping[str, Any]) -> tuple[str, str]:
    value = fields["error"]
    if not isinstance(value, list) or len(value) != len(("ename", "evalue")):
        raise ForksFailed("a fork tells nonsense")
    return str(value[0]), str(value[1])
