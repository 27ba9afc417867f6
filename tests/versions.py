"""The table of Python's and ipykernel's versions in docs/platforms.md: each row is a test that passed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

PROPERTY = "versions"
RUNNER = f"{sys.version_info[0]}.{sys.version_info[1]}"
BEGIN = "<!-- versions: written by make versions-table -->\n"
END = "<!-- /versions -->\n"
HEAD = "\n| runner's Python | kernel's Python | ipykernel | test |\n|---|---|---|---|\n"
TEST = "integration/test_python_versions.py::test_another_python"


def row(kernel: str, ipykernel: str, package: str) -> str:
    """The row of a test that passed."""
    name = f"{kernel}-{package.rstrip('.*')}" if package else kernel
    return f"| {RUNNER} | {kernel} | {ipykernel} | `{TEST}[{name}]` |"


def write(path: Path, passed: Iterable[str]) -> None:
    """Put rows into the table of a document, each in the place of an older row of the same test."""
    before, _, rest = path.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {key(line): line for line in [*table.splitlines(), *passed] if f"`{TEST}" in line}
    lines = "".join(f"{rows[k]}\n" for k in sorted(rows))
    path.write_text(f"{before}{BEGIN}{HEAD}{lines}\n{END}{after}")


def key(line: str) -> tuple[tuple[int, ...], ...]:
    """A row's place: by the runner's Python, the kernel's and ipykernel's version."""
    cells = [cell.strip() for cell in line.strip("| \n").split("|")]
    name = cells[3].partition("[")[2].rstrip("]`")
    versions = (cells[0], cells[1], name.partition("-")[2] or "0")
    return tuple(tuple(int(part) for part in text.split(".")) for text in versions)
