"""Kernels of other tools: a kernelspec that carries limits, used by the real `jupyter execute`, nbconvert and nbmake."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import EXECUTABLE, MARK, make_notebook, marked_processes, wait_until

BIN = Path(sys.executable).parent
EATER = "rows = []\nfor _ in range(1000):\n    rows.append(bytearray(b'x') * (10 << 20))"
KERNEL = "python3-safe-exec-ci"
DIED = "kernel ended with SIGKILL, 1 process(es) killed for memory in its control group at its limit of 300 MiB"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a kernelspec of ours."""
    prefix = tmp_path_factory.mktemp("prefix")
    done = kernelspec("install", "--limits", "ci", "--memory", "300M", "--prefix", str(prefix))
    assert done.returncode == 0, done.stderr
    return prefix


@pytest.fixture
def mark() -> Iterator[str]:
    mark = secrets.token_hex(8)
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 10, "no process is left")


def kernelspec(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = [str(EXECUTABLE), "kernelspec", *arguments]
    return subprocess.run(argv, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=60, check=False)


def environment(prefix: Path, mark: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {**kept, "JUPYTER_PATH": str(prefix / "share" / "jupyter"), MARK: mark}


def run(folder: Path, prefix: Path, mark: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / argv[0]), *argv[1:]]
    return subprocess.run(
        command, cwd=folder, env=environment(prefix, mark), capture_output=True, text=True, timeout=120, check=False
    )


# --- the kernelspec -----------------------------------------------------------------------------------------------


def document(prefix: Path, name: str) -> Any:
    return json.loads((prefix / "share" / "jupyter" / "kernels" / name / "kernel.json").read_text())


def test_the_kernelspec_carries_its_limits(tmp_path: Path) -> None:
    done = kernelspec("install", "--limits", "ci", "--prefix", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Python 3 (safe-exec: ci): installed as python3-safe-exec-ci" in done.stdout
    assert "holds     memory 2.0 GiB, processes 512, open files 1024, file size 1.0 GiB" in done.stdout
    made = document(tmp_path, KERNEL)
    assert made["display_name"] == "Python 3 (safe-exec: ci)"
    assert made["metadata"]["kernel_provisioner"] == {"provisioner_name": "safe-exec", "config": {"limits": "ci"}}
    assert made["metadata"]["debugger"] is True, "what the kernel said of itself stays"
    assert (tmp_path / "share" / "jupyter" / "kernels" / KERNEL / "logo-64x64.png").exists()

    # A file of one's own, from a directory that no server will start in, over bash, under a name of one's own.
    (tmp_path / "mine.yaml").write_text("limits:\n  memory: 1G\n")
    options = ("--limits", str(tmp_path / "mine.yaml"), "--processes", "50", "--kernel", "bash", "--name", "small-bash")
    done = kernelspec("install", *options, "--display-name", "Small", "--prefix", str(tmp_path))
    assert done.returncode == 0, done.stderr
    made = document(tmp_path, "small-bash")
    assert (made["display_name"], made["language"]) == ("Small", "bash")
    assert made["metadata"]["kernel_provisioner"]["config"] == {"limits": str(tmp_path / "mine.yaml"), "processes": "50"}


def test_where_it_goes_and_what_it_does_not_replace(tmp_path: Path) -> None:
    home = {"JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTER_PATH": ""}
    done = kernelspec("install", "--user", env=home)
    assert done.returncode == 0, done.stderr
    place = tmp_path / "data" / "kernels"
    assert (place / "python3-safe-exec-default" / "kernel.json").exists()
    assert kernelspec("install", "--user", env=home).returncode == 0, "our own is replaced"
    (place / "theirs").mkdir()
    (place / "theirs" / "kernel.json").write_text('{"argv": ["x"]}')
    for arguments, said in {
        ("--user", "--name", "theirs"): "there is another kernelspec of this name",
        ("--user", "--name", "My Kernel"): "a kernel's name has",
        ("--user", "--sys-prefix"): "exclude each other",
        ("--user", "--kernel", "absent"): "no kernel named 'absent' is installed",
        ("--user", "--limits", "absent"): "unknown profile 'absent'",
        ("--user", "--memory", "much"): "memory: 'much' is not a size",
    }.items():
        done = kernelspec("install", *arguments, env=home)
        assert (done.returncode, said in done.stderr) == (2, True), (arguments, done.stderr)
    assert (place / "theirs" / "kernel.json").read_text() == '{"argv": ["x"]}'
    listed = subprocess.run(
        [BIN / "jupyter", "kernelspec", "remove", "-f", "python3-safe-exec-default"], env={**os.environ, **home}, check=False
    )
    assert listed.returncode == 0 and not (place / "python3-safe-exec-default").exists()


def test_jupyter_finds_the_command(tmp_path: Path, prefix: Path, mark: str) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1 / 0")
    done = run(tmp_path, prefix, mark, "jupyter", "safe-exec", "run", "nb.ipynb")
    assert done.returncode == 1 and "✗ error in code cell 1 · ZeroDivisionError" in done.stdout


# --- tools that run a notebook ------------------------------------------------------------------------------------

TOOLS: dict[str, tuple[str, ...]] = {
    "jupyter-execute": ("jupyter", "execute", f"--kernel_name={KERNEL}"),
    "nbconvert": ("jupyter", "nbconvert", "--to", "notebook", "--execute", f"--ExecutePreprocessor.kernel_name={KERNEL}"),
    "nbmake": ("pytest", "-q", "-p", "no:cacheprovider", "--nbmake", f"--nbmake-kernel={KERNEL}"),
}


@pytest.mark.kills
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_runs_kernels_inside_limits(tmp_path: Path, prefix: Path, mark: str, tool: str) -> None:
    inside = "import os\nassert '/safe-exec-' in open('/proc/self/cgroup').read()\nprint('inside')"
    make_notebook(tmp_path / "good.ipynb", inside)
    done = run(tmp_path, prefix, mark, *TOOLS[tool], "good.ipynb")
    assert done.returncode == 0, done.stdout + done.stderr
    make_notebook(tmp_path / "eater.ipynb", EATER)
    done = run(tmp_path, prefix, mark, *TOOLS[tool], "eater.ipynb")
    assert done.returncode != 0
    assert DIED in done.stdout + done.stderr
