"""Names read on the way to a crash: small cells by table, and any text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.experiments.static_analysis.frame_reads import names_read_at

# A cell, the line at which it crashed, and the global names that were read before.
READ: dict[str, tuple[str, int, str]] = {
    "a call": ("solve(a)", 1, "solve a"),
    "an assignment": ("y = solve(a)[b]", 1, "solve a"),
    "what the call returns is not read yet": ("solve(a).x(b)", 1, "solve a"),
    "the second line": ("x = 1\nsolve(x)", 2, "solve x"),
    "no such line": ("x = 1", 5, ""),
    "a comment": ("x = 1\n# nothing\ny = x", 2, ""),
    "an import": ("import a", 1, ""),
    "several lines, at the first": ("x = solve(\n  a,\n  b)", 1, "solve a b"),
    "several lines, at the last": ("x = solve(\n  a,\n  b)", 3, "solve a b"),
    "two on one line": ("x = a; y = solve(b)", 1, "a"),
    # Loops and branches: the innermost statement, but for one that begins where the head may still run.
    "in a loop": ("for x in it:\n  solve(x)", 2, "solve x"),
    "the head of a loop": ("for x in it:\n  solve(x)", 1, "it"),
    "a loop in one line": ("for x in it: solve(x)", 1, "it"),
    "a condition in one line": ("if check(a): solve()", 1, "check a"),
    "a condition over two lines": ("if check(\n  a): solve()", 2, "check a"),
    "another branch in one line": ("if a:\n  pass\nelif check(b): solve()", 3, "check b"),
    "the last branch in one line": ("if a:\n  pass\nelse: solve()", 3, "solve"),
    "while": ("while check(): solve()", 1, "check"),
    "in a while": ("while check():\n  solve()", 2, "solve"),
    "with, in one line": ("with a() as b: c(b)", 1, "a"),
    "in a with": ("with a() as b:\n  c(b)", 2, "c b"),
    "a case": ("match v:\n  case [a]:\n    solve(b)", 3, "solve b"),
    "a case with a guard in one line": ("match v:\n  case [a] if check(a): solve(b)", 2, "v"),
    "only what is surely read": ("a and b", 1, "a"),
    "one of two": ("a if b else c", 1, "b"),
    "a comprehension": ("x = [solve(y) for y in ys for z in zs]", 1, "ys"),
    "a generator": ("x = sum(solve(y) for y in ys)", 1, "sum ys"),
    "a lambda that may not run": ("f = lambda: solve()", 1, ""),
    # Functions and classes: what they bind is their own.
    "in a function": ("def f(a, *b, c=d, **e):\n  solve(a, b, c, e, g)", 2, "solve g"),
    "a function's local": ("def f():\n  x = h\n  solve(x)", 3, "solve"),
    "a local that is bound later": ("def f():\n  solve(x)\n  x = 1", 2, "solve"),
    "a local import": ("def f():\n  import a.b, c as d\n  solve(a, d, c)", 3, "solve c"),
    "a local function": (
        "def f():\n  def g(): pass\n  async def h(): pass\n  class C: pass\n  solve(g, h, C)",
        5,
        "solve",
    ),
    "a loop's local": ("def f():\n  for x, (y, *z) in it:\n    solve(x, y, z)", 3, "solve"),
    "an error's name": ("def f():\n  try: pass\n  except E as e:\n    solve(e)", 4, "solve"),
    "a pattern's names": (
        "def f(v):\n  match v:\n    case {'k': [a, *b], **c}:\n      solve(a, b, c, d)",
        4,
        "solve d",
    ),
    "a walrus": ("def f():\n  if (n := g()):\n    solve(n)", 3, "solve"),
    "a deleted local": ("def f():\n  solve(x)\n  del x", 2, "solve"),
    "said to be global": ("def f():\n  global x\n  x = solve(x, y)", 3, "solve y"),
    "in an inner function": ("def f(a):\n  def g(b):\n    solve(a, b, c)\n  g(1)", 3, "solve c"),
    "in a method": ("class C:\n  k = 1\n  def m(self):\n    solve(self, k)", 4, "solve"),
    "in a class": ("class C:\n  n = 3\n  m = solve(n, k)", 3, "solve k"),
    "an async function": ("async def f(a):\n  await solve(a, b)", 2, "solve b"),
    "a function in one line": ("def f(a): solve(a, b)", 1, ""),
    "the definition itself": ("def f(a=b):\n  pass", 1, ""),
    "a decorator": ("@deco(a)\ndef f():\n  pass", 1, ""),
    "the line below a decorator": ("@deco(a)\ndef f():\n  pass", 2, ""),
    # What an error would not end.
    "in a try": ("try:\n  solve()\nexcept E:\n  pass", 2, ""),
    "in a try with groups": ("try:\n  solve()\nexcept* E:\n  pass", 2, ""),
    "in a handler": ("try:\n  pass\nexcept E:\n  solve()", 4, "solve"),
    "in the else of a try": ("try:\n  pass\nexcept E:\n  pass\nelse:\n  solve()", 6, "solve"),
    "in the finally of a try": ("try:\n  pass\nexcept E:\n  pass\nfinally:\n  solve()", 6, "solve"),
    "a try that lets all through": ("try:\n  solve()\nfinally:\n  a()", 2, "solve"),
    "a finally that returns": ("def f():\n  try:\n    solve()\n  finally:\n    return 1", 3, ""),
    "a finally that goes on": (
        "for x in it:\n  try:\n    solve()\n  except E:\n    go()\n  finally:\n    continue",
        5,
        "",
    ),
    "deep in a try": ("try:\n  if a:\n    for x in it:\n      solve()\nexcept E:\n  pass", 4, ""),
    "suppressed": ("with suppress(E):\n  solve()", 2, ""),
    "suppressed beside another": ("with open(p) as f, contextlib.suppress(E):\n  solve(f)", 2, ""),
    "meant to raise": ("with pytest.raises(E):\n  solve()", 2, ""),
    "in another context": ("with open(p) as f:\n  solve(f)", 2, "solve f"),
    # What is no Python.
    "a magic": ("%time solve()", 1, ""),
    "indented": ("  solve()", 1, ""),
    "half a cell": ("solve(", 1, ""),
    "nothing": ("", 1, ""),
    "a NUL": ("a\0b", 1, ""),
    "a form feed in a text": ("x = '\x0c'\nsolve()", 2, "solve"),
}


@pytest.mark.parametrize("name", READ)
def test_names_on_the_way(name: str) -> None:
    source, line, names = READ[name]
    assert names_read_at(source, line) == frozenset(names.split())


LINES = st.sampled_from(
    [line for source, _, _ in READ.values() for line in source.split("\n")]
    + [
        "  " + line
        for line in (
            "x",
            "return f(x)",
            "yield",
            "raise E",
            "@d",
            "async with a: b",
            "else:",
            "finally: return",
        )
    ]
)
DEEP: dict[str, Callable[[int], str]] = {
    "minus": lambda n: "-" * 30 * n + "b",
    "brackets": lambda n: "[" * n,
    "attributes": lambda n: "a." * n + "b",
    "sums": lambda n: "a+" * n + "b",
    "blocks": lambda n: "".join(" " * k + "if 1:\n" for k in range(n)) + " " * n + "a",
    "branches": lambda n: "if 1:\n  a\n" + "elif b:\n  c\n" * n,
    "contexts": lambda n: "with " + "a." * n + "b as c:\n  d",
}


@settings(max_examples=300, deadline=None)
@given(st.lists(LINES, max_size=8).map("\n".join) | st.text(), st.integers(-1, 9))
def test_whatever_the_cell_nothing_is_raised(source: str, line: int) -> None:
    names = names_read_at(source, line)
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("depth", [90, 400, 900, 3000])
def test_however_deep_nothing_is_raised(kind: str, depth: int) -> None:
    source = DEEP[kind](depth)
    names_read_at(source, source.count("\n") + 1)
