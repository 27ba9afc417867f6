"""The terminal: the diagnosis as it reads, colours only where they belong, and progress with and without a terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safe_exec import events
from safe_exec.model import (
    CauseKind,
    CellStatus,
    Enforcement,
    LimitName,
    Mechanism,
    Status,
    TerminationReason,
    Verdict,
)
from safe_exec.reports import text
from safe_exec.reports.terminal import Progress, Style, diagnosis, first_line, print_diagnosis
from tests.unit.builders import GIB, every_verdict, make_cause, make_crash, make_fact, make_verdict, name_of


def printed(verdict: Verdict, style: Style | None = None) -> str:
    stream = io.StringIO()
    print_diagnosis(verdict, stream, style)
    return stream.getvalue()


# --- the diagnosis ----------------------------------------------------------------------------------------------

DIED = """\
✗ kernel died in code cell 2 · out of memory · limit 1.0 GiB, peak 1.0 GiB
    2 │ joined = frame.merge(big, on="k")           line 2, running when the kernel was killed
  why         the summary of out_of_memory
  evidence    oom kills: 1 · memory.oom_control
              memory peak: 1.0 GiB · memory.max_usage_in_bytes
  weak limit  processes: nothing holds it; the pids controller is missing
  warning     a warning
  next        give it more with --memory, or load less at once
  wrote       analysis.out.ipynb · /tmp/analysis.verdict.json
