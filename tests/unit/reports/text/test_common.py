"""The texts that the reports for people share: headlines, names, facts, and foreign text made harmless."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safe_exec.model.evidence import Frame
from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.model.verdict import (
    Activity,
    CauseKind,
    Confidence,
    Fact,
    Origin,
    Status,
    Usage,
    Verdict,
)
from safe_exec.reports.text import common
from tests.unit.builders import (
    every_verdict,
    make_cause,
    make_crash,
    make_fact,
    make_verdict,
    name_of,
)

anything = st.text(st.characters(), max_size=40)  # lone surrogates among it
REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines", "two\nlines"),
        ("dos\r\nlines", "dos\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("back\rover", r"back\rover"),
        ("bell\x07 nul\x00", r"bell\x07 nul\x00"),
        ("c1 \x9b2J", r"c1 \x9b2J"),
        ("user\u202e\u2066nimda", r"user\u202e\u2066nimda"),
        ("caf\udce9", r"caf\udce9"),
        ("tag\U000e0041", r"tag\U000e0041"),
        ("a\tb", "a   b"),
        ("né 漢字 👩\u200d🔬", "né 漢字 👩\u200d🔬"),
    ],
)
def test_printable(raw: str, shown: str) -> None:
    assert common.printable(raw) == shown


@given(anything)
def test_nothing_harmful_passes(raw: str) -> None:
    shown = common.printable(raw)
    shown.encode()
    for char in shown:
        assert char == "\n" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(char) not in REORDERING
    assert common.printable(shown) == shown


@given(anything)
def test_a_single_line_is_one_line(raw: str) -> None:
    assert len(common.single_line(raw).splitlines()) <= 1


@given(anything, st.integers(0, 20))
@example("\x1f00", 2)
def test_clip_keeps_to_the_width(raw: str, width: int) -> None:
    clipped = common.clip(raw, width)
    assert common.display_width(clipped) <= width
    assert clipped == raw or clipped.endswith("…") or not width


def test_wide_characters_take_two_columns() -> None:
    assert common.display_width("漢字e\u0301") == 5
    assert common.clip("漢字漢字", 5) == "漢字…"


@pytest.mark.parametrize(
    ("indices", "name"),
    [([6], "code cell 7"), ([6, 7, 8], "code cells 7-9"), ([8, 2, 3], "code cells 3-4, 9")],
)
def test_people_count_cells_from_one(indices: list[int], name: str) -> None:
    assert common.cell_names(indices) == name


@pytest.mark.parametrize(
    ("indices", "name"),
    [
        ([6], "code cell 7"),
        ([2, 6], "code cells 3 + 7"),
        ([7, 6], "code cells 7 + 8"),
        ([0, 4, 5, 6, 9], "code cells 1 + 5-7 + 10"),
    ],
)
def test_cells_that_it_takes_together(indices: list[int], name: str) -> None:
    assert common.cell_sum(indices) == name


def test_a_path_as_seen_from_the_run() -> None:
    seen = [
        common.path_seen(path, make_verdict())
        for path in ("/home/me/project/a/b", "/home/me/projects/b", "c")
    ]
    assert seen == ["a/b", "/home/me/projects/b", "c"]
    assert common.path_seen("/a", make_verdict(cwd="/")) == "a"


@pytest.mark.parametrize(
    ("frame", "line"),
    [
        (
            Frame(function="load", line=12, file="experiments/trial_cache.py"),
            "load (experiments/trial_cache.py:12)",
        ),
        (Frame(function="<module>", line=3, file="/tmp/1.py", cell=1), "in code cell 1, line 3"),
        (
            Frame(function="<cell line: 2>", line=3, file="/tmp/1.py", cell=2),
            "in code cell 2, line 3",
        ),
        (
            Frame(function="load", line=3, file="<string>", cell=1, source_line="    x = 1"),
            "in `load`, code cell 1, line 3: x = 1",
        ),
        (Frame(function="load", line=None, cell=1), "in `load`, code cell 1"),
        (Frame(function="load", line=1, cell=99), "in `load`, a cell, line 1"),
        (Frame(function="f", line=None, file="lib.so"), "f (lib.so)"),
        (Frame(function="f\x1b[0m", line=None), r"f\x1b[0m (?)"),
    ],
)
def test_a_frame(frame: Frame, line: str) -> None:
    assert common.frame_line(frame, make_verdict()) == line


def test_the_frames_below_the_line_that_is_shown() -> None:
    own = Frame(function="<module>", line=2, cell=2)
    magic = Frame(function="<module>", line=1, cell=2)
    load, read = Frame(function="load", line=5, cell=1), Frame(function="read", line=9, cell=1)
    library = Frame(function="merge", line=812, file="pandas/core/frame.py")
    cases = [
        ((library, own), []),
        ((library, read, library, load, own, library, magic), [load, read]),
        ((read, load), []),  # the line of the crash cell is not in it
        ((), []),
    ]
    for stack, frames in cases:
        assert common.inner_frames(make_verdict(crash_cell=make_crash(stack=stack)), 3) == frames
    assert common.inner_frames(make_verdict(crash_cell=make_crash(stack=(read, load, own))), 1) == [
        read
    ]
    assert common.inner_frames(make_verdict(crash_cell=None), 3) == []


HEADLINES = [
    (make_verdict(Status.PASSED), "passed · 4 code cells · 14.2 s · peak 1.0 GiB"),
    (make_verdict(Status.PASSED, usage=Usage()), "passed · 4 code cells"),
    (make_verdict(), "kernel died in code cell 2 · out of memory · limit 1.0 GiB, peak 1.0 GiB"),
    (make_verdict(limits=Limits()), "kernel died in code cell 2 · out of memory · peak 1.0 GiB"),
    (make_verdict(limits=Limits(), usage=Usage()), "kernel died in code cell 2 · out of memory"),
    (
        make_verdict(
            kind=CauseKind.SEGFAULT,
            cause=make_cause(CauseKind.SEGFAULT, confidence=Confidence.LIKELY),
        ),
        "kernel died in code cell 2 · segfault (likely) · SIGSEGV",
    ),
    (make_verdict(kind=CauseKind.EXIT), "kernel died in code cell 2 · exit · exit status 3"),
    (make_verdict(kind=CauseKind.KILLED, crash_cell=None), "kernel died · killed · SIGKILL"),
    (
        make_verdict(kind=CauseKind.CPU_TIME),
        "kernel died in code cell 2 · cpu time · limit 1m, used 3.5 s",
    ),
    (
        make_verdict(Status.TIMEOUT, CauseKind.CELL_TIMEOUT),
        "timed out in code cell 2 · cell timeout · python loop · limit 30.0 s",
    ),
    (
        make_verdict(
            Status.TIMEOUT,
            cause=make_cause(CauseKind.NOTEBOOK_TIMEOUT, activity=Activity.WAITING_LOCK),
        ),
        "timed out in code cell 2 · notebook timeout · waiting lock · limit 10m",
    ),
    (
        make_verdict(
            Status.CELL_ERROR,
            cause=make_cause(CauseKind.EXCEPTION, summary="ValueError: no\n\x1b[1mway"),
        ),
        r"error in code cell 2 · ValueError: no \x1b[1mway",
    ),
    (make_verdict(Status.LIMIT_EXCEEDED, CauseKind.TOO_MANY_PROCESSES), "limit 64, peak 3"),
    (
        make_verdict(Status.START_FAILED),
        "kernel did not start · the summary of kernel_start_failed",
    ),
    (make_verdict(Status.INTERNAL_ERROR, cause=None, crash_cell=None), "safe-exec failed"),
    (make_verdict(Status.CANCELLED, cause=None), "cancelled in code cell 2"),
]


@pytest.mark.parametrize(("verdict", "line"), HEADLINES, ids=[line[:40] for _, line in HEADLINES])
def test_headline(verdict: Verdict, line: str) -> None:
    said = common.headline(verdict)
    assert said == line or (line.startswith("limit") and said.endswith(line))


@pytest.mark.parametrize("verdict", every_verdict(), ids=name_of)
def test_every_verdict_has_a_headline_and_a_moment(verdict: Verdict) -> None:
    assert 0 < common.display_width(common.headline(verdict)) <= common.HEADLINE_WIDTH
    assert common.moment(verdict).startswith(("line ", "its output differs"))


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (make_verdict(), "line 2, running when the kernel was killed"),
        (make_verdict(kind=CauseKind.SEGFAULT), "line 2, running when the kernel died"),
        (
            make_verdict(crash_cell=make_crash(line=None)),
            "line not known, running when the kernel was killed",
        ),
        (make_verdict(Status.TIMEOUT), "line 2, running when its time was up"),
        (make_verdict(Status.CELL_ERROR), "line 2, raised the error"),
    ],
)
def test_moment(verdict: Verdict, said: str) -> None:
    assert common.moment(verdict) == said


@pytest.mark.parametrize(
    ("fact", "line"),
    [
        (make_fact(), "oom kills: 1 · memory.oom_control"),
        (make_fact(fact="memory_peak", value=1 << 30), "memory peak: 1.0 GiB · memory.oom_control"),
        (make_fact(fact="cell_seconds", value=14.2, source=""), "cell seconds: 14.2 s"),
        (make_fact(fact="cpu_share", value=0.98, source="procfs"), "cpu share: 0.98 · procfs"),
        (make_fact(fact="memory_peak", value=None, source=""), "memory peak: not measured"),
        (make_fact(fact="cell_seconds", value=math.inf, source=""), "cell seconds: not measured"),
        (make_fact(fact="starved", value=True, source="sampler"), "starved: yes · sampler"),
        (
            make_fact(fact="error", value="E\n\x1b[31m", source="reply", origin=Origin.INSIDE),
            r"error: E \x1b[31m · reply, said by the kernel",
        ),
    ],
)
def test_a_fact(fact: Fact, line: str) -> None:
    assert common.fact_line(fact) == line


def test_only_limits_that_were_set_and_are_not_held_are_weak() -> None:
    held = {
        LimitName.MEMORY: Enforcement(by=Mechanism.WATCHDOG, hard=False, note="up to 90 MiB late"),
        LimitName.CPUS: Enforcement(by=Mechanism.NONE, hard=False),
        LimitName.PROCESSES: Enforcement(by=Mechanism.NONE, hard=False),
        LimitName.OPEN_FILES: Enforcement(by=Mechanism.RLIMIT, hard=True),
        LimitName.OUTPUT: Enforcement(by=Mechanism.RUNNER, hard=False),
    }
    limits = Limits(memory=1, processes=2, open_files=3, output=4)
    assert common.weak_limits(make_verdict(limits=limits, enforcement=held)) == [
        "memory: only the watchdog holds it; up to 90 MiB late",
        "processes: nothing holds it",
    ]
