"""Verdicts for tests: one of every status and every cause kind, from defaults that a test changes as it needs."""

from __future__ import annotations

from typing import Any

import msgspec.structs

from safe_exec.model.evidence import Frame, IsolationFacts
from safe_exec.model.limits import Enforcement, Isolation, LimitName, Limits, Mechanism, Wall
from safe_exec.model.verdict import (
    Activity,
    Cause,
    CauseKind,
    CellRecord,
    CellStatus,
    Confidence,
    CrashCell,
    Culprit,
    Culprits,
    Environment,
    Fact,
    NotebookInfo,
    Origin,
    Role,
    Status,
    Stopped,
    Timeline,
    Usage,
    Verdict,
)

GIB = 1 << 30

# The statuses that a cause of each kind can come with; the first is the usual one.
STATUSES_OF_KIND: dict[CauseKind, tuple[Status, ...]] = {
    **dict.fromkeys(CauseKind, (Status.KERNEL_DIED,)),
    CauseKind.MEMORY_ERROR: (Status.CELL_ERROR,),
    CauseKind.WORKER_OUT_OF_MEMORY: (Status.LIMIT_EXCEEDED, Status.CELL_ERROR, Status.TIMEOUT),
    CauseKind.CELL_TIMEOUT: (Status.TIMEOUT,),
    CauseKind.NOTEBOOK_TIMEOUT: (Status.TIMEOUT,),
    CauseKind.UNRESPONSIVE: (Status.TIMEOUT,),
    CauseKind.STDIN: (Status.TIMEOUT, Status.CELL_ERROR),
    CauseKind.NETWORK_BLOCKED: (Status.CELL_ERROR,),
    CauseKind.ISOLATION: (Status.CELL_ERROR,),
    CauseKind.OUTPUT_DIFFERS: (Status.CELL_ERROR,),
    CauseKind.DISK_FULL: (Status.CELL_ERROR, Status.LIMIT_EXCEEDED),
    CauseKind.TOO_MANY_PROCESSES: (Status.CELL_ERROR, Status.LIMIT_EXCEEDED),
    CauseKind.TOO_MANY_OPEN_FILES: (Status.CELL_ERROR,),
    CauseKind.FILE_TOO_LARGE: (Status.CELL_ERROR, Status.KERNEL_DIED),
    CauseKind.OUTPUT_FLOOD: (Status.LIMIT_EXCEEDED,),
    CauseKind.KERNEL_START_FAILED: (Status.START_FAILED,),
    CauseKind.EXCEPTION: (Status.CELL_ERROR,),
    CauseKind.UNKNOWN: (Status.KERNEL_DIED, Status.INTERNAL_ERROR),
}

_SIGNALS = {
    CauseKind.OUT_OF_MEMORY: 9,
    CauseKind.SEGFAULT: 11,
    CauseKind.STACK_OVERFLOW: 11,
    CauseKind.ABORT: 6,
    CauseKind.ILLEGAL_INSTRUCTION: 4,
    CauseKind.BUS_ERROR: 7,
    CauseKind.FLOATING_POINT_EXCEPTION: 8,
    CauseKind.KILLED: 9,
    CauseKind.TERMINATED: 15,
    CauseKind.CPU_TIME: 9,
    CauseKind.BAD_SYSTEM_CALL: 31,
}


def make_fact(**changes: Any) -> Fact:
    """A fact read outside the kernel."""
    fact = Fact(fact="oom_kills", value=1, source="memory.oom_control", origin=Origin.OUTSIDE)
    return msgspec.structs.replace(fact, **changes)


