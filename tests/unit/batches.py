"""Batches for tests of reports: real files of verdicts and notebooks in a folder, no kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
from msgspec.structs import replace

from safe_exec.model.verdict import NotebookInfo, Status, Verdict
from safe_exec.reports import verdict_json
from safe_exec.reports.batch.results import NOT_RUN, REFUSED, UNCHANGED, BatchResult, NotebookResult
from tests.unit.builders import every_verdict, make_verdict

SOURCES = (
    "big = load_everything()",
    'small = 1\njoined = frame.merge(big, on="k")',
    "print(joined)",
    "late()",
)
STARTED = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def write_notebook(path: Path, sources: Sequence[str] = SOURCES) -> str:
    """A notebook whose first cell is markdown, as the verdicts of ``builders`` have it; the hash of the file."""
    cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        *(nbformat.v4.new_code_cell(source) for source in sources),
    ]
    data = nbformat.writes(nbformat.v4.new_notebook(cells=cells)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def make_entry(
    root: Path, path: str, verdict: Verdict | None, sources: Sequence[str] = SOURCES, **changes: Any
) -> NotebookResult:
    """A notebook that was run: the notebook under ``root``, its verdict under ``root/out``."""
    sha256 = write_notebook(root / path, sources)
    written = None
    if verdict is not None:
        info = NotebookInfo(
            path=path,
            sha256=sha256,
            kernel="python3",
            language="python",
            cells=len(sources) + 1,
            code_cells=len(sources),
        )
        written = root / "out" / f"{path}.verdict.json"
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(verdict_json.dumps(replace(verdict, notebook=info)))
    entry = NotebookResult(
        path=path,
        status=verdict.status.value if verdict is not None else NOT_RUN,
        exit_code=verdict.exit_code if verdict is not None else None,
        seconds=verdict.usage.wall_seconds if verdict is not None else None,
        attempts=1 if verdict is not None else 0,
        flaky=False,
        error=None,
        verdict=written,
        notebook=None,
        repro=None,
        source=root / path,
    )
    return replace(entry, **changes)


def make_batch(root: Path, entries: Iterable[NotebookResult], **changes: Any) -> BatchResult:
    """A batch over ``entries`` that wrote under ``root/out``."""
    (root / "out").mkdir(exist_ok=True)
    batch = BatchResult(
        results=tuple(entries),
        root=root,
        out=root / "out",
        started=STARTED,
        seconds=83.1,
        exit_code=3,
        command=("safe-exec", "batch", "notebooks", "-j", "2"),
        safe_exec_version="0.1.0",
    )
    return replace(batch, **changes)


def every_entry(root: Path) -> list[NotebookResult]:
    """A notebook for every verdict there is, and of each state that has none."""
    found = [
        make_entry(root, f"some/folder/{n:02}.ipynb", verdict)
        for n, verdict in enumerate(every_verdict())
    ]
    repro = root / "out" / "flaky.repro.ipynb"
    return [
        *found,
        make_entry(root, "flaky.ipynb", make_verdict(Status.PASSED), flaky=True, attempts=2),
        make_entry(root, "small.ipynb", make_verdict(), repro=repro),
        make_entry(root, "late.ipynb", None),
        make_entry(root, "same.ipynb", None, status=UNCHANGED, exit_code=0),
        make_entry(
            root,
            "broken.ipynb",
            None,
            status=REFUSED,
            exit_code=2,
            error="broken.ipynb: not JSON; mend it",
        ),
        replace(
            make_entry(root, "gone.ipynb", None),
            status="kernel_died",
            exit_code=3,
            verdict=root / "out" / "no-such.verdict.json",
        ),
    ]
