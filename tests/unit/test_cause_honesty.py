"""What must hold of every cause, whatever was observed: no certainty on the kernel's word alone, and
no advice that would not help.

*Certain.* A certain cause names at least one fact that was seen outside the kernel, and it is not
certain any more once all that was seen outside is taken away. Three kinds of observation are left
then, because the runner itself makes them: that it ended the run (a wall time, a limit, a start that
failed, an error of its own), that a cell's reply was an error while the kernel lived
(``exception``), and that a reply asked to end the kernel (``exit``). These claim no more than that
the message arrived. Whatever the message *says* - out of memory, disk full - is the kernel's word.

*Advice.* Each option of ours that a summary or an advice names would help under the run's limits and
isolation: ``HELPS`` says when. A new option in an advice needs a row there.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import click
import msgspec.structs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safe_exec.cli.run import command as run_command
from safe_exec.diagnosis.rules import Context, find_cause
from safe_exec.model.ending import (
    CellFailed,
    Died,
    InternalError,
    LimitHit,
    OutputsDiffer,
    StartFailed,
    TerminationReason,
    TimedOut,
)
from safe_exec.model.evidence import CLAIMS, Evidence, NeedKind
from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism, Wall
from safe_exec.model.verdict import Cause, CauseKind, CellRecord, CellStatus, Confidence, Origin
from safe_exec.trial.errors import NOBODY_TYPES
from tests.unit.diagnosis.rules.test_rules import (
    FIELDS,
    LIMITS,
    ROWS,
    endings,
    evidences,
    languages,
)

OBSERVATIONS = frozenset(
    {
        "exit", "termination", "oom_kills", "oom_kills_cell", "oom_elsewhere", "oom_bound",
        "oomd_killed", "process_refusals", "process_bound", "memory_peak", "memory_peak_raw",
        "memory_last", "processes_peak", "cpu_seconds", "kernel_cpu_seconds", "fault", "observation",
        "cell_seconds", "cell_output_bytes", "cell_output_received",
        "cell_output_age", "cell_output_truncated", "output_bytes",
        "signals_to_keeper", "disk_free", "open_files", "cell_active", "isolation",
        "conflicts", "volumes",
        "caught_signals", "agent", "overcommit", "died_at", "processes_at_timeout", "changed_limits",
        "memory_children", "memory_kernel", "memory_upper_bound",
        "memory_missed", "crowd_at_timeout", "oom_kills_in_time", "oom_kills_earlier", "replaced_by", "kill_command",
        "memory_maps", "named_lock",
    }
)  # fmt: skip
"""Fields of the evidence that are read outside the kernel; the parts of ``fault`` and ``observation``
that are not are in ``CLAIMED_PARTS``."""
CLAIMED_PARTS: Mapping[str, frozenset[str]] = {
    "fault": frozenset({"title", "stack", "main"}),
    "observation": frozenset(
        {"stack", "gil_waits", "lines", "awaiting", "starved", "instrumented"}
    ),
}
REQUIRED_PARTS = {"observation": {"state": None, "cpu_share": None, "syscall": None}, "fault": {}}


def only_claims(evidence: Evidence) -> Evidence:
    """The evidence without all that was seen outside the kernel."""
    kept: dict[str, Any] = {name: getattr(evidence, name) for name in CLAIMS}
    for name, parts in CLAIMED_PARTS.items():
        whole = getattr(evidence, name)
        if whole is not None:
            values = {part: getattr(whole, part) for part in parts}
            kept[name] = type(whole)(**REQUIRED_PARTS[name], **values)
    return Evidence(**kept)


def observed_by_the_runner(context: Context, cause: Cause) -> bool:
    """Whether the ending itself is the observation that the cause claims, and no more."""
    ending = context.ending
    if isinstance(ending, LimitHit | StartFailed | InternalError):
        return True
    if isinstance(ending, TimedOut):
        return cause.kind in (CauseKind.CELL_TIMEOUT, CauseKind.NOTEBOOK_TIMEOUT)
    if isinstance(ending, CellFailed):
        return cause.kind is CauseKind.EXCEPTION
    if isinstance(ending, OutputsDiffer):  # the messages that arrived are compared with a file
        return cause.kind is CauseKind.OUTPUT_DIFFERS
    return isinstance(ending, Died) and ending.asked_to_exit and cause.kind is CauseKind.EXIT


def test_each_field_of_the_evidence_is_a_claim_or_an_observation() -> None:
    fields = set(typing.get_type_hints(Evidence))
    unsorted = fields ^ (set(CLAIMS) | OBSERVATIONS)
    assert not unsorted, f"who says it? put it into CLAIMS (model.py) or OBSERVATIONS: {unsorted}"
    assert not set(CLAIMS) & OBSERVATIONS


# --- contexts -----------------------------------------------------------------------------------

values: Mapping[LimitName, Any] = {name: LIMITS.of(name) or 1 << 20 for name in LimitName}
limit_sets = st.sets(st.sampled_from(LimitName)).map(
    lambda names: Limits(**{name.value: values[name] for name in names})
)
holders = st.builds(
    Enforcement, by=st.sampled_from(Mechanism), hard=st.booleans(), note=st.just("")
)
enforcements = st.dictionaries(st.sampled_from(LimitName), holders, max_size=4)
walls = st.dictionaries(st.sampled_from(Wall), holders, max_size=4)
records = st.lists(st.none() | st.integers(0, 1 << 30), min_size=10, max_size=10).map(
    lambda kept: tuple(
        CellRecord(index=n, code_index=n, id=None, status=CellStatus.PASSED, memory_kept=bytes_)
        for n, bytes_ in enumerate(kept)
    )
)
changes = st.fixed_dictionaries({}, optional=FIELDS)


@st.composite
def contexts(draw: st.DrawFn) -> Context:
    """A row of the table of causes with some of it changed, or anything at all; other limits and walls."""
    if draw(st.booleans()):
        base = draw(st.sampled_from(ROWS)).context
        names = draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=3))
        evidence = msgspec.structs.replace(
            base.evidence, **{name: draw(FIELDS[name]) for name in names}
        )
        ending = base.ending
    else:
        ending, evidence = draw(endings), draw(evidences)
    if isinstance(ending, CellFailed | TimedOut):  # as a trial puts it there
        evidence = msgspec.structs.replace(evidence, error=ending.error)
    if isinstance(ending, Died | StartFailed) and ending.exit is not None:
        evidence = msgspec.structs.replace(evidence, exit=ending.exit)
    kills = (evidence.oom_kills or 0, evidence.oom_kills_cell or 0)
    evidence = msgspec.structs.replace(evidence, oom_kills=max(kills) or evidence.oom_kills)
    if not evidence.oom_elsewhere:
        evidence = msgspec.structs.replace(evidence, oom_bound=None)
    limits = draw(limit_sets)
    if isinstance(ending, LimitHit):  # no limit is hit that the run does not have
        limits = msgspec.structs.replace(limits, **{ending.limit.value: values[ending.limit]})
    return Context(
        ending=ending,
        evidence=evidence,
        limits=limits,
        language=draw(languages),
        enforcement=draw(enforcements),
        walls=draw(walls),
        cells=draw(st.just(()) | records),
        current=draw(st.none() | st.just(getattr(ending, "cell", None))),
    )


EXAMPLES = settings(
    deadline=None,
    max_examples=600,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# --- certain ------------------------------------------------------------------------------------


def check_certain(context: Context) -> None:
    cause = find_cause(context)
    if cause is None or cause.confidence is not Confidence.CERTAIN:
        return
    seen = [f for f in cause.evidence if f.origin is Origin.OUTSIDE and f.value is not None]
    assert seen, f"{cause.kind}: nothing seen outside the kernel is among its evidence"
    evidence = only_claims(context.evidence)
    ending = context.ending
    if isinstance(ending, Died):
        ending = msgspec.structs.replace(ending, exit=None)
    told = msgspec.structs.replace(
        context, ending=ending, evidence=evidence, limits=Limits(), walls={}, enforcement={}
    )
    alone = find_cause(told)
    assert (
        alone is None
        or alone.confidence is not Confidence.CERTAIN
        or observed_by_the_runner(told, alone)
    ), f"{alone.kind} is certain by the kernel's word alone: {alone.summary}"


@EXAMPLES
@given(context=contexts())
def test_nothing_is_certain_by_the_kernel_s_word_alone(context: Context) -> None:
    check_certain(context)


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_no_row_is_certain_by_the_kernel_s_word_alone(row: Any) -> None:
    check_certain(row.context)


# --- advice -------------------------------------------------------------------------------------

OPTIONS = frozenset(
    name
    for parameter in run_command.params
    for name in (*parameter.opts, *parameter.secondary_opts)
)
"""All options of ``safe-exec run``: other programs' options in an advice are their own affair."""


