"""Several failures of one notebook in one run: which cells go on, what each failure says, and who reports them."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest

from tests.support import make_notebook, run_notebook
from tests.support import safe_exec as command

CELLS = (
    "import os, time\nbase = 1",
    "a = base + 1",
    "import ctypes\nlost = a\nctypes.string_at(0)",
    "b = a + 1\nprint('b is', b)",
    "print(lost)",
    "os._exit(b)",
    "while True: time.sleep(0.1)",
    "limit = None",
    "os.abort()",
    "1 / 0",
    "open('new.txt', 'w').write('x')\nprint('the end', b)",
)
# Code cell, kind of the cause, and the culprits, all counted from 1.
FAILURES = [
    (3, "segfault", [1, 2, 3]),
    (6, "exit", [1, 2, 4, 6]),
    (7, "cell_timeout", [1, 7]),
    (9, "abort", [1, 9]),
    (10, "exception", None),
]


@pytest.mark.kills
def test_all_failures_of_a_notebook(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", *CELLS)
    outcome = run_notebook(path, "--keep-going", "--cell-timeout", "3")
    verdict = outcome.verdict
    assert outcome.code == verdict["exit_code"] == 3
    failures = verdict["failures"]
    for key in ("status", "cause", "crash_cell", "culprits"):
        assert failures[0][key] == verdict[key]
    assert [
        (
            failure["crash_cell"]["code_index"] + 1,
            failure["cause"]["kind"],
            failure["culprits"]
            and [culprit["code_index"] + 1 for culprit in failure["culprits"]["cells"]],
        )
        for failure in failures
    ] == FAILURES
    assert all(failure["culprits"]["minimal"] for failure in failures[:-1])
    statuses = [cell["status"] for cell in verdict["cells"]]
    assert statuses == [
        *("passed", "passed", "killed", "passed", "skipped", "killed", "killed"),
        *("passed", "killed", "failed", "passed"),
    ]
    reasons = [cell["reason"] for cell in verdict["cells"] if cell["reason"]]
    assert reasons == ["needs `lost` of code cell 3, which failed"]
    begins = [cell["started"] for cell in verdict["cells"] if cell["started"] is not None]
    assert begins == sorted(begins)

    # Every failure is in the terminal, and in the notebook at its cell; the outputs go on to the end.
    marked = [line for line in outcome.stdout.splitlines() if line.startswith("✗")]
    assert [f"code cell {cell}" in line for (cell, *_), line in zip(FAILURES, marked, strict=True)]
    annotated = nbformat.read(tmp_path / "nb.out.ipynb", as_version=4)
    texts = ["".join(o.get("text", "") for o in cell.outputs) for cell in annotated.cells[1:]]
    assert texts[3] == "b is 3\n"
    assert texts[10] == "the end 3\n"
    assert not (tmp_path / "new.txt").exists()
    names = [
        o.ename
        for cell in annotated.cells[1:]
        for o in cell.outputs
        # The hang also has the traceback of its interrupt.
        if o.output_type == "error" and o.ename != "KeyboardInterrupt"
    ]
    assert [name.removeprefix("SafeExec: ") for name in names] == [
        *("segfault", "exit", "cell_timeout", "abort"),
        "ZeroDivisionError",
    ]
    # Each reproduction reproduces its own failure.
    assert sorted(p.name for p in tmp_path.glob("*.repro.ipynb")) == [
        *(f"nb.{number}.repro.ipynb" for number in (2, 3, 4)),
        "nb.repro.ipynb",
    ]
    again = run_notebook(tmp_path / "nb.2.repro.ipynb")
    assert again.verdict["cause"]["kind"] == "exit"
    # The annotations are taken away before the next run.
    rerun = (tmp_path / "nb.out.ipynb").rename(tmp_path / "rerun.ipynb")
    passed = run_notebook(rerun, "--no-bisect", "--until", "2")
    assert passed.verdict["status"] == "passed"


@pytest.mark.kills
def test_a_batch_and_pytest_report_them(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", "import os\nos._exit(3)", "x = 1", "import os\nos._exit(4)"
    )
    done = command(
        *("batch", path, "--keep-going", "--no-bisect", "--github"),
        *("--out", tmp_path / "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stdout.splitlines() if line.startswith("::error")]
    assert ["exit status 3" in errors[0], "exit status 4" in errors[1]] == [True, True]
    cases = [case.get("name") for case in ET.parse(tmp_path / "out" / "junit.xml").iter("testcase")]
    assert cases == ["nb.ipynb", "nb.ipynb, code cell 3"]
    (verdict_file,) = (tmp_path / "out").rglob("*.verdict.json")
    assert len(json.loads(verdict_file.read_text())["failures"]) == 2

    argv = ["-p", "no:cacheprovider", "--safe-exec", "--safe-exec-keep-going"]
    test = subprocess.run(
        [sys.executable, "-m", "pytest", *argv, "--safe-exec-no-bisect", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert test.returncode == 1
    assert "✗ kernel died in code cell 1" in test.stdout
    assert "✗ kernel died in code cell 3" in test.stdout


@pytest.mark.kills
@pytest.mark.bed("bash")
def test_names_of_other_languages_are_not_known(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb",
        *("a=1", "kill -9 $PPID", "echo go $a"),
        kernel="bash",
        language="bash",
    )
    verdict = run_notebook(path, "--keep-going", "--no-bisect").verdict
    assert [failure["cause"]["kind"] for failure in verdict["failures"]] == ["killed"]
    assert [cell["status"] for cell in verdict["cells"]] == ["passed", "killed", "passed"]
