"""Rows of coverage that cannot be written: the runner is told once."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safe_exec.agent.line_coverage import LineCoverage


class Inside:
    """The agent, of which only the facts matter here."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []

    def fact(self, **fields: Any) -> None:
        self.facts.append(fields)


def coverage_to(descriptor: int) -> tuple[Any, Inside]:
    """A measurement that writes its rows to a descriptor, without the package coverage."""
    inside = Inside()
    coverage: Any = LineCoverage.__new__(LineCoverage)
    coverage.inside, coverage.descriptor = inside, descriptor
    coverage.entries, coverage.branch, coverage.failed = {}, False, False
    return coverage, inside


@pytest.fixture
def size_limit() -> Iterator[int]:
    """A limit on the size of files, of this process, while a test runs."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_a_fact_once() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        coverage, inside = coverage_to(full)
        coverage.take("/lib/a.py", {1, 2})
        coverage.take("/lib/b.py", {3})
    finally:
        os.close(full)
    assert inside.facts == [{"coverage_failed": errno.ENOSPC}]


def test_a_row_that_is_written_in_part_is_a_fact(tmp_path: Path, size_limit: int) -> None:
    with (tmp_path / "rows").open("wb", buffering=0) as file:
        coverage, inside = coverage_to(file.fileno())
        coverage.take("/lib/a.py", {1})
        assert inside.facts == []
        coverage.take("/lib/b.py", set(range(size_limit)))
    assert inside.facts == [{"coverage_failed": errno.EFBIG}]
    assert (tmp_path / "rows").stat().st_size == size_limit
