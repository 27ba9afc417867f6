"""Whatever a kernel puts where our documents go, nothing of anybody else's is written to, and the run ends with a verdict or says why not.

The cells know the names: they are those of the notebook. ``@NB@`` in a cell is the path of the notebook without its suffix.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jsonschema import Draft202012Validator

from safe_exec.model.verdict import Status
from safe_exec.reports.verdict_json import load_schema
from tests.hostile.arena import Arena, Launched, Who, in_turn
from tests.support import NOBODY, make_notebook

pytestmark = pytest.mark.hostile

NAMES = (".out.ipynb", ".verdict.json", ".repro.ipynb")
SEGFAULT = "import ctypes; ctypes.string_at(1)"


def launch(
    arena: Arena,
    *cells: str,
    options: tuple[str, ...] = (),
    bisect: bool = False,
    folder: Path | None = None,
) -> Launched:
    """Run cells in a notebook of the arena's folder."""
    ipython = arena.mkdir("ipython")
    path = (folder or arena.folder) / "n.ipynb"
    words = {
        "@NB@": str(path.with_suffix("")),
        "@FOLDER@": str(path.parent),
        "@BASE@": str(arena.base),
    }
    sources = [arena.fill(cell) for cell in cells]
    for word, value in words.items():
        sources = [source.replace(word, value) for source in sources]
    make_notebook(path, *sources)
    if arena.who == "user":
        os.chown(path, NOBODY, NOBODY)
    return arena.launch(path, options=options, bisect=bisect, env={"IPYTHONDIR": str(ipython)})


