"""The tables of versions in docs/platforms.md: each row is a test that passed."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PROPERTY = "versions"
RUNNER = f"{sys.version_info[0]}.{sys.version_info[1]}"
FILE = "integration/test_python_versions.py"
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table between two marks; its last column names the test, each row of another case of it."""

    name: str
    columns: tuple[str, ...]
    test: str

    def row(self, case: str, *cells: str) -> str:
        """The row of a case that passed, on this Python."""
        return f"| {' | '.join((RUNNER, *cells))} | `{FILE}::{self.test}[{case}]` |"

    def write(self, text: str, passed: Iterable[str]) -> str:
        """Put the rows of this table into a document, each in the place of an older row of the same case."""
        before, begin, rest = text.partition(
            f"<!-- {self.name}: written by make versions-table -->\n"
        )
        table, end, after = rest.partition(f"<!-- /{self.name} -->\n")
        if not end:
            raise ValueError(f"the document has no place for the table {self.name}")
        ours = f"`{FILE}::{self.test}["
        rows = {_key(line): line for line in [*table.splitlines(), *passed] if ours in line}
        head = f"\n| {' | '.join(self.columns)} |\n{'|---' * len(self.columns)}|\n"
        lines = "".join(f"{rows[key]}\n" for key in sorted(rows))
        return f"{before}{begin}{head}{lines}\n{end}{after}"


KERNELS = Table(
    name="kernels",
    columns=("runner's Python", "kernel's Python", "ipykernel", "test"),
    test="test_another_python",
)
LIBRARIES = Table(
    name="libraries",
    columns=("runner's Python", "nbclient", "nbformat", "jupyter_client", "ipykernel", "test"),
    test="test_other_libraries",
)


def write(path: Path, passed: Iterable[str]) -> None:
    """Put rows into the tables of a document."""
    rows = list(passed)
    text = path.read_text()
    for table in (KERNELS, LIBRARIES):
        text = table.write(text, rows)
    path.write_text(text)


def _key(line: str) -> tuple[tuple[int, ...], tuple[tuple[int, str], ...]]:
    """A row's place: by the runner's Python and the case of the test, numbers in them as numbers."""
    cells = [cell.strip() for cell in line.strip("| \n").split("|")]
    case = cells[-1].rpartition("[")[2].rstrip("]`")
    runner = tuple(int(part) for part in cells[0].split("."))
    parts = re.findall(r"(\d+)|([^\d]+)", case)
    return runner, tuple((int(number or 0), text) for number, text in parts)


def lower_bounds(pyproject: Path = PYPROJECT) -> Mapping[str, str]:
    """The oldest version of each library that the package is said to run with."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return dict(line.split(">=") for line in project["dependencies"])
