from __future__ import annotations

from safe_exec.model import events
from safe_exec.model.verdict import CellStatus, Status
from safe_exec.reports.follow import LONGEST_LINE, OutputFollower


class Log:
    def __init__(self, **options: object) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.follower = OutputFollower(
            lambda line, _stream: self.lines.append(line),
            clock=lambda: self.now,
            **options,  # type: ignore[arg-type]
        )
        self.follower(
            events.RunStarted(
                time=0.0, run_id="x", notebook="nb", kernel="python3", code_cells=2, limits={}
            )
        )

    def cell(self, *texts: str, code_index: int = 0, ends: bool = True) -> list[str]:
        self.follower(events.CellStarted(time=0.0, index=5, code_index=code_index, source=""))
        for text in texts:
            self.follower.take(5, "stdout", text)
        if ends:
            self.follower(
                events.CellFinished(
                    time=1.0, index=5, code_index=code_index, status=CellStatus.PASSED,
                    seconds=1.0, cpu_seconds=None, memory_peak=None, memory_kept=None,
                )
            )  # fmt: skip
        return self.lines


def test_lines_come_whole_below_a_heading_and_a_silent_cell_has_none() -> None:
    log = Log()
    log.cell()
    assert log.cell("a", "b\nc\n", "rest") == ["--- code cell 1/2 ---", "ab", "c", "rest"]


def test_nothing_that_a_notebook_writes_controls_the_terminal() -> None:
    lines = Log().cell("\x1b[31mred\x1b[0m \x1b]0;title\x07\n")
    assert lines[1] == "red \\x1b]0;title\\x07"


def test_a_progress_bar_shows_its_state_now_and_then_and_its_last_one() -> None:
    log = Log()
    log.cell("\r10%", "\r20%", ends=False)
    assert log.lines == []
    log.now = 11.0
    log.follower.take(5, "stdout", "\r30%")
    log.follower.take(5, "stdout", "\r40%")
    log.follower.take(5, "stdout", "\r100%\n")
    assert log.lines[1:] == ["30%", "100%"]


def test_a_line_without_an_end_is_cut() -> None:
    log = Log()
    log.cell("x" * (LONGEST_LINE + 5))
    assert [len(line) for line in log.lines[1:]] == [LONGEST_LINE, 5]


def test_a_batch_names_the_notebook_in_each_line() -> None:
    assert Log(prefix="docs/a.ipynb").cell("x\n", code_index=1) == ["docs/a.ipynb [2]: x"]


def test_on_github_a_cell_is_a_group_and_its_lines_are_no_commands() -> None:
    texts = ("::error::no\n", "##[error]no\n", "  ::set-output name=a::b\n")
    assert Log(github=True).cell(*texts) == [
        "::group::code cell 1/2",
        "| ::error::no",
        "| # #[error]no",
        "|   ::set-output name=a::b",
        "::endgroup::",
    ]


def test_a_group_of_a_batch_is_written_at_once() -> None:
    log = Log(github=True, prefix="a.ipynb", whole_cells=True)
    log.cell("x\n", ends=False)
    assert log.lines == []
    log.follower(events.RunFinished(time=1.0, status=Status.PASSED, cause=None))
    assert log.lines == ["::group::a.ipynb · code cell 1/2\n| x\n::endgroup::"]
