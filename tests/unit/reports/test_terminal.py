"""The terminal: the diagnosis as it reads, colours only where they belong, and progress with and without a terminal."""

from __future__ import annotations

import asyncio
import io
import math
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec.structs
import pytest
from msgspec.structs import replace

from safe_exec.model import events
from safe_exec.model.ending import TerminationReason
from safe_exec.model.limits import Enforcement, LimitName, Mechanism, Wall
from safe_exec.model.verdict import (
    CauseKind,
    CellStatus,
    Environment,
    Role,
    Status,
    Stopped,
    Verdict,
)
from safe_exec.reports.progress import Progress, first_line
from safe_exec.reports.terminal import Style, diagnosis, print_diagnosis
from safe_exec.reports.text import common
from tests.unit.builders import (
    GIB,
    every_verdict,
    make_cause,
    make_crash,
    make_culprit,
    make_culprits,
    make_fact,
    make_verdict,
    name_of,
    nothing_found,
)


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


def test_walls_that_do_not_stand_are_one_line() -> None:
    lost = "no bubblewrap: it is not installed"
    held = {
        Wall.HOME: Enforcement(by=Mechanism.LANDLOCK, hard=True, note="refused rather than hidden"),
        Wall.NETWORK: Enforcement(
            by=Mechanism.LANDLOCK, hard=False, note=f"TCP only, loopback too; {lost}"
        ),
        Wall.PROCESSES: Enforcement(by=Mechanism.NONE, hard=False, note=lost),
        Wall.SYSTEM_CALLS: Enforcement(by=Mechanism.SECCOMP, hard=True),
        Wall.USER: Enforcement(
            by=Mechanism.NONE, hard=False, note="only root can become somebody else"
        ),
    }
    environment = Environment(python="3.11", platform="Linux", isolation=held)
    said = printed(make_verdict(Status.PASSED, environment=environment), Style(width=200))
    assert f"  weak wall   network (landlock holds a part), processes not held; {lost}\n" in said
    hard = {wall: Enforcement(by=Mechanism.BUBBLEWRAP, hard=True) for wall in Wall}
    assert "weak" not in printed(
        make_verdict(Status.PASSED, environment=replace(environment, isolation=hard))
    )


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
        assert common.display_width(line) <= max(width, 52), line


def test_a_long_line_of_wide_characters_is_clipped() -> None:
    crash = make_crash(source_line="x = '" + "漢" * 99)
    line = printed(make_verdict(crash_cell=crash), Style(width=100)).splitlines()[1]
    assert common.display_width(line) == 100 or common.display_width(line) == 99
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
    cause = make_cause(
        CauseKind.EXCEPTION, summary=evil, advice=evil, evidence=(make_fact(fact=evil, value=evil),)
    )
    culprits = make_culprits(make_culprit(note=evil, source_line=evil), repro_notebook=evil)
    crash, written = make_crash(source_line=evil), {"notebook": evil}
    verdict = make_verdict(
        cause=cause, crash_cell=crash, warnings=(evil,), outputs=written, culprits=culprits
    )
    assert set(printed(verdict)).isdisjoint("\x1b\x07\u202e\r\ud800")


# --- culprits ---------------------------------------------------------------------------------------------------

SEARCHED = """\
✗ kernel died in code cell 2 · out of memory · limit 1.0 GiB, peak 1.0 GiB
    2 │ joined = frame.merge(big, on="k")           line 2, running when the kernel was killed
  caused by   code cells 1 + 2                      reproduced 2/2 · 6 trials · 14.2 s
    1 │ big = load_everything()                     +612 MiB kept
  look first  code cell 1 · accumulator: +612 MiB kept
  why         the summary of out_of_memory
  wrote       analysis.repro.ipynb
  reproduce   safe-exec run analysis.repro.ipynb
"""
NARROW = """\
  caused by   code cells 1 + 2
              reproduced 2/2 · 6 trials · 14.2 s
    1 │ big = load_everything()                +612 MiB kept
"""