def make_cause(kind: CauseKind = CauseKind.OUT_OF_MEMORY, **changes: Any) -> Cause:
    """A cause as sure as can be, with the signal or exit code that its kind comes with."""
    facts = (
        make_fact(),
        make_fact(fact="memory_peak", value=GIB, source="memory.max_usage_in_bytes"),
    )
    cause = Cause(
        kind=kind,
        summary=f"the summary of {kind.value}",
        confidence=Confidence.CERTAIN,
        evidence=facts,
        advice="give it more with --memory, or load less at once",
        activity=Activity.PYTHON_LOOP
        if kind in (CauseKind.CELL_TIMEOUT, CauseKind.NOTEBOOK_TIMEOUT)
        else None,
        signal=-_SIGNALS[kind] if kind in _SIGNALS else None,
        exit_code=3 if kind is CauseKind.EXIT else None,
    )
    return msgspec.structs.replace(cause, **changes)


def make_crash(**changes: Any) -> CrashCell:
    """The third cell of the notebook, second code cell, at its second line."""
    stack = (
        Frame(function="merge", line=812, file="pandas/core/frame.py"),
        Frame(function="<module>", line=2, file="/tmp/ipykernel_1/1.py", cell=2),
    )
    source = 'joined = frame.merge(big, on="k")'
    crash = CrashCell(
        index=2,
        code_index=1,
        id="third",
        execution_count=2,
        line=2,
        source_line=source,
        stack=stack,
    )
    return msgspec.structs.replace(crash, **changes)


def make_culprit(code_index: int = 0, role: Role = Role.ACCUMULATOR, **changes: Any) -> Culprit:
    """A culprit of the notebook whose first cell is markdown."""
    culprit = Culprit(
        index=code_index + 1,
        code_index=code_index,
        id=NAMES[code_index] if code_index < len(NAMES) else None,
        role=role,
        note="+612 MiB kept",
        source_line="big = load_everything()",
    )
    return msgspec.structs.replace(culprit, **changes)


def make_culprits(*cells: Culprit, **changes: Any) -> Culprits:
    """The result of a search that found the first two code cells, the second of which is the crash cell."""
    found = Culprits(
        cells=cells or (make_culprit(), make_culprit(1, Role.CRASH, note="asked for more")),
        minimal=True,
        method="search",
        look_first=1,
        trials=6,
        cached=0,
        reproduced=(2, 2),
        endings={"out_of_memory": 2},
        seconds=14.2,
        repro_notebook="/home/me/project/analysis.repro.ipynb",
    )
    return msgspec.structs.replace(found, **changes)


def nothing_found(stopped: Stopped, reproduced: tuple[int, int] = (0, 3)) -> Culprits:
    """The result of a search that found nothing."""
    found = make_culprits(
        minimal=False,
        look_first=None,
        reproduced=reproduced,
        endings={},
        repro_notebook=None,
        stopped=stopped,
    )
    return msgspec.structs.replace(found, cells=())


NAMES = ("second", "third", "fourth", "fifth")


def make_records(*statuses: CellStatus) -> tuple[CellRecord, ...]:
    """Records of the code cells of a notebook whose first cell is markdown."""
    return tuple(
        CellRecord(
            index=i + 1,
            code_index=i,
            id=NAMES[i],
            status=status,
            seconds=_seconds(status),
            output_bytes=None,
        )
        for i, status in enumerate(statuses)
    )


def _seconds(status: CellStatus) -> float | None:
    return None if status in (CellStatus.NOT_RUN, CellStatus.SKIPPED) else 1.5


