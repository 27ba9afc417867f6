"""The action, the GitLab job and the hooks: their steps executed as they are written, with the variables that those systems set."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import MARK, ROOT, make_notebook, marked_processes, wait_until

EATER = "rows = []\nfor _ in range(1000):\n    rows.append(bytearray(b'x') * (10 << 20))"
BIN = Path(sys.executable).parent


@pytest.fixture
def mark() -> Iterator[str]:
    mark = secrets.token_hex(8)
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 10, "no process is left")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a notebook that passes, one that dies, and one that safe-exec wrote."""
    folder = tmp_path / "repository"
    (folder / "docs").mkdir(parents=True)
    make_notebook(folder / "docs" / "good.ipynb", "print('fine')")
    make_notebook(folder / "docs" / "eater.ipynb", EATER)
    make_notebook(folder / "docs" / "good.out.ipynb", "raise SystemError('nobody should run this')")
    for argv in (["init", "-q"], ["add", "."], [*NAMED, "commit", "-q", "-m", "notebooks"]):
        subprocess.run(["git", *argv], cwd=folder, check=True)
    return folder


NAMED = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")


def environment(mark: str, **more: str) -> dict[str, str]:
    """Our environment as a CI system would have it: this interpreter first on the PATH, nothing of the pytest around us."""
    dropped = ("PYTEST", "GITHUB_", "CI_", "GITLAB_", "GIT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "PATH": f"{BIN}:{os.environ['PATH']}", MARK: mark, **more}


def summary(folder: Path) -> dict[str, str]:
    """The status of each notebook of a batch."""
    found = json.loads((folder / "safe-exec-out" / "summary.json").read_text())
    return {entry["path"]: entry["status"] for entry in found["notebooks"]}


# --- GitHub -------------------------------------------------------------------------------------------------------


class Workflow:
    """Runs the steps of a composite action as a runner does: expressions filled in, then ``bash`` with the runner's own flags."""

    def __init__(
        self, action: Path, inputs: Mapping[str, str], folder: Path, scratch: Path, mark: str
    ) -> None:
        self.document = yaml.safe_load((action / "action.yml").read_text())
        unknown = set(inputs) - set(self.document["inputs"])
        assert not unknown, unknown
        self.values = {
            f"inputs.{name}": given.get("default", "")
            for name, given in self.document["inputs"].items()
        }
        self.values |= {f"inputs.{name}": value for name, value in inputs.items()}
        self.values["github.action_path"] = str(action)
        self.folder, self.scratch = folder, scratch
        self.files = {
            name: scratch / name
            for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ENV", "GITHUB_PATH")
        }
        for path in self.files.values():
            path.touch()
        self.env = environment(
            mark, CI="true", GITHUB_ACTIONS="true", GITHUB_WORKSPACE=str(folder), GITHUB_ACTION_PATH=str(action), RUNNER_TEMP=str(scratch),
            **{name: str(path) for name, path in self.files.items()},
        )  # fmt: skip

    def fill(self, text: str) -> str:
        """``${{ a || b }}``: the first that is not empty."""

        def value(found: re.Match[str]) -> str:
            return next(
                (
                    self.values[name.strip()]
                    for name in found[1].split("||")
                    if self.values[name.strip()]
                ),
                "",
            )

        return re.sub(r"\$\{\{(.*?)\}\}", value, text)

    def run(self) -> subprocess.CompletedProcess[str]:
        """The steps one after the other, until one fails; what the last one said."""
        assert self.document["runs"]["using"] == "composite"
        for number, step in enumerate(self.document["runs"]["steps"]):
            assert step["shell"] == "bash" and "${{" not in step["run"], (
                "a value put into a script would be run"
            )
            script = self.scratch / f"step{number}.sh"
            script.write_text(step["run"])
            env = {name: self.fill(value) for name, value in step["env"].items()}
            argv = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)]
            done = subprocess.run(
                argv,
                cwd=self.folder,
                env={**self.env, **env},
                capture_output=True,
                text=True,
                timeout=250,
                check=False,
            )
            if done.returncode:
                break
        return done


def checkout(tmp_path: Path) -> Path:
    """A copy of what is installed from, so that two tests that build it do not meet."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "safe_exec", "limits", "pyproject.toml", "README.md",
         "LICENSE", "action.yml", ".pre-commit-hooks.yaml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    copy = tmp_path / "safe-exec"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """An environment of one's own that has our packages and not safe-exec: what an action installs is to be seen."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    ours = next(Path(sys.prefix).glob("lib/python*/site-packages"))
    for entry in ours.iterdir():
        if "safe_exec" not in entry.name and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.kills
