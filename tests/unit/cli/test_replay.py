"""``replay`` without a kernel: what makes two failures the same, what is printed, which notebook is run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from safe_exec.cli.replay import as_document, command, exit_code, report, source_of
from safe_exec.errors import UsageError
from safe_exec.experiments.compare import Agreement, compare
from safe_exec.experiments.culprits import reproduction
from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.model.verdict import CauseKind, Culprit, Fact, Origin, Role, Status, Verdict
from safe_exec.notebook import notebook
from safe_exec.reports import verdict_json
from safe_exec.reports.terminal import Style
from safe_exec.workflows.replay import Replay, ReplayResult, prepare_replay
from tests.support import make_notebook
from tests.unit.builders import (
    GIB,
    make_cause,
    make_crash,
    make_culprit,
    make_culprits,
    make_verdict,
)

THEN = make_verdict()
CULPRITS = (make_culprit(), make_culprit(1, Role.CRASH))


def decisive(found: Agreement) -> list[str]:
    return [difference.what for difference in found.failure if difference.decides]


def told(found: Agreement) -> list[str]:
    return [difference.what for difference in found.failure if not difference.decides]


def peak(verdict: Verdict, size: int) -> Verdict:
    return replace(verdict, usage=replace(verdict.usage, memory_peak=size))


# --- the same or not ----------------------------------------------------------------------------------------------


def test_the_same() -> None:
    found = compare(THEN, THEN)
    assert found.same and found.failure == () and found.environment == () and found.cell == 1


def test_another_cause_signal_exit_code_or_none() -> None:
    assert decisive(compare(THEN, make_verdict(kind=CauseKind.SEGFAULT))) == ["cause", "signal"]
    assert decisive(
        compare(
            make_verdict(kind=CauseKind.EXIT),
            make_verdict(cause=make_cause(CauseKind.EXIT, exit_code=4)),
        )
    ) == ["exit code"]
    assert decisive(compare(THEN, make_verdict(Status.PASSED))) == ["status"]


def test_another_exception() -> None:
    def raised(words: str) -> Verdict:
        fact = Fact(fact="raised", value=words, source="the cell's error", origin=Origin.INSIDE)
        return make_verdict(
            Status.CELL_ERROR,
            CauseKind.EXCEPTION,
            cause=make_cause(CauseKind.EXCEPTION, evidence=(fact,)),
        )

    assert decisive(compare(raised("KeyError: 'a'"), raised("NameError: b"))) == ["error"]
    assert compare(raised("KeyError: 'a'"), raised("KeyError: 'b'")).same


def test_another_cell_unless_the_heap_is_corrupt() -> None:
    elsewhere = make_crash(index=3, code_index=2)
    assert decisive(compare(THEN, make_verdict(crash_cell=elsewhere))) == ["code cell"]
    words = Fact(
        fact="last message", value="free(): invalid pointer", source="stderr", origin=Origin.INSIDE
    )
    heap = make_cause(CauseKind.ABORT, evidence=(words,))
    found = compare(make_verdict(cause=heap), make_verdict(cause=heap, crash_cell=elsewhere))
    assert found.same and told(found) == ["code cell"]


def test_another_form_of_the_same_failure_is_told_and_does_not_decide() -> None:
    words = Fact(
        fact="last message",
        value="corrupted size vs. prev_size",
        source="stderr",
        origin=Origin.INSIDE,
    )
    abort = make_verdict(cause=make_cause(CauseKind.ABORT, evidence=(words,)))
    segfault = make_verdict(kind=CauseKind.SEGFAULT)
    for then, here in ((abort, segfault), (segfault, abort)):
        agreement = compare(then, here)
        assert agreement.same and told(agreement) == ["cause", "signal"]
    elsewhere = replace(segfault, crash_cell=make_crash(index=3, code_index=2))
    assert decisive(compare(abort, elsewhere)) == ["code cell"]


def test_line_and_peak_are_told_and_do_not_decide() -> None:
    found = compare(THEN, peak(make_verdict(crash_cell=make_crash(line=1)), int(0.8 * GIB)))
    assert found.same and told(found) == ["line", "memory peak"]
    assert compare(THEN, peak(THEN, int(0.91 * GIB))).failure == ()
    assert (
        compare(THEN, make_verdict(crash_cell=make_crash(line=None, source_line=None))).failure
        == ()
    )


def test_a_reproduction_counts_its_cells_anew() -> None:
    here = make_verdict(crash_cell=make_crash(index=1, code_index=1))
    assert compare(THEN, here, CULPRITS).same
    third = (make_culprit(), make_culprit(3, Role.CRASH))
    found = compare(make_verdict(crash_cell=make_crash(code_index=3)), here, third)
    assert found.same and found.cell == 3
    assert decisive(
        compare(THEN, make_verdict(crash_cell=make_crash(index=0, code_index=0)), CULPRITS)
    ) == ["code cell"]


def test_lines_of_a_cell_that_was_made_shorter_are_the_same_by_their_text() -> None:
    here = make_verdict(
        crash_cell=make_crash(
            index=1, code_index=1, line=1, source_line=f"  {make_crash().source_line} "
        )
    )
    assert compare(THEN, here, CULPRITS).failure == ()
    other = make_verdict(
        crash_cell=make_crash(index=1, code_index=1, line=2, source_line="other()")
    )
    assert told(compare(THEN, other, CULPRITS)) == ["line"]


def test_a_reproduction_may_need_less_memory_unless_it_is_what_ran_out() -> None:
    less = int(0.3 * GIB)
    assert told(compare(THEN, peak(THEN, less), CULPRITS)) == ["memory peak"]
    segfault = make_verdict(kind=CauseKind.SEGFAULT)
    assert told(compare(segfault, peak(segfault, less), CULPRITS)) == []
    assert told(compare(segfault, peak(segfault, less))) == ["memory peak"]


def test_what_is_different_around_it() -> None:
    environment = replace(
        THEN.environment,
        python="3.12.1",
        platform="Linux-7",
        packages={"NumPy": "2.1", "pandas": "3"},
    )
    held = {**THEN.enforcement, LimitName.MEMORY: Enforcement(by=Mechanism.WATCHDOG, hard=False)}
    here = make_verdict(environment=environment, enforcement=held)
    found = {d.what: (d.then, d.here) for d in compare(THEN, here).environment}
    assert found == {
        "python": ("3.11.2", "3.12.1"),
        "platform": ("Linux-6.1", "Linux-7"),
        "memory held by": ("cgroup-v1", "watchdog"),
        "numpy": ("2.0", None),
        "NumPy": (None, "2.1"),
        "pandas": (None, "3"),
    }
    unknown = make_verdict(environment=replace(THEN.environment, packages=None))
    assert compare(THEN, unknown).environment == ()


# --- what is printed --------------------------------------------------------------------------------------------


def replayed(
    here: Verdict, then: Verdict = THEN, cells: tuple[Culprit, ...] | None = None
) -> ReplayResult:
    prepared: Any = SimpleNamespace(job=SimpleNamespace(path=Path("analysis.ipynb")))
    asked = Replay(original=then, prepared=prepared, cells=cells)
    return ReplayResult(replay=asked, rerun=here, agreement=compare(then, here, cells), warnings=())


def said(done: ReplayResult, **style: Any) -> str:
    return "".join(f"{line}\n" for line in report(done, Style(**style)))


def test_the_same_in_words() -> None:
    done = replayed(make_verdict(crash_cell=make_crash(index=1, code_index=1)), cells=CULPRITS)
    assert said(done) == (
        "✓ the same here: out of memory in code cell 2, line 2, peak 1.0 GiB (1.0 GiB then)\n"
        "  ran         analysis.ipynb · code cells 1 + 2 of the notebook, in a copy of its folder\n"
    )
    assert exit_code(done) == 0


def test_not_the_same_in_words() -> None:
    environment = replace(THEN.environment, packages={"numpy": "2.1"})
    done = replayed(make_verdict(kind=CauseKind.SEGFAULT, environment=environment))
    lines = said(done).splitlines()
    assert lines[0] == "✗ not the same: segfault in code cell 2 here"
    assert [line.split() for line in lines[1:5]] == [
        ["then", "here"],
        ["cause", "out", "of", "memory", "segfault"],
        ["signal", "SIGKILL", "SIGSEGV"],
        ["numpy", "2.0", "2.1"],
    ]
    assert exit_code(done) == 1


def test_it_passed_here() -> None:
    done = replayed(make_verdict(Status.PASSED))
    assert said(done).splitlines()[0] == "✗ not the same: it passed here"
    assert said(done).splitlines()[2].split() == ["status", "kernel", "died", "passed"]
    assert exit_code(done) == 1


def test_the_surroundings_are_of_interest_only_where_it_is_not_the_same() -> None:
    environment = replace(
        THEN.environment, python="3.12.1", packages={f"p{n}": "1" for n in range(40)}
    )
    assert "3.12.1" not in said(replayed(make_verdict(environment=environment)))
    words = said(replayed(make_verdict(Status.PASSED, environment=environment)))
    assert "3.12.1" in words and "  and 30 more (--json)\n" in words


def test_stopped() -> None:
    done = replayed(make_verdict(Status.CANCELLED, cause=None))
    assert exit_code(done) == 130 and said(done).startswith("✗ stopped")
    assert as_document(done, "v.json")["same"] is False


def test_nothing_from_outside_reaches_the_terminal_raw() -> None:
    evil = "a\x1b]0;title\x07\u202eb"
    environment = replace(THEN.environment, python=evil, packages={evil: evil})
    done = replayed(
        make_verdict(Status.PASSED, environment=environment),
        make_verdict(environment=THEN.environment),
    )
    assert not {"\x1b", "\u202e", "\x07"} & set(said(done))


def test_the_document() -> None:
    document = as_document(replayed(make_verdict(kind=CauseKind.SEGFAULT)), "v.json")
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["schema"], document["same"], document["reproduction"]) == (
        "safe-exec/replay/1",
        False,
        False,
    )
    assert document["differs"][0] == {
        "what": "cause",
        "then": "out_of_memory",
        "here": "segfault",
        "decides": True,
    }
    assert (
        document["then"]["cause"]["kind"] == "out_of_memory"
        and document["here"]["cause"]["kind"] == "segfault"
    )


# --- which notebook ---------------------------------------------------------------------------------------------


def written(folder: Path, **changes: Any) -> tuple[Verdict, Path]:
    """A verdict of a notebook in ``folder``, and its file."""
    path = make_notebook(folder / "analysis.ipynb", "1", "2", "3")
    info = replace(THEN.notebook, path=str(path), sha256=notebook.read(path).sha256)
    verdict = make_verdict(
        notebook=info, cwd=str(folder), **{"limits": Limits(memory=GIB), **changes}
    )
    file = folder / "analysis.verdict.json"
    file.write_bytes(verdict_json.dumps(verdict))
    return verdict, file


def test_the_reproduction_is_run_where_there_is_one(tmp_path: Path) -> None:
    verdict, file = written(
        tmp_path,
        culprits=make_culprits(*CULPRITS, repro_notebook="/elsewhere/analysis.repro.ipynb"),
    )
    assert source_of(verdict, file) == (tmp_path / "analysis.ipynb", False)
    node = notebook.read(tmp_path / "analysis.ipynb").node
    made = reproduction.build(
        node,
        (0, 1),
        limits=verdict.limits,
        kernel="python3",
        allow_errors=False,
        origin="analysis.ipynb",
        cause=verdict.cause,
    )
    beside = tmp_path / "analysis.repro.ipynb"
    beside.write_bytes(notebook.dumps(made))
    assert source_of(verdict, file) == (beside, True)
    asked = prepare_replay(verdict, beside, reproduction=True, command=("safe-exec", "replay"))
    assert asked.cells == CULPRITS and asked.prepared.limits.values == verdict.limits


def test_a_file_that_is_no_reproduction_is_refused(tmp_path: Path) -> None:
    verdict, _ = written(tmp_path, culprits=make_culprits(*CULPRITS))
    with pytest.raises(UsageError, match="not the reproduction"):
        prepare_replay(verdict, tmp_path / "analysis.ipynb", reproduction=True, command=())


def test_a_notebook_that_has_changed_is_refused(tmp_path: Path) -> None:
    verdict, file = written(tmp_path)
    source, _ = source_of(verdict, file)
    assert prepare_replay(verdict, source, reproduction=False, command=()).cells is None
    make_notebook(tmp_path / "analysis.ipynb", "other")
    with pytest.raises(UsageError, match="changed since the verdict was written"):
        prepare_replay(verdict, source, reproduction=False, command=())


def test_a_folder_of_another_machine(tmp_path: Path) -> None:
    verdict, _ = written(tmp_path)
    moved = replace(verdict, cwd="/no/such/folder")
    assert (
        prepare_replay(
            moved, tmp_path / "analysis.ipynb", reproduction=False, command=()
        ).prepared.paths.cwd
        == tmp_path
    )


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (make_verdict(Status.PASSED), "nothing to replay: the run passed"),
        (make_verdict(Status.CANCELLED, cause=None), "nothing to replay: the run was stopped"),
        (make_verdict(Status.INTERNAL_ERROR), "nothing to replay: safe-exec itself failed"),
        (
            make_verdict(notebook=replace(THEN.notebook, path="gone.ipynb"), culprits=None),
            "gone.ipynb does not exist",
        ),
        (None, "not a verdict"),
    ],
)
def test_bad_usage(tmp_path: Path, verdict: Verdict | None, words: str) -> None:
    file = tmp_path / "v.json"
    file.write_bytes(b"{}" if verdict is None else verdict_json.dumps(verdict))
    done = CliRunner().invoke(command, [str(file)], standalone_mode=False)
    assert isinstance(done.exception, UsageError) and words in str(done.exception)
    assert "\n" not in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"]


def test_a_difference_of_nothing_is_shown() -> None:
    done = replayed(make_verdict(crash_cell=None))
    assert ["code", "cell", "2", "none"] in [line.split() for line in said(done).splitlines()]
    assert done.agreement.failure[0].here is None
