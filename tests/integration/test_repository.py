"""The repository around a notebook behind walls: what of it is open, what closes it, and what is opened besides; real kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safe_exec.sandbox.planner import CHOOSABLE
from tests.support import Outcome, make_notebook, private_directory, run_notebook, safe_exec

CI = ("--limits", "ci", "--no-bisect")
WITHOUT_BUBBLEWRAP = ("--mechanisms", ",".join(name for name in CHOOSABLE if name != "bubblewrap"))
MECHANISMS = [
    pytest.param((), id="bubblewrap", marks=pytest.mark.bed("bubblewrap")),
    pytest.param(WITHOUT_BUBBLEWRAP, id="landlock", marks=pytest.mark.bed("landlock")),
]
TRIED = """
import errno
from pathlib import Path


def tried(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
"""


class Project:
    """A home with a repository ``code/repo`` in it, and a notebook in its folder ``nb``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / "code" / "repo"
        self.folder = self.root / "nb"
        self.folder.mkdir(parents=True)
        (self.root / ".git").mkdir()
        (self.root / "data").mkdir()
        (self.root / "data" / "rows.csv").write_text("a,b")

    def run(self, *cells: str, options: tuple[str, ...] = CI, **metadata: Any) -> Outcome:
        path = make_notebook(self.folder / "a.ipynb", *cells, **metadata)
        return run_notebook(path, *options, env={"HOME": str(self.home)})

    def answers(
        self, *expressions: str, options: tuple[str, ...] = CI, **metadata: Any
    ) -> list[str]:
        """What the notebook prints for each expression, which may use ``tried``, ``Path`` and ``home``."""
        cell = f"{TRIED}\nhome = Path({str(self.home)!r})\n" + "\n".join(
            f"print({each})" for each in expressions
        )
        outcome = self.run(cell, options=options, **metadata)
        assert outcome.verdict["status"] == "passed", outcome.stdout
        self.verdict = outcome.verdict
        return "".join(
            output["text"]
            for output in outcome.notebook.cells[-1].outputs
            if output.name == "stdout"
        ).split()


@pytest.fixture
def project() -> Iterator[Project]:
    with private_directory() as home:
        yield Project(home / "home")


READ, WRITE = (
    "tried(Path('../data/rows.csv').read_text)",
    "tried(Path('../made.txt').write_text, 'x')",
)
REFUSED = {"EROFS", "EACCES", "ENOENT"}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_nothing_is_open_beside_the_repository(
    project: Project, mechanism: tuple[str, ...]
) -> None:
    (project.home / "code" / "other").mkdir()
    (project.home / "code" / "other" / "key").write_text("secret")
    (project.home / "key").write_text("secret")
    beside = (
        "tried((home / 'key').read_text)",
        "tried((home / 'code/other/key').read_text)",
        "tried((home / 'code/third').mkdir)",
        "tried((home / 'code/new.csv').write_text, 'x')",
        "tried((home / 'code/repo').rename, home / 'code/moved')",
        "tried(Path('../../new.csv').write_text, 'x')",
    )
    answers = project.answers(READ, WRITE, *beside, options=(*CI, *mechanism))
    assert answers[:2] == ["done", "done"] and set(answers[2:]) <= REFUSED, answers
    assert (project.root / "made.txt").read_text() == "x"
    facts = project.verdict["environment"]["isolation_facts"]
    assert (facts["repository"], facts["repository_use"]) == (str(project.root), "write")


@pytest.mark.bed("bubblewrap")
def test_a_work_tree_and_a_submodule_are_repositories(project: Project) -> None:
    (project.root / ".git").rmdir()
    (project.root / ".git").write_text("gitdir: /elsewhere/.git/worktrees/repo\n")
    assert project.answers(READ, WRITE) == ["done", "done"]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_home_that_is_a_repository_is_not_opened(
    project: Project, mechanism: tuple[str, ...]
) -> None:
    (project.root / ".git").rmdir()
    (project.home / ".git").mkdir()
    answers = project.answers(
        READ, WRITE, "tried(Path('mine.txt').write_text, 'x')", options=(*CI, *mechanism)
    )
    assert set(answers[:2]) <= REFUSED and answers[2] == "done"
    warning = f"the repository {project.home} is a home directory, or holds one"
    assert [words for words in project.verdict["warnings"] if words.startswith(warning)]


@pytest.mark.bed("bubblewrap")
def test_with_a_disk_limit_it_is_read_and_a_directory_named_can_be_written(
    project: Project,
) -> None:
    assert project.answers(READ, WRITE, options=(*CI, "--disk", "10M")) == ["done", "EROFS"]
    options = (*CI, "--disk", "10M", "--writable", str(project.root / "data"))
    assert project.answers(
        "tried(Path('../data/new.csv').write_text, 'x')", WRITE, options=options
    ) == ["done", "EROFS"]
    assert (project.root / "data" / "new.csv").exists()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_links_are_shown_and_opened_by_their_own_names(
    project: Project, mechanism: tuple[str, ...]
) -> None:
    real = project.home / "disk"
    for name in ("models", "out"):
        (real / name).mkdir(parents=True)
        (project.home / name).symlink_to(real / name)
    (real / "models" / "a.bin").write_text("a")
    asked = (
        "tried((home / 'models/a.bin').read_text)",
        "tried((home / 'models/b.bin').write_text, 'x')",
        "tried((home / 'out/table.csv').write_text, 'x')",
        "tried((home / 'disk/out/again.csv').write_text, 'x')",
    )
    options = (
        *CI,
        *mechanism,
        "--show",
        str(project.home / "models"),
        "--writable",
        str(project.home / "out"),
    )
    answers = project.answers(*asked, options=options)
    if (
        mechanism
    ):  # a link in a directory that cannot be read leads on, for Landlock judges what it leads to
        assert answers[1] in REFUSED and answers[::3] == ["done", "done"], answers
    else:
        assert answers == ["done", "EROFS", "done", "done"]
    assert {path.name for path in (real / "out").iterdir()} == {"table.csv", "again.csv"}
    assert not project.verdict["warnings"]


@pytest.mark.bed("bubblewrap")
def test_a_notebook_opens_nothing_for_itself(project: Project) -> None:
    (project.home / "key").write_text("secret")
    wished = {
        "repository": "write",
        "folder": "write",
        "show": [str(project.home)],
        "writable": [str(project.home)],
    }
    asked = (READ, "tried((home / 'key').read_text)", "tried((home / 'code/new').write_text, 'x')")
    answers = project.answers(
        *asked, options=("--limits", "strict"), safe_exec={"isolation": wished}
    )
    assert set(answers) <= REFUSED


@pytest.mark.bed("bubblewrap")
def test_an_interpreter_in_the_repository_is_read_only_unless_it_is_named(project: Project) -> None:
    environment = project.root / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(Path("/usr/bin/python3"))
    (environment / "pyvenv.cfg").write_text("home = /usr/bin\n")
    kernels = project.home / "kernels" / "own"
    kernels.mkdir(parents=True)
    starter = environment / "bin" / "start"
    starter.write_text(f'#!/bin/sh\nexec {Path(__import__("sys").executable)} "$@"\n')
    starter.chmod(0o755)
    spec = {
        "argv": [str(starter), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "o",
        "language": "python",
    }
    (kernels / "kernel.json").write_text(json.dumps(spec))
    path = make_notebook(
        project.folder / "a.ipynb", f"{TRIED}\nprint(tried(Path('../.venv/new').write_text, 'x'))"
    )
    env = {"HOME": str(project.home), "JUPYTER_PATH": str(project.home)}
    closed = run_notebook(path, *CI, "--kernel", "own", env=env)
    assert closed.notebook.cells[-1].outputs[0].text == "EROFS\n", closed.stdout
    opened = run_notebook(path, *CI, "--kernel", "own", "--writable", str(environment), env=env)
    assert opened.notebook.cells[-1].outputs[0].text == "done\n", opened.stdout


@pytest.mark.bed("bubblewrap")
def test_a_search_leaves_the_repository_as_the_run_left_it(project: Project) -> None:
    cells = (
        "import ctypes, os\nos.mkdir('../results')\nopen('../results/size', 'w').write('3')",
        "label = 'unused'",
        "size = int(open('../results/size').read())\nopen(f'../results/run', 'x').close()\nctypes.string_at(size - 3)",
    )
    outcome = run_notebook(
        make_notebook(project.folder / "a.ipynb", *cells),
        "--limits",
        "ci",
        env={"HOME": str(project.home)},
    )
    culprits = outcome.verdict["culprits"]
    assert [cell["code_index"] for cell in culprits["cells"]] == [0, 2], outcome.stdout
    assert sorted(path.name for path in (project.root / "results").iterdir()) == ["run", "size"]


@pytest.mark.bed("bubblewrap")
def test_notebooks_of_a_batch_share_the_repository_and_may_share_a_directory(
    project: Project,
) -> None:
    for name in ("one", "two"):
        make_notebook(
            project.folder / f"{name}.ipynb",
            f"open('made-{name}.csv', 'w').write(open('rows.csv').read())",
        )
    options = (
        "--limits",
        "ci",
        "--cwd",
        project.root / "data",
        "--out",
        project.home / "out",
        "-j",
        "2",
        "-q",
    )
    done = safe_exec(
        "batch", project.folder, *options, cwd=project.home, env={"HOME": str(project.home)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (project.root / "data").iterdir()} == {
        "rows.csv",
        "made-one.csv",
        "made-two.csv",
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--show", "nowhere"), "--show nowhere: no such file or directory"),
        (
            ("--writable", "/"),
            "--writable /: / itself cannot be named; name a directory or file in it",
        ),
        (
            ("--env", "A=b"),
            "--env A: expected the name of a variable of yours; to set one, use --set-env NAME=VALUE",
        ),
    ],
)
def test_a_wrong_option_is_one_line(project: Project, options: tuple[str, ...], said: str) -> None:
    path = make_notebook(project.folder / "a.ipynb", "1")
    done = safe_exec("run", path, *CI, *options)
    assert (done.returncode, done.stderr) == (2, f"safe-exec: {said}\n")