def searched(*cells: object, **changes: object) -> Verdict:
    repro = "/home/me/project/analysis.repro.ipynb"
    cause = make_cause(evidence=(), advice="")
    return make_verdict(
        cause=cause,
        outputs={"repro": repro},
        culprits=make_culprits(*cells, **changes),  # type: ignore[arg-type]
    )


def test_the_diagnosis_with_culprits() -> None:
    assert printed(searched()) == SEARCHED
    assert NARROW in printed(searched(), Style(width=60))
    assert "    1 | big = load_everything()                     +612 MiB kept" in printed(
        searched(), Style(encoding="ascii")
    )


def test_a_long_note_of_a_culprit_goes_below_its_line() -> None:
    said = printed(
        searched(make_culprit(note="defines frame, which code cell 7 uses, and much more")),
        Style(width=60),
    )
    assert (
        "    1 │ big = load_everything()\n        defines frame, which code cell 7 uses, and much more\n"
        in said
    )


def test_a_crash_cell_alone() -> None:
    said = printed(searched(make_culprit(1, Role.CRASH), look_first=2, cached=3, trials=1))
    assert (
        "  caused by   code cell 2 alone                     reproduced 2/2 · 1 trial + 3 cached · 14.2 s\n  why"
        in said
    )


def test_no_more_than_eight_culprits_beside_the_crash_cell() -> None:
    many = [make_culprit(i, Role.SETUP, note="", source_line=f"c{i}") for i in (0, *range(2, 12))]
    said = printed(searched(*many, look_first=None))
    assert "caused by   code cells 1 + 3-12 " in said
    assert said.count("must run before") == 8
    assert "    9 │ c8 " in said and "c9" not in said and "\n      │ and 3 more\n" in said


def test_what_to_look_at_first_unless_it_is_the_crash_cell() -> None:
    assert "look first" not in printed(searched(look_first=2))
    assert "look first" not in printed(searched(look_first=None))


@pytest.mark.parametrize(
    ("stopped", "said"),
    [
        (Stopped.BUDGET, "not known to be minimal: the budget ran out"),
        (Stopped.CANCELLED, "stopped by the user; the smallest set so far"),
        (Stopped.TOO_RARE, "not known to be minimal: too rare for the budget"),
        (None, "not known to be minimal"),
    ],
)
def test_a_set_that_may_be_too_large(stopped: Stopped | None, said: str) -> None:
    lines = printed(searched(minimal=False, stopped=stopped)).splitlines()
    assert lines[3] == f"              {said}"


@pytest.mark.parametrize(
    ("stopped", "reproduced", "said"),
    [
        (Stopped.NOT_REPRODUCED, (0, 3), "it did not happen again in 3 of 3 runs"),
        (Stopped.NOT_REPRODUCED, (0, 1), "it did not happen again in 1 of 1 run"),
        (Stopped.NOT_REPRODUCED, (0, 0), "it did not happen again"),
        (Stopped.TOO_RARE, (1, 5), "it happened in 1 of 5 runs: too rare for the budget"),
        (Stopped.BUDGET, (0, 0), "the budget ran out before any culprits were found"),
        (Stopped.CANCELLED, (0, 0), "stopped by the user before any culprits were found"),
    ],
)
def test_a_search_that_found_nothing(
    stopped: Stopped, reproduced: tuple[int, int], said: str
) -> None:
    lines = printed(make_verdict(culprits=nothing_found(stopped, reproduced))).splitlines()
    assert lines[2] == f"  search      {said} · 6 trials · 14.2 s"
    assert not any("reproduce  " in line or "caused by" in line for line in lines)


@pytest.mark.parametrize(
    ("endings", "text"),
    [
        ({"passed": 3}, "it did not happen again in 3 of 3 runs"),
        ({"memory_error": 3}, "it ended another way in 3 of 3 runs: memory error 3"),
        (
            {"memory_error": 2, "passed": 1},
            "it ended another way in 2 of 3 runs: memory error 2, passed 1",
        ),
    ],
)
def test_a_search_without_a_result_says_how_its_runs_ended(
    endings: dict[str, int], text: str
) -> None:
    found = msgspec.structs.replace(nothing_found(Stopped.NOT_REPRODUCED), endings=endings)
    assert f"search      {text} · 6 trials" in printed(make_verdict(culprits=found))