def limited(name: LimitName) -> Callable[[Context], bool]:
    return lambda context: context.limits.of(name) is not None


def walled(*names: Wall) -> Callable[[Context], bool]:
    def stands(context: Context) -> bool:
        held = [context.walls.get(name) for name in names]
        return any(wall is not None and wall.by is not Mechanism.NONE for wall in held)

    return stands


def memory_is_short_elsewhere(context: Context) -> bool:
    """The run's own limit did not strike: one that is lower than the other's stops the run first."""
    evidence = context.evidence
    ours = evidence.termination is TerminationReason.MEMORY
    # A kill by the group's own limit, if it has one, in the same cell says that it struck, too.
    own_kill = evidence.oom_kills_cell and context.limits.memory is not None
    by_oomd = evidence.oomd_killed and not own_kill
    return not ours and bool(evidence.oom_elsewhere or by_oomd)


HELPS: Mapping[str, Callable[[Context], bool]] = {
    "--memory": lambda c: c.limits.memory is not None or memory_is_short_elsewhere(c),
    "--processes": lambda c: c.limits.processes is not None and c.evidence.process_bound is None,
    "--open-files": limited(LimitName.OPEN_FILES),
    "--file-size": limited(LimitName.FILE_SIZE),
    # Of a file system that is the sandbox's own the option sets the size, whether it was given or not.
    "--disk": lambda c: c.limits.disk is not None or any(v.own for v in c.evidence.volumes),
    "--shm": lambda c: c.limits.shm is not None or any(v.own for v in c.evidence.volumes),
    "--cell-output": limited(LimitName.CELL_OUTPUT),
    "--output": limited(LimitName.OUTPUT),
    "--cpu-time": limited(LimitName.CPU_TIME),
    "--cell-timeout": lambda c: isinstance(c.ending, TimedOut) and not c.ending.whole_notebook,
    "--timeout": lambda c: isinstance(c.ending, TimedOut) and c.ending.whole_notebook,
    "--start-timeout": lambda c: isinstance(c.ending, StartFailed),
    "--network": walled(Wall.NETWORK),
    "--env": lambda c: any(n.kind is NeedKind.VARIABLE for n in c.evidence.conflicts),
    "--show": lambda c: any(n.path is not None and not n.writes for n in c.evidence.conflicts),
    "--writable": lambda c: any(n.path is not None and n.writes for n in c.evidence.conflicts),
    "--device": lambda c: any((n.path or "").startswith("/dev/") for n in c.evidence.conflicts),
    "--sanitize-with": lambda c: isinstance(c.ending, OutputsDiffer),
    "--compare-tolerance": lambda c: isinstance(c.ending, OutputsDiffer),
    "--stdin": lambda c: c.evidence.error is not None and c.evidence.error.ename == NOBODY_TYPES,
    "--allow-errors": lambda c: isinstance(c.ending, CellFailed),
    "--kernel": lambda c: isinstance(c.ending, StartFailed),
    "--limits": lambda c: isinstance(c.ending, InternalError) and c.ending.unfit,
    "--mechanisms": lambda c: by_rlimit(c, LimitName.MEMORY),
    "--require": lambda c: isinstance(c.ending, InternalError) and c.ending.refused,
}
"""When each option helps. None is to be raised that does not bound the run."""


