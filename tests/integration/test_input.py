"""Input that cannot be used: one clear line, exit code 2, nothing written. And odd input that can."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.support import (
    MARK,
    left_behind,
    make_notebook,
    marked_processes,
    ordinary_user,
    run_notebook,
    safe_exec,
)

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def listing(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every entry below a folder with its inode, mode and, for regular files, content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_mode, content)
    return found


def refused(folder: Path, *arguments: str | Path, prefix: tuple[str, ...] = ()) -> str:
    """Run; it must refuse with one line, which is returned, and leave ``folder`` as it was."""
    before = listing(folder)
    done = safe_exec("run", *arguments, cwd=folder, prefix=prefix)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("safe-exec: ")
    assert lines[0].removeprefix("safe-exec: ").strip()
    assert listing(folder) == before
    return lines[0]


def document(**changes: Any) -> str:
    """A small valid notebook with some keys changed."""
    node = dict(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)", id="a")]))
    return json.dumps({**node, **changes})


# --- the notebook -----------------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    make_notebook(tmp_path / "analysis.ipynb", "1")
    line = refused(tmp_path, "analsis.ipynb")
    assert "no such file" in line
    assert "analysis.ipynb" in line


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "an empty file"),
        (b"print('a script')", "Python source"),
        (b'{"cells": [', "cut off"),
        (b"\xff\xfe\x00binary", "UTF-16"),
        (b"[]", "not a notebook"),
        (b"{}", "nbformat"),
        (b"null", "not a notebook"),
        (b'"text"', "not a notebook"),
        (b'{"a": 1}', "nbformat"),
        (b"[" * 100_000, "not"),
        (b'{"nbformat": "4", "nbformat_minor": 5, "metadata": {}, "cells": []}', "nbformat"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "cells"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": [], "cells": []}', "metadata"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": {}}', "cells"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [1]}', "cell 0"),
        (
            b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "other"}]}',
            "cell 0",
        ),
        (b'{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": 1}', "nbformat 3"),
        (b'{"nbformat": 0}', "nbformat"),
    ],
)
def test_no_notebook(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "bad.ipynb").write_bytes(content)
    line = refused(tmp_path, "bad.ipynb")
    assert "bad.ipynb" in line
    assert word in line


@pytest.mark.parametrize("major", [5, 6, 99])
def test_a_format_of_the_future(major: int, tmp_path: Path) -> None:
    (tmp_path / "new.ipynb").write_text(document(nbformat=major, nbformat_minor=0))
    line = refused(tmp_path, "new.ipynb")
    assert f"nbformat {major}" in line
    assert "nbformat 4" in line


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "folder.ipynb").mkdir()
    assert "directory" in refused(tmp_path, "folder.ipynb")
    assert "directory" in refused(tmp_path, ".")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ipynb")
    assert "pipe" in refused(tmp_path, "pipe.ipynb")


def test_a_device_and_a_dangling_link(tmp_path: Path) -> None:
    assert "device" in refused(tmp_path, "/dev/null")
    (tmp_path / "link.ipynb").symlink_to("nowhere.ipynb")
    assert "no such file" in refused(tmp_path, "link.ipynb")
    (tmp_path / "round.ipynb").symlink_to("round.ipynb")
    refused(tmp_path, "round.ipynb")


@pytest.mark.parametrize(
    "name",
    [
        "new\nline.ipynb",
        "tab\there.ipynb",
        "\x1b[31mred.ipynb",
        "a" * 255,
        "nb.ipynb/inside",
        "%s%d{}",
    ],
)
def test_names_that_would_break_a_line(name: str, tmp_path: Path) -> None:
    line = refused(tmp_path, name)
    assert line.isprintable()


@pytest.fixture
def for_anybody() -> Iterator[Path]:
    """A folder that any user may enter and write to: pytest's own are private."""
    folder = Path(tempfile.mkdtemp(prefix="anybody-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.bed("ordinary-user")
def test_an_unreadable_file(for_anybody: Path) -> None:
    path = make_notebook(for_anybody / "secret.ipynb", "1")
    path.chmod(0)
    line = refused(for_anybody, "secret.ipynb", prefix=AS_NOBODY)
    assert "readable" in line


@pytest.mark.bed("ordinary-user")
def test_an_output_folder_that_may_not_be_written(for_anybody: Path) -> None:
    make_notebook(for_anybody / "nb.ipynb", "1").chmod(0o644)
    for_anybody.chmod(0o755)
    assert "cannot be written" in refused(for_anybody, "nb.ipynb", prefix=AS_NOBODY)


# --- output paths -----------------------------------------------------------------------------------------------


def there(folder: Path) -> None:
    (folder / "there").mkdir()


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def link_to_a_directory(folder: Path) -> None:
    (folder / "there").mkdir()
    (folder / "link").symlink_to("there")


def nothing(folder: Path) -> None:
    """Nothing to prepare."""


@pytest.mark.parametrize("option", ["-o", "--verdict"])
@pytest.mark.parametrize(
    ("prepare", "target", "word"),
    [
        (nothing, "missing/out.ipynb", "does not exist"),
        (there, "there", "directory"),
        (nothing, "nb.ipynb/out.ipynb", "not a directory"),
        (pipe, "pipe", "pipe"),
        (link_to_a_directory, "link", "directory"),
        (nothing, "/dev/null", "device"),
        (nothing, "/proc/out.ipynb", "written"),
        (nothing, "x" * 300, "long"),
    ],
)
def test_outputs_that_cannot_be_written(
    option: str, prepare: Callable[[Path], None], target: str, word: str, tmp_path: Path
) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    prepare(tmp_path)
    assert word in refused(tmp_path, "nb.ipynb", option, target)


def test_an_event_log_that_cannot_be_written(tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    assert "missing" in refused(tmp_path, "nb.ipynb", "--events", "missing/events.jsonl")


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "same", "--verdict", "same"),
        ("-o", "same", "--verdict", "./same"),
        ("--verdict", "same", "--events", "same"),
        ("--verdict", "nb.out.ipynb"),
        ("--verdict", "nb.ipynb"),
        ("--events", "nb.ipynb"),
    ],
    ids=" ".join,
)
def test_two_files_in_the_same_place(options: tuple[str, ...], tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    refused(tmp_path, "nb.ipynb", *options)


def test_a_folder_to_run_in_that_is_none(tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    assert "missing" in refused(tmp_path, "nb.ipynb", "--cwd", "missing")
    assert "nb.ipynb" in refused(tmp_path, "nb.ipynb", "--cwd", "nb.ipynb")


# --- options and limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--memory", "12Q", "12Q"),
        ("--memory", "-1G", "negative"),
        ("--memory", "0", "0"),
        ("--memory", "", "memory"),
        ("--memory", "nan", "nan"),
        ("--memory", "1e999", "1e999"),
        ("--memory", "1 potato", "potato"),
        ("--memory", "200%", "200%"),
        ("--cpus", "-1", "negative"),
        ("--cpus", "0", "0"),
        ("--cpus", "two", "two"),
        ("--cpu-time", "5 fortnights", "fortnights"),
        ("--cell-timeout", "-3s", "negative"),
        ("--cell-timeout", "0", "0"),
        ("--timeout", "soon", "soon"),
        ("--start-timeout", "-1", "negative"),
        ("--processes", "0", "0"),
        ("--processes", "1.5", "1.5"),
        ("--processes", "-2", "negative"),
        ("--open-files", "many", "many"),
        ("--file-size", "-1", "negative"),
        ("--output", "10X", "10X"),
        ("--cell-output", "-5M", "negative"),
        ("--limits", "strickt", "strict"),
        ("--limits", "no-such-file.yaml", "no-such-file.yaml"),
        ("--limits", "", "limits"),
        ("--require", "memry", "memory"),
        ("--require", "", "require"),
        ("--mechanisms", "magic", "magic"),
        ("--mechanisms", "", "mechanisms"),
    ],
)
def test_values_that_are_none(option: str, value: str, word: str, tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    assert word in refused(tmp_path, "nb.ipynb", option, value)


def test_options_that_are_none(tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    assert "--memory" in refused(tmp_path, "nb.ipynb", "--memroy", "1G")
    refused(tmp_path, "nb.ipynb", "--memory")
    refused(tmp_path)
    refused(tmp_path, "nb.ipynb", "another.ipynb")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("limits: [", ["mine.yaml"]),
        ("limits:\n\tmemory: 1G", ["mine.yaml"]),
        ("just text", ["mine.yaml"]),
        ("- a\n- b", ["mine.yaml"]),
        ("limits:\n  memry: 1G", ["mine.yaml", "memry", "memory"]),
        ("limts:\n  memory: 1G", ["mine.yaml", "limts", "limits"]),
        ("limits:\n  memory: 12Q", ["mine.yaml", "memory", "12Q"]),
        ("limits:\n  processes: -1", ["mine.yaml", "processes", "negative"]),
        ("limits:\n  cell_timeout: true", ["mine.yaml", "cell_timeout"]),
        ("limits:\n  cpus: [1]", ["mine.yaml", "cpus"]),
        ("limits: 5", ["mine.yaml", "limits"]),
        ("extends: strickt", ["mine.yaml", "strict"]),
        ("extends: mine.yaml", ["mine.yaml"]),
        ("limits:\n  memory: 1G\n  memory: 2G", ["mine.yaml", "memory"]),
        ("limits: !!python/object/apply:os.system ['touch pwned']", ["mine.yaml"]),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", ["mine.yaml"]),
    ],
)
def test_limits_files_that_are_wrong(text: str, words: list[str], tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    (tmp_path / "mine.yaml").write_text(text)
    line = refused(tmp_path, "nb.ipynb", "--limits", "mine.yaml")
    assert [word for word in words if word not in line] == []


def test_the_limits_file_of_the_repository_is_wrong(tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    (tmp_path / ".git").mkdir()
    (tmp_path / "safe-exec.yaml").write_text("notebooks: 5\nlimts: 1\n")
    assert "safe-exec.yaml" in refused(tmp_path, "nb.ipynb")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"safe_exec": {"limits": {"memory": "12Q"}}}, ["memory", "12Q"]),
        ({"safe_exec": {"limits": {"memry": "1G"}}}, ["memry", "memory"]),
        ({"safe_exec": {"limits": {"processes": -1}}}, ["processes", "negative"]),
        ({"safe_exec": {"limits": "strict"}}, ["limits"]),
        ({"safe_exec": {"limits": {"cpus": None, "cell_timeout": []}}}, ["cell_timeout"]),
    ],
)
def test_limits_in_the_metadata_are_wrong(
    metadata: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1", **metadata)
    line = refused(tmp_path, "nb.ipynb")
    assert [word for word in ["nb.ipynb", *words] if word not in line] == []


def test_limits_of_a_cell_are_wrong(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "1", "2")
    node = nbformat.read(path, as_version=4)
    node.cells[1].metadata["safe_exec"] = {"limits": {"cell_timeout": "soon"}}
    nbformat.write(node, path)
    line = refused(tmp_path, "nb.ipynb")
    assert "nb.ipynb" in line
    assert "cell 1" in line
    assert "soon" in line


# --- no errors --------------------------------------------------------------------------------------------------


def test_a_notebook_of_format_3_passes(tmp_path: Path) -> None:
    code = {
        "cell_type": "code",
        "collapsed": False,
        "input": "print(6 * 7)",
        "language": "python",
        "metadata": {},
        "outputs": [],
    }
    old = {
        "metadata": {"name": ""},
        "nbformat": 3,
        "nbformat_minor": 0,
        "worksheets": [{"cells": [code], "metadata": {}}],
    }
    path = tmp_path / "old.ipynb"
    path.write_text(json.dumps(old))
    outcome = run_notebook(path)
    assert outcome.code == 0
    assert outcome.notebook.cells[0].outputs[0].text == "42\n"
    assert json.loads(path.read_text()) == old


def test_a_notebook_without_cells_passes(tmp_path: Path) -> None:
    outcome = run_notebook(make_notebook(tmp_path / "empty.ipynb"))
    assert (outcome.code, outcome.verdict["cells"]) == (0, [])
    assert outcome.notebook.cells == []


def test_a_notebook_of_text_alone_passes(tmp_path: Path) -> None:
    node = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# text", id="a"),
            nbformat.v4.new_raw_cell("raw", id="b"),
        ]
    )
    path = tmp_path / "text.ipynb"
    nbformat.write(node, path)
    outcome = run_notebook(path)
    assert outcome.code == 0
    assert [cell.source for cell in outcome.notebook.cells] == ["# text", "raw"]


