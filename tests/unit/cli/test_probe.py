"""``probe`` without a kernel: what its scales make of values and causes, how runs are asked for, what is printed."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from safe_exec.cli import probe as probe_command
from safe_exec.cli.options.limits import WallOptions
from safe_exec.cli.probe import (
    ProbeOptions,
    command,
    exit_code,
    parse_precision,
    reproduce_command,
)
from safe_exec.cli.probe_report import RunLines, as_document, report
from safe_exec.cli.run import command as run_command
from safe_exec.errors import SafeExecError, UsageError
from safe_exec.experiments import rerun
from safe_exec.experiments.rerun import Rerunner, RerunOptions
from safe_exec.experiments.threshold.descriptors import Descriptors
from safe_exec.experiments.threshold.scales import SCALES
from safe_exec.experiments.threshold.search import (
    ProbeOutcome,
    ProbeProblem,
    ProbeQuery,
    StopReason,
    search,
)
from safe_exec.limits.values import parse_overrides
from safe_exec.model import events
from safe_exec.model.ending import TimedOut
from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.model.verdict import CauseKind
from safe_exec.reports.terminal import Style
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.planner import build_plan
from safe_exec.trial.request import TrialRequest
from safe_exec.workflows import probe as probing
from safe_exec.workflows.job import PreparedJob
from safe_exec.workflows.probe import ProbeReport, ProbeRun, run_search
from tests.support import make_notebook
from tests.unit.builders import make_cause, make_crash

MIB = 1 << 20
MEMORY = SCALES[LimitName.MEMORY]
SOURCE = 'joined = frame.merge(big, on="k")'


@dataclass
class Fake:
    """Shoots at a made-up notebook; stopped by the user at run ``stop``."""

    needs: float = 400 * MIB
    peak: float = 396 * MIB
    kind: CauseKind = CauseKind.OUT_OF_MEMORY
    stop: int = 0
    values: list[float] = field(default_factory=list)

    @property
    def cancelled(self) -> bool:
        return len(self.values) == self.stop

    async def run(self, query: ProbeQuery) -> ProbeRun:
        self.values.append(query.value)
        if query.value >= self.needs:
            return ProbeRun(
                value=query.value, outcome=ProbeOutcome.PASSED, seconds=1.0, peak=self.peak
            )
        cause = make_cause(self.kind)
        return ProbeRun(
            value=query.value,
            outcome=MEMORY.outcome(cause),
            seconds=1.5,
            peak=query.value,
            cause=cause,
            crash_cell=make_crash(index=4, code_index=2, source_line=f"    {SOURCE}"),
        )


class Told:
    """Takes down what a watch is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, float, bool | None]] = []

    def begins(self, number: int, value: float) -> None:
        self.lines.append((number, value, None))

    def ended(self, number: int, run: ProbeRun) -> None:
        self.lines.append((number, run.value, run.passed))


def probed(fake: Fake | None = None, **question: Any) -> ProbeReport:
    asked = MEMORY.question(initial=1 << 30, most=1 << 34, precision=0.05, budget=600.0)
    changed: ProbeProblem = replace(asked, **question)
    bracket, runs = asyncio.run(run_search(search(changed), fake or Fake(), Told()))
    held = Enforcement(by=Mechanism.CGROUP_V1, hard=True)
    return ProbeReport(scale=MEMORY, precision=0.05, bracket=bracket, runs=runs, enforcement=held)


def said(found: ProbeReport, **style: Any) -> str:
    again = "safe-exec run analysis.ipynb --memory 396M"
    return "".join(
        f"{line}\n" for line in report(found, "some/where/analysis.ipynb", again, Style(**style))
    )


# --- scales -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SCALES))
@given(value=st.floats(0, 1e11), precision=st.sampled_from([0.001, 0.05, 1.0]))
def test_a_value_is_written_as_its_option_reads_it(
    name: LimitName, value: float, precision: float
) -> None:
    scale = SCALES[name]
    most = {"seconds": 1e7, "count": 2**31 - 1}.get(scale.unit, value)
    fitted = scale.fit(min(value, most), precision)
    assert fitted >= scale.least
    # Less is refused as a size that has lost its unit.
    assume(name is not LimitName.MEMORY or fitted >= 1 << 20)
    read = parse_overrides(
        {name.value: scale.written(fitted)}, error_prefix="--", machine_memory=None
    )[name.value]
    assert read == scale.limit(fitted)


