"""``papermill --engine safe-exec``: papermill's own command, its saved notebook and its exit code."""

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

import nbformat
import pytest

from tests.support import MARK, make_notebook, marked_processes, run_notebook, wait_until

PAPERMILL = Path(sys.executable).parent / "papermill"
EATER = "rows = []\nfor _ in range(1000):\n    rows.append(bytearray(b'x') * (10 << 20))"


@pytest.fixture
def mark() -> Iterator[str]:
    mark = secrets.token_hex(8)
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 10, "no process is left")


def environment(mark: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return {**kept, "SAFE_EXEC_LIMITS": "ci", MARK: mark}


def papermill(
    folder: Path, mark: str, *arguments: str, engine: str = "safe-exec"
) -> subprocess.CompletedProcess[str]:
    argv = [str(PAPERMILL), "--engine", engine, "--no-progress-bar", *arguments]
    return subprocess.run(
        argv,
        cwd=folder,
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def saved(path: Path) -> Any:
    node = nbformat.read(path, as_version=4)
    nbformat.validate(node)
    return node


def statuses(node: Any) -> list[str]:
    """What papermill says of each cell, its own markers of an error left out."""
    return [cell.metadata.papermill.status for cell in node.cells if "papermill" in cell.metadata]


def parameters(path: Path, *sources: str, **metadata: Any) -> Path:
    """A notebook with text, a cell of parameters, and one that is not to be run."""
    make_notebook(path, "x = 1", *sources, "raise SystemError('skipped')", **metadata)
    node = nbformat.read(path, as_version=4)
    node.cells[0].metadata["tags"] = ["parameters"]
    node.cells[-1].metadata["tags"] = ["skip-execution"]
    node.cells.insert(0, nbformat.v4.new_markdown_cell("# Title", id="title"))
    path.write_text(nbformat.writes(node))
    return path


def plain(node: Any) -> Any:
    """A notebook without what differs from run to run, and without papermill's markers of an error."""
    node.cells = [
        cell
        for cell in node.cells
        if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])
    ]
    for cell in node.cells:
        cell.metadata.pop("execution", None)
        cell.pop("id", None)
        for key in ("start_time", "end_time", "duration"):
            assert cell.metadata.papermill.pop(key) is not None
    for key in ("start_time", "end_time", "duration", "output_path"):
        assert node.metadata.papermill.pop(key)
    return node


PASSES = (
    "print('x is', x)",
    "import sys\nprint('warned', file=sys.stderr)",
    "from IPython.display import display, HTML\ndisplay(HTML('<b>x</b>'))\nx + 1",
    "1 / 0",
    "h = display('first', display_id=True)\nh.update('second')",
)


def test_a_notebook_that_passes_is_as_by_papermill_itself(tmp_path: Path, mark: str) -> None:
    path = parameters(tmp_path / "nb.ipynb", *PASSES)
    node = nbformat.read(path, as_version=4)
    node.cells[5].metadata["tags"] = ["raises-exception"]
    path.write_text(nbformat.writes(node))
    found = {}
    for engine in ("safe-exec", "nbclient"):
        done = papermill(
            tmp_path,
            mark,
            "nb.ipynb",
            f"{engine}.ipynb",
            "-p",
            "x",
            "7",
            "--log-output",
            engine=engine,
        )
        told = [
            line
            for line in done.stderr.splitlines()
            if line.strip() and not re.search(r"ipynb|IPKernelApp", line)
        ]
        found[engine] = (done.returncode, told, plain(saved(tmp_path / f"{engine}.ipynb")))
    assert found["safe-exec"] == found["nbclient"]
    # papermill raises for the traceback of a cell that may raise, too; all cells have run.
    code, told, node = found["safe-exec"]
    assert (code, statuses(node)) == (1, ["completed"] * 9)
    assert "x is 7" in told


def test_a_dead_kernel_is_recorded_as_failed(tmp_path: Path, mark: str) -> None:
    parameters(
        tmp_path / "nb.ipynb", "print('before')", f"print('last words')\n{EATER}", "print('after')"
    )
    (tmp_path / "safe-exec.yaml").write_text("limits:\n  - path: nb.ipynb\n    memory: 200M\n")
    done = papermill(
        tmp_path, mark, "nb.ipynb", "out.ipynb", "--stdout-file", "said.txt", "-p", "x", "3"
    )
    assert done.returncode == 1
    assert (
        "SafeExec: out_of_memory: out of memory: peak 200 MiB of 200 MiB, and the system killed the kernel"
        in done.stderr
    )
    node = saved(tmp_path / "out.ipynb")
    assert node.metadata.papermill.exception is True
    # Title, parameters, injected parameters, two that ran, and two that did not.
    assert statuses(node) == ["completed"] * 4 + ["failed", "pending", "pending"]
    crashed = next(
        cell for cell in node.cells if cell.metadata.get("papermill", {}).get("status") == "failed"
    )
    assert crashed.metadata.papermill.exception is True and crashed.metadata.papermill.duration > 0
    assert [output.get("ename", output.get("text")) for output in crashed.outputs] == [
        "last words\n",
        "SafeExec: out_of_memory",
    ]
    assert "----> 4     rows.append" in "\n".join(crashed.outputs[1].traceback)
    assert (tmp_path / "said.txt").read_text().split() == ["before", "last", "words"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "nb.ipynb",
        "out.ipynb",
        "safe-exec.yaml",
        "said.txt",
    ]