"""


def test_the_diagnosis_of_a_death() -> None:
    note = "the pids controller is missing"
    held = {LimitName.PROCESSES: Enforcement(by=Mechanism.NONE, hard=False, note=note)}
    assert printed(make_verdict(enforcement=held, warnings=("a warning",))) == DIED


def test_the_diagnosis_of_a_pass() -> None:
    assert printed(make_verdict(Status.PASSED)) == (
        "✓ passed · 4 code cells · 14.2 s · peak 1.0 GiB\n  wrote       analysis.out.ipynb · /tmp/analysis.verdict.json\n"
    )


def test_a_kernel_that_did_not_start_shows_its_last_words() -> None:
    stderr = "".join(f"line {i}\n" for i in range(9)) + "\x1b[31mImportError\n\n"
    said = printed(make_verdict(Status.START_FAILED, stderr_tail=stderr, outputs={}))
    assert said.splitlines()[0] == "✗ kernel did not start · the summary of kernel_start_failed"
    assert "  stderr      line 5\n              line 6\n" in said
    assert r"\x1b[31mImportError" in said and "line 4" not in said and "wrote" not in said
    assert "ImportError" not in printed(make_verdict(stderr_tail=stderr))


def test_at_most_four_facts() -> None:
    facts = tuple(make_fact(fact=f"fact {i}") for i in range(9))
    said = printed(make_verdict(cause=make_cause(evidence=facts)))
    assert said.count("memory.oom_control") == 4


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200])
@pytest.mark.parametrize("verdict", every_verdict(), ids=name_of)
def test_every_line_but_the_headline_keeps_to_the_width(verdict: Verdict, width: int) -> None:
    for line in list(diagnosis(verdict, Style(width=width)))[1:]:
        assert text.display_width(line) <= max(width, 52), line


def test_a_long_line_of_wide_characters_is_clipped() -> None:
    crash = make_crash(source_line="x = '" + "漢" * 99)
    line = printed(make_verdict(crash_cell=crash), Style(width=100)).splitlines()[1]
    assert text.display_width(line) == 100 or text.display_width(line) == 99
    assert "…" in line and line.endswith("was killed")


def test_ascii_where_the_encoding_has_no_more() -> None:
    crash = make_crash(source_line="é = '漢'")
    said = printed(make_verdict(crash_cell=crash), Style(encoding="ascii"))
    assert said.isascii()
    assert said.startswith("x kernel died in code cell 2 - out of memory - limit")
    assert r"    2 | \xe9 = '\u6f22'" in said
    latin = printed(make_verdict(crash_cell=crash), Style(encoding="latin-1"))
    assert r"    2 | é = '\u6f22'" in latin


def test_a_stream_of_ascii_takes_it() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_diagnosis(make_verdict(Status.PASSED), stream)
    assert raw.getvalue().startswith(b"ok passed - 4 code cells")


@pytest.mark.parametrize("verdict", every_verdict(), ids=name_of)
def test_colours_change_nothing_but_the_colours(verdict: Verdict) -> None:
    coloured = printed(verdict, Style(colour=True))
    assert "\x1b[" in coloured and "\x1b[" not in printed(verdict, Style())
    for colour in ("\x1b[1;31m", "\x1b[1;32m", "\x1b[33m", "\x1b[2m", "\x1b[1m", "\x1b[0m"):
        coloured = coloured.replace(colour, "")
    assert coloured == printed(verdict, Style())


def test_nothing_from_outside_reaches_the_terminal_raw() -> None:
    evil = "a\x1b]0;title\x07\u202eb\r\ud800"
    cause = make_cause(CauseKind.EXCEPTION, summary=evil, advice=evil, evidence=(make_fact(fact=evil, value=evil),))
    verdict = make_verdict(cause=cause, crash_cell=make_crash(source_line=evil), warnings=(evil,), outputs={"notebook": evil})
    assert set(printed(verdict)).isdisjoint("\x1b\x07\u202e\r\ud800")


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class BrokenStream(io.StringIO):
    tries = 0

    def write(self, words: str) -> int:
        self.tries += 1
        raise BrokenPipeError


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return FakeTerminal()


def test_colours_on_a_terminal_only_and_never_with_no_color(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Style.of(terminal) == Style(width=100, colour=True)
    assert not Style.of(io.StringIO()).colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Style.of(terminal).colour
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not Style.of(terminal).colour


# --- progress ---------------------------------------------------------------------------------------------------


def finished(code_index: int, seconds: float, status: CellStatus = CellStatus.PASSED) -> events.CellFinished:
    return events.CellFinished(
        time=9.0,
        index=code_index + 1,
        code_index=code_index,
        status=status,
        seconds=seconds,
        cpu_seconds=None,
        memory_peak=GIB,
        memory_kept=None,
    )


def sampled(time: float, cpu: float = 1.0) -> events.UsageSampled:
    return events.UsageSampled(time=time, index=2, memory=GIB // 2, cpu_seconds=cpu, processes=1)


def a_run() -> list[events.Event]:
    limits = {"memory": GIB}
    return [
        events.RunStarted(time=0.0, run_id="r", notebook="a.ipynb", kernel="python3", code_cells=2, limits=limits),
        events.KernelStarted(time=0.1, pid=7),
        events.KernelReady(time=0.4),
        events.CellStarted(time=0.5, index=1, code_index=0, source="quick()"),
        finished(0, 0.1),
        events.CellStarted(time=1.0, index=2, code_index=1, source="\n# load\nbig = load()\n"),
        sampled(1.2),
        events.LimitNear(time=3.0, limit=LimitName.MEMORY, used=0.95 * GIB, allowed=GIB),
        events.Interrupted(time=31.0, index=2),
        events.Killed(time=33.0, reason=TerminationReason.CELL_TIMEOUT),
        events.KernelEnded(time=33.1, status=9, expected=False),
        finished(1, 32.1, CellStatus.KILLED),
    ]


def test_plain_progress() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        for event in a_run():
            progress(event)
    assert stream.getvalue().splitlines() == [
        "kernel python3 ready after 400 ms",
        "memory near its limit in code cell 2: 973 MiB of 1.0 GiB",
        "interrupting code cell 2 after 30.0 s",
        "ending the kernel: cell timeout",
        "code cell 2/2 killed · 32.1 s · peak 1.0 GiB",
    ]


def test_quiet_progress(terminal: FakeTerminal) -> None:
    for stream in (io.StringIO(), terminal):
        with Progress(stream, quiet=True) as progress:
            for event in a_run():
                progress(event)
        assert stream.getvalue() == ""


def test_only_an_end_of_the_kernel_that_nobody_asked_for_is_news() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress(events.KernelEnded(time=1.0, status=0, expected=True))
        assert stream.getvalue() == ""
        progress(events.KernelEnded(time=1.0, status=256, expected=False))
        progress(a_run()[3])
        progress(events.KernelEnded(time=1.0, status=11, expected=False))
        progress(events.Killed(time=1.0, reason=TerminationReason.SHUTDOWN))
    assert stream.getvalue().splitlines() == [
        "the kernel died: exit status 1",
        "the kernel died in code cell 1: SIGSEGV",
    ]


def test_a_broken_stream_does_not_end_the_run() -> None:
    broken, closed = BrokenStream(), io.StringIO()
    closed.close()
    for stream in (broken, closed):
        with Progress(stream) as progress:
            for event in a_run():
                progress(event)
    assert broken.tries == 1


def ticks(*times: float) -> Iterator[float]:
    yield from times
    while True:
        yield times[-1]


def test_live_progress_says_cell_source_time_memory_and_cpu(terminal: FakeTerminal) -> None:
    clock = ticks(*range(1, 99))
    with Progress(terminal, clock=lambda: next(clock)) as progress:
        for event in [*a_run()[:7], sampled(3.2, cpu=2.5)]:
            progress(event)
        drawn = terminal.getvalue()
    assert "starting the kernel" in drawn and "kernel python3 is ready" in drawn
    last = drawn[drawn.rindex("code cell 2/2") :]
    assert "big = load()" in last and "2.2 s" in last
    assert "██████░░░░░░ 512 MiB/1.0 GiB" in last and "cpu 75%" in last


def test_live_progress_draws_ten_times_a_second_at_most(terminal: FakeTerminal) -> None:
    clock = 0.0
    with Progress(terminal, clock=lambda: clock) as progress:
        for _ in range(1000):
            clock += 0.001
            progress(sampled(clock))
        assert 9 <= terminal.getvalue().count("starting the kernel") <= 12


def test_notable_lines_stay_above_the_live_line(terminal: FakeTerminal) -> None:
    with Progress(terminal, clock=lambda: 1.0) as progress:
        for event in a_run():
            progress(event)
    assert "ending the kernel: cell timeout" in terminal.getvalue()
    assert "ready after" not in terminal.getvalue()


def test_the_terminal_is_left_as_it_was_even_by_an_error(terminal: FakeTerminal) -> None:
    progress = Progress(terminal)

    def interrupted() -> None:
        with progress:
            progress(a_run()[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown, hidden = "\x1b[?25h", "\x1b[?25l"
    assert terminal.getvalue().rindex(shown) > terminal.getvalue().rindex(hidden)
    before = terminal.getvalue()
    progress(a_run()[2])
    assert terminal.getvalue() == before, "drawn on after the end"


@pytest.mark.parametrize(
    ("source", "line"),
    [("", ""), ("# only\n# words", "# only"), ("\n\n  x = 1\ny", "x = 1"), ("\x1b[2J", r"\x1b[2J")],
)
def test_the_first_line_that_says_something(source: str, line: str) -> None:
    assert first_line(source) == line


IMPORTED = """
import sys
from safe_exec.reports.terminal import Progress, print_diagnosis
with Progress(sys.stderr): pass
print("rich" in sys.modules)
"""


def python(code: str, stderr: int) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, check=True, text=True).stdout


def test_rich_is_imported_only_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with (tmp_path / "stderr").open("w") as log:
        assert python(IMPORTED, log.fileno()) == "False\n"
    master, slave = pty.openpty()
    try:
        assert python(IMPORTED, slave) == "True\n"
    finally:
        os.close(slave)
        os.close(master)