@given(value=st.floats(1e6, 1e11), precision=st.sampled_from([0.001, 0.01, 0.05, 1.0]))
def test_rounding_is_up_and_finer_than_the_precision(value: float, precision: float) -> None:
    fitted = MEMORY.fit(value, precision)
    assert value * (1 - 1e-9) <= fitted <= value * (1 + precision / 3) + 4096
    assert MEMORY.fit(fitted, precision) == fitted


def test_values_that_people_can_type() -> None:
    assert [MEMORY.written(value) for value in (396 * MIB, 4708 << 10, 4097, math.inf)] == [
        "396M",
        "4708K",
        "4097",
        "none",
    ]
    assert [SCALES[LimitName.TIMEOUT].written(value) for value in (0.607, 1.25, 90, 123456)] == [
        "0.607s",
        "1.25s",
        "90s",
        "123456s",
    ]
    assert SCALES[LimitName.OPEN_FILES].written(164.0) == "164"


def test_what_to_set() -> None:
    assert MEMORY.written(MEMORY.advised(412 * MIB)) == "433M"
    assert SCALES[LimitName.PROCESSES].advised(33) == 33
    assert SCALES[LimitName.CELL_TIMEOUT].advised(2.0) == pytest.approx(3.0, abs=0.1)


def test_every_kind_of_cause_has_a_fate() -> None:
    for kind in CauseKind:
        assert SCALES[LimitName.MEMORY].outcome(make_cause(kind)) is not ProbeOutcome.PASSED
    fates = {kind: MEMORY.outcome(make_cause(kind)) for kind in CauseKind}
    assert (
        fates[CauseKind.WORKER_OUT_OF_MEMORY]
        is fates[CauseKind.MEMORY_ERROR]
        is ProbeOutcome.STRUCK
    )
    assert (
        fates[CauseKind.SEGFAULT] is fates[CauseKind.KERNEL_START_FAILED] is ProbeOutcome.OTHERWISE
    )
    assert fates[CauseKind.EXCEPTION] is fates[CauseKind.CELL_TIMEOUT] is ProbeOutcome.UNRELATED
    assert MEMORY.outcome(None) is ProbeOutcome.PASSED


def test_the_causes_of_two_limits_are_never_the_same() -> None:
    every = [kind for scale in SCALES.values() for kind in scale.causes]
    assert len(every) == len(set(every))


# --- asking for runs --------------------------------------------------------------------------------------------


def test_runs_are_told_of_and_kept() -> None:
    told, fake = Told(), Fake()
    asked = MEMORY.question(initial=None, most=1 << 34, precision=0.05, budget=600.0)
    bracket, runs = asyncio.run(run_search(search(asked), fake, told))
    assert (bracket.passes, bracket.fails) == (416 * MIB, 397 * MIB)
    assert [run.value for run in runs] == fake.values == [math.inf, 416 * MIB, 397 * MIB, 416 * MIB]
    assert [line[2] for line in told.lines] == [None, True, None, True, None, False, None, True]


def test_a_signal_keeps_what_is_known() -> None:
    found = probed(Fake(stop=3))
    assert found.bracket.ended is StopReason.CANCELLED and len(found.runs) == 2
    assert exit_code(found) == 130
    assert "stopped" in said(found) and "passes with 416 MiB" in said(found)


def test_open_files_are_counted_below_the_limit(tmp_path: Path) -> None:
    seen = Descriptors(limit=None)
    with open(tmp_path / "data", "wb") as file:
        file.write(b"x" * 5000)
        file.flush()
        seen(events.KernelReady(time=0))
        assert (seen.most, seen.largest) == (None, None)
        seen(events.KernelStarted(time=0, pid=os.getpid()))
        seen(events.UsageSampled(time=0, index=0, memory=None, cpu_seconds=None, processes=None))
        assert (seen.most or 0) >= 4 and (seen.largest or 0) >= 5000
    none = Descriptors(limit=0)
    none(events.KernelStarted(time=0, pid=os.getpid()))
    none.look()
    assert not none.most
    gone = Descriptors(limit=None)
    gone(events.KernelStarted(time=0, pid=2**22 + 1))
    gone.look()
    assert gone.most is None


