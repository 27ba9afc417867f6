"""The mistakes that new users make most often: each is one line that says how to fix it."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest

from safe_exec.cli import batch, run
from safe_exec.cli.main import call
from tests.support import make_notebook

ROWS = [
    # A misspelt option, command, profile, limit, tag and file.
    (["run", "nb.ipynb", "--memry", "1G"], "there is no option --memry; did you mean --memory?"),
    (["run", "nb.ipynb", "--tolerance", "1"], "did you mean --compare-tolerance?"),
    (["rnu", "nb.ipynb"], "there is no command rnu; did you mean run?"),
    (["nb.ipynb"], "nb.ipynb is no command; did you mean safe-exec run nb.ipynb?"),
    (["folder"], "folder is no command; did you mean safe-exec batch folder?"),
    (["run", "nb.ipynb", "--limits", "strickt"], "did you mean strict?"),
    (["run", "nb.ipynb", "--require", "memroy"], "did you mean memory?"),
    (["run", "nb.ipynb", "--mechanisms", "cgroups"], "unknown mechanism cgroups; there are"),
    (["run", "nb.ipynb", "--only-tag", "shwo"], "did you mean 'show'?"),
    (["run", "bn.ipynb"], "bn.ipynb: no such file; did you mean nb.ipynb?"),
    (["run", "nb.ipynb", "--jobs", "4"], "no option of safe-exec run, but of safe-exec batch"),
    (["batch", "folder", "--json"], "no option of safe-exec batch, but of safe-exec run"),
    (["run", "nb.ipynb", "--retries", "x"], "a whole number from 0 to 10, found 'x'"),
    (["run", "nb"], "nb: no such file; did you mean nb.ipynb?"),
    (["batch", "nb"], "nb: no such file or directory; did you mean nb.ipynb?"),
    (["batch", "folder", "--limits", "strickt"], "did you mean strict?"),
    (["batch", "folder", "--require", "memroy"], "--require: memroy is no limit"),
    (["batch", "folder", "--cell-timeout", "-5"], "--cell-timeout: '-5' is negative"),
    (["batch", "nb.ipynb", "--out", "nb.ipynb"], "is a file; name a directory"),
    # Options of other tools.
    (["run", "nb.ipynb", "-f", "values.yaml"], "for a file of parameters use --parameters FILE"),
    (["run", "nb.ipynb", "--log-output"], "there is no option --log-output; use --follow"),
    (["run", "nb.ipynb", "--nbval-lax"], "use --compare-lax"),
    (["batch", "folder", "--junitxml", "x"], "always writes junit.xml"),
    # A wrong unit, number or choice.
    (["run", "nb.ipynb", "--memory", "512"], "a number alone is bytes; did you mean 512M?"),
    (["run", "nb.ipynb", "--memory", "0.5K"], "too little for any kernel"),
    (["run", "nb.ipynb", "--memory", "1Q"], "a number with K, M, G or T, such as 512M"),
    (["run", "nb.ipynb", "--cell-timeout", "5x"], "such as 90s or 1h30m"),
    (["run", "nb.ipynb", "--retries", "99"], "--retries: expected a whole number from 0 to 10"),
    (["run", "nb.ipynb", "--compare", "--compare-tolerance", "x"], "expected a number from 0"),
    (
        ["run", "nb.ipynb", "--bisect", "maybe"],
        "expected one of auto, always, never, found 'maybe'",
    ),
    # A value that is missing, or one too many.
    (["run"], "expected safe-exec run NOTEBOOK"),
    (["batch"], "expected safe-exec batch PATH..."),
    (
        ["run", "nb.ipynb", "two.ipynb"],
        "for its output write -o two.ipynb, for several notebooks use safe-exec batch",
    ),
    (["run", "nb.ipynb", "--memory"], "--memory: expected --memory SIZE"),
    (["run", "nb.ipynb", "--bisect"], "--bisect: expected --bisect auto|always|never"),
    (["run", "nb.ipynb", "-p", "x"], "-p: expected -p NAME VALUE"),
    (["run", "nb.ipynb", "--compare=yes"], "--compare takes no value"),
    (["run", "nb.ipynb", "--set-env", "A"], "expected NAME=VALUE"),
    (["run", "nb.ipynb", "--env", "A=1"], "--env A: expected the name of a variable of yours"),
    # Files that are missing or are no notebooks.
    (["run", "folder"], "run all notebooks in it: safe-exec batch folder"),
    (["run", "nb.ipynb", "--parameters", "no.yaml"], "--parameters no.yaml: no such file"),
    (["run", "nb.ipynb", "--stdin", "no.txt"], "--stdin no.txt: no such file"),
    (["run", "nb.ipynb", "-o", "no/out.ipynb"], "create it first"),
    (["run", "nb.ipynb", "-o", "nb.ipynb"], "or use --in-place"),
    (["run", "script.py"], "mark cells with # %%, or run it with python script.py"),
    (["run", "cells.py"], "pip install 'safe-exec[jupytext]'"),
    (["run", "nb.ipynb", "--limits", "folder"], "folder: is a directory; name a file in it"),
    (["run", "nb.ipynb", "--limits", "bad.yaml"], "bad.yaml:3:2: not valid YAML:"),
    (["run", "nb.ipynb", "--limits", "bad.yaml"], "; check the indentation of this line"),
    (["run", "nb.ipynb", "--parameters", "bad.yaml"], "safe-exec: --parameters bad.yaml:3:2: not"),
    (
        ["run", "nb.ipynb", "--compare", "--sanitize-with", "script.py"],
        "--sanitize-with script.py: no",
    ),
    (["run", "nb.ipynb", "-p", "1x", "2"], "it has letters, digits and _"),
    # Options that need another one.
    (["run", "nb.ipynb", "--on-failure", "write"], "add --in-place"),
    (["run", "nb.ipynb", "--compare-tolerance", "1"], "nothing is compared; add --compare"),
    (["run", "nb.ipynb", "--until", "9"], "the notebook has 2 code cells, numbered from 1"),
]


@pytest.mark.parametrize(("arguments", "words"), ROWS, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_line_that_says_how_to_fix_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    # As if jupytext were not installed.
    monkeypatch.setitem(sys.modules, "jupytext", None)
    path = make_notebook(tmp_path / "nb.ipynb", "1", "2")
    path.write_text(path.read_text().replace('"metadata": {}', '"metadata": {"tags": ["show"]}'))
    (tmp_path / "folder").mkdir()
    (tmp_path / "script.py").write_text("print(1)\n")
    (tmp_path / "bad.yaml").write_text("limits:\n  memory: 1G\n cpus: 2\n")
    (tmp_path / "cells.py").write_text("# %%\nprint(1)\n")
    assert call(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1, streams.err
    assert streams.err.startswith("safe-exec: ") and words in streams.err


@pytest.mark.parametrize("command", ["run", "batch"])
@pytest.mark.parametrize("columns", [80, 100])
def test_help_fits_on_two_screens_in_groups(
    command: str,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    call([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    # Two screens of 50 lines.
    assert len(lines) <= 100 and max(map(len, lines)) <= columns
    for title in ("Limits:", "Isolation:", "Cells:", "Output:"):
        assert title in lines


@pytest.mark.parametrize("command", [run.command, batch.command], ids=["run", "batch"])
def test_every_option_is_in_the_help_with_its_text_on_one_line(
    command: click.Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert command.name is not None
    call([command.name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help and any(line.endswith(f"  {option.help}") for line in lines)
            assert any(line.lstrip().startswith(option.opts[0]) for line in lines)
