"""What messages may carry."""

from __future__ import annotations

from typing import Any

import pytest

from safe_exec.kernel.message_validation import MOST_TYPES, bounded_size, checked, mended_reply


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("stream", {"name": "stdout"}),
        ("stream", {"name": 1, "text": "x"}),
        ("error", {"ename": "E", "evalue": "v", "traceback": [1]}),
        ("display_data", {"data": [1]}),
        ("display_data", {"data": {}, "metadata": []}),
        ("display_data", {"data": {"text/plain": 5}}),
        ("execute_result", {"data": {"image/png": "<script>"}}),
        ("comm_open", {"comm_id": 1, "data": {}}),
    ],
)
def test_what_says_nothing_is_refused(kind: str, content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        checked(kind, content)


def test_wrong_entries_of_a_bundle_are_left_out() -> None:
    kept = {
        "text/html": "x",
        "application/json": {"a": [1]},
        "application/x+json": 5,
        "text/plain": ["a", "b"],
        "image/png": "iVBOR w0=\n",
    }
    content = {
        "data": {**kept, "image/jpeg": "<>", "text/latex": 5, "x" * 300: "y"},
        "metadata": {},
    }
    assert len(checked("display_data", content)) == 1
    assert content["data"] == kept


def test_many_types_are_cut() -> None:
    content = {"data": {f"text/{n}": "x" for n in range(1000)}, "metadata": {}}
    assert checked("display_data", content)
    assert len(content["data"]) == MOST_TYPES


@pytest.mark.parametrize("count", ["1", -1, 10**30, True, 1.0, [1]])
def test_a_count_that_is_none(count: Any) -> None:
    content = {"execution_count": count}
    assert checked("execute_input", content)
    assert content["execution_count"] is None


@pytest.mark.parametrize("content", [{}, {"execution_count": None}, {"execution_count": 7}])
def test_counts_that_are(content: dict[str, Any]) -> None:
    before = dict(content)
    assert checked("execute_input", content) == []
    assert content == before


@pytest.mark.parametrize(
    ("told", "size"),
    [
        (5, 5),
        (-5, 0),
        (10**400, 2**40),
        (float("inf"), 0),
        (float("nan"), 0),
        ("x", 0),
        (None, 0),
        (2.5, 2),
    ],
)
def test_sizes_that_are_told(told: Any, size: int) -> None:
    assert bounded_size(told) == size


@pytest.mark.parametrize(
    ("content", "status", "ename"),
    [
        ({"status": "ok"}, "ok", None),
        ({"status": "aborted", "payload": [5, {"source": "x"}]}, "aborted", None),
        ({}, "error", "MalformedReply"),
        ({"status": ["ok"]}, "error", "MalformedReply"),
        ({"status": "error"}, "error", ""),
        ({"status": "error", "ename": 5, "evalue": [], "traceback": "x"}, "error", "5"),
    ],
)
def test_replies_are_mended(content: dict[str, Any], status: str, ename: str | None) -> None:
    mended = mended_reply(content)
    assert (mended["status"], mended.get("ename")) == (status, ename)
    assert all(isinstance(item, dict) for item in mended["payload"])
    assert isinstance(mended.get("traceback", []), list)