# --- what is printed --------------------------------------------------------------------------------------------

FOUND = """\
memory of analysis.ipynb
  passes with 416 MiB   peak 396 MiB
  fails with  397 MiB   out of memory in code cell 3, line 2
      3 │ joined = frame.merge(big, on="k")
              4 runs · 4.5 s · to 5 %
  use         --memory 437M (5 % above what it needs)
  reproduce   safe-exec run analysis.ipynb --memory 396M
"""


def test_a_bracket() -> None:
    assert said(probed()) == FOUND
    assert exit_code(probed()) == 0


def test_another_reason() -> None:
    found = probed(Fake(needs=math.inf, kind=CauseKind.EXCEPTION))
    words = said(found)
    assert words.startswith(
        "memory of analysis.ipynb: it fails for another reason, which another limit on memory does not change\n"
    )
    assert (
        "fails with  1.0 GiB   exception in code cell 3, line 2\n              the summary of exception\n"
        in words
    )
    assert "use  " not in words and "passes" not in words
    assert exit_code(found) == 1


def test_another_cause_near_the_edge_is_a_failure_and_named() -> None:
    found = probed(Fake(kind=CauseKind.SEGFAULT))
    assert exit_code(found) == 0
    words = said(found)
    assert "fails with  397 MiB   segfault in code cell 3, line 2\n" in words
    assert "note        it does not die of this limit itself just below, but of segfault" in words


def test_the_most_and_the_least() -> None:
    assert "it fails with all that there is" in said(probed(Fake(needs=math.inf)))
    assert "it passes with the least that can be set" in said(probed(Fake(needs=0, peak=1 * MIB)))
    assert "the budget ran out (--budget)" in said(probed(budget=1.2))


def test_a_weak_limit_and_warnings() -> None:
    watched = Enforcement(by=Mechanism.WATCHDOG, hard=False, note="looked at every 20 ms")
    words = said(replace(probed(), enforcement=watched, warnings=("a warning",)))
    assert (
        "weak limit  only the watchdog holds it; looked at every 20 ms\n  warning     a warning\n"
        in words
    )
    runner = Enforcement(by=Mechanism.RUNNER, hard=False)
    assert "weak limit" not in said(replace(probed(), enforcement=runner))


def test_a_bracket_that_wavers_says_so() -> None:
    found = probed()
    wavers = replace(found, bracket=replace(found.bracket, wavers=True))
    assert "wavers      between these two it passed at one time and failed at another" in said(
        wavers
    )
    assert as_document(wavers, "a.ipynb", None)["wavers"] is True


@pytest.mark.parametrize("width", [40, 60, 110])
@pytest.mark.parametrize("colour", [True, False])
def test_every_width_and_colour(width: int, colour: bool) -> None:
    for line in said(probed(), width=width, colour=False).splitlines()[:-1]:
        assert len(line) <= max(width, 40)
    assert "\x1b[" in said(probed(), width=width, colour=True) or not colour


def test_nothing_from_outside_reaches_the_terminal_raw() -> None:
    evil = "a\x1b]0;title\x07\u202eb"
    found = probed(Fake(kind=CauseKind.SEGFAULT))
    crash = make_crash(source_line=evil)
    runs = tuple(
        replace(
            run, crash_cell=crash, cause=replace(run.cause, summary=evil) if run.cause else None
        )
        for run in found.runs
    )
    lines = list(
        report(
            replace(found, runs=runs, warnings=(evil,)),
            f"{evil}.ipynb",
            f"safe-exec run {evil}",
            Style(),
        )
    )
    assert not [line for line in lines if "\x1b" in line or "\u202e" in line or "\x07" in line]