def by_rlimit(context: Context, name: LimitName) -> bool:
    held = context.enforcement.get(name)
    return held is not None and held.by is Mechanism.RLIMIT


RAISES_MEMORY = re.compile(r"(?:[Rr]aise|limit with|[Ii]ncrease)[^.;]{0,30}--memory")


def check_advice(context: Context) -> None:
    cause = find_cause(context)
    if cause is None:
        return
    text = f"{cause.summary} {cause.advice}" if not quotes(context) else cause.advice
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) & OPTIONS
    for option in named:
        assert option in HELPS, f"{option}: say in HELPS when it helps"
        assert HELPS[option](context), f"{cause.kind}: {option} would not help: {cause.advice}"
    if memory_is_short_elsewhere(context) and cause.kind is CauseKind.OUT_OF_MEMORY:
        assert not RAISES_MEMORY.search(cause.advice), (
            f"the limit is not the run's own: {cause.advice}"
        )


def quotes(context: Context) -> bool:
    """Whether the summary may quote what the notebook or an error of ours says."""
    return not isinstance(context.ending, TimedOut | LimitHit)


@EXAMPLES
@given(context=contexts())
def test_no_advice_names_an_option_that_would_not_help(context: Context) -> None:
    check_advice(context)


@pytest.mark.parametrize("bare", [False, True], ids=["limits", "no limits"])
@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_no_row_s_advice_names_an_option_that_would_not_help(row: Any, bare: bool) -> None:
    context = row.context
    check_advice(msgspec.structs.replace(context, limits=Limits()) if bare else context)


def test_the_table_names_options_that_exist() -> None:
    assert isinstance(run_command, click.Command)
    assert {option for option in HELPS if option not in OPTIONS} <= {"--show"}
