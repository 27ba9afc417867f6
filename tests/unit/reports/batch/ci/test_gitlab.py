"""GitLab's code quality report: the keys it reads, one problem a notebook that failed, fingerprints that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from msgspec.structs import replace

from safe_exec.model.verdict import CauseKind, Status
from safe_exec.reports.batch.ci import gitlab
from safe_exec.reports.batch.results import BatchResult
from tests.unit.batches import SOURCES, every_entry, make_batch, make_entry
from tests.unit.builders import make_crash, make_culprits, make_verdict

# As GitLab documents what it reads.
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["description", "check_name", "fingerprint", "severity", "location"],
        "properties": {
            "description": {"type": "string", "minLength": 1, "pattern": "^[^\\n]*$"},
            "check_name": {"type": "string", "pattern": "^safe-exec/[a-z_]+$"},
            "fingerprint": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
            "location": {
                "type": "object",
                "required": ["path", "lines"],
                "properties": {
                    "path": {"type": "string", "pattern": "^[^./]"},
                    "lines": {
                        "type": "object",
                        "required": ["begin"],
                        "properties": {"begin": {"type": "integer", "minimum": 1}},
                    },
                },
            },
        },
    },
}


def written(batch: BatchResult, base: Path | None = None) -> list[dict[str, Any]]:
    path = batch.out / "codequality.json"
    gitlab.write(batch, path, base)
    problems: list[dict[str, Any]] = json.loads(path.read_text())
    Draft202012Validator(SCHEMA).validate(problems)
    return problems


def test_a_problem_for_each_notebook_that_failed(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, every_entry(tmp_path))
    problems = written(batch)
    failed = [
        entry.path
        for entry in batch.results
        if entry.status not in ("passed", "not_run", "unchanged")
    ]
    assert [problem["location"]["path"] for problem in problems] == failed
    assert len({problem["fingerprint"] for problem in problems}) == len(problems)


def test_none_is_a_list_too(tmp_path: Path) -> None:
    assert (
        written(
            make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", make_verdict(Status.PASSED))])
        )
        == []
    )


def test_what_a_problem_says(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "a/b.ipynb", make_verdict(culprits=make_culprits()))
    (problem,) = written(make_batch(tmp_path, [entry]))
    assert problem["check_name"] == "safe-exec/out_of_memory" and problem["severity"] == "critical"
    assert "caused by code cells 1 + 2" in problem["description"]
    line = entry.source.read_text().splitlines()[problem["location"]["lines"]["begin"] - 1]
    assert json.loads(line.strip().rstrip(",")) == 'joined = frame.merge(big, on="k")'


def test_paths_are_those_of_the_checkout(tmp_path: Path) -> None:
    root = tmp_path / "below"
    root.mkdir()
    (problem,) = written(make_batch(root, [make_entry(root, "a.ipynb", make_verdict())]), tmp_path)
    assert problem["location"]["path"] == "below/a.ipynb"


def test_a_fingerprint_stays_when_cells_are_added_above(tmp_path: Path) -> None:
    verdict = make_verdict()
    entry = make_entry(tmp_path, "a.ipynb", verdict)
    (before,) = written(make_batch(tmp_path, [entry]))
    moved = replace(verdict, crash_cell=make_crash(index=3, code_index=2))
    (after,) = written(
        make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", moved, ("new()", *SOURCES))])
    )
    assert before["fingerprint"] == after["fingerprint"]
    assert before["location"] != after["location"]
    for other in (
        make_verdict(Status.KERNEL_DIED, CauseKind.SEGFAULT),
        replace(verdict, crash_cell=make_crash(source_line="other()")),
    ):
        (changed,) = written(make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", other)]))
        assert changed["fingerprint"] != before["fingerprint"]