def test_lines_of_progress() -> None:
    stream = io.StringIO()
    with RunLines(stream, MEMORY) as lines:
        asyncio.run(
            run_search(
                search(MEMORY.question(initial=None, most=1 << 34, precision=0.05, budget=9.0)),
                Fake(),
                lines,
            )
        )
    assert stream.getvalue().splitlines()[1:3] == [
        "run 2 · memory 416 MiB · passed · 1.0 s",
        "run 3 · memory 397 MiB · out of memory in code cell 3, line 2 · 1.5 s",
    ]
    assert stream.getvalue().startswith("run 1 · memory no limit · passed · 1.0 s\n")


def test_quiet_and_broken_streams() -> None:
    stream = io.StringIO()
    with RunLines(stream, MEMORY, quiet=True) as lines:
        lines.ended(1, ProbeRun(value=1.0, outcome=ProbeOutcome.PASSED, seconds=1.0))
    assert stream.getvalue() == ""
    stream.close()
    RunLines(stream, MEMORY).ended(1, ProbeRun(value=1.0, outcome=ProbeOutcome.PASSED, seconds=1.0))


def test_the_document() -> None:
    document = as_document(probed(), "analysis.ipynb", "safe-exec run analysis.ipynb --memory 397M")
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert {
        key: document[key]
        for key in ("schema", "notebook", "limit", "unit", "passes", "fails", "precision", "peak")
    } == {
        "schema": "safe-exec/probe/1",
        "notebook": "analysis.ipynb",
        "limit": "memory",
        "unit": "bytes",
        "passes": 416 * MIB,
        "fails": 397 * MIB,
        "precision": 0.05,
        "peak": 396 * MIB,
    }
    assert (document["found"], document["ended"], document["reason"], document["advised"]) == (
        True,
        None,
        None,
        "437M",
    )
    assert (
        document["cause"]["kind"] == "out_of_memory" and document["crash_cell"]["code_index"] == 2
    )
    assert [run["passed"] for run in document["runs"]] == [True, True, False, True]
    assert document["runs"][2]["line"] == 2 and document["seconds"] == 4.5
    assert document["enforcement"] == {"by": "cgroup-v1", "hard": True, "note": ""}


def test_the_document_of_no_bracket() -> None:
    document = as_document(probed(Fake(needs=math.inf, kind=CauseKind.EXCEPTION)), "a.ipynb", None)
    assert (document["passes"], document["fails"], document["found"], document["ended"]) == (
        None,
        1 << 30,
        False,
        "unrelated",
    )
    assert document["reason"] and document["advised"] is None and document["peak"] is None


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_that_makes_it_fail_again() -> None:
    options = ProbeOptions(
        limits="ci",
        figures={"memory": "2G", "cell_timeout": "9"},
        cwd=Path("a b"),
        allow_errors=True,
    )
    words = reproduce_command(Path("-x.ipynb"), options, LimitName.MEMORY, "396M")
    assert (
        words
        == "safe-exec run ./-x.ipynb --memory 396M --limits ci --cell-timeout 9 --cwd 'a b' --allow-errors"
    )


def test_the_command_has_the_walls_too() -> None:
    options = ProbeOptions(
        walls=WallOptions(network=False, writable=("/a", "/b"), env_names=("TOKEN",))
    )
    words = reproduce_command(Path("x.ipynb"), options, LimitName.MEMORY, "396M")
    assert (
        words
        == "safe-exec run x.ipynb --memory 396M --no-network --writable /a --writable /b --env TOKEN"
    )


def test_every_option_of_it_is_one_of_run() -> None:
    ours = {parameter.name for parameter in command.params} - {"precision", "budget", "limit"}
    assert ours <= {parameter.name for parameter in run_command.params}


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.1 %", 0.001), ("100%", 1.0)])
def test_precision(text: str, share: float) -> None:
    assert parse_precision(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["5", "0%", "0.01%", "101%", "", "a lot"])
