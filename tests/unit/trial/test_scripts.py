"""The line at which the script of a cell magic failed, from what programs print (real texts)."""

from __future__ import annotations

import pytest

from safe_exec.trial.crash_site import line_of_debugger_call
from safe_exec.trial.printed import without_colours
from safe_exec.trial.scripts import header_line, script_line

PYTHON = 'Traceback (most recent call last):\n  File "<stdin>", line 5, in <module>\n  File "<stdin>", line 4, in f\nZeroDivisionError: x\n'
COLOURED = (  # Python 3.13 with FORCE_COLOR
    "Traceback (most recent call last):\n"
    '  File \x1b[35m"<stdin>"\x1b[0m, line \x1b[35m3\x1b[0m, in \x1b[35m<module>\x1b[0m\n'
    '  File \x1b[35m"<stdin>"\x1b[0m, line \x1b[35m2\x1b[0m, in \x1b[35mf\x1b[0m\n'
    "\x1b[1;35mIndexError\x1b[0m: \x1b[35mlist index out of range\x1b[0m\n"
)
PYTHON_SYNTAX = "  File \"<stdin>\", line 2\n    if x\n        ^\nSyntaxError: expected ':'\n"
IN_A_LIBRARY = 'Traceback (most recent call last):\n  File "<stdin>", line 3, in <module>\n  File "/lib/x.py", line 99, in f\nError\n'
SCRIPT = "a\n\nb\nc\nd"


@pytest.mark.parametrize(
    ("source", "text", "line"),
    [
        (f"%%python\n{SCRIPT}", PYTHON, 5),
        (f"%%python\n{SCRIPT}", PYTHON_SYNTAX, 3),
        (f"%%python\n{SCRIPT}", without_colours(COLOURED), 3),
        (f"\n\n%%script python3 -u\n{SCRIPT}", PYTHON, 7),
        (f"%%capture\n%%python\n{SCRIPT}", IN_A_LIBRARY, 5),
        (f"%%python\n{SCRIPT}", "out\n" + PYTHON + PYTHON_SYNTAX, 3),
        ("%%python\na", PYTHON, None),  # it has no such line
        (f"%%python\n{SCRIPT}", "no traceback", None),
        ("%%perl\na;\ndie 'x';", "x at - line 2.\n", 3),
        ("%%ruby\na\nb", "-:2:in `f': x (RuntimeError)\n", 3),
        ("%%script node\na\nb", "[stdin]:2\nthrow new Error('x')\n^\n\nError: x", 3),
        ("%%sh\necho\nfoo", "sh: 2: foo: not found\n", 3),
        ("%%sh\nfoo\necho", "sh: 1: foo: not found\n", None),  # it went on
        ("%%sh\nset -e\nfoo\necho", "sh: 2: foo: not found\n", 3),
        ("%%bash -e\nfoo\necho", "bash: line 1: foo: command not found\n", 2),
        ("%%bash\nset -euo pipefail\nfoo\necho", "/bin/bash: line 2: foo: command not found\n", 3),
        ("%%bash\nset -o errexit\nfoo\necho", "bash: line 2: foo: command not found\n", 3),
        ("%%bash\nset -u\necho $x\necho", "bash: line 2: x: unbound variable\n", 3),
        ("%%bash\nfoo\n# the end\n", "bash: line 1: foo: command not found\n", 2),
        ("%%bash\nfoo", "bash: foo: command not found\n", None),  # a shell that names no line
        ("1 / 0", PYTHON, None),
        ("", PYTHON, None),
    ],
)
def test_the_line_of_a_script(source: str, text: str, line: int | None) -> None:
    assert script_line(source, text) == line


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("%%time\na", 1),
        ("\n\n%%time\n\n%%bash\na", 5),
        ("a\n%%time", None),
        ("", None),
        ("  %%time\na", 1),
    ],
)
def test_the_innermost_magic(source: str, line: int | None) -> None:
    assert header_line(source.splitlines()) == line


@pytest.mark.parametrize(
    ("source", "line", "call"),
    [
        ("x = 1\nset_trace()\ny = 2", 3, 2),
        ("def f():\n    pdb.set_trace()\n    return 1\nf()", 3, 2),
        ("breakpoint()", 1, 1),
        ("# breakpoint()\nx = 1", 2, 2),
        ("x = 1\nbreakpoint()", 1, 1),  # it comes later
        ("post_mortem()", 1, 1),
    ],
)
def test_a_debugger_is_where_it_was_called(source: str, line: int, call: int) -> None:
    assert line_of_debugger_call(source, line) == call
