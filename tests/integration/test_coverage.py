"""Coverage of library code: in run, batch, the plugin and from Python, and the reports that coverage makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safe_exec
from tests.support import (
    NOBODY,
    make_notebook,
    ordinary_user,
    private_directory,
    run_notebook,
)
from tests.support import safe_exec as command

LIBRARY = """def plain():
    return 1


def dies():
    import os
    os.kill(os.getpid(), 9)


def exits():
    import os
    os._exit(3)


def hangs():
    while True:
        pass


def unused():
    return 2
"""
PLAIN, DIES, EXITS, HANGS = {2}, {6, 7}, {11, 12}, {16, 17}
"""Lines that run when a function is called."""
DEFINITIONS = {1, 5, 10, 15, 20}
IMPORTS = "import sys\nsys.path.insert(0, '../lib')\nimport mylib"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with a library, its configuration of coverage, and notebooks of all ends."""
    return make_project(tmp_path)


def make_project(root: Path) -> Path:
    for name in (".git", "lib", "notebooks"):
        (root / name).mkdir()
    (root / "lib" / "mylib.py").write_text(LIBRARY)
    (root / "lib" / "never.py").write_text("value = 1\n")
    (root / "pyproject.toml").write_text('[tool.coverage.run]\nsource = ["lib"]\n')
    for call in ("plain", "dies", "exits", "hangs"):
        make_notebook(root / "notebooks" / f"{call}.ipynb", IMPORTS, f"mylib.{call}()")
    return root


def coverage(root: Path, *arguments: str) -> str:
    argv = [sys.executable, "-m", "coverage", *arguments]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def combined(root: Path) -> dict[str, set[int]]:
    """The lines of each file that ran, as coverage reports them after `combine`."""
    coverage(root, "combine", "--quiet")
    coverage(root, "json", "--quiet", "-o", "report.json")
    files = json.loads((root / "report.json").read_text())["files"]
    return {name: set(file["executed_lines"]) for name, file in files.items()}


@pytest.mark.kills
@pytest.mark.parametrize(
    "limits",
    [
        "default",
        pytest.param("ci", marks=pytest.mark.bed("bubblewrap")),
        pytest.param("untrusted", marks=pytest.mark.bed("bubblewrap")),
    ],
)
def test_a_batch_measures_killed_kernels_too(project: Path, limits: str) -> None:
    options = ("--limits", limits, "--no-bisect", "--cell-timeout", "3s", "--coverage")
    # A notebook of a stranger sees its own folder only.
    shown = ("--show", "lib") if limits == "untrusted" else ()
    done = command("batch", "notebooks", *options, *shown, cwd=project)
    assert done.returncode == 3, done.stdout + done.stderr
    stems = sorted(path.name.split(".")[2] for path in project.glob(".coverage.*"))
    assert stems == ["dies", "exits", "hangs", "plain"]
    lines = combined(project)
    # Which lines of the loop count depends on the version of Python.
    assert lines["lib/mylib.py"] - HANGS == DEFINITIONS | PLAIN | DIES | EXITS
    # Like `coverage run`: a source file that never ran counts.
    assert lines["lib/never.py"] == set()
    assert "lib/mylib.py" in coverage(project, "report")


@pytest.mark.kills
def test_lines_of_a_cell_that_is_ended_at_its_time_limit_are_kept(project: Path) -> None:
    path = project / "notebooks" / "hangs.ipynb"
    run = run_notebook(path, "--cell-timeout", "3s", "--no-bisect", "--coverage")
    assert run.verdict["status"] == "timeout"
    assert combined(project)["lib/mylib.py"] & HANGS


