"""Finds the last message that a library wrote before it ended the process. Pure.

There are no phrases to search for, since every library has its own. The order in time decides: the
last text on the process's own descriptors comes from native code, and an abort follows its message
at once. Text around a message is recognised by its form and removed: stack traces, tracebacks,
warnings, progress bars and rulers. Imports model and context.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from msgspec import Struct

from safe_exec.diagnosis.context import inside
from safe_exec.model.evidence import Channel, Evidence, OutputBurst
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Fact

# Native code seldom writes, and some of it writes a stack trace or waits before it aborts: so its
# last message may be this old.
NATIVE_SECONDS = 10.0
# Python code prints all the time: only what came this shortly before the end is a message about it.
PYTHON_SECONDS = 2.0
# A summary is one line; the evidence holds more.
SHOWN_LINES = 5
SHOWN_CHARACTERS = 400
# A long line (V8 prints its collections on one) leaves room for the line below it that names the
# reason.
SHOWN_LINE_CHARACTERS = 120
# Enough for the message of any library that we know.
KEPT_LINES = 20
KEPT_CHARACTERS = 2000
# Ordinary prints are not a message, so only the last few lines of stdout are shown.
STDOUT_LINES = 3
# Below this, an age in seconds would only distract.
RIGHT_BEFORE_SECONDS = 0.5
SOURCES = {
    Channel.DESCRIPTOR: "written by native code or a child",
    Channel.STDERR: "the cell's stderr",
    Channel.STDOUT: "the cell's stdout",
}

_ESCAPES = lazy_pattern(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_CONTROLS = lazy_pattern(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
# A progress bar as tqdm draws it; it has no line end, so a message may follow on its line.
_BAR = lazy_pattern(r"^.*?\d{1,3}%\|[^|]*\|[^\[\]]*\[[^\]]*\]")
_WARNING = lazy_pattern(r"^(?:\S.*:\d+: )?\w*Warning: ")
_FRAME = lazy_pattern(
    # gdb and sanitizers, glog, mxnet, rust, torch
    r"^\s*(?:#\d+\s|@\s+0x|\[bt\]|\d+:\s+0x|frame #\d+)"
    r"|\[0x[0-9a-fA-F]+\]\s*$"  # backtrace(3)
    r"|^\s+(?:\d+: \S|at \S+:\d+)"  # rust
    r"|^\s+\S+\.go:\d+ \+0x|^goroutine \d+ \["
    # Python; the first line of a tail may be cut off
    r'|(?:^\s+File ".*|\.py)", line (?:\d+|\?\?\?)(?: in |, in )'
    r"|^(?:Current thread|Thread) 0x[0-9a-f]+|^\s+<no Python frame>|^Extension modules: "
    r"|^Python runtime state: "
)
_PLAIN_FAULT = lazy_pattern(
    r"^Fatal Python error: (?:Aborted|Segmentation fault|Bus error|Illegal instruction"
    r"|Floating.point exception)$"
)
_HEX = lazy_pattern(r"\b(?:0x)?[0-9a-fA-F]{8,16}\b")
# A line with so many addresses is a dump of registers or of memory.
_MOST_HEX = 3
_TRACEBACK = "Traceback (most recent call last):"


class Message(Struct, frozen=True, kw_only=True):
    """A message: its lines, its channel, and its age at the end of the process, in seconds."""

    lines: tuple[str, ...]
    channel: Channel
    age: float

    @property
    def text(self) -> str:
        """The message on one line for a summary, labelled and shortened."""
        lines = self.lines
        if len(lines) > SHOWN_LINES:
            lines = (*lines[: SHOWN_LINES - 2], "...", *lines[-1:])
        label = "last output" if self.channel is Channel.STDOUT else "last message"
        clipped_lines = [
            _clipped(line.strip(), SHOWN_LINE_CHARACTERS if len(lines) > 1 else SHOWN_CHARACTERS)
            for line in lines
        ]
        return _clipped(f"{label}: {' / '.join(clipped_lines)}", SHOWN_CHARACTERS)

    @property
    def fact(self) -> Fact:
        """The message for the evidence, with its line breaks."""
        text = "\n".join(self.lines[:KEPT_LINES])[:KEPT_CHARACTERS]
        moment = (
            "right before the end"
            if self.age < RIGHT_BEFORE_SECONDS
            else f"{self.age:.0f} s before the end"
        )
        return inside("last message", text, f"{SOURCES[self.channel]}, {moment}")


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def last_message(
    evidence: Evidence, channels: Sequence[Channel] = tuple(Channel)
) -> Message | None:
    """Return the last message before the end.

    It comes from native code, or from Python code that wrote later; from stdout if nothing else was
    written.
    """
    bursts = [burst for burst in evidence.final_output if burst.channel in channels]
    # Native code writes to the descriptor, Python code to the streams of the cell.
    native, printed = _native(bursts), _printed(bursts, Channel.STDERR)
    if native is not None:
        later_message = _after(printed, native)
        return native if later_message is None else later_message
    # stdout is the last resort: most of it is no message.
    return printed or _printed(bursts, Channel.STDOUT)


def _native(bursts: Sequence[OutputBurst]) -> Message | None:
    """Return the last burst of output from native code that is more than a stack trace."""
    for burst in reversed(bursts):
        if (
            burst.channel is Channel.DESCRIPTOR
            and burst.age <= NATIVE_SECONDS
            and (lines := clean(burst.text))
        ):
            return Message(lines=lines, channel=burst.channel, age=burst.age)
    return None


def _printed(bursts: Sequence[OutputBurst], channel: Channel) -> Message | None:
    """Return the last paragraph that Python code wrote just before the end."""
    # Older prints are ordinary output of the program.
    recent = [burst for burst in bursts if burst.channel is channel and burst.age <= PYTHON_SECONDS]
    # A message is set off by blank lines from the output before it.
    paragraphs = re.split(
        r"\n[ \t]*\n", "".join(burst.text for burst in recent).replace("\r\n", "\n")
    )
    lines = next((lines for part in reversed(paragraphs) if (lines := clean(part))), ())
    most = SHOWN_LINES if channel is Channel.STDERR else STDOUT_LINES
    return Message(lines=lines[-most:], channel=channel, age=recent[-1].age) if lines else None


def _after(printed: Message | None, native: Message) -> Message | None:
    """Return the text that Python code wrote after the native message.

    The cell's stderr also contains the output of native code.
    """
    if printed is None:
        return None
    at = next(
        (
            n
            for n in reversed(range(len(printed.lines)))
            if printed.lines[n].endswith(native.lines[-1])
        ),
        None,
    )
    lines = () if at is None else printed.lines[at + 1 :]
    return Message(lines=lines, channel=printed.channel, age=printed.age) if lines else None


# --- lines ----------------------------------------------------------------------------------------


def clean(text: str) -> tuple[str, ...]:
    """Return the lines of a text that may be a message, without terminal escapes."""
    return tuple(_messages(_plain_lines(text)))


def _plain_lines(text: str) -> Iterator[str]:
    for line in _ESCAPES.sub("", text).replace("\r\n", "\n").split("\n"):
        # A terminal shows only the text after the last carriage return.
        visible = line.rstrip("\r").rpartition("\r")[2]
        yield _CONTROLS.sub("", _BAR.sub("", visible)).rstrip()


def _messages(lines: Iterator[str]) -> Iterator[str]:
    indented = (
        # Below a traceback's or warning's first line, whatever is indented belongs to it.
        False
    )
    for line in lines:
        # The body of a traceback or of a warning.
        if indented and line[:1].isspace():
            continue
        indented = line.strip() == _TRACEBACK or _WARNING.match(line) is not None
        if not indented and not _is_noise(line):
            yield line


def _is_noise(line: str) -> bool:
    # Rulers and frames of tables.
    if not any(char.isalnum() for char in line):
        return True
    return (
        bool(_FRAME.search(line) or _PLAIN_FAULT.match(line))
        or len(_HEX.findall(line)) >= _MOST_HEX
    )
