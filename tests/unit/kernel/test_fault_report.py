"""Reading what faulthandler wrote: real dumps of Python 3.9 to 3.14 (in dumps/), and damaged ones.

Each file begins with the main thread's identifier. ``ask``: a dump that was asked for, then a fault; ``thread``: a fault in
a thread that the cell started; ``deep``: a fault below 150 calls, of which faulthandler prints 100.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.kernel.fault_report import (
    dumps,
    fatal_part,
    main_stack,
    most_typical,
    other_stacks,
    parse_fault,
    parse_threads,
)
from safe_exec.model.evidence import FaultReport, Frame
from tests.unit.kernel.cells import code_of_files

DUMPS = Path(__file__).parent / "dumps"
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
CELL = "/tmp/ipykernel_7/42.py"
CELLS = code_of_files({CELL: 4})
NO_CELLS = code_of_files({})


def dump(version: str, mode: str) -> tuple[int, str]:
    """The main thread's identifier and the text of one real dump."""
    head, _, text = (DUMPS / f"python{version}-{mode}.txt").read_text().partition("\n")
    return int(head.removeprefix("main "), 16), text


def read(text: str, main: int | None) -> FaultReport:
    report = parse_fault(text, CELLS, main, 8 << 20, 16 << 20)
    assert report is not None
    return report