def verdict_in(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    Draft202012Validator(load_schema()).validate(found)
    return found


def is_ours(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


TRAPS = {
    "symlink": "os.symlink(target, path)",
    "symlink to nothing": "os.symlink(target + '.none', path)",
    "symlink to itself": "os.symlink(path, path)",
    "symlink to a folder": "os.symlink(os.path.dirname(target), path)",
    "fifo": "os.mkfifo(path)",
    "hard link": "os.link(target, path)",
    "socket": "s = socket.socket(socket.AF_UNIX); os.chdir(os.path.dirname(path)); s.bind(os.path.basename(path))",
    "file without rights": "os.close(os.open(path, os.O_CREAT, 0))",
}
SET = """
import os, socket
target = '@FOLDER@/target.txt'
open(target, 'w').write('untouched')
for end in {names!r}:
    path = '@NB@' + end
    if os.path.lexists(path):
        os.unlink(path)
    {trap}
"""


@pytest.mark.parametrize(
    ("arena", "name"), in_turn(TRAPS, both=("symlink", "fifo", "hard link")), indirect=["arena"]
)
def test_what_is_put_in_the_place_of_a_document_is_replaced(arena: Arena, name: str) -> None:
    done = launch(
        arena,
        SET.format(names=NAMES, trap=TRAPS[name]),
        SEGFAULT,
        bisect=name in ("symlink", "fifo"),
    )
    assert done.code == Status.KERNEL_DIED.exit_code, done
    verdict = verdict_in(arena.folder / "n.verdict.json")
    assert verdict["crash_cell"]["code_index"] == 1 and is_ours(arena.folder / "n.verdict.json")
    nbformat.validate(nbformat.read(arena.folder / "n.out.ipynb", as_version=4))
    assert is_ours(arena.folder / "n.out.ipynb")
    assert (arena.folder / "target.txt").read_text() == "untouched"
    assert not (arena.folder / "target.txt.none").exists()
    assert list(arena.folder.glob(".safe-exec-*")) == []


def test_links_to_what_others_own_lead_nowhere() -> None:
    """As root without walls a kernel may do it itself; that we do it for one who may not is what must not be."""
    with Arena("user", "ci") as arena:
        trap = "os.symlink('@SYSTEM@/canary', path)"
        done = launch(arena, SET.format(names=NAMES, trap=trap), SEGFAULT)
        assert done.code == Status.KERNEL_DIED.exit_code, done
        assert is_ours(arena.folder / "n.verdict.json") and is_ours(arena.folder / "n.out.ipynb")


def test_a_folder_in_the_place_of_a_document_leaves_it_beside(arena: Arena) -> None:
    trap = "os.mkdir(path); open(path + '/mine', 'w').write('kept')"
    done = launch(arena, SET.format(names=NAMES[:2], trap=trap), SEGFAULT)
    assert done.code == Status.KERNEL_DIED.exit_code, done
    assert (arena.folder / "n.verdict.json" / "mine").read_text() == "kept"
    (beside,) = [path for path in arena.folder.glob("n.verdict.*.json") if path.is_file()]
    verdict = verdict_in(beside)
    assert (
        verdict["outputs"]["verdict"] == str(beside)
        and Path(verdict["outputs"]["notebook"]).is_file()
    )
    assert (
        "could not be replaced" in " ".join(verdict["warnings"])
        and beside.name in done.stdout + done.stderr
    )


# --- the folder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["root", "user"])
def test_a_folder_that_was_moved_is_written_to_where_it_is(who: Who) -> None:
    with Arena(who, "default") as arena:
        cell = """
import os
os.mkdir('@BASE@/trap'); open('@BASE@/trap/n.verdict.json', 'w').write('untouched')
os.rename('@FOLDER@', '@BASE@/moved'); os.symlink('@BASE@/trap', '@FOLDER@')
"""
        done = launch(arena, cell, SEGFAULT)
        assert done.code == Status.KERNEL_DIED.exit_code, done
        verdict = verdict_in(arena.base / "moved" / "n.verdict.json")
        assert verdict["outputs"]["verdict"] == str(arena.base / "moved" / "n.verdict.json")
        assert (arena.base / "trap" / "n.verdict.json").read_text() == "untouched"
        assert sorted(path.name for path in (arena.base / "trap").iterdir()) == ["n.verdict.json"]


@pytest.mark.parametrize(("who", "quiet"), [("root", False), ("user", True)])
def test_a_folder_that_was_removed_is_said(who: Who, quiet: bool) -> None:
    with Arena(who, "default") as arena:
        folder = arena.base / "gone"
        folder.mkdir()
        if who == "user":
            os.chown(folder, NOBODY, NOBODY)
        cell = "import os, shutil\nos.chdir('/')\nshutil.rmtree('@FOLDER@')"
        done = launch(arena, cell, SEGFAULT, folder=folder, options=("-q",) if quiet else ())
        assert done.code == Status.KERNEL_DIED.exit_code, done
        assert (
            "the verdict could not be written" in done.stderr and "Traceback" not in done.stderr
        ), done
        assert quiet or "kernel died in code cell 2" in done.stdout
        assert not folder.exists()


@pytest.mark.parametrize("who", ["root", "user"])
def test_a_folder_without_rights(who: Who) -> None:
    with Arena(who, "default") as arena:
        done = launch(arena, "import os\nos.chmod('@FOLDER@', 0)", SEGFAULT)
        arena.folder.chmod(0o755)
        assert done.code == Status.KERNEL_DIED.exit_code, done
        if who == "root":
            verdict_in(arena.folder / "n.verdict.json")
        else:
            assert (
                "the verdict could not be written" in done.stderr and "Traceback" not in done.stderr
            ), done
            assert "kernel died in code cell 2" in done.stdout


INPUTS = {
    "removed": "os.unlink('@NB@.ipynb')",
    "swapped": "open('@NB@.ipynb', 'w').write('{}')",
    "a fifo": "os.unlink('@NB@.ipynb'); os.mkfifo('@NB@.ipynb')",
    "a symlink": "os.unlink('@NB@.ipynb'); os.symlink('/dev/zero', '@NB@.ipynb')",
}


@pytest.mark.parametrize(("arena", "name"), in_turn(INPUTS, both=("swapped",)), indirect=["arena"])
def test_the_notebook_is_read_once(arena: Arena, name: str) -> None:
    cell = f"import os\n{INPUTS[name]}"
    done = launch(arena, cell, "print('second')", SEGFAULT)
    assert done.code == Status.KERNEL_DIED.exit_code, done
    verdict = verdict_in(arena.folder / "n.verdict.json")
    assert verdict["crash_cell"]["code_index"] == 2
    node = nbformat.read(arena.folder / "n.out.ipynb", as_version=4)
    assert "second" in str(node.cells[2].outputs) and node.cells[3].source == SEGFAULT


# --- many notebooks ---------------------------------------------------------------------------------------------

MOVES = {
    "the directory": "os.rename('out', 'away'); os.symlink('@TARGET@', 'out')",
    "a directory in it": "os.rename('out/sub', 'out/away'); os.symlink('@TARGET@', 'out/sub')",
    "a directory to come": "os.symlink('@TARGET@', 'out/late')",
}


@pytest.mark.parametrize(
    ("who", "name"),
    [
        ("root", "the directory"),
        ("user", "the directory"),
        ("user", "a directory in it"),
        ("root", "a directory to come"),
    ],
)
def test_documents_of_a_batch_go_through_no_link_that_a_notebook_has_put_there(
    who: Who, name: str
) -> None:
    """The output directory lies in the folder of a notebook, which may write there, and nowhere else."""
    with Arena(who, "ci") as arena:
        target = arena.mkdir("target")
        for document in (
            "summary.json",
            "junit.xml",
            "report.html",
            "b.verdict.json",
            "b.out.ipynb",
        ):
            (target / document).write_text("untouched")
        for folder in ("sub", "late"):
            (arena.folder / folder).mkdir()
            make_notebook(arena.folder / folder / "b.ipynb", "1")
        # The longer a file is, the earlier it is run; the kernel of the second is started, and its directory made, while the first runs.
        move = f"import os\n{MOVES[name].replace('@TARGET@', str(target))}"
        for first, source, spaces in (("a.ipynb", move, 20_000), ("second.ipynb", "1", 10_000)):
            made = make_notebook(arena.folder / first, source)
            made.write_text(made.read_text() + " " * spaces)
        (arena.folder / "out" / "sub").mkdir(parents=True)
        if who == "user":
            for path in (arena.folder, *arena.folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        words = (
            "a.ipynb",
            "second.ipynb",
            "sub/b.ipynb",
            "late/b.ipynb",
            "--out",
            "out",
            "-j",
            "1",
            "--limits",
            "ci",
            "--no-bisect",
        )
        done = arena.command("batch", *words)
        assert {path.name: path.read_text() for path in target.iterdir()} == dict.fromkeys(
            ("summary.json", "junit.xml", "report.html", "b.verdict.json", "b.out.ipynb"),
            "untouched",
        ), done
        where = arena.folder / ("away" if name == "the directory" else "out")
        summary = json.loads((where / "summary.json").read_text())
        status = {found["path"]: found["status"] for found in summary["notebooks"]}
        assert (
            status["a.ipynb"] == "passed"
            and verdict_in(where / "a.verdict.json")["status"] == "passed"
        ), done
        for folder, blocked in (
            ("sub", name == "a directory in it"),
            ("late", name == "a directory to come"),
        ):
            assert status[f"{folder}/b.ipynb"] == ("refused" if blocked else "passed"), done
        assert (name == "the directory") == ("was moved away" in done.stderr), done


PUT_FOR_VERDICTS = """
import os
os.chdir('out')
for name in ('pipe', 'link', 'nonsense', 'shape'):
    os.unlink(name + '.verdict.json')
os.mkfifo('pipe.verdict.json')
os.symlink('/dev/zero', 'link.verdict.json')
open('nonsense.verdict.json', 'w').write('[' * 100_000)
open('shape.verdict.json', 'w').write('{"cause": 5, "cells": {}, "crash_cell": [], "status": [], "usage": 7, "limits": "x"}')
"""


def test_what_is_put_in_the_place_of_others_verdicts_holds_up_no_report() -> None:
    with Arena("user", "ci") as arena:
        for name in ("pipe", "link", "nonsense", "shape"):
            path = make_notebook(arena.folder / f"{name}.ipynb", "raise ValueError")
            # The longer a file is, the earlier it is run; spaces leave it the notebook that it is.
            path.write_text(path.read_text() + " " * 10_000)
        make_notebook(arena.folder / "evil.ipynb", PUT_FOR_VERDICTS)
        (arena.folder / "out").mkdir()
        for path in (arena.folder, *arena.folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        done = arena.command(
            "batch", ".", "--out", "out", "-j", "1", "--limits", "ci", "--no-bisect"
        )
        summary = json.loads((arena.folder / "out" / "summary.json").read_text())
        statuses = {found["path"]: found["status"] for found in summary["notebooks"]}
        assert (
            statuses.pop("evil.ipynb") == "passed"
            and set(statuses.values()) == {"cell_error"}
            and len(statuses) == 4
        ), done
        assert done.code == Status.CELL_ERROR.exit_code and "Traceback" not in done.stderr, done
        assert {path.name for path in (arena.folder / "out").iterdir()} >= {
            "junit.xml",
            "report.html",
        }


# --- the disk and the log ---------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_verdict(arena: Arena) -> None:
    with tempfile.TemporaryDirectory(prefix="full-") as name:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m,mode=1777", "hostile", name], check=True
        )
        try:
            folder = Path(name) / "f"
            folder.mkdir()
            folder.chmod(0o777)
            Path(name).chmod(0o755)
            fill = """
import os
fd = os.open('@FOLDER@/fill', os.O_CREAT | os.O_WRONLY)
try:
    while True: os.write(fd, b'x' * 4096)
except OSError as error:
    print(error)
print('y' * 3_000_000)
"""
            done = launch(arena, fill, SEGFAULT, folder=folder)
            assert done.code == Status.KERNEL_DIED.exit_code, done
            verdict = verdict_in(folder / "n.verdict.json")
            assert verdict["crash_cell"]["code_index"] == 1
            assert "notebook" not in verdict["outputs"], "3 MB do not fit"
            assert (
                "could not be written" in " ".join(verdict["warnings"])
                and not (folder / "n.out.ipynb").exists()
            )
            assert list(folder.glob(".safe-exec-*")) == []
        finally:
            subprocess.run(["umount", "-l", name], check=True)


LOGS = {
    "a symlink": "os.unlink(path); os.symlink('@FOLDER@/target.txt', path)",
    "a fifo": "os.unlink(path); os.mkfifo(path)",
    "nothing": "os.unlink(path)",
    "a folder": "os.unlink(path); os.mkdir(path)",
    "shorter": "os.truncate(path, 0)",
}


@pytest.mark.parametrize(("arena", "name"), in_turn(LOGS), indirect=["arena"])
def test_the_event_log_goes_on_in_its_own_file(arena: Arena, name: str) -> None:
    log = arena.folder / "log.jsonl"
    cell = f"import os\nopen('@FOLDER@/target.txt', 'w').write('untouched')\npath = {str(log)!r}\n{LOGS[name]}"
    done = launch(arena, cell, SEGFAULT, options=("--events", str(log)))
    assert done.code == Status.KERNEL_DIED.exit_code, done
    verdict_in(arena.folder / "n.verdict.json")
    assert (arena.folder / "target.txt").read_text() == "untouched"