def test_an_exception_is_the_cells_own(tmp_path: Path, mark: str) -> None:
    make_notebook(tmp_path / "nb.ipynb", "y = 0", "1 / y", "2")
    done = papermill(tmp_path, mark, "nb.ipynb", "out.ipynb")
    assert (
        done.returncode == 1
        and "ZeroDivisionError: division by zero" in done.stderr
        and "SafeExec" not in done.stderr
    )
    assert statuses(saved(tmp_path / "out.ipynb")) == ["completed", "failed", "pending"]


def test_an_error_that_is_shown_fails_as_in_run(tmp_path: Path, mark: str) -> None:
    shown = "try:\n    1 / 0\nexcept Exception:\n    get_ipython().showtraceback()"
    make_notebook(tmp_path / "nb.ipynb", "1", shown, "2")
    done = papermill(tmp_path, mark, "nb.ipynb", "out.ipynb")
    assert done.returncode == 1 and "ZeroDivisionError: division by zero" in done.stderr
    assert statuses(saved(tmp_path / "out.ipynb")) == ["completed", "failed", "pending"]
    run = run_notebook(tmp_path / "nb.ipynb", "--no-bisect")
    assert (run.verdict["status"], run.verdict["cause"]["kind"]) == ("cell_error", "exception")


def test_sys_exit_is_a_success_as_in_papermill_and_in_run(tmp_path: Path, mark: str) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1", "import sys\nsys.exit(0)", "2")
    done = papermill(tmp_path, mark, "nb.ipynb", "out.ipynb")
    assert done.returncode == 0, done.stderr
    assert "1 code cell below it did not run" in done.stderr
    assert statuses(saved(tmp_path / "out.ipynb"))[0] == "completed"
    assert run_notebook(tmp_path / "nb.ipynb").verdict["status"] == "passed"


def test_papermills_timeouts_and_a_kernel_that_does_not_start(tmp_path: Path, mark: str) -> None:
    make_notebook(tmp_path / "slow.ipynb", "import time", "time.sleep(60)")
    done = papermill(tmp_path, mark, "slow.ipynb", "out.ipynb", "--execution-timeout", "1")
    assert done.returncode == 1 and "SafeExec: cell_timeout" in done.stderr, done.stderr
    node = saved(tmp_path / "out.ipynb")
    assert statuses(node) == ["completed", "failed"]

    spec = tmp_path / "kernels" / "broken"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-c", "import sys; sys.exit('no kernel in here')", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "broken", "language": "python"})
    )
    make_notebook(tmp_path / "broken.ipynb", "1", kernel="broken")
    env = {**environment(mark), "JUPYTER_PATH": str(tmp_path)}
    command = [
        str(PAPERMILL),
        "--engine",
        "safe-exec",
        "--no-progress-bar",
        "broken.ipynb",
        "none.ipynb",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1 and "SafeExec: kernel_start_failed" in done.stderr
    assert statuses(saved(tmp_path / "none.ipynb")) == ["failed"]


def test_from_python_with_limits_as_arguments_and_a_loop_that_runs(
    tmp_path: Path, mark: str
) -> None:
    make_notebook(tmp_path / "nb.ipynb", EATER)
    (tmp_path / "call.py").write_text(
        "import asyncio, papermill\n"
        "async def main():\n"
        "    papermill.execute_notebook('nb.ipynb', 'out.ipynb', engine_name='safe-exec', progress_bar=False, "
        "limits='strict', options={'memory': '150M'})\n"
        "asyncio.run(main())\n"
    )
    argv = [sys.executable, "call.py"]
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and "out of memory: peak 150 MiB of 150 MiB" in done.stderr, (
        done.stderr
    )
    assert "papermill.exceptions.PapermillExecutionError" in done.stderr
    wrong = (tmp_path / "call.py").read_text().replace("150M", "much")
    (tmp_path / "call.py").write_text(wrong)
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and "memory: 'much' is not a size" in done.stderr


def test_a_notebook_object_is_an_input_too(tmp_path: Path, mark: str) -> None:
    (tmp_path / "call.py").write_text(
        "import nbformat.v4 as v4, papermill\n"
        "node = v4.new_notebook(cells=[v4.new_code_cell('print(6 * 7)')])\n"
        "node.metadata.kernelspec = {'name': 'python3', 'display_name': 'x', 'language': 'python'}\n"
        "papermill.execute_notebook(node, 'out.ipynb', engine_name='safe-exec', progress_bar=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "call.py"],
        cwd=tmp_path,
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "out.ipynb").cells[0].outputs[0].text == "42\n"


def test_ctrl_c_is_recorded_and_ends_the_kernel(tmp_path: Path, mark: str) -> None:
    make_notebook(
        tmp_path / "nb.ipynb", "1", "open('began', 'w').close()\nimport time\ntime.sleep(600)", "2"
    )
    argv = [str(PAPERMILL), "--engine", "safe-exec", "--no-progress-bar", "nb.ipynb", "out.ipynb"]
    process = subprocess.Popen(
        argv,
        cwd=tmp_path,
        env=environment(mark),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until((tmp_path / "began").exists, 60, "the cell runs")
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert statuses(saved(tmp_path / "out.ipynb")) == ["completed", "failed", "pending"]
