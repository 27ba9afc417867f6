"""Text is wrapped as rich wraps it, without rich where that takes no effort."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from safe_exec.reports.text import common, layout

words = st.text(st.sampled_from("ab-/.·│漢é"), min_size=1, max_size=9)


def wrapped_by_rich(text: str, width: int) -> list[str]:
    lines = Text(text).wrap(layout._console(width), width, overflow="fold")
    return [line.plain.rstrip() for line in lines if line.plain.strip()]


@given(st.lists(words, max_size=12).map(" ".join), st.integers(min_value=2, max_value=20))
def test_lines_are_those_of_rich(text: str, width: int) -> None:
    lines = layout.wrap(text, width)
    assert lines == wrapped_by_rich(text, width)
    assert all(common.display_width(line) <= width for line in lines)


@given(st.text(st.sampled_from("ab-·  "), max_size=40), st.integers(min_value=2, max_value=20))
def test_runs_of_spaces_lose_no_word(text: str, width: int) -> None:
    lines = layout.wrap(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(common.display_width(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("the kernel died in cell 2", ["the kernel", "died in", "cell 2"]),
        ("a well-known name", ["a", "well-known", "name"]),
        ("no /long/path/here ends", ["no", "/long/path", "/here ends"]),
        ("", []),
        (" ", []),
    ],
)
def test_wrapped_lines(text: str, lines: list[str]) -> None:
    assert layout.wrap(text, 10) == lines


def test_plain_text_needs_no_rich() -> None:
    code = (
        "import sys\n"
        "from safe_exec.reports.text import common, layout\n"
        "assert layout.wrap('the kernel died · │', 10) == ['the kernel', 'died · │']\n"
        "assert common.clip('frame.merge(big)', 10) == 'frame.mer…'\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'rich']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
