"""Decides which queries a fork of a live kernel may answer, and derives the answers. Pure.

An answer from a fork decides only which trial comes next: the result is confirmed from scratch. If
an ending is unclear, a trial from scratch answers the query.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct

from safe_exec.experiments.culprits.failure import Failure
from safe_exec.experiments.culprits.protocol import PASSED, Outcome, Reply
from safe_exec.experiments.static_analysis.effects import EffectKind, effects_of, functions_of
from safe_exec.experiments.static_analysis.ipython_syntax import imports, python_of
from safe_exec.model.verdict import CauseKind

# Deaths that the wait status of the process tells, and exceptions. Not those for which memory or
# time adds up, nor kills from outside: what a fork shares with others changes them.
FORKABLE = frozenset(
    {
        CauseKind.SEGFAULT,
        CauseKind.STACK_OVERFLOW,
        CauseKind.ABORT,
        CauseKind.ILLEGAL_INSTRUCTION,
        CauseKind.BUS_ERROR,
        CauseKind.FLOATING_POINT_EXCEPTION,
        CauseKind.EXIT,
        CauseKind.EXCEPTION,
    }
)
# Errors that tell of something that processes share, or that the kernel reports in another way.
DOUBTFUL_ERRORS = frozenset(
    {"SystemExit", "KeyboardInterrupt", "MemoryError", "BlockingIOError", "RuntimeError"}
)
# What tells a process from its fork: after a cell with one of these words no snapshot is taken.
_OF_ONE_PROCESS = re.compile(
    r"\b(?:getp?pid|gettid|get_ident|get_native_id|current_process|fork\w*|multiprocessing|"
    r"ProcessPool\w*|asyncio|setitimer|alarm|Popen|shared_memory|mmap|memmap|joblib|dask|ray)\b"
)
# What maps files or memory that all forks see.
_SHARED = re.compile(r"\b(?:shared_memory|SharedMemory|memmap|mmap)\b")
# The cells after this much of work begin from a snapshot in later runs.
LEAST_SECONDS = 0.1
# Each is a process, and keeps pages that would otherwise be free.
MOST_SNAPSHOTS = 12
# How long a run may take: its cells took so long in the first run. A cell that takes longer is
# asked from scratch, where it has more time.
SLACK_FACTOR, SLACK_SECONDS = 3.0, 2.0
_MISSING = re.compile(r"name '([^']+)' is not defined")


class ForkCell(Struct, frozen=True, kw_only=True):
    """A cell as it runs in a fork: its index in the notebook, and its source or a part of it."""

    index: int
    source: str
    may_raise: bool = False


Cells = tuple[ForkCell, ...]


class ForkEnding(Struct, frozen=True, kw_only=True):
    """The ending of a run of some cells in a fork.

    ``cell`` is the cell that ran last, ``error`` the name and text of the exception that it raised.
    ``status`` is the raw wait status, and ``passed`` says that all cells ran. ``odd`` names an
    observation that a fork cannot judge. ``line`` is that of the last top-level statement, ``None``
    if unknown.
    """

    cell: int | None
    status: int | None
    passed: bool = False
    error: tuple[str, str] | None = None
    odd: str | None = None
    line: int | None = None


class ForkAnswer(Struct, frozen=True, kw_only=True):
    """The answer that follows from a fork's ending, in the terms of ``protocol.Reply``."""

    outcome: Outcome
    ended: str
    stopped_at: int | None = None
    names: frozenset[str] = frozenset()
    # Of a failure: the line of the top-level statement.
    line: int | None = None


def can_ask(failure: Failure) -> bool:
    """Tell whether forks can recognise a failure by how a process ended."""
    # A request to exit goes to the kernel. Heap corruption that moves is told by its message.
    untold = failure.signal is None and failure.exit_code is None
    if failure.moves or (untold and failure.kind is not CauseKind.EXCEPTION):
        return False
    return failure.kind in FORKABLE


def cells_with_files(sources: Mapping[int, str]) -> frozenset[int]:
    """Return the cells that may write files, which the next fork would find."""
    modules: dict[str, str] = {}
    writers: dict[str, bool] = {}
    writing = set()
    for cell in sorted(sources):
        source = sources[cell]
        _, tree = python_of(source)
        if tree is None or _SHARED.search(source):
            # A shell command or another language, where anything may happen, or a mapped file.
            writing.add(cell)
            continue
        modules |= {k: v for node in tree.body for k, v in imports(node).items()}
        functions = functions_of(source, modules)
        writers |= {name: e.kind is EffectKind.FILE for name, e in functions.items()}
        if any(
            effect.kind is EffectKind.FILE or writers.get(effect.name or "", False)
            for effect in effects_of(source, modules)
        ):
            writing.add(cell)
    return frozenset(writing)


