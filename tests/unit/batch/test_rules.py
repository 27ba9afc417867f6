"""The rules of a batch that need no kernel: admission, order, shards, retries, exit code and the last line."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.batch.admission import (
    RESERVE_BYTES,
    START_BYTES,
    Capacity,
    admits,
    admits_prestart,
    capacity_for,
    first_fitting,
    max_prestarted,
    parse_jobs,
)
from safe_exec.batch.ordering import cut, longest_first, parse_shard, read_timings
from safe_exec.batch.outcome import SEVERITY, STATUSES, exit_code, summary_line, worst
from safe_exec.errors import UsageError
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import (
    Activity,
    Cause,
    CauseKind,
    Confidence,
    Fact,
    Origin,
    Status,
    Verdict,
)
from safe_exec.reports.batch.results import NOT_RUN, REFUSED, UNCHANGED, BatchResult, NotebookResult
from safe_exec.workflows.retry import is_transient
from tests.unit.builders import make_verdict

# --- admission --------------------------------------------------------------------------------------------------

LIMIT = st.none() | st.integers(1, 40)


@given(st.integers(1, 6), st.none() | st.integers(0, 100), st.lists(LIMIT, max_size=30))
def test_never_more_than_fits(jobs: int, memory: int | None, limits: list[int | None]) -> None:
    room = Capacity(jobs=jobs, memory=memory)
    running: list[int | None] = []
    waiting = list(limits)
    while waiting or running:
        at = first_fitting(room, running, waiting)
        if at is None:
            running.pop(0)
            continue
        running.append(waiting.pop(at))
        assert len(running) <= jobs
        if memory is not None and len(running) > 1:
            assert None not in running
            assert sum(limit for limit in running if limit is not None) <= memory
    # It came to an end: whatever the limits are, each gets its turn.


def test_one_always_runs() -> None:
    assert admits(Capacity(jobs=1, memory=0), [], 1 << 40)
    assert admits(Capacity(jobs=4, memory=0), [], None)


def test_one_without_a_limit_runs_alone() -> None:
    room = Capacity(jobs=4, memory=1000)
    assert not admits(room, [1], None) and not admits(room, [None], 1)
    assert admits(Capacity(jobs=4, memory=None), [None], None), (
        "where memory is not known it does not count"
    )


@given(
    st.integers(1, 6),
    st.none() | st.integers(0, 40 << 30),
    st.lists(st.none() | st.integers(1, 8 << 30), max_size=6),
)
def test_kernels_that_only_wait_fit_beside_all_limits(
    jobs: int, memory: int | None, running: list[int | None]
) -> None:
    room = Capacity(jobs=jobs, memory=memory)
    ahead = 0
    while admits_prestart(room, running, ahead):
        ahead += 1
        assert ahead <= max_prestarted(room) <= jobs
        if memory is not None:
            assert None not in running, "one without a limit may use all there is"
            assert (
                sum(limit for limit in running if limit is not None) + ahead * START_BYTES <= memory
            )


def test_what_waits_counts_when_the_next_one_is_to_run() -> None:
    room = Capacity(jobs=3, memory=4 * START_BYTES)
    assert admits(room, [START_BYTES], 2 * START_BYTES, prestarted=1)
    assert not admits(room, [START_BYTES], 2 * START_BYTES, prestarted=2)
    assert admits(room, [], 1 << 50, prestarted=2), "one always runs"


def test_a_small_one_may_pass_a_large_one_that_does_not_fit() -> None:
    assert first_fitting(Capacity(jobs=3, memory=100), [60], [50, 41, 40]) == 2
    assert first_fitting(Capacity(jobs=1, memory=100), [60], [1]) is None


def test_room_leaves_something_for_ourselves() -> None:
    assert capacity_for(2, RESERVE_BYTES + 5).memory == 5
    assert capacity_for(2, 1).memory == 0
    assert capacity_for(2, None).memory is None


@pytest.mark.parametrize(("text", "jobs"), [("auto", 3), ("1", 1), ("16", 16)])
def test_jobs(text: str, jobs: int) -> None:
    assert parse_jobs(text, 3) == jobs


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "", "many", "²"])
def test_jobs_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="-j: expected"):
        parse_jobs(text, 3)


# --- order and shards -------------------------------------------------------------------------------------------

PATHS = st.lists(st.text("abc/", min_size=1, max_size=6), unique=True, max_size=30)


def test_the_longest_comes_first_and_the_unknown_before_all() -> None:
    order = longest_first(["a", "b", "c", "d", "e"], {"a": 1.0, "b": 9.0}, {"c": 1, "d": 5, "e": 5})
    assert order == ["d", "e", "c", "b", "a"]


@given(PATHS, st.data(), st.integers(1, 7))
def test_shards_are_a_partition_that_does_not_depend_on_the_order(
    paths: list[str], data: st.DataObject, shards: int
) -> None:
    seconds = {path: data.draw(st.floats(0, 1000)) for path in paths if data.draw(st.booleans())}
    found = cut(paths, seconds, shards)
    assert len(found) == shards
    assert sorted(path for shard in found for path in shard) == sorted(paths)
    shuffled = data.draw(st.permutations(paths))
    assert [set(shard) for shard in cut(shuffled, seconds, shards)] == [
        set(shard) for shard in found
    ]


@given(PATHS, st.data(), st.integers(1, 7))
def test_no_shard_takes_much_longer_than_another(
    paths: list[str], data: st.DataObject, shards: int
) -> None:
    seconds = {path: data.draw(st.floats(0.1, 1000)) for path in paths}
    loads = [sum(seconds[path] for path in shard) for shard in cut(paths, seconds, shards)]
    assert max(loads) - min(loads) <= max(seconds.values(), default=0.0) + 1e-6


def test_without_timings_shards_are_equal_in_number() -> None:
    assert [len(shard) for shard in cut([f"{n:02}" for n in range(10)], {}, 4)] == [3, 3, 2, 2]


@pytest.mark.parametrize(("text", "shard"), [("1/1", (1, 1)), ("3/8", (3, 8))])
def test_shard(text: str, shard: tuple[int, int]) -> None:
    assert parse_shard(text) == shard


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/b", "-1/2", "1/2/3", ""])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--shard: expected K/N"):
        parse_shard(text)


def test_timings_come_from_summaries_and_the_last_one_counts(tmp_path: Path) -> None:
    for name, rows in (("a", {"x": 1.0, "y": None}), ("b", {"x": 2.5, "z": 3})):
        document = {
            "schema": "safe-exec/batch/1",
            "notebooks": [{"path": p, "seconds": s} for p, s in rows.items()],
        }
        (tmp_path / name).write_text(json.dumps(document))
    assert read_timings([tmp_path / "a", tmp_path / "b"]) == {"x": 2.5, "z": 3.0}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": "other", "notebooks": []}', '{"schema": "safe-exec/batch/1"}'],
)
def test_timings_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(UsageError, match=r"--timings .*expected the summary.json"):
        read_timings([tmp_path / "t"])


# --- retries ----------------------------------------------------------------------------------------------------


def failed(
    kind: CauseKind,
    status: Status = Status.KERNEL_DIED,
    activity: Activity | None = None,
    start_timeout: float | None = None,
    **facts: str | float,
) -> Verdict:
    evidence = tuple(
        Fact(fact=name.replace("_", " "), value=value, source="s", origin=Origin.OUTSIDE)
        for name, value in facts.items()
    )
    cause = Cause(
        kind=kind, summary="s", confidence=Confidence.CERTAIN, evidence=evidence, activity=activity
    )
    return make_verdict(status=status, cause=cause, limits=Limits(start_timeout=start_timeout))


TRANSIENT = {CauseKind.KILLED, CauseKind.TERMINATED}


@pytest.mark.parametrize("kind", list(CauseKind))
def test_only_what_may_come_from_outside_is_tried_again(kind: CauseKind) -> None:
    assert is_transient(failed(kind)) is (kind in TRANSIENT)


@pytest.mark.parametrize("status", list(Status))
def test_what_did_not_fail_by_itself_is_not(status: Status) -> None:
    wanted = status in (
        Status.KERNEL_DIED,
        Status.TIMEOUT,
        Status.LIMIT_EXCEEDED,
        Status.START_FAILED,
    )
    assert is_transient(failed(CauseKind.KILLED, status)) is wanted


@pytest.mark.parametrize(
    "kind", [CauseKind.CELL_TIMEOUT, CauseKind.NOTEBOOK_TIMEOUT, CauseKind.UNRESPONSIVE]
)
@pytest.mark.parametrize("activity", [None, *Activity])
def test_out_of_time_while_waiting_may_go_better(
    kind: CauseKind, activity: Activity | None
) -> None:
    waits = activity is not None and (
        activity.startswith("waiting") or activity is Activity.SLEEPING
    )
    assert is_transient(failed(kind, Status.TIMEOUT, activity)) is waits


def test_out_of_memory_is_tried_again_where_it_was_not_its_own_limit() -> None:
    assert not is_transient(failed(CauseKind.OUT_OF_MEMORY, killed_by_the_system=1))
    assert is_transient(
        failed(CauseKind.OUT_OF_MEMORY, ran_out_in="a group above the sandbox, or the machine")
    )
    assert is_transient(failed(CauseKind.OUT_OF_MEMORY, marked_by="systemd-oomd"))


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ({"seconds_waited": 60.0}, True),
        ({"seconds_waited": 0.1}, False),
        ({"seconds_waited": 60.0, "ended_with": "exit status 1"}, False),
        ({}, False),
    ],
)
def test_a_start_is_tried_again_where_time_ran_out(facts: dict[str, Any], wanted: bool) -> None:
    verdict = failed(
        CauseKind.KERNEL_START_FAILED, Status.START_FAILED, start_timeout=60.0, **facts
    )
    assert is_transient(verdict) is wanted


def test_what_passed_is_not_tried_again() -> None:
    assert not is_transient(make_verdict(status=Status.PASSED, cause=None))


# --- exit code and last line ------------------------------------------------------------------------------------


def entry(status: str, code: int | None, *, flaky: bool = False) -> NotebookResult:
    return NotebookResult(
        path="a.ipynb",
        status=status,
        exit_code=code,
        seconds=None,
        attempts=2 if flaky else 1,
        flaky=flaky,
        error=None,
        verdict=None,
        notebook=None,
        repro=None,
        source=Path("a.ipynb"),
    )


def test_the_order_of_exit_codes_is_whole() -> None:
    assert sorted(SEVERITY) == sorted({*(status.exit_code for status in Status), 2})


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 1], 1),
        ([1, 5], 5),
        ([5, 4], 4),
        ([4, 3], 3),
        ([3, 6], 6),
        ([6, 2], 2),
        ([2, 7], 7),
        ([7, 130], 130),
    ],
)
def test_the_worst_code_counts(codes: list[int], wanted: int) -> None:
    assert worst(codes) == worst(codes[::-1]) == wanted


def test_what_was_not_run_has_no_code_and_a_stop_is_the_worst() -> None:
    entries = [entry("passed", 0), entry(NOT_RUN, None), entry(UNCHANGED, None)]
    assert exit_code(entries, cancelled=False) == 0
    assert exit_code(entries, cancelled=True) == 130
    assert exit_code([*entries, entry(REFUSED, 2)], cancelled=False) == 2


LINE = re.compile(
    r"batch: (\d+) notebooks?(?:: (\d+ [a-z_]+(?: \(\d+ flaky\))?(?:, \d+ [a-z_]+)*))? in (\d+\.\d) s; exit code (\d+)"
)


@given(
    st.lists(st.tuples(st.sampled_from(STATUSES), st.booleans()), max_size=20), st.floats(0, 1e6)
)
def test_the_last_line_can_be_parsed(statuses: list[tuple[str, bool]], seconds: float) -> None:
    entries = tuple(
        entry(status, 0, flaky=flaky and status == "passed") for status, flaky in statuses
    )
    batch = BatchResult(
        results=entries,
        root=Path(),
        out=Path(),
        started=datetime.now(UTC),
        seconds=seconds,
        exit_code=3,
        command=(),
        safe_exec_version="1",
    )
    line = LINE.fullmatch(summary_line(batch))
    assert line and int(line[1]) == len(entries) and line[4] == "3"
    found = dict(
        part.split(" ")[1::-1]
        for part in re.sub(r" \(.*?\)", "", line[2] or "").split(", ")
        if part
    )
    assert {status: int(count) for status, count in found.items()} == batch.counts()


def test_the_last_line() -> None:
    entries = (
        entry("kernel_died", 3),
        entry("cell_error", 1),
        entry("passed", 0),
        entry("passed", 0, flaky=True),
        entry(NOT_RUN, None),
    )
    batch = BatchResult(
        results=entries,
        root=Path(),
        out=Path(),
        started=datetime.now(UTC),
        seconds=12.34,
        exit_code=3,
        command=(),
        safe_exec_version="1",
    )
    assert (
        summary_line(batch)
        == "batch: 5 notebooks: 2 passed (1 flaky), 1 cell_error, 1 kernel_died, 1 not_run in 12.3 s; exit code 3"
    )
