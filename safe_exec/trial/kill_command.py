"""Finds a command that sends a signal in a cell's shell or script code. Pure.

The agent sees no audit events of such code.
"""

from __future__ import annotations

from safe_exec.model.patterns import lazy_pattern

# Longer lines are cut in the evidence.
LONGEST_TEXT = 200
# Commands of a shell, and calls of R and JavaScript.
KILLING = lazy_pattern(
    r"(?:^|[\s;&|('\"])(?:p?kill|killall|pskill|tools::pskill|Deno\.kill|process\.kill)\b"
)
SCRIPT = lazy_pattern(r"%%(?:bash|sh|script|system|ruby|perl|cmd|!)|%%!")


def kill_command(source: str, *, python: bool) -> tuple[int, str] | None:
    """Return number (from 1) and text of the first line that sends a signal.

    In a Python cell only the body of a script magic is searched.
    """
    lines = source.splitlines()
    if python and not (lines and SCRIPT.match(lines[0].strip())):
        return None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text.startswith("#") and KILLING.search(text):
            return number, text[:LONGEST_TEXT]
    return None
