"""Patterns that are compiled at their first use."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from safe_exec.model.patterns import LazyPattern, compile_next, lazy_pattern


def test_a_pattern_behaves_like_a_compiled_one() -> None:
    lazy, usual = lazy_pattern(r"(\w+)=(\d+)", re.MULTILINE), re.compile(r"(\w+)=(\d+)", 8)
    text = "a=1\nb=2"
    assert lazy.findall(text) == usual.findall(text)
    assert lazy.sub(r"\2", text) == usual.sub(r"\2", text)
    assert (lazy.pattern, lazy.flags, lazy.groups) == (usual.pattern, usual.flags, usual.groups)


def test_a_pattern_is_compiled_at_its_first_use_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    usual = re.compile

    def note(text: str, flags: int = 0) -> re.Pattern[str]:
        compiled.append(text)
        return usual(text, flags)

    lazy = LazyPattern("a+", 0)
    monkeypatch.setattr(re, "compile", note)
    assert compiled == []
    assert lazy.search("aa") and lazy.match("a")
    assert compiled == ["a+"]


def test_all_patterns_of_the_rules_are_valid() -> None:
    code = (
        "import safe_exec.diagnosis.verdict, safe_exec.trial.run\n"
        "from safe_exec.model import patterns\n"
        "count = len(patterns._uncompiled)\n"
        "while patterns.compile_next(): pass\n"
        "print(count)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50


def test_nothing_is_left_to_compile_in_the_end() -> None:
    while compile_next():
        pass
    lazy_pattern("b+")
    assert compile_next() and not compile_next()
