"""``pytest --safe-exec``: the real pytest in a process of its own, on notebooks of all ends, alone and beside other plugins."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.support import MARK, make_notebook, marked_processes, wait_until

EATER = "rows = []\nfor _ in range(1000):\n    rows.append(bytearray(b'x') * (10 << 20))"
SETTINGS = ("-p", "no:nbmake", "-o", "addopts=", "-W", "error")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with notebooks that pass, raise and die, what Jupyter and safe-exec left beside them, and an ordinary test."""
    (tmp_path / "docs" / ".ipynb_checkpoints").mkdir(parents=True)
    make_notebook(
        tmp_path / "docs" / "good.ipynb",
        "print('fine')",
        "import os\nassert 'PYTEST_CURRENT_TEST' not in os.environ",
    )
    make_notebook(tmp_path / "docs" / "bad.ipynb", "x = 0", "y = 1\n1 / x")
    make_notebook(tmp_path / "docs" / "eater.ipynb", "limit = 1000", EATER)
    for name in (
        "docs/.ipynb_checkpoints/good.ipynb",
        "docs/good.out.ipynb",
        "docs/bad.repro.ipynb",
    ):
        make_notebook(tmp_path / name, "raise SystemError('nobody should run this')")
    (tmp_path / "test_plain.py").write_text("def test_plain():\n    pass\n")
    return tmp_path


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark that every process of the test inherits; none of them may be left."""
    mark = secrets.token_hex(8)
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 10, "no process of the session is left")


def run_pytest(
    cwd: Path, mark: str, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    full = {**clean_environment(), "XDG_CACHE_HOME": str(cwd / "cache"), MARK: mark, **(env or {})}
    argv = [sys.executable, "-m", "pytest", *SETTINGS, *arguments]
    return subprocess.run(
        argv, cwd=cwd, env=full, capture_output=True, text=True, timeout=180, check=False
    )


def clean_environment() -> dict[str, str]:
    """Ours without what the pytest around us put there."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST", "COV_", "GITHUB_"))
    }


