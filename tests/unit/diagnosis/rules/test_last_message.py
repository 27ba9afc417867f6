"""The message that a library leaves before it ends the process, found by order in time and by form alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.diagnosis.rules.last_message import (
    KEPT_CHARACTERS,
    SHOWN_CHARACTERS,
    clean,
    last_message,
)
from safe_exec.model.evidence import Channel, Evidence, OutputBurst

D, ERR, OUT = Channel.DESCRIPTOR, Channel.STDERR, Channel.STDOUT


def evidence(*bursts: tuple[Channel, str, float]) -> Evidence:
    return Evidence(final_output=tuple(OutputBurst(channel=c, text=t, age=a) for c, t, a in bursts))


MESSAGES = {
    "numba": (
        "Terminating: fork() called from a process already using GNU OpenMP, this is unsafe.\n",
        ["Terminating: fork() called from a process already using GNU OpenMP, this is unsafe."],
    ),
    "terminate": (
        "terminate called after throwing an instance of 'std::runtime_error'\n  what():  no such mesh\n",
        ["terminate called after throwing an instance of 'std::runtime_error'", "  what():  no such mesh"],
    ),
    "glog": (
        "F0000 00:00:1 7 shape.cc:3] Check failed: n > 0 \n*** Check failure stack trace: ***\n    @     0x7f3a11223344  a::b()\n",
        ["F0000 00:00:1 7 shape.cc:3] Check failed: n > 0", "*** Check failure stack trace: ***"],
    ),
    "v8": ("\n\n#\n# Fatal error in , line 0\n# Check failed: ok.\n#\n#\n", ["# Fatal error in , line 0", "# Check failed: ok."]),
    "rust": (
        "\nthread 'main' panicked at src/a.rs:5:9:\nboom\nstack backtrace:\n   0: rust_begin_unwind\n             at /rustc/x/lib.rs:1:2\n",
        ["thread 'main' panicked at src/a.rs:5:9:", "boom", "stack backtrace:"],
    ),
    "go": (
        "panic: boom\n\ngoroutine 17 [running, locked to thread]:\nmain.f(...)\n\t/src/f.go:30 +0x1d\n",
        ["panic: boom", "main.f(...)"],
    ),
    "backtrace": ("oops\n/lib/libc.so.6(abort+0xd3) [0x7f8f0c0288ff]\n", ["oops"]),
    "registers": ("oops\nrax 0000000000000000 rbx 00007ffd12345678 rcx 0000000000000001\n", ["oops"]),
    "colours": ("\x1b[31;1mERROR\x1b[0m device \x1b]0;title\x07lost\x07\n", ["ERROR device lost"]),
    "progress": ("\r 10%|#    | 1/9 [00:01<00:09]\r 20%|##   | 2/9 [00:02<00:07]singular matrix\n", ["singular matrix"]),
    "traceback": (
        'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\n    f()\nValueError: bad\n',
        ["ValueError: bad"],
    ),
    "warning": ("/a/b.py:3: UserWarning: old\n  f(x)\nfatal: no licence\n", ["fatal: no licence"]),
    "python": ("Fatal Python error: tupledealloc: bad\nPython runtime state: initialized\n\n", ["Fatal Python error: tupledealloc: bad"]),
    "fault-report": (
        'Fatal Python error: Aborted\n\nCurrent thread 0x00007f1 (most recent call first):\n  File "a.py", line 3 in f\n',
        [],
    ),
    "rulers": ("=====\n-----\n", []),
}  # fmt: skip


@pytest.mark.parametrize(("text", "lines"), MESSAGES.values(), ids=MESSAGES)
def test_lines_that_may_be_a_message(text: str, lines: list[str]) -> None:
    assert list(clean(text)) == lines


CHOICES = {
    "native": ([(D, "mine\n", 0.0)], (D, ["mine"])),
    "native-and-the-same-in-the-cell": (
        [(D, "mine\n", 0.0), (ERR, "step 1\nmine\n", 0.1)],
        (D, ["mine"]),
    ),
    "the-last-burst": ([(D, "old\n", 3.0), (D, "new\n", 0.1)], (D, ["new"])),
    "before-a-slow-stack-trace": (
        [(D, "why\n", 3.0), (D, "    @     0x7f00aa  f()\n", 0.1)],
        (D, ["why"]),
    ),
    "native-of-long-ago": ([(D, "loaded\n", 60.0)], None),
    "python-after-native": (
        [(D, "loaded\n", 0.5), (ERR, "loaded\n", 0.5), (ERR, "cannot go on\n", 0.0)],
        (ERR, ["cannot go on"]),
    ),
    "native-after-python": (
        [(ERR, "step 1\n", 0.5), (ERR, "mine\n", 0.0), (D, "mine\n", 0.0)],
        (D, ["mine"]),
    ),
    "native-that-the-cell-did-not-get": (
        [(ERR, "step 1\n", 0.0), (D, "mine\n", 0.0)],
        (D, ["mine"]),
    ),
    "python": (
        [(ERR, "step 1\n\nlicence expired\nsee the manual\n", 0.0)],
        (ERR, ["licence expired", "see the manual"]),
    ),
    "python-of-long-ago": ([(ERR, "step 1\n", 30.0)], None),
    "only-a-warning": ([(ERR, "/a.py:1: UserWarning: old\n  f()\n", 0.0)], None),
    "stdout": ([(OUT, "a\nb\nc\nno opset 22\n", 0.0)], (OUT, ["b", "c", "no opset 22"])),
    "stderr-before-stdout": ([(ERR, "why\n", 0.1), (OUT, "ready\n", 0.0)], (ERR, ["why"])),
    "nothing": ([], None),
}


@pytest.mark.parametrize(("bursts", "expected"), CHOICES.values(), ids=CHOICES)
def test_the_message_that_came_last(
    bursts: list[tuple[Channel, str, float]], expected: tuple[Channel, list[str]] | None
) -> None:
    message = last_message(evidence(*bursts))
    assert (None if message is None else (message.channel, list(message.lines))) == expected


def test_what_is_shown_is_the_beginning_and_the_end() -> None:
    message = last_message(evidence((D, "".join(f"line {n}\n" for n in range(40)), 0.0)))
    assert message is not None
    assert message.text == "last message: line 0 / line 1 / line 2 / ... / line 39"
    assert str(message.fact.value).splitlines()[:2] == ["line 0", "line 1"]


@given(text=st.text(max_size=300), channel=st.sampled_from(Channel), age=st.floats(0, 20))
def test_any_output_gives_printable_lines_of_bounded_size(
    text: str, channel: Channel, age: float
) -> None:
    message = last_message(evidence((channel, text * 20, age)))
    if message is not None:
        assert len(message.text) <= SHOWN_CHARACTERS
        assert len(str(message.fact.value)) <= KEPT_CHARACTERS
        assert not any(ord(char) < 32 and char != "\t" for line in message.lines for char in line)


def test_a_long_line_leaves_room_for_the_reason_below_it() -> None:
    collections = "Mark-Compact (reduce) 149.3 (150.0) MB " * 40
    text = f"<--- Last few GCs --->\n{collections}\n\n#\n# Fatal JavaScript out of memory: CALL_AND_RETRY_LAST\n#\n"
    message = last_message(evidence((D, text, 0.0)))
    assert message is not None
    assert message.text.endswith("# Fatal JavaScript out of memory: CALL_AND_RETRY_LAST")
    assert len(message.text) <= SHOWN_CHARACTERS
