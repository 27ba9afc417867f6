"""Seconds by line, from samples."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from safe_exec.trial.profile import Place, TimeProfile

INDICES = {1: 0, 3: 1}


def test_own_time_and_time_with_calls() -> None:
    profile = TimeProfile()
    profile.add(10.5, 10.0, [(1, 7), (3, 2)])
    profile.add(12.5, 10.0, [(3, 2)])
    profile.add(13.0, 10.0, [(1, 7), (1, 7), (3, 3)])
    rows = [(r.code_index, r.line, r.seconds, r.own_seconds) for r in profile.lines(INDICES)]
    assert rows == [(1, 2, 2.5, 2.0), (0, 7, 1.0, 1.0), (1, 3, 0.5, 0.0)]


def test_time_between_cells_belongs_to_none() -> None:
    profile = TimeProfile()
    profile.add(1.0, 0.0, [(1, 1)])
    profile.add(9.5, 9.0, [(3, 1)])
    profile.add(10.0, 9.0, [])
    assert [(r.code_index, r.seconds) for r in profile.lines(INDICES)] == [(0, 1.0), (1, 0.5)]


@given(st.lists(st.tuples(st.floats(0.01, 5), st.lists(st.sampled_from([(1, 1), (1, 2), (3, 1)])))))
def test_no_line_takes_more_time_than_there_was(samples: list[tuple[float, list[Place]]]) -> None:
    profile, time = TimeProfile(), 0.0
    for duration, stack in samples:
        time += duration
        profile.add(time, 0.0, stack)
    lines = profile.lines(INDICES)
    # Figures are rounded to milliseconds.
    assert sum(line.own_seconds for line in lines) <= time + 0.01
    for line in lines:
        assert line.own_seconds <= line.seconds <= time + 0.01
    assert list(lines) == sorted(lines, key=lambda line: -line.seconds)


def test_empty() -> None:
    assert TimeProfile().lines(INDICES) == ()
