"""What an answer in the cache depends on, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from msgspec.structs import replace

from safe_exec.experiments.culprits.oracle.cached_answers import CachedAnswers
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.culprits.protocol import Outcome, Query, Reply
from safe_exec.experiments.trial_cache import TrialCache
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import CauseKind
from tests.unit.experiments.culprits.oracle.subjects import CRASH, subject

QUERY = Query(cells=(0, CRASH), time_budget=50.0)
REPLY = Reply(
    answer=Outcome.UNRESOLVED,
    seconds=1.5,
    stopped_at=0,
    names=frozenset({"b", "a"}),
    peak=3.0,
    another_form=True,
    ended="abort",
    line=3,
    exact_line=True,
)


def with_source(one: Subject, index: int, source: str) -> Subject:
    one.node.cells[index].source = source
    return one


def in_folder(one: Subject, cwd: str) -> Subject:
    return replace(one, request=replace(one.request, cwd=Path(cwd)))


def test_an_answer_costs_nothing_the_second_time(tmp_path: Path) -> None:
    answers = CachedAnswers(subject(), "folder", TrialCache(tmp_path))
    assert answers.get(QUERY, None) is None
    answers.put(QUERY, None, REPLY)
    assert answers.get(QUERY, None) == replace(REPLY, seconds=0.0)
    assert answers.get(replace(QUERY, fresh=True), None) is None


def test_another_cell_does_not_matter(tmp_path: Path) -> None:
    CachedAnswers(subject(), "folder", TrialCache(tmp_path)).put(QUERY, None, REPLY)
    changed = with_source(subject(), 1, "another")
    assert CachedAnswers(changed, "folder", TrialCache(tmp_path)).get(QUERY, None) is not None


@pytest.mark.parametrize(
    ("changed", "folder", "query"),
    [
        (with_source(subject(), 0, "another"), "folder", QUERY),
        (subject(CauseKind.ABORT), "folder", QUERY),
        (subject(limits=Limits(memory=1)), "folder", QUERY),
        (subject(environment={"python": "4"}), "folder", QUERY),
        (in_folder(subject(), "/another"), "folder", QUERY),
        (subject(), "another folder", QUERY),
        (subject(), "folder", replace(QUERY, cells=(CRASH,))),
    ],
)
def test_what_an_answer_depends_on(
    changed: Subject, folder: str, query: Query, tmp_path: Path
) -> None:
    CachedAnswers(subject(), "folder", TrialCache(tmp_path)).put(QUERY, None, REPLY)
    assert CachedAnswers(changed, folder, TrialCache(tmp_path)).get(query, None) is None


def test_the_whole_of_another_notebook(tmp_path: Path) -> None:
    def other(source: str) -> Any:
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])

    answers = CachedAnswers(subject(), "folder", TrialCache(tmp_path))
    answers.put(QUERY, other("x"), REPLY)
    assert answers.get(QUERY, other("x")) is not None
    assert answers.get(QUERY, other("y")) is None and answers.get(QUERY, None) is None


def test_without_a_cache() -> None:
    answers = CachedAnswers(subject(), "folder", None)
    answers.put(QUERY, None, REPLY)
    assert answers.get(QUERY, None) is None