def cells_of_one_process(sources: Mapping[int, str]) -> frozenset[int]:
    """Return the cells that depend on their process and so may behave differently in a fork."""
    return frozenset(cell for cell, source in sources.items() if _OF_ONE_PROCESS.search(source))


def nearest(snapshots: Collection[Cells], cells: Sequence[ForkCell]) -> Cells:
    """Return the longest beginning of ``cells`` that a snapshot has run."""
    fitting = (s for s in snapshots if tuple(cells[: len(s)]) == s and len(s) < len(cells))
    return max(fitting, key=len, default=())


def positions_to_keep(seconds: Sequence[float], room: int, last: int) -> tuple[int, ...]:
    """Return the positions in a run of cells at which snapshots are worthwhile.

    ``seconds`` are those of each cell, and ``room`` the number of snapshots that may be taken. No
    position is larger than ``last``. A snapshot is worthwhile after every LEAST_SECONDS of work, or
    after more if there would be too many.
    """
    if room <= 0:
        return ()
    worth = max(LEAST_SECONDS, sum(seconds[:last]) / (room + 1))
    positions: list[int] = []
    work = 0.0
    for position in range(1, min(last, len(seconds) - 1) + 1):
        work += seconds[position - 1]
        if work >= worth and len(positions) < room:
            positions.append(position)
            work = 0.0
    return tuple(positions)


def seconds_allowed(seconds: Iterable[float], time_budget: float) -> float:
    """Return the time limit for cells that took ``seconds`` each in the first run."""
    return min(time_budget, SLACK_SECONDS + SLACK_FACTOR * sum(seconds))


def answer_of(failure: Failure, ending: ForkEnding) -> ForkAnswer | None:
    """Return the answer that an ending gives; ``None`` if only a trial from scratch can tell."""
    if ending.odd is not None or ending.status is None or ending.cell is None:
        return None
    if ending.passed or ending.error is not None:
        # What it did after its last message, it did not do for the notebook.
        if ending.status != 0:
            return None
        return _of_error(failure, ending) if ending.error is not None else _PASS
    return _of_death(failure, ending, ending.status)


def reply_of(answer: ForkAnswer, seconds: float) -> Reply:
    """Return an answer that took ``seconds`` as the reply to a query."""
    return Reply(
        answer=answer.outcome,
        seconds=seconds,
        stopped_at=answer.stopped_at,
        names=answer.names,
        ended=answer.ended,
        from_scratch=False,
        line=answer.line,
    )


_PASS = ForkAnswer(outcome=Outcome.PASS, ended=PASSED)


def _of_error(failure: Failure, ending: ForkEnding) -> ForkAnswer | None:
    assert ending.error is not None
    name, text = ending.error
    if name in DOUBTFUL_ERRORS:
        return None
    is_lack = name in ("NameError", "UnboundLocalError")
    missing = frozenset(_MISSING.findall(text)) if is_lack else frozenset()
    is_same = (
        failure.kind is CauseKind.EXCEPTION
        and failure.error == name
        and failure.cell == ending.cell
        and not missing - set(failure.missing)
    )
    if is_same:
        return _failure(failure, ending)
    return ForkAnswer(
        outcome=Outcome.UNRESOLVED,
        ended=CauseKind.EXCEPTION.value,
        stopped_at=ending.cell,
        names=missing,
    )


def _failure(failure: Failure, ending: ForkEnding) -> ForkAnswer:
    return ForkAnswer(outcome=Outcome.FAIL, ended=failure.kind.value, line=ending.line)


def _of_death(failure: Failure, ending: ForkEnding, status: int) -> ForkAnswer | None:
    # Negative, as everywhere in verdicts.
    signal = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    exit_code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    is_same = (
        failure.kind is not CauseKind.EXCEPTION
        and ending.cell == failure.cell
        and (signal, exit_code) == (failure.signal, failure.exit_code)
    )
    # Another death may be another form of the failure: its cause takes all the evidence.
    return _failure(failure, ending) if is_same else None
