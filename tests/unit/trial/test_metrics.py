"""The figures of a run: what was not measured stays null, the peaks survive, kills are counted where they happened."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.model.verdict import CellStatus
from safe_exec.sandbox.usage.meter import Reading
from safe_exec.trial.metrics import TIMELINE_POINTS, MetricsRecorder

MIB = 1 << 20


def metrics(*kinds: str) -> MetricsRecorder:
    """A ledger of a notebook with cells of these kinds."""
    cells = [
        SimpleNamespace(cell_type=kind, get=lambda name, n=n: f"id-{n}")
        for n, kind in enumerate(kinds or ("code",))
    ]
    return MetricsRecorder.for_notebook(SimpleNamespace(cells=cells), 0.0)


def end(
    book: MetricsRecorder,
    index: int,
    *,
    reading: Reading | None = None,
    oom: int | None = None,
    now: float = 2.0,
) -> None:
    book.end(
        index,
        now,
        CellStatus.PASSED,
        reading=reading,
        oom_kills=oom,
        output_bytes=None,
        truncated=False,
    )


def test_only_code_cells_are_counted() -> None:
    book = metrics("markdown", "code", "raw", "code")
    assert [(r.index, r.code_index, r.id, r.status) for r in book.records.values()] == [
        (1, 0, "id-1", CellStatus.NOT_RUN),
        (3, 1, "id-3", CellStatus.NOT_RUN),
    ]


def test_what_a_cell_used_is_a_difference() -> None:
    book = metrics()
    book.begin(0, 1.0, Reading(memory=100 * MIB, cpu_seconds=2.0, tasks=3))
    book.sample(1.5, Reading(memory=300 * MIB, cpu_seconds=2.2, tasks=9), 0)
    end(book, 0, reading=Reading(memory=150 * MIB, cpu_seconds=2.5, tasks=3), now=3.0)
    record = book.records[0]
    assert (record.seconds, record.cpu_seconds, record.memory_kept, record.memory_peak) == (
        2.0,
        0.5,
        50 * MIB,
        300 * MIB,
    )
    assert (book.tasks_peak, book.memory_last, book.cpu_last, book.memory_peak) == (
        9,
        150 * MIB,
        2.5,
        300 * MIB,
    )


def test_memory_given_back_is_kept_with_its_sign() -> None:
    book = metrics()
    book.begin(0, 1.0, Reading(memory=100))
    end(book, 0, reading=Reading(memory=40))
    assert book.records[0].memory_kept == -60


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, None),
        (None, Reading(memory=5, cpu_seconds=1.0)),
        (Reading(memory=5, cpu_seconds=1.0), None),
        (Reading(), Reading(memory=5, cpu_seconds=1.0)),
        (Reading(memory=5, cpu_seconds=1.0), Reading()),
    ],
)
def test_a_difference_to_what_was_not_measured_is_null(
    before: Reading | None, after: Reading | None
) -> None:
    book = metrics()
    book.begin(0, 1.0, before)
    end(book, 0, reading=after)
    record = book.records[0]
    assert record.memory_kept is None and record.cpu_seconds is None


def test_nothing_measured_is_null_and_never_zero() -> None:
    book = metrics()
    book.begin(0, 1.0, None)
    end(book, 0)
    assert (book.memory_peak, book.memory_last, book.cpu_last, book.tasks_peak) == (
        None,
        None,
        None,
        None,
    )
    assert (book.records[0].memory_peak, book.records[0].output_bytes) == (None, None)
    assert (book.timeline().memory, book.timeline().cpu) == ((None,), (None,))


@pytest.mark.parametrize(
    ("counts", "in_cells", "first"),
    [
        ([0, 0, 0], [0, 0, 0], None),
        ([0, 1, 1], [0, 1, 0], 1),
        ([2, 2, 3], [2, 0, 1], 0),
        ([None, None, None], [0, 0, 0], None),
        ([None, 1, 1], [0, 1, 0], 1),
        ([1, None, 1], [1, 0, 0], 0),
    ],
)
def test_kills_belong_to_the_cell_in_which_the_counter_went_up(
    counts: Sequence[int | None], in_cells: Sequence[int], first: int | None
) -> None:
    book = metrics("code", "code", "code")
    found = []
    for index, count in enumerate(counts):
        book.begin(index, float(index), None)
        end(book, index, oom=count)
        found.append(book.oom_cell)
    assert (found, book.cell_of_first_oom) == (list(in_cells), first)


def test_a_peak_that_a_counter_knows_only_raises() -> None:
    book = metrics()
    book.begin(0, 0.0, Reading(memory=10))
    book.raise_peak(0, 50)
    book.raise_peak(0, 20)
    assert book.records[0].memory_peak == 50


def test_between_cells_is_minus_one() -> None:
    book = metrics()
    book.sample(0.5, Reading(memory=1), None)
    book.sample(0.6, Reading(memory=1), 0)
    assert book.timeline().cell == (-1, 0)


def test_a_sample_for_a_cell_that_is_no_code_changes_no_record() -> None:
    book = metrics("markdown")
    book.sample(0.5, Reading(memory=1), 0)
    assert book.records == {}


@settings(deadline=None, max_examples=25)
@given(
    peak=st.integers(0, 8099),
    count=st.sampled_from([0, 1, 499, 500, 501, 999, 4001, 8100]),
    measured=st.booleans(),
)
def test_a_timeline_is_short_in_order_and_keeps_its_peak(
    peak: int, count: int, measured: bool
) -> None:
    book = metrics()
    for n in range(count):
        book.sample(
            n / 10,
            Reading(
                memory=(10**6 if n == peak % count else n % 7) if measured else None,
                cpu_seconds=n / 20,
            ),
            0,
        )
    line = book.timeline()
    assert (
        len(line.seconds) == len(line.memory) == len(line.cpu) == len(line.cell) <= TIMELINE_POINTS
    )
    assert list(line.seconds) == sorted(line.seconds)
    assert len(line.seconds) == count or len(line.seconds) > TIMELINE_POINTS // 4, (
        "thinned, not emptied"
    )
    if count and measured:
        assert max(m for m in line.memory if m is not None) == 10**6
    if not measured:
        assert set(line.memory) <= {None}


def test_a_long_run_does_not_fill_our_memory() -> None:
    book = metrics()
    for n in range(20_000):
        book.sample(float(n), Reading(memory=n), None)
    assert len(book.samples) <= 8 * TIMELINE_POINTS
    assert book.memory_peak == 19_999
