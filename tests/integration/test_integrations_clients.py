"""Drop-in classes: each with the real tool, on a notebook whose kernel dies."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import v4

from safe_exec.nbclient import NotebookClient
from tests.support import MARK, marked_processes, wait_until

pytestmark = pytest.mark.kills
BIN = Path(sys.executable).parent
SEGFAULT = "import ctypes\nctypes.string_at(0)"


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")  # nbgrader runs alembic
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 20, "no process is left")


def notebook(*sources: str) -> Any:
    node = v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])
    node.metadata.kernelspec = {"name": "python3", "display_name": "P", "language": "python"}
    return node


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / argv[0]), *argv[1:]],
        cwd=folder,
        env=dict(os.environ),
        input="y\n",  # jcache asks before it creates its cache
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


# --- nbclient -----------------------------------------------------------------------------------------------------


def test_nbclients_own_class_with_another_import() -> None:
    node = notebook("x = 6", "print(x * 7)")
    assert NotebookClient(node, timeout=60).execute().cells[1].outputs[0].text == "42\n"
    node = notebook("x = 1", SEGFAULT, "print(x)")
    with pytest.raises(CellExecutionError, match="SafeExec: segfault"):
        NotebookClient(node, timeout=60, limits="ci").execute()
    assert "----> 2 ctypes.string_at(0)" in "\n".join(node.cells[1].outputs[-1].traceback)


def test_a_subclass_and_its_hooks_go_on_with_a_fresh_kernel() -> None:
    ended: list[int] = []

    class Client(NotebookClient):
        """As somebody's own code would have it."""

    node = notebook("x = 1", SEGFAULT, "print('x' in dir())")
    Client(
        node,
        timeout=60,
        allow_errors=True,
        on_death="restart",
        kernel_options=["--memory=300M"],
        on_cell_executed=lambda cell_index, **_: ended.append(cell_index),
    ).execute()
    assert ended == [0, 1, 2]
    texts = "".join(output.get("text", "") for output in node.cells[2].outputs)
    assert "all variables" in texts and texts.endswith("False\n")


# --- jupyter-cache ------------------------------------------------------------------------------------------------


def test_a_death_is_one_notebooks_error_in_jupyter_cache(tmp_path: Path) -> None:
    nbformat.write(notebook("print(6 * 7)"), tmp_path / "good.ipynb")
    nbformat.write(notebook(SEGFAULT), tmp_path / "bad.ipynb")
    cache = ["--cache-path", str(tmp_path / "cache")]
    added = run(tmp_path, "jcache", "notebook", *cache, "add", "good.ipynb", "bad.ipynb")
    assert added.returncode == 0, added.stderr
    done = run(tmp_path, "jcache", "project", *cache, "execute", "--executor", "safe-exec")
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "SafeExec: segfault" in said, said
    listed = run(tmp_path, "jcache", "cache", *cache, "list")
    assert "good.ipynb" in listed.stdout and "bad.ipynb" not in listed.stdout


# --- nbgrader -----------------------------------------------------------------------------------------------------

CONFIG = """
from nbgrader.converters.autograde import Autograde
c = get_config()
c.CourseDirectory.root = {root!r}
names = []
for cls in Autograde.autograde_preprocessors.default_args[0]:
    name = cls if isinstance(cls, str) else f"{{cls.__module__}}.{{cls.__name__}}"
    ours = name.endswith(".Execute")
    names.append("safe_exec.integrations.nbgrader.Execute" if ours else cls)
c.Autograde.autograde_preprocessors = names
"""
SOLUTION = "### BEGIN SOLUTION\nanswer = 42\n### END SOLUTION"


def graded(source: str, name: str, *, solution: bool, points: int) -> Any:
    cell = v4.new_code_cell(source)
    cell.metadata.nbgrader = {
        "schema_version": 3,
        "grade": not solution,
        "solution": solution,
        "locked": not solution,
        "task": False,
        "grade_id": name,
        **({} if solution else {"points": points}),
    }
    return cell


