"""The line of a cell from the text of a traceback, as IPython 7, 8 and 9 and other kernels print it (real texts, shortened)."""

from __future__ import annotations

import pytest

from safe_exec.trial.crash_site import body_of_endless_loop, line_in_traceback

SEVEN = """\
\x1b[0;31m---------------------------------------------------------------------------\x1b[0m
\x1b[0;31mZeroDivisionError\x1b[0m                         Traceback (most recent call last)
\x1b[0;32m<ipython-input-2-e92e62a74730>\x1b[0m in \x1b[0;36m<cell line: 3>\x1b[0;34m()\x1b[0m
\x1b[1;32m      1\x1b[0m \x1b[0my\x1b[0m = 2
\x1b[1;32m      2\x1b[0m
\x1b[0;32m----> 3\x1b[0;31m \x1b[0mf\x1b[0m(0)

\x1b[0;32m<ipython-input-1-f33fd48d09bc>\x1b[0m in \x1b[0;36mf\x1b[0;34m(n)\x1b[0m
\x1b[1;32m      1\x1b[0m x = 1
\x1b[0;32m----> 2\x1b[0;31m     return 1 / n

\x1b[0;31mZeroDivisionError\x1b[0m: division by zero"""

SEVEN_KERNEL = """\
ZeroDivisionError                         Traceback (most recent call last)
/tmp/ipykernel_9/2226374418.py in <module>
      1 y = 2
----> 2 f(0)

/tmp/ipykernel_9/1111111111.py in f(n)
----> 9     return 1 / n

ZeroDivisionError: division by zero"""

SEVEN_SYNTAX = """\
  File "<ipython-input-3-017b65df1d32>", line 2
    1 +
       ^
SyntaxError: invalid syntax
"""

EIGHT_ZERO = """\
ZeroDivisionError                         Traceback (most recent call last)
Input In [2], in <module>
      1 y = 2
----> 3 f(0)

Input In [1], in f(n)
      2 def f(n):
----> 8     return 1 / n

ZeroDivisionError: division by zero"""

EIGHT_FIVE = """\
ZeroDivisionError                         Traceback (most recent call last)
Input In [2], in <cell line: 3>()
      1 y = 2
----> 3 f(0)

ZeroDivisionError: division by zero"""

NINE = """\
\x1b[31m---------------------------------------------------------------------------\x1b[39m
\x1b[31mZeroDivisionError\x1b[39m                         Traceback (most recent call last)
\x1b[36mCell\x1b[39m\x1b[36m \x1b[39m\x1b[32mIn[2]\x1b[39m\x1b[32m, line 3\x1b[39m
\x1b[32m      1\x1b[39m y = \x1b[32m2\x1b[39m
\x1b[32m----> \x1b[39m\x1b[32m3\x1b[39m f(\x1b[32m0\x1b[39m)

\x1b[36mCell\x1b[39m\x1b[36m \x1b[39m\x1b[32mIn[1]\x1b[39m\x1b[32m, line 8\x1b[39m, in \x1b[36mf\x1b[39m\x1b[34m(n)\x1b[39m
\x1b[32m      2\x1b[39m \x1b[38;5;28;01mdef\x1b[39;00m f(n):
\x1b[32m----> \x1b[39m\x1b[32m8\x1b[39m     \x1b[38;5;28;01mreturn\x1b[39;00m \x1b[32m1\x1b[39m / n

\x1b[31mZeroDivisionError\x1b[39m: division by zero"""

NINE_SYNTAX = """\
  \x1b[36mCell\x1b[39m\x1b[36m \x1b[39m\x1b[32mIn[3]\x1b[39m\x1b[32m, line 2\x1b[39m
\x1b[31m    \x1b[39m1 +
       ^
\x1b[31mSyntaxError\x1b[39m\x1b[31m:\x1b[39m invalid syntax
"""

NINE_INDENTATION = """\
  File <tokenize>:3
    b
    ^
IndentationError: unindent does not match any outer indentation level
"""

