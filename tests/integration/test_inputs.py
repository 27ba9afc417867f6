"""Parameters, environment and the choice of cells, with real kernels: in run, batch, the plugin and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

import safe_exec
from tests.support import make_notebook, run_notebook
from tests.support import safe_exec as command

DEFAULTS = "alpha = 0.1\nname = 'x'"
SHOW = "import os; print(alpha, name, os.environ.get('SAFE_EXEC_TEST_VALUE'))"


def parametrised(path: Path, *, kernel: str = "python3") -> Path:
    make_notebook(path, DEFAULTS, SHOW, "print('last')", kernel=kernel)
    node = nbformat.read(path, 4)
    for index, tag in enumerate(("parameters", "show", "end")):
        node.cells[index].metadata["tags"] = [tag]
    nbformat.write(node, path)
    return path


def texts(node: Any) -> list[str]:
    return [
        output.text for cell in node.cells for output in cell.get("outputs", ()) if "text" in output
    ]


@pytest.mark.parametrize("limits", ["default", "ci"])
def test_parameters_and_variables_reach_the_notebook(tmp_path: Path, limits: str) -> None:
    path = parametrised(tmp_path / "nb.ipynb")
    (tmp_path / "values.yaml").write_text("alpha: 0.5\nname: file\n")
    (tmp_path / "values.env").write_text("# ours\nSAFE_EXEC_TEST_VALUE='a b'\n")
    run = run_notebook(
        path, "--parameters", str(tmp_path / "values.yaml"), "-p", "name", "option",
        "--env-file", str(tmp_path / "values.env"), "--limits", limits,
    )  # fmt: skip
    assert run.code == 0 and texts(run.notebook) == ["0.5 option a b\n", "last\n"]
    assert run.verdict["notebook"]["parameters"] == {"alpha": 0.5, "name": "option"}
    assert run.verdict["warnings"] == []
    assert run.notebook.cells[1].metadata["tags"][0] == "injected-parameters"


def test_a_search_and_a_replay_of_its_verdict_set_the_same_parameters(tmp_path: Path) -> None:
    make_notebook(
        tmp_path / "nb.ipynb",
        "size = 1",
        "rows = []",
        "rows.append(bytearray(b'x') * size)",
        "import os\nif size > 9: os.abort()",
    )
    node = nbformat.read(tmp_path / "nb.ipynb", 4)
    node.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(node, tmp_path / "nb.ipynb")
    run = run_notebook(tmp_path / "nb.ipynb", "-p", "size", "10", "--bisect", "always")
    assert run.verdict["cause"]["kind"] == "abort" and run.verdict["crash_cell"]["code_index"] == 4
    again, runs = run.verdict["culprits"]["reproduced"]
    assert again == runs > 0, run.verdict["culprits"]
    indexes = [cell["code_index"] for cell in run.verdict["culprits"]["cells"]]
    assert indexes == [1, 4], "the cell that sets the parameters, and the crash"
    replayed = command("replay", tmp_path / "nb.verdict.json")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr


@pytest.mark.bed("R")
def test_parameters_of_another_language(tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "cat(x$a, x$b[[2]])", kernel="ir", language="R")
    values = tmp_path / "values.json"
    values.write_text(json.dumps({"x": {"a": 'é"\\$', "b": [1, 2.5, True, None]}}))
    run = run_notebook(tmp_path / "nb.ipynb", "--parameters", str(values))
    assert run.code == 0 and texts(run.notebook) == ['é"\\$ 2.5']
    assert "no cell with the tag 'parameters'" in run.verdict["warnings"][0]


@pytest.mark.bed("bash")
def test_parameters_of_bash(tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", 'echo "$x"', kernel="bash", language="bash")
    run = run_notebook(tmp_path / "nb.ipynb", "-r", "x", "it's $HOME `id`")
    assert run.code == 0 and texts(run.notebook) == ["it's $HOME `id`\n"]


def test_cells_are_chosen_by_tag_and_by_the_last_one(tmp_path: Path) -> None:
    path = parametrised(tmp_path / "nb.ipynb")
    for options, statuses in (
        (("--skip-tag", "show"), ["passed", "skipped", "passed"]),
        (("--only-tag", "end"), ["skipped", "skipped", "passed"]),
        (("--until", "1"), ["passed", "skipped", "skipped"]),
        (("--until", "show"), ["passed", "passed", "skipped"]),
    ):
        run = run_notebook(path, *options)
        assert run.code == 0
        assert [cell["status"] for cell in run.verdict["cells"]] == statuses, options


def test_sys_exit_ends_a_notebook_as_passed(tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1", "import sys\nsys.exit(0)", "print('never')")
    run = run_notebook(tmp_path / "nb.ipynb")
    assert (run.code, run.verdict["status"]) == (0, "passed")
    assert [cell["status"] for cell in run.verdict["cells"]] == ["passed", "passed", "skipped"]
    assert "code cell 2 ended the notebook with sys.exit()" in run.verdict["warnings"][0]
    run = run_notebook(tmp_path / "nb.ipynb", "--exit-is", "error", "--no-bisect")
    assert (run.code, run.verdict["cause"]["kind"]) == (1, "exception")
    make_notebook(tmp_path / "nb.ipynb", "import sys\nsys.exit(3)")
    run = run_notebook(tmp_path / "nb.ipynb", "--no-bisect")
    assert (run.code, run.verdict["cause"]["kind"]) == (1, "exception")


def test_a_batch_gives_all_notebooks_the_same_and_takes_those_without_the_tag(
    tmp_path: Path,
) -> None:
    parametrised(tmp_path / "one.ipynb")
    make_notebook(tmp_path / "two.ipynb", "print('plain')")
    out = tmp_path / "out"
    done = command(
        "batch", tmp_path, "--out", out, "-p", "alpha", "2", "--only-tag", "show", "--no-bisect"
    )
    # Without its cell of defaults the notebook lacks a name.
    assert done.returncode == 1, done.stdout + done.stderr
    done = command("batch", tmp_path, "--out", out, "-p", "alpha", "2", "--skip-tag", "end")
    assert done.returncode == 0, done.stdout + done.stderr
    (verdict,) = (json.loads(path.read_text()) for path in out.rglob("one.verdict.json"))
    assert verdict["notebook"]["parameters"] == {"alpha": 2}
    # One of the notebooks has the tag: nothing is misspelt.
    assert "no code cell has this tag" not in done.stderr
    again = command(
        "batch", tmp_path, "--out", out, "-p", "alpha", "2", "--skip-tag", "end", "--only-changed"
    )
    assert "2 unchanged" in again.stdout, again.stdout
    again = command(
        "batch", tmp_path, "--out", out, "-p", "alpha", "3", "--skip-tag", "end", "--only-changed"
    )
    assert "unchanged" not in again.stdout, "other parameters are another run"
    misspelt = command("batch", tmp_path, "--out", tmp_path / "other", "--skip-tag", "edn")
    assert "note: --skip-tag edn: no code cell has this tag" in misspelt.stderr


def test_the_plugin_takes_the_same(tmp_path: Path) -> None:
    path = parametrised(tmp_path / "nb.ipynb")
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec", "--safe-exec-out", "out",
            "--safe-exec-parameter", "alpha", "7", "--safe-exec-set-env", "SAFE_EXEC_TEST_VALUE=v",
            "--safe-exec-skip-tag", "end", "--safe-exec-limits", "ci", str(path),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (tmp_path / "out").rglob("nb.out.ipynb")
    assert texts(nbformat.read(written, 4)) == ["7 x v\n"]


def test_from_python(tmp_path: Path) -> None:
    path = parametrised(tmp_path / "nb.ipynb")
    verdict = safe_exec.run(path, parameters={"alpha": [1, {"b": None}]}, until=2)
    assert verdict.status == "passed"
    assert texts(nbformat.read(tmp_path / "nb.out.ipynb", 4)) == ["[1, {'b': None}] x None\n"]
    assert [str(cell.status) for cell in verdict.cells] == [
        "passed",
        "passed",
        "passed",
        "skipped",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-p", "1a", "x"), "-p 1a: not the name of a variable in python"),
        (("--parameters", "missing.yaml"), "missing.yaml: no such file"),
        (("--only-tag", "shwo"), "did you mean 'show'?"),
        (("--until", "9"), "--until 9: the notebook has 3 code cells"),
        (("--set-env", "NAME"), "expected NAME=VALUE"),
        (("--exit-is", "good"), "expected one of success, error"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    path = parametrised(tmp_path / "nb.ipynb")
    done = command("run", path, *options, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