def test_a_byte_order_mark_and_odd_names_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "späce and 'quotes' \U0001f600.ipynb"
    path.write_bytes(b"\xef\xbb\xbf" + document().encode())
    assert run_notebook(path).code == 0


@pytest.mark.bed("ordinary-user")
def test_a_read_only_folder_with_outputs_elsewhere(for_anybody: Path) -> None:
    (for_anybody / "in").mkdir()
    make_notebook(for_anybody / "in" / "nb.ipynb", "print(1)").chmod(0o644)
    (for_anybody / "in").chmod(0o555)
    (for_anybody / "out").mkdir()
    (for_anybody / "out").chmod(0o777)
    out, verdict = for_anybody / "out" / "o.ipynb", for_anybody / "out" / "v.json"
    home = {"HOME": str(for_anybody / "out")}
    done = safe_exec(
        "run",
        for_anybody / "in" / "nb.ipynb",
        "-o",
        out,
        "--verdict",
        verdict,
        prefix=ordinary_user(),
        env=home,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(for_anybody / "in") == ["nb.ipynb"]
    assert json.loads(verdict.read_text())["status"] == "passed"


@pytest.mark.bed("bash")
def test_an_unknown_kernel_names_those_installed_in_a_verdict(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "1", kernel="pithon")
    outcome = run_notebook(path, "--kernel-fallback", "never")
    assert (outcome.code, outcome.verdict["status"]) == (6, "start_failed")
    assert outcome.verdict["cause"]["kind"] == "kernel_start_failed"
    for word in ("pithon", "python3", "bash"):
        assert word in json.dumps(outcome.verdict["cause"])
        assert word in outcome.stdout
    assert [cell["status"] for cell in outcome.verdict["cells"]] == ["not_run"]


def test_an_unknown_kernel_as_an_option(tmp_path: Path) -> None:
    outcome = run_notebook(make_notebook(tmp_path / "nb.ipynb", "1"), "--kernel", "julia-9")
    assert outcome.code == 6
    assert "julia-9" in outcome.verdict["cause"]["summary"] + json.dumps(
        outcome.verdict["cause"]["evidence"]
    )


# --- again ------------------------------------------------------------------------------------------------------


def bare(node: Any) -> Any:
    """A notebook without times, figures and process ids."""
    copy = json.loads(json.dumps(node))
    for part in (copy, *copy["cells"]):
        part["metadata"].pop("safe_exec", None)
        part["metadata"].pop("execution", None)
    copy["cells"] = [
        cell for cell in copy["cells"] if "safe-exec" not in cell["metadata"].get("tags", [])
    ]
    for cell in copy["cells"]:
        cell["outputs"] = [
            o for o in cell.get("outputs", []) if not str(o.get("ename")).startswith("SafeExec")
        ]
    return copy


def essence(verdict: dict[str, Any]) -> dict[str, Any]:
    cause, crash = verdict["cause"] or {}, verdict["crash_cell"] or {}
    return {
        "status": verdict["status"],
        "cause": (
            cause.get("kind"),
            cause.get("summary"),
            cause.get("signal"),
            cause.get("advice"),
        ),
        "crash": {
            key: crash.get(key) for key in ("index", "code_index", "id", "line", "source_line")
        },
        "cells": [
            (cell["index"], cell["code_index"], cell["id"], cell["status"])
            for cell in verdict["cells"]
        ],
        "limits": verdict["limits"],
        "notebook": {key: verdict["notebook"][key] for key in ("cells", "code_cells", "kernel")},
    }


@pytest.mark.parametrize(
    "sources",
    [
        ("print('a')", "1 + 1", "x = 3"),
        (
            "print('before')",
            "import os\nprint('last words')\nos.kill(os.getpid(), 11)",
            "print('never')",
        ),
        ("print('before')", "print('in it')\n1 / 0", "print('never')"),
        ("import os", "os._exit(3)", "print('never')"),
    ],
    ids=["passes", "segfault", "error", "exit"],
)
def test_running_an_annotated_notebook_gives_the_same_again(
    sources: tuple[str, ...], tmp_path: Path
) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", *sources)
    node = nbformat.read(path, as_version=4)
    node.cells.insert(0, nbformat.v4.new_markdown_cell("# a title", id="title"))
    node.metadata["safe_exec"] = {"limits": {"memory": "900M"}}
    nbformat.write(node, path)
    first = run_notebook(path)
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(tmp_path / "nb.out.ipynb", again / "nb.ipynb")
    second = run_notebook(again / "nb.ipynb")
    assert essence(second.verdict) == essence(first.verdict)
    assert bare(second.notebook) == bare(first.notebook)
    assert len(second.notebook.cells) == len(first.notebook.cells)
    assert second.notebook.metadata.safe_exec.limits == {"memory": "900M"}


# --- links ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sources", [("print(1)",), ("import os\nos._exit(1)",)], ids=["passes", "dies"]
)
@pytest.mark.parametrize("hard", [False, True], ids=["symbolic", "hard"])
@pytest.mark.parametrize("target", ["nb.out.ipynb", "nb.verdict.json"])
def test_outputs_are_never_written_through_a_link(
    target: str, hard: bool, sources: tuple[str, ...], tmp_path: Path
) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", *sources)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    if hard:
        os.link(precious, tmp_path / target)
    else:
        (tmp_path / target).symlink_to("precious")
    run_notebook(path)
    assert precious.read_text() == "precious"
    assert not (tmp_path / target).is_symlink()
    assert (tmp_path / target).stat().st_ino != precious.stat().st_ino


