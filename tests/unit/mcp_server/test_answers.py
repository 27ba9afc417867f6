"""Short forms of verdicts and cells: complete, one line each, bounded."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.mcp_server.answers import (
    MOST_OUTPUT,
    cell_result,
    explanation,
    short_verdict,
    shorten,
)
from safe_exec.model.verdict import Status, Verdict
from tests.unit.builders import every_verdict, make_verdict, name_of


@pytest.mark.parametrize("verdict", every_verdict(), ids=name_of)
def test_every_verdict_has_a_short_form(verdict: Verdict) -> None:
    short = short_verdict(verdict)
    assert short.status == verdict.status.value
    assert (short.cause is None) == (verdict.cause is None)
    assert len(json.dumps(asdict(short))) < 8000
    for line in (short.headline, short.summary or "", *short.evidence, *short.warnings):
        assert "\n" not in line


def test_cells_count_from_one() -> None:
    verdict = make_verdict()
    crash = verdict.crash_cell
    assert crash is not None
    assert (short_verdict(verdict).cell, short_verdict(verdict).line) == (
        crash.code_index + 1,
        crash.line,
    )
    assert [figures.cell for figures in explanation(verdict).cells] == [
        record.code_index + 1 for record in verdict.cells
    ]
    assert explanation(verdict).limits["memory"] == "1.0 GiB"
    assert short_verdict(make_verdict(Status.PASSED)).cell is None


def test_the_result_of_a_cell() -> None:
    result = cell_result(
        [
            {"output_type": "stream", "name": "stdout", "text": "\x1b[1mone\x1b[0m\n"},
            {"output_type": "display_data", "data": {"image/png": "…", "text/plain": "<Figure>"}},
            {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[31mE: v"]},
        ]
    )
    assert result.output == "one\n<Figure> [image/png]\n"
    assert (result.status, result.error) == ("error", "E: v")
    assert cell_result([]).status == "ok"


@given(st.text(max_size=3 * MOST_OUTPUT))
def test_long_texts_keep_both_ends(text: str) -> None:
    short = shorten(text)
    assert len(short) <= MOST_OUTPUT + 60
    assert short[:100] == text[:100] and short[-100:] == text[-100:]