def test_a_failure_with_several_forms_says_how_often_each_was_seen() -> None:
    report = printed(searched(reproduced=(5, 5), endings={"segfault": 3, "abort": 2}))
    assert "reproduced 5/5 (abort 2, segfault 3)" in report


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("/home/me/project/a.repro.ipynb", "safe-exec run a.repro.ipynb"),
        (
            "/home/me/project/sub/a.repro.ipynb",
            "safe-exec run sub/a.repro.ipynb --cwd /home/me/project",
        ),
        (
            "/elsewhere/a.repro.ipynb",
            "safe-exec run /elsewhere/a.repro.ipynb --cwd /home/me/project",
        ),
        (
            "/home/me/project/my 'own'; rm -r.ipynb",
            """safe-exec run 'my '"'"'own'"'"'; rm -r.ipynb'""",
        ),
        ("/home/me/project/-x.ipynb", "safe-exec run ./-x.ipynb"),
        (
            "/home/me/project/" + "long" * 30 + " name.ipynb",
            f"safe-exec run '{'long' * 30} name.ipynb'",
        ),
    ],
)
def test_the_command_to_see_it_again_is_there_to_be_copied(path: str, command: str) -> None:
    assert printed(searched(repro_notebook=path), Style(width=60)).endswith(
        f"\n  reproduce   {command}\n"
    )


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


