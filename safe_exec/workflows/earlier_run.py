"""Verdicts of earlier runs: read one, find its notebook, prepare its job again."""

from __future__ import annotations

import contextlib
from pathlib import Path

from safe_exec.errors import UsageError
from safe_exec.files import read_regular
from safe_exec.model.verdict import Verdict
from safe_exec.reports import verdict_json
from safe_exec.workflows.job import Bisect, Job, PreparedJob
from safe_exec.workflows.prepare import command_line, inputs_of_run, prepare

MOST_BYTES = 1 << 30


def read_verdict(path: Path) -> Verdict:
    """Read the verdict in a file. Raises UsageError."""
    data = read_regular(path, most=MOST_BYTES, error=UsageError)
    try:
        return verdict_json.loads(data)
    # The file may come from anywhere; deeply nested brackets exhaust the parser's stack.
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a verdict of safe-exec: {str(error)[:200]}") from None


def prepare_again(verdict: Verdict, path: Path, seconds: float | None) -> PreparedJob:
    """Prepare the job of an earlier run again. Raises UsageError if its notebook has changed."""
    source = find_notebook(verdict, path)
    outputs = {name: Path(output) for name, output in verdict.outputs.items()}
    prepared = prepare(
        Job(
            path=source,
            # The limits of the failed run, even if the profile has changed since.
            limits=verdict.limits,
            isolation=verdict.isolation,
            inputs=inputs_of_run(verdict),
            output=outputs.get("notebook"),
            verdict=path,
            kernel=verdict.notebook.kernel,
            cwd=Path(verdict.cwd),
            allow_errors=verdict.allow_errors,
            bisect=Bisect.ALWAYS,
            bisect_budget=seconds,
            command=command_line(),
        )
    )
    # Culprits of a changed notebook would name the wrong cells.
    if prepared.notebook.sha256 != verdict.notebook.sha256:
        raise UsageError(
            f"{source}: changed since the verdict was written; run `safe-exec run` again"
        )
    return prepared


def find_notebook(verdict: Verdict, path: Path) -> Path:
    """Find the notebook of a verdict. Raises UsageError."""
    # It may have moved together with its verdict, for example as a CI artifact.
    recorded_path = Path(verdict.notebook.path)
    for candidate in (
        recorded_path,
        Path(verdict.cwd) / recorded_path.name,
        path.absolute().parent / recorded_path.name,
    ):
        # A recorded path may lie in a folder that this user must not enter.
        with contextlib.suppress(OSError):
            if candidate.is_file():
                return candidate
    raise UsageError(
        f"{path}: its notebook {recorded_path} does not exist; "
        "run in the original folder, or put both files into one folder"
    )
