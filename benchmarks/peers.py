"""The tools that are compared, each as a command for a notebook and where its output goes."""

from __future__ import annotations

import compileall
import shlex
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import execute, notebook

BIN = Path(sys.executable).parent
OURS = "safe-exec"
NBCLIENT, EXECUTE, PAPERMILL, NBMAKE, NBCONVERT = (
    "nbclient",
    "jupyter execute",
    "papermill",
    "nbmake",
    "nbconvert",
)
PROFILE = ("--limits", "ci")
PACKAGES = (
    "safe-exec",
    "nbclient",
    "jupyter_client",
    "ipykernel",
    "papermill",
    "nbmake",
    "nbconvert",
)
MISSING = "papermill, nbmake and nbconvert are not all installed: pip install -e '.[bench]' (make bench does)"

_NBCLIENT = """
import sys, nbformat
from nbclient import NotebookClient
node = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(node, timeout=600, kernel_name="python3").execute()
nbformat.write(node, sys.argv[2])
"""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A way to execute a notebook: its name and its command for (notebook, output)."""

    name: str
    command: Callable[[Path, Path], list[str]]


def ours(notebook: Path, out: Path, *options: str) -> list[str]:
    """Our command, with the limits and walls of the profile ``ci``."""
    return [str(BIN / "safe-exec"), "run", "-q", *PROFILE, *options, str(notebook), "-o", str(out)]


def nbclient(notebook: Path, out: Path) -> list[str]:
    """A script that reads, executes and writes a notebook with nbclient."""
    return [sys.executable, "-c", _NBCLIENT, str(notebook), str(out)]


def papermill(notebook: Path, out: Path) -> list[str]:
    """papermill without its progress bar."""
    return [
        str(BIN / "papermill"),
        "--no-progress-bar",
        "--log-level",
        "ERROR",
        str(notebook),
        str(out),
    ]


def nbmake(*arguments: str) -> list[str]:
    """pytest with nbmake, and with nothing that it does not need."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", *arguments]


def tools() -> list[Tool]:
    """All of them, ours first."""
    return [
        Tool(name=OURS, command=ours),
        Tool(
            name=EXECUTE,
            command=lambda nb, out: [str(BIN / "jupyter-execute"), str(nb), f"--output={out}"],
        ),
        Tool(name=NBCLIENT, command=nbclient),
        Tool(name=PAPERMILL, command=papermill),
        Tool(name=NBMAKE, command=lambda nb, _out: nbmake(str(nb))),
        Tool(
            name=NBCONVERT,
            command=lambda nb, out: [
                str(BIN / "jupyter-nbconvert"),
                "--to=notebook",
                "--execute",
                f"--output={out}",
                str(nb),
            ],
        ),
    ]


def loop_of(commands: Sequence[Sequence[str]]) -> list[str]:
    """One command that runs others one after the other, until one fails."""
    return ["/bin/sh", "-c", "set -e\n" + "\n".join(map(shlex.join, commands))]


def demand_peers() -> None:
    """Stop where a peer is missing: a comparison that leaves some out in silence is none."""
    if not all(find_spec(name) for name in ("papermill", "nbmake", "nbconvert")):
        raise SystemExit(MISSING)


def warm_up(folder: Path, *names: str) -> None:
    """Store byte code of all that is used, and have every file in the page cache."""
    package = str(Path(__file__).parents[1] / "safe_exec")
    for directory in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), package}:
        compileall.compile_dir(directory, quiet=2, workers=0)
    path = notebook(folder / "warm", "print(1)")
    for tool in tools():
        if not names or tool.name in names:
            execute(tool.command(path, path.with_suffix(".o.ipynb")), path.parent)