def test_wrong_precision(text: str) -> None:
    with pytest.raises(UsageError, match="--precision"):
        parse_precision(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("memori",), "is not one of"),
        (("cpus",), "is not one of"),
        (("memory", "--precision", "5"), "--precision"),
        (("memory", "--budget", "soon"), "--budget"),
        (("memory", "--budget", "none"), "--budget"),
        (("memory", "--limits", ""), "--limits"),
        (("memory", "--memory", "5Q"), "--memory"),
        (("memory", "--mechanisms", "magic"), "--mechanisms"),
    ],
)
def test_bad_usage(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "1")
    done = CliRunner().invoke(command, [str(path), *arguments])
    message = done.output + (
        str(done.exception) if isinstance(done.exception, SafeExecError) else ""
    )
    assert words in message
    assert done.exit_code == 2 or (
        isinstance(done.exception, UsageError) and done.exception.exit_code == 2
    )
    assert os.listdir(tmp_path) == ["nb.ipynb"]


def test_the_command_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def probe(
        prepared: PreparedJob,
        name: LimitName,
        *,
        precision: float,
        budget: float,
        observer: probing.ProbeListener,
    ) -> ProbeReport:
        assert (name, precision, budget) == (LimitName.MEMORY, 0.1, 90.0)
        assert prepared.limits.values.memory == 1 << 30 and not prepared.job.writes
        asked = MEMORY.question(
            initial=prepared.limits.values.memory, most=1 << 34, precision=0.05, budget=budget
        )
        bracket, runs = await run_search(search(asked), Fake(), observer)
        return ProbeReport(scale=MEMORY, precision=0.05, bracket=bracket, runs=runs)

    monkeypatch.setattr(probe_command, "probe", probe)
    path = make_notebook(tmp_path / "nb.ipynb", "1")
    arguments = [str(path), "memory", "--memory", "1G", "--precision", "10%", "--budget", "90s"]
    done = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert done.return_value == 0
    assert f"reproduce   safe-exec run {path} --memory 397M\n" in done.stdout
    assert done.stderr.startswith("run 1 · memory 1.0 GiB · passed · 1.0 s\n")
    quiet = CliRunner().invoke(command, [*arguments, "-q"], standalone_mode=False)
    assert (quiet.stdout, quiet.stderr) == ("", "")
    as_json = CliRunner().invoke(command, [*arguments, "--json"], standalone_mode=False)
    assert json.loads(as_json.stdout)["passes"] == 416 * MIB and as_json.stderr == ""


# --- one run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeout", "times", "bound", "ended"),
    [
        (None, (math.inf, math.inf), None, ""),
        (30.0, (math.inf, math.inf), 30.0, ""),
        (30.0, (20.0, 100.0), 20.0, "slow"),
        (30.0, (20.0, 10.0), 9.0, "cut"),
        (5.0, (20.0, 10.0), 5.0, ""),
        (None, (20.0, 0.2), 1.0, "cut"),
    ],
)
def test_why_a_run_was_over(
    monkeypatch: pytest.MonkeyPatch,
    timeout: float | None,
    times: tuple[float, float],
    bound: float | None,
    ended: str,
) -> None:
    """``times`` are the deadline and what is allowed."""
    asked: list[TrialRequest] = []

    async def run_trial(request: TrialRequest) -> Any:
        asked.append(request)
        return SimpleNamespace(
            ending=TimedOut(cell=0, whole_notebook=True, allowed=request.limits.timeout or 0.0)
        )

    limits = Limits(memory=MIB, timeout=timeout)
    template = TrialRequest(
        run_id="0", node=None, kernel_name="python3", cwd=Path(), limits=limits, machine=HostCapabilities(),
        plan=build_plan(limits, HostCapabilities(), "0"),
        cell_limits=lambda _: limits,
    )  # fmt: skip
    monkeypatch.setattr(rerun, "run_trial", run_trial)
    monkeypatch.setattr(
        rerun,
        "isolated_request",
        lambda request, _views, limits, cleanup_if_runner_dies: replace(request, limits=limits),
    )
    workspaces: Any = SimpleNamespace(snapshot=SimpleNamespace(scratch=Path("scratch")))
    change = RerunOptions(
        limits=limits, cell_limits=lambda _: limits, deadline=times[0], time_budget=times[1]
    )
    ran = asyncio.run(Rerunner(template, workspaces).run(change))
    assert asked[0].limits.timeout == bound
    assert ran.request.limits == limits  # what is told of it is what the user set
    assert (ran.slow, ran.cut) == (ended == "slow", ended == "cut")