def make_verdict(
    status: Status = Status.KERNEL_DIED, kind: CauseKind | None = None, **changes: Any
) -> Verdict:
    """A verdict of ``status``; unless changed, with a cause where the status has one."""
    passed = status is Status.PASSED
    nothing_ran = status is Status.START_FAILED
    if kind is None:
        kind = next(
            (k for k, all_of_it in STATUSES_OF_KIND.items() if all_of_it[0] is status), None
        )
    verdict = Verdict(
        safe_exec_version="0.1.0",
        run_id="20260101-120000-abcdef",
        started="2026-01-01T12:00:00.000000Z",
        finished="2026-01-01T12:00:14.200000Z",
        command=("safe-exec", "run", "analysis.ipynb"),
        cwd="/home/me/project",
        status=status,
        notebook=NotebookInfo(
            path="analysis.ipynb",
            sha256="0" * 64,
            kernel="python3",
            language="python",
            cells=5,
            code_cells=4,
        ),
        cause=None if passed or kind is None else make_cause(kind),
        crash_cell=None if passed or nothing_ran else make_crash(),
        cells=make_records(*_cell_statuses(status)),
        limits=Limits(
            memory=GIB,
            cell_timeout=30.0,
            timeout=600.0,
            cpu_time=60.0,
            processes=64,
            output=1 << 20,
        ),
        enforcement={
            LimitName.MEMORY: Enforcement(by=Mechanism.CGROUP_V1, hard=True),
            LimitName.CELL_TIMEOUT: Enforcement(by=Mechanism.RUNNER, hard=False),
        },
        timeline=Timeline(seconds=(0.0, 0.5), memory=(100, None), cpu=(None, 0.4), cell=(-1, 2)),
        usage=Usage(
            wall_seconds=14.2, cpu_seconds=3.5, memory_peak=GIB, oom_kills=0, processes_peak=3
        ),
        environment=Environment(
            python="3.11.2",
            platform="Linux-6.1",
            packages={"numpy": "2.0"},
            cgroup="v1",
            isolation={Wall.HOME: Enforcement(by=Mechanism.BUBBLEWRAP, hard=True, note="empty")},
            isolation_facts=IsolationFacts(
                by=Mechanism.BUBBLEWRAP,
                home="/home/me",
                folder="/home/me/project",
                hidden_homes=("/home/me",),
                hidden=("/srv/data",),
                writable=("/home/me/project",),
                discarded=("/tmp", "/home/me"),
                removed_variables=("MY_TOKEN",),
            ),
        ),
        isolation=Isolation(hide_home=True, hide=("/srv/data",)),
        outputs={
            "notebook": "/home/me/project/analysis.out.ipynb",
            "verdict": "/tmp/analysis.verdict.json",
        },
    )
    return msgspec.structs.replace(verdict, **changes)


def _cell_statuses(status: Status) -> tuple[CellStatus, ...]:
    passed, missed = CellStatus.PASSED, CellStatus.NOT_RUN
    if status is Status.PASSED:
        return (passed,) * 4
    if status is Status.START_FAILED:
        return (missed,) * 4
    crash = CellStatus.FAILED if status is Status.CELL_ERROR else CellStatus.KILLED
    return (passed, crash, missed, missed)


def every_verdict() -> list[Verdict]:
    """A verdict for every status, and for every cause kind with each status that it comes with."""
    bare = [
        make_verdict(Status.CANCELLED, cause=None),
        make_verdict(Status.INTERNAL_ERROR, cause=None),
    ]
    of_kinds = [
        make_verdict(status, kind)
        for kind, statuses in STATUSES_OF_KIND.items()
        for status in statuses
    ]
    return [make_verdict(Status.PASSED), *bare, *of_kinds, *searched_verdicts()]


def searched_verdicts() -> list[Verdict]:
    """Verdicts of every end that a search can come to."""
    many = tuple(make_culprit(i, Role.SETUP, note="", source_line=None) for i in range(12))
    found = [
        make_culprits(),
        make_culprits(make_culprit(1, Role.CRASH), look_first=2, cached=3),
        make_culprits(*many, look_first=None, minimal=False, stopped=Stopped.BUDGET),
        *(make_culprits(minimal=False, stopped=stopped, reproduced=(1, 4)) for stopped in Stopped),
        *(nothing_found(stopped) for stopped in Stopped),
    ]
    everywhere = [make_verdict(culprits=culprits) for culprits in found]
    return [
        *everywhere,
        make_verdict(crash_cell=None, culprits=make_culprits(make_culprit(0, Role.TRIGGER))),
    ]


def name_of(verdict: Verdict) -> str:
    """The name of a test case with this verdict."""
    return f"{verdict.status.value}-{verdict.cause.kind.value if verdict.cause is not None else 'none'}"