def test_a_death_costs_the_points_of_its_cell_alone(tmp_path: Path) -> None:
    from nbgrader.api import Gradebook

    node = notebook()
    node.cells = [
        graded(SOLUTION, "solution", solution=True, points=0),
        graded("assert answer == 42", "first", solution=False, points=1),
        graded(SOLUTION.replace("answer", "other"), "second-solution", solution=True, points=0),
        graded("assert other == 42", "second", solution=False, points=2),
        graded("assert answer == 42", "third", solution=False, points=4),
    ]
    (tmp_path / "source" / "ps1").mkdir(parents=True)
    nbformat.write(node, tmp_path / "source" / "ps1" / "p.ipynb")
    (tmp_path / "nbgrader_config.py").write_text(CONFIG.format(root=str(tmp_path)))
    made = run(tmp_path, "nbgrader", "generate_assignment", "ps1", "--create")
    assert made.returncode == 0, made.stderr
    submitted = tmp_path / "submitted" / "ada" / "ps1"
    submitted.mkdir(parents=True)
    release = nbformat.read(tmp_path / "release" / "ps1" / "p.ipynb", as_version=4)
    release.cells[0].source = "answer = 42"
    release.cells[2].source = SEGFAULT
    nbformat.write(release, submitted / "p.ipynb")
    done = run(tmp_path, "nbgrader", "autograde", "ps1", "--create")
    assert done.returncode == 0, done.stderr
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        grades = book.find_submission_notebook("p", "ps1", "ada").grades
        assert {grade.name: grade.auto_score for grade in grades} == {
            "first": 1,
            "second": 0,
            "third": 4,
        }
    out = nbformat.read(tmp_path / "autograded" / "ada" / "ps1" / "p.ipynb", as_version=4)
    assert any(o.get("ename") == "SafeExec: segfault" for o in out.cells[2].outputs)


# --- jupyter-scheduler --------------------------------------------------------------------------------------------


# In a process of its own: `multiprocessing` leaves a resource tracker in the one that creates a job.
SCHEDULER = """
import json, sys, time
from jupyter_scheduler.environments import CondaEnvironmentManager
from jupyter_scheduler.models import CreateJob
from jupyter_scheduler.orm import create_tables
from jupyter_scheduler.scheduler import Scheduler
from safe_exec.integrations.jupyter_scheduler import ExecutionManager

database = "sqlite:///scheduler.sqlite"
create_tables(database)
scheduler = Scheduler(
    root_dir=".",
    environments_manager=CondaEnvironmentManager(),
    db_url=database,
    execution_manager_class=ExecutionManager,
    task_runner_class=None,
    staging_path="staging",
)
ids = [
    scheduler.create_job(
        CreateJob(
            **{"runtime_environment_parameters": {}, **fields},
            name="nightly",
            runtime_environment_name="here",
            output_formats=["ipynb", "html"],
        )
    )
    for fields in json.loads(sys.argv[1])
]
for job_id in ids:
    while (job := scheduler.get_job(job_id, job_files=False)).status not in ("COMPLETED", "FAILED"):
        time.sleep(0.1)
    print(job.json())
"""


def finished_jobs(folder: Path, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Jobs of the real scheduler after their end."""
    done = run(folder, "python", "-W", "ignore", "-c", SCHEDULER, json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_scheduled_jobs_say_why_they_failed(tmp_path: Path) -> None:
    nbformat.write(notebook("x = 1", SEGFAULT, "print(x)"), tmp_path / "bad.ipynb")
    nbformat.write(notebook("import time; time.sleep(y)"), tmp_path / "slow.ipynb")
    dead, late, good = finished_jobs(
        tmp_path,
        {"input_uri": "bad.ipynb"},
        {
            "input_uri": "slow.ipynb",
            "parameters": {"y": "60"},
            "runtime_environment_parameters": {
                "timeout_seconds": 2,
                "max_retries": 1,
                "retry_on_timeout": True,
            },
        },
        {"input_uri": "slow.ipynb", "parameters": {"y": "0"}},
    )
    assert good["status"] == "COMPLETED", good["status_message"]
    assert late["status"] == "FAILED"
    assert "limit 2.0 s" in late["status_message"] and "2 tries" in late["status_message"]
    assert dead["status"] == "FAILED"
    assert dead["status_message"].startswith("kernel died in code cell 2 · segfault")
    assert "ctypes.string_at(0)" in dead["status_message"]
    assert "caused by code cell 2 alone" in dead["status_message"]
    folder = tmp_path / "staging" / dead["job_id"]
    (output,) = folder.glob("bad-*.ipynb")
    assert "safe-exec: kernel died" in nbformat.read(output, as_version=4).cells[0].source
    (page,) = folder.glob("bad-*.html")
    assert "segmentation fault" in page.read_text()
    assert "bad.verdict.json" in dead["packaged_files"]