NINE_CHAINED = """\
ZeroDivisionError                         Traceback (most recent call last)
Cell In[7], line 2
      1 try:
----> 2     f(0)

Cell In[1], line 3, in f(n)
----> 3     return 1 / n

The above exception was the direct cause of the following exception:

ValueError                                Traceback (most recent call last)
Cell In[7], line 4
      3 except ZeroDivisionError as e:
----> 4     raise ValueError('v') from e

ValueError: v"""

NINE_RECURSION = """\
RecursionError                            Traceback (most recent call last)
Cell In[6], line 4
----> 4 g(0)

Cell In[6], line 2, in g(n)
----> 2     return g(n+1)

    [... skipping similar frames: g at line 2 (988 times)]

RecursionError: maximum recursion depth exceeded"""

DEEP_IN_A_LIBRARY = """\
KeyError                                  Traceback (most recent call last)
File /usr/lib/python3/pandas/core/indexes/base.py:3812, in Index.get_loc(self, key)
-> 3812     return self._engine.get_loc(casted_key)

The above exception was the direct cause of the following exception:

KeyError                                  Traceback (most recent call last)
Cell In[12], line 5
----> 5 frame["nope"]

File /usr/lib/python3/pandas/core/frame.py:4113, in DataFrame.__getitem__(self, key)
-> 4113     indexer = self.columns.get_loc(key)

KeyError: 'nope'"""

TABLE: list[tuple[str, str, int | None, int | None]] = [
    ("ipython-7", SEVEN, 2, 3),
    ("ipython-7-in-a-kernel", SEVEN_KERNEL, 2, 2),
    ("ipython-7-syntax", SEVEN_SYNTAX, 3, 2),
    ("ipython-8.0", EIGHT_ZERO, 2, 3),
    ("ipython-8.5", EIGHT_FIVE, 2, 3),
    ("ipython-9", NINE, 2, 3),
    ("ipython-9-syntax", NINE_SYNTAX, 3, 2),
    ("ipython-9-indentation", NINE_INDENTATION, 5, 3),
    (
        "ipython-7-indentation",
        NINE_INDENTATION.replace("<tokenize>:3", '"<tokenize>", line 3'),
        5,
        3,
    ),
    ("chained", NINE_CHAINED, 7, 4),
    ("recursion", NINE_RECURSION, 6, 2),
    ("library", DEEP_IN_A_LIBRARY, 12, 5),
    ("count-not-known", DEEP_IN_A_LIBRARY, None, 5),
    ("nothing", "", 1, None),
    ("a-text-of-another-kernel", "bash: syntax error near unexpected token", 1, None),
]


@pytest.mark.parametrize(
    ("text", "count", "line"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_the_line_of_the_cell(text: str, count: int | None, line: int | None) -> None:
    assert line_in_traceback(text.split("\n"), count) == line
    assert line_in_traceback([text], count) == line


def test_no_traceback_no_line() -> None:
    assert line_in_traceback([], 1) is None


@pytest.mark.parametrize(
    ("source", "line", "body"),
    [
        ("x = 1\nwhile True:\n    x += 1", 2, 3),
        ("while 1:\n\n    x += 1; y += 1", 1, 3),
        ("while True:\n    x += 1", 2, None),  # it is there already
        ("while True: x += 1", 1, None),
        ("while x():\n    pass", 1, None),  # the condition may be what runs
        ("while True:\n    a()\n    b()", 1, None),  # which of both is not known
        ("while True:\n    a(1,\n      2)", 1, None),
        ("for x in y:\n    pass", 1, None),  # the iterator may be what runs
        ("%%time\nwhile True:\n    x += 1", 2, 3),
        ("if x:\n    !ls\n    while True:\n        x += 1", 3, 4),
        ("y = !ls\nwhile True:\n    x += 1", 2, None),
    ],
)
def test_an_endless_loop_is_in_its_body(source: str, line: int, body: int | None) -> None:
    assert body_of_endless_loop(source, line) == body
