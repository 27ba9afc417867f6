"""Show foreign text in markdown: a notebook cannot add markup, links or formulas to a report."""

from __future__ import annotations

import re

from safe_exec.model.patterns import lazy_pattern
from safe_exec.reports.text import common

_MARKUP = lazy_pattern(r"[&<>`*_\[\]#~|!^@]|(?<=:)//|(?<=www)\.")


def inert(text: str) -> str:
    """Return ``text`` as markdown that only displays it; not for the start of a line.

    Markup characters become character references, which also keep URLs from turning into links.
    References do not stop MathJax, which reads the finished page but skips code, so ``$`` and the
    backslash become code.
    """
    # Odd parts are runs of the characters that start a formula or an escape.
    parts = re.split(r"([$\\]+)", common.single_line(text))
    return "".join(
        f"`{part}`" if i % 2 else _MARKUP.sub(_reference, part) for i, part in enumerate(parts)
    )


def _reference(match: re.Match[str]) -> str:
    return "".join(f"&#{ord(char)};" for char in match[0])


def code_span(text: str) -> str:
    """Return ``text`` as inline code, whatever backticks it contains (CommonMark 6.1)."""
    # One backtick more than the longest run, so that no run inside closes the code.
    ticks = "`" * (_longest_run(text) + 1)
    # CommonMark strips a space at both ends. Without it a backtick there would join the fence.
    pad = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fenced(code: str) -> str:
    """Return ``code`` in a fence longer than any run of backticks in it (CommonMark 4.5)."""
    fence = "`" * max(3, _longest_run(code) + 1)
    return f"{fence}text\n{code}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