def test_colours_on_a_terminal_only_and_never_with_no_color(
    terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Style.of(terminal) == Style(width=100, colour=True)
    assert not Style.of(io.StringIO()).colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Style.of(terminal).colour
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not Style.of(terminal).colour


# --- progress ---------------------------------------------------------------------------------------------------


def finished(
    code_index: int, seconds: float, status: CellStatus = CellStatus.PASSED
) -> events.CellFinished:
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
        events.RunStarted(
            time=0.0, run_id="r", notebook="a.ipynb", kernel="python3", code_cells=2, limits=limits
        ),
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


# --- progress of a search ---------------------------------------------------------------------------------------


def trial_finished(
    number: int, time: float, left: int, best: tuple[int, ...], answer: str = "fail"
) -> events.SearchTrialFinished:
    return events.SearchTrialFinished(
        time=time, number=number, answer=answer, seconds=2.5, left=left, best=best
    )


def a_search(budget: float = 60.0) -> list[events.Event]:
    """A run of seven code cells, every second cell markdown, and a search that ends with two of them."""
    cells = [events.CellStarted(time=0.5, index=2 * i, code_index=i, source="x") for i in range(7)]
    return [
        *cells,
        events.SearchStarted(time=10.0, cells=7, budget=budget),
        events.SearchTrialStarted(time=10.0, number=1, cells=(0, 4, 12)),
        trial_finished(1, 12.0, 5, (0, 4, 12)),
        events.SearchTrialStarted(time=12.0, number=2, cells=(0, 12)),
        trial_finished(2, 14.0, 5, (0, 4, 12), "pass"),
        trial_finished(3, 21.9, 4, (0, 4, 12), "pass"),
        trial_finished(4, 22.0, 3, (0, 4, 12), "unresolved"),
        trial_finished(5, 23.0, 2, (4, 12)),
        events.SearchTrialStarted(time=23.0, number=6, cells=(4,)),
        trial_finished(6, 24.0, 2, (4, 12), "pass"),
        events.SearchFinished(time=24.2, cells=(4, 12), minimal=True),
    ]


def plainly(happened: list[events.Event]) -> list[str]:
    stream = io.StringIO()
    with Progress(stream) as progress:
        for event in happened:
            progress(event)
    return stream.getvalue().splitlines()


def test_plain_progress_of_a_search() -> None:
    assert plainly(a_search()) == [
        "searching for the culprits among 7 code cells (budget 60 s)",
        "search  trial 1 · 5 cells left · best: code cells 1 + 3 + 7 · 2 s of 60 s",
        "search  trial 4 · 3 cells left · best: code cells 1 + 3 + 7 · 12 s of 60 s",
        "search  trial 5 · 2 cells left · best: code cells 3 + 7 · 13 s of 60 s",
        "culprits: code cells 3 + 7 · 6 trials · 14.2 s",
    ]


def test_plain_progress_of_a_search_without_a_budget() -> None:
    said = plainly(a_search(math.inf))
    assert said[0] == "searching for the culprits among 7 code cells"
    assert said[1].endswith("code cells 1 + 3 + 7 · 2 s")
    assert plainly(a_search(3600.0))[0].endswith("(budget 1h)")


def test_the_end_of_a_search_that_did_not_come_to_one() -> None:
    end = events.SearchFinished(time=24.2, cells=(), minimal=False)
    assert plainly([*a_search()[:9], end])[-1] == "no culprits found · 1 trial · 14.2 s"
    end = events.SearchFinished(time=24.2, cells=(4, 12), minimal=False)
    assert (
        plainly([*a_search()[:-1], end])[-1]
        == "culprits: code cells 3 + 7 · not known to be minimal · 6 trials · 14.2 s"
    )


def test_cells_that_nobody_saw_run_are_counted() -> None:
    assert plainly(a_search()[7:])[-1] == "culprits: 2 cells · 6 trials · 14.2 s"


def drawn(terminal: FakeTerminal, happened: list[events.Event]) -> str:
    clock = ticks(*range(1, 99))
    with Progress(terminal, clock=lambda: next(clock)) as progress:
        for event in happened:
            progress(event)
        return terminal.getvalue()


def test_live_progress_of_a_search(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn(terminal, a_search()[:9])
    assert "search  trial 1 · 7 cells left" in first and "Ctrl-C keeps the best so far" in first
    assert "searching for" not in first
    last = drawn(terminal, a_search()[:-3])
    assert (
        "search  trial 5 · 2 cells left · best: code cells 3 + 7" in last[last.rindex("search  ") :]
    )
    assert "s of 60 s" in last
    over = drawn(terminal, a_search())
    assert "search  code cells 3 + 7" in over and "Ctrl-C" not in over[over.rindex("search  ") :]


def test_live_progress_of_a_search_on_a_narrow_terminal(
    terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    last = drawn(terminal, a_search()[:-1])
    line = last[last.rindex("search  ") :]
    assert (
        "trial 6 · 2 cells left" in line
        and "        best: code cells 3 + 7 · Ctrl-C keeps it" in line
    )


def test_the_seconds_of_a_search_go_on_between_its_events(terminal: FakeTerminal) -> None:
    async def searching() -> None:
        with Progress(terminal, clock=lambda: 20 * time.monotonic()) as progress:
            for event in a_search()[:9]:
                progress(event)
            await asyncio.sleep(1.2)
        before = terminal.getvalue()
        await asyncio.sleep(0.7)
        assert terminal.getvalue() == before, "drawn on after the end"

    asyncio.run(searching())
    seconds = [int(spent) for spent in re.findall(r"(\d+) s of 60 s", terminal.getvalue())]
    assert len(seconds) > 2 and seconds == sorted(seconds) and seconds[-1] >= 12, (
        "the last event was after 2 s"
    )


@pytest.mark.parametrize(
    ("source", "line"),
    [("", ""), ("# only\n# words", "# only"), ("\n\n  x = 1\ny", "x = 1"), ("\x1b[2J", r"\x1b[2J")],
)
def test_the_first_line_that_says_something(source: str, line: str) -> None:
    assert first_line(source) == line


IMPORTED = """
import sys
from safe_exec.reports.progress import Progress
from safe_exec.reports.terminal import print_diagnosis
with Progress(sys.stderr): pass
print("rich" in sys.modules)
"""


def python(code: str, stderr: int) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=stderr, check=True, text=True
    ).stdout


def test_rich_is_imported_only_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with (tmp_path / "stderr").open("w") as log:
        assert python(IMPORTED, log.fileno()) == "False\n"
    master, slave = pty.openpty()
    try:
        assert python(IMPORTED, slave) == "True\n"
    finally:
        os.close(slave)
        os.close(master)