def test_the_action(repository: Path, interpreter: Path, tmp_path: Path, mark: str) -> None:
    inputs = {
        "notebooks": "docs nowhere*",
        "args": "-j 2 --memory 200M --no-bisect",
        "python": str(interpreter),
    }
    flow = Workflow(checkout(tmp_path), inputs, repository, tmp_path, mark)
    done = flow.run()
    assert done.returncode == 2 and "nowhere*: matches nothing" in done.stderr, (
        "patterns are for safe-exec, and its exit code counts"
    )
    flow.values["inputs.notebooks"] = "docs"
    done = flow.run()
    assert done.returncode == 3, done.stdout + done.stderr
    assert "exit-code=3" in flow.files["GITHUB_OUTPUT"].read_text().splitlines()
    assert summary(repository) == {"docs/eater.ipynb": "kernel_died", "docs/good.ipynb": "passed"}
    site = next((interpreter.parent.parent / "lib").glob("python*/site-packages"))
    assert (site / "safe_exec" / "_limits" / "ci.yaml").exists(), "it ran what it had installed"


# --- GitLab -------------------------------------------------------------------------------------------------------


@pytest.mark.kills
def test_the_gitlab_job(repository: Path, interpreter: Path, tmp_path: Path, mark: str) -> None:
    document = yaml.safe_load((ROOT / "templates" / "safe-exec.yml").read_text())
    job = document["safe-exec"]
    given = {
        "SAFE_EXEC_NOTEBOOKS": "docs",
        "SAFE_EXEC_ARGS": "--memory 200M --no-bisect",
        "SAFE_EXEC_SOURCE": str(checkout(tmp_path)),
    }
    assert set(given) <= set(document["variables"])
    variables = {
        **document["variables"],
        **given,
        "CI": "true",
        "GITLAB_CI": "true",
        "CI_PROJECT_DIR": str(repository),
    }
    path = f"{interpreter.parent}:{os.environ['PATH']}"
    # A runner puts the lines into one script and stops at the first that fails.
    argv = ["bash", "-c", "set -eo pipefail\n" + "\n".join(job["script"])]
    env = {**environment(mark), **variables, "PATH": path}
    done = subprocess.run(
        argv, cwd=repository, env=env, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert summary(repository) == {"docs/eater.ipynb": "kernel_died", "docs/good.ipynb": "passed"}
    named = [job["artifacts"]["paths"][0], *job["artifacts"]["reports"].values()]
    for name in named:
        assert (repository / name.replace("$SAFE_EXEC_OUT", variables["SAFE_EXEC_OUT"])).exists(), (
            name
        )


# --- pre-commit ---------------------------------------------------------------------------------------------------


def hooks() -> dict[str, Any]:
    return {
        hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    }


@pytest.mark.kills
def test_the_hooks_of_pre_commit(repository: Path, tmp_path: Path, mark: str) -> None:
    assert set(hooks()) == {"safe-exec", "safe-exec-system"}
    source = checkout(tmp_path)
    for argv in (["init", "-q"], ["add", "."], [*NAMED, "commit", "-q", "-m", "hooks"]):
        subprocess.run(["git", *argv], cwd=source, check=True)
    hook = {"id": "safe-exec-system", "args": ["--limits", "ci", "--memory", "200M", "--no-bisect"]}
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=True
    ).stdout.strip()
    config = {"repos": [{"repo": str(source), "rev": revision, "hooks": [hook]}]}
    (repository / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    (repository / ".gitignore").write_text("safe-exec-out\n")
    env = environment(mark, PRE_COMMIT_HOME=str(tmp_path / "pre-commit"))
    subprocess.run(
        ["git", "add", ".pre-commit-config.yaml", ".gitignore"], cwd=repository, check=True
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [str(BIN / "pre-commit"), "run", "--color=never", *arguments]
        return subprocess.run(
            argv, cwd=repository, env=env, capture_output=True, text=True, timeout=250, check=False
        )

    assert "no files to check" in run().stdout, "no notebook has changed"
    make_notebook(repository / "docs" / "good.ipynb", "print('still fine')")
    subprocess.run(["git", "add", "docs"], cwd=repository, check=True)
    done = run()
    assert done.returncode == 0 and "Passed" in done.stdout, done.stdout + done.stderr
    assert summary(repository) == {"docs/good.ipynb": "passed"}
    done = run("--all-files")
    assert done.returncode == 1 and "exit code: 3" in done.stdout, done.stdout
    assert "docs/eater.ipynb: kernel died in code cell 1 · out of memory" in done.stdout


def test_the_hook_with_an_environment_of_its_own_installs_what_it_runs() -> None:
    """The one that pre-commit installs differs from the one above in its language alone; what is installed is the project's wheel."""
    own, system = hooks()["safe-exec"], hooks()["safe-exec-system"]
    differing = {key for key in own if own[key] != system[key]}
    assert differing == {"id", "name", "description", "language"} and own["language"] == "python"
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert own["entry"].split()[0] in scripts