def outcomes(junit: Path) -> dict[str, str]:
    return {
        case.attrib["name"]: next(
            (child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"
        )
        for case in ET.parse(junit).iter("testcase")
    }


def properties(junit: Path, name: str) -> dict[str, str]:
    case = next(case for case in ET.parse(junit).iter("testcase") if case.attrib["name"] == name)
    return {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")}


ENDS = {
    "good.ipynb": "passed",
    "bad.ipynb": "failure",
    "eater.ipynb": "failure",
    "test_plain": "passed",
}


def test_each_notebook_is_a_test_beside_the_ordinary_ones(project: Path, mark: str) -> None:
    done = run_pytest(
        project, mark, "--safe-exec", "--safe-exec-memory", "200M", "--junitxml=junit.xml"
    )
    assert done.returncode == 1, done.stdout
    assert outcomes(project / "junit.xml") == ENDS
    said = done.stdout
    # The diagnosis, whole: what, where, why, the cells that it takes, and how to see it again.
    assert "✗ kernel died in code cell 2 · out of memory · limit 200 MiB, peak 200 MiB" in said
    assert re.search(
        r"2 │ rows\.append\(bytearray.*line 3, running when the kernel was killed", said
    )
    assert "caused by   code cell 2 alone" in said and "killed by the system: 1" in said
    assert "✗ error in code cell 2 · ZeroDivisionError: division by zero" in said
    assert "Traceback" not in said and "\x1b[" not in said
    figures = properties(project / "junit.xml", "eater.ipynb")
    assert (figures["status"], figures["cause"], figures["crash_cell"], figures["culprits"]) == (
        "kernel_died",
        "out_of_memory",
        "1",
        "1",
    )
    assert int(figures["memory_limit"]) == 200 << 20 and int(figures["memory_peak"]) > 150 << 20
    failure = next(ET.parse(project / "junit.xml").iter("failure"))
    assert failure.attrib["message"] == "error in code cell 2 · ZeroDivisionError: division by zero"

    # Nothing of ours beside the notebooks; what failed can be looked at in the cache, and the reproduction runs as it is said.
    assert sorted(path.name for path in (project / "docs").iterdir()) == [
        ".ipynb_checkpoints", "bad.ipynb", "bad.repro.ipynb", "eater.ipynb", "good.ipynb", "good.out.ipynb",
    ]  # fmt: skip
    kept = project / ".pytest_cache" / "d" / "safe-exec" / "docs"
    assert sorted(path.name for path in kept.iterdir()) == [
        "bad.out.ipynb", "bad.verdict.json", "eater.out.ipynb", "eater.repro.ipynb", "eater.verdict.json",
    ]  # fmt: skip
    assert (
        f"reproduce   safe-exec run {kept / 'eater.repro.ipynb'} --cwd {project / 'docs'}" in said
    )


def test_without_the_option_a_notebook_is_no_test(project: Path, mark: str) -> None:
    done = run_pytest(project, mark)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout


def test_with_xdist_and_a_directory_for_what_is_written(project: Path, mark: str) -> None:
    done = run_pytest(
        project, mark, "--safe-exec", "--safe-exec-memory", "200M", "--safe-exec-no-bisect", "--safe-exec-out", "out",
        "-n", "2", "--junitxml=junit.xml", "--safe-exec-limits", "ci",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert outcomes(project / "junit.xml") == ENDS
    assert properties(project / "junit.xml", "eater.ipynb")["cause"] == "out_of_memory"
    messages = {
        failure.attrib["message"] for failure in ET.parse(project / "junit.xml").iter("failure")
    }
    assert "kernel died in code cell 2 · out of memory · limit 200 MiB, peak 200 MiB" in messages
    verdict = json.loads((project / "out" / "docs" / "good.verdict.json").read_text())
    assert (verdict["status"], verdict["limits"]["cell_timeout"]) == ("passed", 300.0)
    assert (project / "out" / "docs" / "good.out.ipynb").exists()


def test_selection_and_what_failed_last(project: Path, mark: str) -> None:
    done = run_pytest(
        project,
        mark,
        "--safe-exec",
        "--safe-exec-no-bisect",
        "-k",
        "good or bad",
        "--junitxml=one.xml",
    )
    assert outcomes(project / "one.xml") == {"good.ipynb": "passed", "bad.ipynb": "failure"}, (
        done.stdout
    )
    make_notebook(project / "docs" / "bad.ipynb", "x = 1", "1 / x")
    done = run_pytest(project, mark, "--safe-exec", "--lf", "--junitxml=two.xml")
    assert outcomes(project / "two.xml") == {"bad.ipynb": "passed"}, done.stdout
    done = run_pytest(
        project,
        mark,
        "--safe-exec",
        "docs/good.ipynb",
        "docs/good.out.ipynb",
        "--collect-only",
        "-q",
    )
    assert done.stdout.splitlines()[0] == "docs/good.ipynb::good.ipynb"
    assert "1 test collected" in done.stdout


def test_ends_that_are_no_cells(project: Path, mark: str) -> None:
    for path in (project / "docs").glob("*.ipynb"):
        path.unlink()
    make_notebook(project / "loop.ipynb", "while True:\n    pass")
    make_notebook(project / "absent.ipynb", "1", kernel="no-such-kernel", language="none")
    (project / "torn.ipynb").write_text('{"cells": [')
    options = ("--safe-exec-cell-timeout", "1s", "--safe-exec-no-bisect", "--junitxml=junit.xml")
    done = run_pytest(project, mark, "--safe-exec", *options)
    assert set(outcomes(project / "junit.xml").items()) >= {
        (f"{name}.ipynb", "failure") for name in ("loop", "absent", "torn")
    }
    assert "✗ timed out in code cell 1 · cell timeout" in done.stdout
    assert "no kernel named 'no-such-kernel' is installed" in done.stdout
    assert re.search(
        r"^safe-exec: .*torn\.ipynb.*: cut off in the middle", done.stdout, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--safe-exec-limits", "nowhere"), "unknown profile 'nowhere'"),
        (("--safe-exec-memory", "lots"), "--safe-exec-memory"),
        (("--safe-exec-bisect-budget", "soon"), "--safe-exec-bisect-budget"),
        (("--safe-exec-show", "nowhere"), "--safe-exec-show nowhere: no such file or directory"),
        (("--safe-exec-writable", "/"), "--safe-exec-writable /: / itself cannot be named"),
        (("--safe-exec-env", "A=b"), "--safe-exec-env A: expected the name of a variable of yours"),
        (("--safe-exec-cwd", "nowhere"), "no such directory to run in (--safe-exec-cwd)"),
        (("--safe-exec-require", "memroy"), "--safe-exec-require: memroy is no limit"),
    ],
)
def test_a_wrong_option_is_one_error(
    project: Path, mark: str, options: tuple[str, ...], said: str
) -> None:
    done = run_pytest(project, mark, "--safe-exec", *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


OPENED = """\
import os
from pathlib import Path

assert os.environ["MY_SETTING"] == "seven"
rows = (Path.home() / "data" / "rows.csv").read_text()
(Path.home() / "out" / "table.csv").write_text(rows)
assert Path.cwd().name == "elsewhere"
"""


def test_isolation_is_opened_by_the_options_of_run(project: Path, mark: str) -> None:
    home = project / "home"
    for name in ("data", "out", "elsewhere"):
        (home / name).mkdir(parents=True)
    (home / "data" / "rows.csv").write_text("a,b")
    make_notebook(project / "opened.ipynb", OPENED)
    options = [
        *(
            "--safe-exec-env",
            "MY_SETTING",
            "--safe-exec-show",
            "home/data",
            "--safe-exec-writable",
            "home/out",
        ),
        *("--safe-exec-cwd", "home/elsewhere"),
    ]
    env = {"HOME": str(home), "MY_SETTING": "seven"}
    asked = ("--safe-exec", "--safe-exec-limits", "ci", "--safe-exec-no-bisect", "opened.ipynb")
    done = run_pytest(project, mark, *asked, *options, env=env)
    assert done.returncode == 0, done.stdout
    assert (home / "out" / "table.csv").read_text() == "a,b"
    assert run_pytest(project, mark, *asked, env=env).returncode == 1, "without them it is closed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--safe-exec-repeat", "0"), "expected a whole number from 1 to 1000, found 0"),
        (("--safe-exec-retries=-1",), "expected a whole number from 0 to 10, found -1"),
        (("--safe-exec-compare-images", "x"), "expected a whole number from 0 to 64, found 'x'"),
        (("--safe-exec-compare-tolerance", "nan"), "expected a number from 0, found nan"),
    ],
)
def test_numbers_out_of_bounds_are_refused(
    project: Path, mark: str, options: tuple[str, ...], words: str
) -> None:
    done = run_pytest(project, mark, "--safe-exec", *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and words in done.stderr, done.stderr


def test_a_misspelt_parameter_or_tag_is_a_warning(project: Path, mark: str) -> None:
    path = make_notebook(project / "with_values.ipynb", "alpha = 1", "alpha")
    path.write_text(
        path.read_text().replace('"metadata": {}', '"metadata": {"tags": ["parameters"]}', 1)
    )
    asked = ("--safe-exec", "--safe-exec-no-bisect", path.name, "-W", "default")
    done = run_pytest(project, mark, *asked, "--safe-exec-parameter", "alpah", "2")
    assert done.returncode == 0, done.stdout
    assert "UnusedInputs: " in done.stdout and "did you mean 'alpha'?" in done.stdout
    done = run_pytest(project, mark, *asked, "--safe-exec-only-tag", "shwo")
    assert done.returncode == 0 and "no cell was run" in done.stdout, done.stdout


def test_files_that_are_not_kept_are_a_warning(project: Path, mark: str) -> None:
    make_notebook(
        project / "lossy.ipynb",
        "from pathlib import Path\n(Path.home() / 'summary.csv').write_text('a,b')",
    )
    asked = ("--safe-exec", "--safe-exec-limits", "ci", "lossy.ipynb", "-W", "default")
    done = run_pytest(project, mark, *asked)
    assert done.returncode == 0, done.stdout
    assert (
        "FilesNotKept: lossy.ipynb::lossy.ipynb: files that were not kept: ~/summary.csv (3 B)"
        in done.stdout
    )


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_ctrl_c_ends_the_kernels(tmp_path: Path, mark: str, workers: tuple[str, ...]) -> None:
    for number in range(2):
        make_notebook(
            tmp_path / f"long{number}.ipynb",
            f"open('began{number}', 'w').close()\nimport time\ntime.sleep(600)",
        )
    argv = [sys.executable, "-m", "pytest", *SETTINGS, "--safe-exec", *workers]
    env = {**clean_environment(), "XDG_CACHE_HOME": str(tmp_path / "cache"), MARK: mark}
    process = subprocess.Popen(
        argv, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: list(tmp_path.glob("began*")), 60, "a notebook runs")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, said
    assert "KeyboardInterrupt" in said


def commands(said: str) -> list[dict[str, Any]]:
    found = re.findall(r"^::error (.*?)::(.*)$", said, re.MULTILINE)
    return [
        dict(part.split("=", 1) for part in head.split(",")) | {"message": body}
        for head, body in found
    ]


def test_annotations_of_a_plugin_that_knows_nothing_of_us(project: Path, mark: str) -> None:
    done = run_pytest(project, mark, "--safe-exec", "-k", "bad", env={"GITHUB_ACTIONS": "true"})
    (found,) = commands(done.stderr)
    assert found["file"] == "docs/bad.ipynb"
    lines = (project / "docs" / "bad.ipynb").read_text().splitlines()
    assert "1 / x" in lines[int(found["line"]) - 1], found
    assert "ZeroDivisionError" in found["message"]


def test_installed_and_not_asked_for_it_costs_nothing() -> None:
    code = "import sys, pytest; before = set(sys.modules); import safe_exec.integrations.pytest_plugin; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {
        "safe_exec",
        "safe_exec.integrations",
        "safe_exec.integrations.pytest_options",
        "safe_exec.integrations.pytest_plugin",
        "safe_exec.limits",
        "safe_exec.limits.spec",
    }