def test_an_event_log_is_never_written_through_a_link(tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "events").symlink_to("precious")
    assert "link" in refused(tmp_path, "nb.ipynb", "--events", "events")
    assert (tmp_path / "precious").read_text() == "precious"


def test_the_notebook_itself_may_be_a_link_and_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = make_notebook(tmp_path / "real" / "nb.ipynb", "import os\nprint(os.getcwd())")
    (tmp_path / "link.ipynb").symlink_to(real)
    before = real.read_bytes()
    outcome = run_notebook(tmp_path / "link.ipynb")
    assert outcome.code == 0
    assert real.read_bytes() == before
    assert (tmp_path / "link.ipynb").is_symlink()
    assert left_behind(outcome.run_id) == []


def test_help_and_version_need_no_notebook() -> None:
    for arguments in (("--help",), ("run", "--help"), ("--version",)):
        done: subprocess.CompletedProcess[str] = safe_exec(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


# --- a kernel that has been started already -----------------------------------------------------------------------


@pytest.mark.kills
def test_a_notebook_found_invalid_while_its_kernel_starts(tmp_path: Path) -> None:
    """The kernel is started when the metadata is known; the rest of the notebook may still be none."""
    mark = secrets.token_hex(8)
    cells = [
        {
            "cell_type": "code",
            "metadata": {},
            "source": "open('ran', 'w')",
            "outputs": 5,
            "execution_count": None,
        }
    ]
    (tmp_path / "nb.ipynb").write_text(document(cells=cells))
    done = safe_exec(
        "run", "nb.ipynb", cwd=tmp_path, env={MARK: mark, "XDG_RUNTIME_DIR": str(tmp_path)}
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert marked_processes(mark) == []
    left = [path for path in tmp_path.rglob("*") if path.name not in ("nb.ipynb", "safe-exec")]
    assert left == [], "no documents, sockets or notes"


def test_what_no_notebook_needs_checked_is_not_imported(tmp_path: Path) -> None:
    """Beside JupyterLab jsonschema imports what takes it most of a second; the kernel may import it as ever."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "rfc3987_syntax.py").write_text(
        "import os\nopen(os.environ['SEEN'], 'a').write('imported ')\n"
    )
    path = make_notebook(
        tmp_path / "nb.ipynb", "import rfc3987_syntax, sys\nprint('rfc3987_syntax' in sys.modules)"
    )
    seen = tmp_path / "seen"
    outcome = run_notebook(path, env={"PYTHONPATH": str(place), "SEEN": str(seen)})
    assert outcome.verdict["status"] == "passed"
    assert seen.read_text() == "imported "
