"""Markdown that shows foreign text and does nothing else: nothing in a notebook can mark up, link or typeset a report. Pure."""

from __future__ import annotations

import re

from safe_exec.reports.text import common

_MARKUP = re.compile(r"[&<>`*_\[\]#~|!^@]|(?<=:)//|(?<=www)\.")


def inert(text: str) -> str:
    """``words`` on one line as markdown that shows them and does nothing else; not for the start of a line.

    Markup becomes character references, which also keep URLs from turning into links. A reference does not stop
    MathJax, which reads the finished page, but it passes code by: so ``$`` and the backslash are code.
    """
    parts = re.split(r"([$\\]+)", common.one_line(text))
    return "".join(
        f"`{part}`" if i % 2 else _MARKUP.sub(_reference, part) for i, part in enumerate(parts)
    )


def _reference(match: re.Match[str]) -> str:
    return "".join(f"&#{ord(char)};" for char in match[0])


def code_span(text: str) -> str:
    """One line of ``words`` as inline code, however many backticks are in it (CommonMark 6.1)."""
    ticks = "`" * (_longest_run(text) + 1)
    # A blank at both ends is taken off again; without it a backtick there would join the fence.
    pad = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(code: str) -> str:
    """``code`` as a block whose fence is longer than any run of backticks in it (CommonMark 4.5)."""
    fence = "`" * max(3, _longest_run(code) + 1)
    return f"{fence}text\n{code}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
