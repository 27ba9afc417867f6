"""Finds the line at which the script of a cell magic failed (``%%bash``, ``%%script perl``). Pure.

Such a magic passes its body to a program's standard input and reports only the exit status of a
failure. Most programs print their own message with the line number. A shell prints one for each
failing command and continues, so only a message after which it must have ended tells the line.
"""

from __future__ import annotations

import re

from safe_exec.model.patterns import lazy_pattern

_HEADER = lazy_pattern(r"\s*%%(\S+)(.*)")
_MESSAGES = (
    # CPython's traceback: of the frames of the script the innermost is printed last.
    lazy_pattern(r'^ *File "<stdin>", line (\d+)', re.MULTILINE),
    # Perl.
    lazy_pattern(r" at - line (\d+)[.,]"),
    # Ruby.
    lazy_pattern(r"^-:(\d+):in ", re.MULTILINE),
    # Node.
    lazy_pattern(r"^\[stdin\]:(\d+)$", re.MULTILINE),
)
_SHELL_MESSAGE = lazy_pattern(r"^(?:/\S*/)?(?:ba|da|z|k)?sh: (?:line )?(\d+): (.*)$", re.MULTILINE)
_ENDS_A_SHELL = lazy_pattern(
    r"syntax error|[Uu]nterminated|unbound variable|parameter not set|bad substitution"
)
_STOPS_AT_ERRORS = lazy_pattern(r"^\s*set +(?:-\w*e|-o +errexit)", re.MULTILINE)
_E_OPTION = lazy_pattern(r"\s-\w*e")


def script_line(source: str, text: str) -> int | None:
    """Return the cell line named in the script's output; ``None`` if the output does not tell."""
    lines = source.splitlines()
    start = header_line(lines)
    if start is None:
        return None
    line = _line_of_script("\n".join(lines[start:]), lines[start - 1], text)
    return start + line if line is not None and 1 <= line <= len(lines) - start else None


def header_line(lines: list[str]) -> int | None:
    """Return the line, from 1, of the innermost cell magic at the top of a cell."""
    header_number = None
    for number, line in enumerate(lines, 1):
        if _HEADER.match(line):
            header_number = number
        elif line.strip():
            break
    return header_number


def _line_of_script(body: str, header: str, text: str) -> int | None:
    for message in _MESSAGES:
        numbers = message.findall(text)
        if numbers:
            return int(numbers[-1])
    messages = list(_SHELL_MESSAGE.finditer(text))
    if not messages:
        return None
    line, shell_message = int(messages[-1][1]), messages[-1][2]
    commands = [
        number
        for number, row in enumerate(body.splitlines(), 1)
        if row.strip() and not row.lstrip().startswith("#")
    ]
    stops = (
        _STOPS_AT_ERRORS.search(body)
        or _E_OPTION.search(header)
        or _ENDS_A_SHELL.search(shell_message)
    )
    return line if stops or (commands and line == commands[-1]) else None