@pytest.fixture
def nobodys_project() -> Iterator[Path]:
    with private_directory() as folder:
        project = make_project(folder)
        for path in (project, *project.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        yield project


@pytest.mark.bed("root", "ordinary-user")
@pytest.mark.parametrize(
    "limits", ["default", pytest.param("ci", marks=pytest.mark.bed("landlock"))]
)
def test_an_ordinary_user_gets_coverage_too(nobodys_project: Path, limits: str) -> None:
    path = nobodys_project / "notebooks" / "dies.ipynb"
    options = ("--limits", limits, "--no-bisect", "--coverage")
    run = run_notebook(path, *options, prefix=ordinary_user())
    assert run.verdict["status"] == "kernel_died", run.stderr
    assert combined(nobodys_project)["lib/mylib.py"] == DEFINITIONS | DIES


def test_the_plugin_adds_notebooks_to_the_report_of_pytest_cov(project: Path) -> None:
    (project / "test_unused.py").write_text(
        "import mylib\n\n\ndef test_unused() -> None:\n    assert mylib.unused() == 2\n"
    )
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:nbmake", "--safe-exec")
    mine = ("--safe-exec-coverage", "--safe-exec-no-bisect", "--safe-exec-out=out")
    theirs = ("--cov=lib", "--cov-branch", "--cov-report=json:report.json")
    argv = [sys.executable, "-m", "pytest", *options, *mine, *theirs, "test_unused.py"]
    done = subprocess.run(
        [*argv, "notebooks/plain.ipynb", "notebooks/dies.ipynb"],
        cwd=project, env={**os.environ, "PYTHONPATH": "lib"}, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    report = json.loads((project / "report.json").read_text())["files"]["lib/mylib.py"]
    assert set(report["executed_lines"]) == DEFINITIONS | PLAIN | DIES | {21}


def test_python_gets_the_path_of_the_data(project: Path) -> None:
    (project / "pyproject.toml").write_text(
        "[tool.coverage.run]\nbranch = true\nrelative_files = true\n"
        'data_file = "data/cov"\nsource = ["lib"]\n'
    )
    verdict = safe_exec.run(project / "notebooks" / "plain.ipynb", coverage=True)
    path = Path(verdict.outputs["coverage"])
    assert path.parent == project / "data" and path.name.startswith("cov.plain.")
    coverage(project, "combine", "--quiet")
    report = coverage(project, "report", "--show-missing", "--skip-covered")
    assert "lib/mylib.py" in report and "lib/never.py" in report
    html = ("html", "--quiet", "--show-contexts", "-d", "html")
    coverage(project, *html)
    pages = "".join(page.read_text() for page in (project / "html").glob("*.html"))
    assert "notebooks/plain.ipynb" in pages


def test_a_notebook_that_takes_the_trace_function_is_told(project: Path) -> None:
    cells = (IMPORTS, "sys.settrace(None)", "mylib.plain()")
    path = make_notebook(project / "notebooks" / "traces.ipynb", *cells)
    run = run_notebook(path, "--coverage")
    lines = combined(project)["lib/mylib.py"]
    if sys.version_info >= (3, 12):
        assert run.verdict["warnings"] == []
    else:
        (warning,) = run.verdict["warnings"]
        assert warning.startswith("coverage is incomplete: code cell 2 replaced the trace")
    # It is installed again at the next cell.
    assert lines == DEFINITIONS | PLAIN


def test_rows_beyond_the_limit_on_file_sizes_are_told(project: Path) -> None:
    (project / "lib" / "large.py").write_text("value = 1\n" * 20_000)
    path = make_notebook(project / "notebooks" / "large.ipynb", IMPORTS, "import large")
    run = run_notebook(path, "--coverage", "--file-size", "64K")
    assert run.verdict["status"] == "passed", run.stderr
    (warning,) = run.verdict["warnings"]
    assert warning.startswith("coverage is incomplete: ") and "raise --file-size" in warning
    # Rows that were written before are kept.
    assert combined(project)["lib/mylib.py"] == DEFINITIONS


def test_our_own_trace_function_is_not_the_notebooks(project: Path) -> None:
    cells = (
        IMPORTS,
        "import threading\nt = threading.Thread(target=mylib.plain)\nt.start()\nt.join()",
    )
    path = make_notebook(project / "notebooks" / "threads.ipynb", *cells)
    run = run_notebook(path, "--coverage")
    assert run.verdict["warnings"] == []
    assert combined(project)["lib/mylib.py"] == DEFINITIONS | PLAIN


def test_an_environment_without_coverage_is_one_line(project: Path) -> None:
    broken = project / "broken"
    (broken / "coverage").mkdir(parents=True)
    (broken / "coverage" / "__init__.py").write_text("raise ImportError('hidden')")
    path = project / "notebooks" / "plain.ipynb"
    run = run_notebook(path, "--coverage", "--set-env", f"PYTHONPATH={broken}")
    (warning,) = run.verdict["warnings"]
    assert run.code == 0
    assert warning.startswith("coverage was not measured: the kernel's environment lacks")
    assert warning.endswith("-m pip install coverage")
    assert not list(project.glob(".coverage*"))