def brief(frames: tuple[Frame, ...]) -> list[tuple[str, int | None, int | None]]:
    return [(frame.function, frame.line, frame.cell) for frame in frames]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fault_after_a_dump_that_was_asked_for(version: str) -> None:
    main, text = dump(version, "ask")
    report = read(text, main)
    assert (report.title, report.main) == ("Segmentation fault", True)
    assert (report.stack_bytes, report.stack_limit) == (8 << 20, 16 << 20)
    assert brief(report.stack)[1:] == [("inner", 14, 4), ("<module>", 16, 4)], (
        "up to the cell, and nothing of what runs it"
    )
    assert report.stack[0].function == "string_at" and str(report.stack[0].file).endswith(
        "ctypes/__init__.py"
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_dump_that_was_asked_for(version: str) -> None:
    main, text = dump(version, "ask")
    asked = text[: text.index("Fatal Python error")]
    assert brief(main_stack(asked, CELLS, main)) == [("inner", 4, 4), ("<module>", 16, 4)]
    assert parse_fault(asked, CELLS, main, None, None) is None
    worker, current = parse_threads(asked, CELLS)
    assert (worker.current, current.current, current.ident) == (False, True, main)
    assert [frame.function for frame in worker.frames][-1] == "_bootstrap", (
        "a thread without notebook code stays whole"
    )


def test_the_main_threads_dump_of_its_own_stack_has_no_number() -> None:
    frame = '  File "/tmp/ipykernel_1/4.py", line {} in {}\n'
    own = "Stack (most recent call first):\n" + frame.format(7, "exact")
    others = "Thread 0x1 (most recent call first):\n" + frame.format(8, "later")
    others += "Current thread 0x2 (most recent call first):\n" + frame.format(9, "other")
    assert [f.function for f in main_stack(own + others, NO_CELLS, 1)] == ["exact"]
    assert [s[0].function for s in other_stacks(own + others, NO_CELLS, 1)] == ["other"]
    assert [s[0].function for s in dumps(own + others, NO_CELLS, 1)] == ["exact", "later"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_last_of_several_dumps(version: str) -> None:
    main, text = dump(version, "ask")
    asked, fatal = text[: text.index("Fatal")], text[text.index("Fatal") :]
    assert brief(dumps(asked + fatal.partition("\n")[2], CELLS, main)[-1])[-2:] == [
        ("inner", 14, 4),
        ("<module>", 16, 4),
    ]
    assert dumps("", CELLS, main) == ()


def stack(*rows: tuple[str, int, int | None]) -> tuple[Frame, ...]:
    return tuple(
        Frame(function=name, line=line, file="f.py", cell=cell) for name, line, cell in rows
    )


FILLS = stack(("full", 386, None), ("load", 4, 1), ("<module>", 2, 4))
SUMS = stack(("_sum", 50, None), ("<module>", 2, 4))
BEFORE = stack(("<module>", 1, 4))


@pytest.mark.parametrize(
    ("stacks", "found"),
    [
        ([SUMS], SUMS),
        ([FILLS, FILLS, SUMS], FILLS),
        ([FILLS, SUMS], FILLS),
        ([SUMS, FILLS], FILLS),
        ([FILLS, SUMS, SUMS], SUMS),
        ([FILLS, FILLS, BEFORE], BEFORE),
        ([BEFORE, BEFORE, BEFORE, SUMS], SUMS),
    ],
    ids=[
        "one",
        "most",
        "deeper",
        "last",
        "most are in the cell",
        "another line",
        "the last line counts",
    ],
)
def test_the_stack_that_says_where_the_time_went(
    stacks: list[tuple[Frame, ...]], found: tuple[Frame, ...]
) -> None:
    assert most_typical(stacks, 4) is found


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fault_in_a_thread(version: str) -> None:
    main, text = dump(version, "thread")
    report = read(text, main)
    assert report.main is False
    assert brief(report.stack)[1:] == [("<lambda>", 7, 4)]
    inner = [row for row in brief(main_stack(text, CELLS, main)) if row[2] is not None]
    assert inner in (
        [("inner", 8, 4), ("<module>", 16, 4)],
        [("inner", 9, 4), ("<module>", 16, 4)],
    ), "start() or join()"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_deep_stack_fills_what_is_printed(version: str) -> None:
    main, text = dump(version, "deep")
    stack = read(text, main).stack
    assert 90 <= len(stack) <= 100
    assert brief(stack)[-1] == ("inner", 12, 4)


THREE_FOURTEEN = f"""\
Fatal Python error: Aborted

Thread 0x00007f1111111111 [pool-3_0] (most recent call first):
  File "/usr/lib/python3.14/threading.py", line 369 in wait

Thread 0x00007f3333333333 [work[1]] (most recent call first):
  File "/usr/lib/python3.14/threading.py", line 1 in run

Current thread 0x00007f2222222222 [python] (most recent call first):
  Garbage-collecting
  File "/usr/lib/python3.14/ctypes/__init__.py", line 564 in string_at
  File "{CELL}", line 2 in <module>
  File "/usr/lib/python3.14/runpy.py", line 88 in _run_code

Current thread's C stack trace (most recent call first):
  Binary file "/usr/bin/python3.14", at _Py_DumpStack+0x37 [0x55d1d6b0a2d7]
  Binary file "/lib/x86_64-linux-gnu/libc.so.6", at abort+0xd3 [0x7f8f0c0288ff]
  <truncated rest of calls>

Extension modules: numpy._core._multiarray_umath, zmq.backend.cython._zmq (total: 2)
"""


def test_names_of_threads_and_a_stack_of_c() -> None:
    report = read(THREE_FOURTEEN, 0x7F2222222222)
    assert (report.title, report.main) == ("Aborted", True)
    assert brief(report.stack) == [("string_at", 564, None), ("<module>", 2, 4)]


def test_a_thread_whose_name_has_brackets_is_a_thread_of_its_own() -> None:
    threads = parse_threads(THREE_FOURTEEN, CELLS)
    assert [hex(thread.ident or 0) for thread in threads] == [
        "0x7f1111111111",
        "0x7f3333333333",
        "0x7f2222222222",
    ]


UNKNOWN = f"""\
Fatal Python error: Bus error

Current thread 0x0000000000000009 (most recent call first):
  File ???, line ??? in ???
  File "{CELL}", line ??? in f
  File "{CELL}", line 7 in <module>
"""


def test_lines_that_are_not_known() -> None:
    assert brief(read(UNKNOWN, 9).stack)[-2:] == [("f", None, 4), ("<module>", 7, 4)]


HEAD = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x0000000000000009 (most recent call first):\n"


@pytest.mark.parametrize(
    ("text", "stack"),
    [
        ("Fatal Python error: Segmentation fault", ()),
        ("Fatal Python error: Segmentation fault\n\n<no Python frame>\n", ()),
        (HEAD, ()),
        (HEAD + "  <no Python frame>\n", ()),
    ],
    ids=["title-only", "no-thread", "head-only", "no-frame"],
)
def test_a_fault_without_frames(text: str, stack: tuple[Frame, ...]) -> None:
    report = read(text, 9)
    assert (report.title, report.stack) == ("Segmentation fault", stack)


@pytest.mark.parametrize("text", ["", "\n", "no such thing", "Fatal Python err"])
def test_nothing_fatal(text: str) -> None:
    assert parse_fault(text, CELLS, 9, None, None) is None
    assert fatal_part(text) == ""


def test_the_last_fatal_error_counts() -> None:
    text = "Fatal Python error: Aborted\n\n" + UNKNOWN
    assert read(text, 9).title == "Bus error"


def test_a_main_thread_that_is_not_known() -> None:
    _, text = dump("3.11", "thread")
    assert read(text, None).main is None
    assert main_stack(text, CELLS, 12345) == (), (
        "faulthandler prints at most 100 threads: the main one may be missing"
    )
    assert main_stack(text, CELLS, None)[-1].function == "<module>", (
        "the main thread is printed last"
    )


# faulthandler escapes what is not ASCII (a real line of 3.11): the folder for temporary files may be called so.
ESCAPED = r'  File "/tmp/\xfcn\xef\u20ac\U0001f600/ipykernel_7/42.py", line 2 in <module>'


def test_a_cell_in_a_folder_whose_name_is_not_ascii() -> None:
    text = f"Fatal Python error: Aborted\n\nCurrent thread 0x0000000000000009 (most recent call first):\n{ESCAPED}\n"
    report = parse_fault(text, code_of_files({"/tmp/ünï€😀/ipykernel_7/42.py": 4}), 9, None, None)
    assert report is not None and brief(report.stack) == [("<module>", 2, 4)]


@pytest.mark.parametrize(("version", "mode"), [("3.9", "ask"), ("3.13", "thread")])
def test_wherever_a_dump_is_cut_off_the_rest_is_true(version: str, mode: str) -> None:
    _, text = dump(version, mode)
    text = text[text.index("Fatal") :]
    whole = {thread.ident: thread.frames for thread in parse_threads(text, NO_CELLS)}
    for cut in range(len(text)):
        for thread in parse_threads(text[:cut], NO_CELLS):
            assert thread.ident in whole
            assert thread.frames == whole[thread.ident][: len(thread.frames)], text[
                max(0, cut - 30) : cut
            ]


lines = st.sampled_from(
    [
        "Fatal Python error: x",
        "Current thread 0x9 (most recent call first):",
        "Thread 0xff [a] (most recent call first):",
        f'  File "{CELL}", line 3 in f',
        '  File "a", line ??? in ???',
        "  File ???, line 1 in g",
        "  ...",
        "",
    ]
)


@settings(deadline=None)
@given(st.lists(lines | st.text(max_size=20), max_size=12).map("\n".join))
def test_anything_may_be_written_there(text: str) -> None:
    report = parse_fault(text, CELLS, 9, None, None)
    assert (report is None) == ("Fatal Python error: " not in text)
    main_stack(text, CELLS, 9)
    dumps(text, CELLS, None)


def test_frames_of_the_agent_are_left_out_and_those_of_a_users_own_agent_are_not() -> None:
    rows = (
        ("f", CELL),
        ("run_code_noted", "/x/safe_exec/agent/cells.py"),
        ("g", "/x/agent/cells.py"),
        ("<module>", CELL),
    )
    text = "Current thread 0x01 (most recent call first):\n"
    text += "".join(f'  File "{file}", line 3 in {name}\n' for name, file in rows)
    (thread,) = parse_threads(text, CELLS)
    assert [frame.function for frame in thread.frames] == ["f", "g", "<module>"]
