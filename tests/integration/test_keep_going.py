"""Several failures of one notebook in one run: which cells go on, what each failure says, and who reports them."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest

from tests.support import make_notebook, ordinary_user, private_directory, run_notebook
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
# The beginning of the warning about a run from the start.
RAN_AGAIN = "the cells before it ran again"
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
    # The run went on in copies of the kernel, in the notebook's own folder.
    assert (tmp_path / "new.txt").read_text() == "x"
    assert not [text for text in verdict["warnings"] if RAN_AGAIN in text]
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


FIVE_DEATHS = (
    "import ctypes\nctypes.string_at(0)",
    "import os\nos.abort()",
    "chunks = []\nwhile True: chunks.append(bytearray(8 << 20))",
    "import time\nwhile True: time.sleep(0.05)",
    "import os\nos._exit(7)",
)
FIVE_CAUSES = ["segfault", "abort", "out_of_memory", "cell_timeout", "exit"]


@pytest.mark.kills
@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param([], id="root"),
        pytest.param(ordinary_user(), id="user", marks=pytest.mark.bed("ordinary-user")),
    ],
)
def test_no_cell_runs_twice_for_five_deaths(tmp_path: Path, prefix: list[str]) -> None:
    cells = ["import os, time\nstamp, first = time.monotonic_ns(), os.getpid()\nprint(stamp)"]
    for death in FIVE_DEATHS:
        cells += [death, "print(stamp, os.getpid() == first)"]
    with private_directory() as folder:
        path = make_notebook(folder / "nb.ipynb", *cells)
        options = ("--keep-going", "--no-bisect", "--cell-timeout", "6", "--memory", "500M")
        outcome = run_notebook(path, *options, prefix=prefix)
    verdict, node = outcome.verdict, outcome.notebook
    assert [failure["cause"]["kind"] for failure in verdict["failures"]] == FIVE_CAUSES
    assert [failure["crash_cell"]["code_index"] for failure in verdict["failures"]] == [
        *(1, 3, 5, 7, 9)
    ]
    assert not [text for text in verdict["warnings"] if RAN_AGAIN in text]
    # Every cell ran below the same first one, and each failure made another process the kernel.
    texts = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in node.cells
        if cell.cell_type == "code" and "stamp" in cell.source
    ]
    stamp = texts[0].strip()
    assert texts[1:] == [f"{stamp} False\n"] * 5


@pytest.mark.kills
@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("open('half.txt', 'w').write('ha')\nimport os\nos._exit(3)", "has changed files"),
        (
            "import subprocess\nsubprocess.run(['true'])\nimport os\nos._exit(3)",
            "has changed files",
        ),
    ],
)
def test_a_cell_that_changes_files_is_undone(tmp_path: Path, cell: str, reason: str) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", "x = 1", cell, "import os\nprint(os.path.exists('half.txt'))"
    )
    outcome = run_notebook(path, "--keep-going", "--no-bisect")
    (warning,) = [text for text in outcome.verdict["warnings"] if RAN_AGAIN in text]
    assert reason in warning
    assert outcome.notebook.cells[-1].outputs[0]["text"] == "False\n"


@pytest.mark.kills
@pytest.mark.parametrize(
    "state",
    [
        "import threading as t, time\nt.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "import socket\nkept = socket.socket()",
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'])",
        "import asyncio\ntask = asyncio.ensure_future(asyncio.sleep(60))",
        "import signal\nsignal.setitimer(signal.ITIMER_REAL, 60)",
        "handle = open('/proc/self/stat')",
    ],
    ids=["thread", "socket", "child", "task", "timer", "file"],
)
def test_a_state_that_does_not_survive_a_fork_is_made_again(tmp_path: Path, state: str) -> None:
    # A copy from before that cell would lack its state, and runs it again itself.
    path = make_notebook(
        tmp_path / "nb.ipynb",
        *("import os\nfirst = os.getpid()", state, "os._exit(4)", "print(os.getpid() == first)"),
    )
    outcome = run_notebook(path, "--keep-going", "--no-bisect")
    assert [failure["cause"]["kind"] for failure in outcome.verdict["failures"]] == ["exit"]
    assert [cell["status"] for cell in outcome.verdict["cells"]] == [
        *("passed", "passed", "killed", "passed")
    ]


@pytest.mark.kills
def test_definitions_of_earlier_cells_are_named_after_a_failure(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb",
        "import os\ndef fall():\n    os.abort()",
        "os._exit(3)",
        "fall()",
    )
    verdict = run_notebook(path, "--keep-going", "--no-bisect").verdict
    assert [failure["cause"]["kind"] for failure in verdict["failures"]] == ["exit", "abort"]
    frame = verdict["failures"][1]["crash_cell"]["stack"][0]
    assert (frame["function"], frame["line"], frame["cell"]) == ("fall", 3, 0)


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
