"""Names are nouns or verbs: a bare participle, adverb or question word says nothing about a value."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "safe_exec"

PARTICIPLES = frozenset(
    re.findall(
        r"\w+",
        """
        asked begun born bound brought built done drawn felt found given gone got grown heard held
        kept known laid led left lost made meant met named needed put read_out said seen sent shown
        sought spent stood taken thought told wanted won worn written_out
        """,
    )
)
ADVERBS = frozenset(
    re.findall(
        r"\w+",
        """
        after again ahead already anew apart around aside before behind beside by_now earlier
        elsewhere ever here inside_out instead later never now once rest so_far soon still then
        there together whole within yet
        """,
    )
)
QUESTIONS = frozenset(
    ["how", "what", "when", "where", "which", "who", "whom", "whose", "why", "words"]
)
REJECTED = PARTICIPLES | ADVERBS | QUESTIONS

DOCUMENT_KEYS = frozenset(
    {
        ("experiments/compare.py", "what"),
        ("experiments/compare.py", "then"),
        ("experiments/compare.py", "here"),
        ("model/events.py", "left"),
    }
)
"""Fields that are keys of a JSON document: renaming them would break its readers."""


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that is bound, with its line: assignments, parameters, attributes, aliases."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield name, node.lineno


def rejected_names(source: str) -> list[tuple[str, int]]:
    return [
        (name, line) for name, line in bound_names(ast.parse(source)) if name.strip("_") in REJECTED
    ]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("found = 1", ["found"]),
        ("def f(where): ...", ["where"]),
        ("def f(*, _held): ...", ["_held"]),
        ("class C:\n    def __init__(self): self._told = 1", ["_told"]),
        ("for what in []: pass", ["what"]),
        ("with open('x') as then: pass", ["then"]),
        ("match x:\n    case [1, kept]: pass", ["kept"]),
        ("try: pass\nexcept OSError as said: pass", ["said"]),
        ("lambda now: now", ["now"]),
        ("keeper = 1", []),
        ("print(found)", []),
        ("call(found=1)", []),
        ("known_hosts = 1", []),
    ],
)
def test_what_is_rejected(source: str, names: list[str]) -> None:
    assert [name for name, _ in rejected_names(source)] == names


@pytest.mark.parametrize(
    "folder",
    [
        folder.name
        for folder in sorted(PACKAGE.iterdir())
        if folder.is_dir() and (folder / "__init__.py").exists()
    ],
)
def test_names_in_a_folder(folder: str) -> None:
    assert list(_rejected_in((PACKAGE / folder).rglob("*.py"))) == []


def test_names_at_the_top() -> None:
    assert list(_rejected_in(PACKAGE.glob("*.py"))) == []


def _rejected_in(files: Iterator[Path]) -> Iterator[str]:
    for path in files:
        file = path.relative_to(PACKAGE).as_posix()
        for name, line in rejected_names(path.read_text()):
            if (file, name) not in DOCUMENT_KEYS:
                yield f"{file}:{line}: {name}"
