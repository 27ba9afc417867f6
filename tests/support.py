"""What the tests with real kernels share: run the command as a user would, and see that nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from jsonschema import Draft202012Validator

from safe_exec.reports.verdict_json import load_schema

ROOT = Path(__file__).resolve().parent.parent
EXECUTABLE = Path(sys.executable).parent / "safe-exec"
CGROUP_ROOT = Path("/sys/fs/cgroup")
MARK = "SAFE_EXEC_TEST_MARK"
NOBODY = 65534


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of the command: its exit code, what it printed, and the documents it wrote."""

    code: int
    stdout: str
    stderr: str
    verdict: dict[str, Any]
    notebook: Any
    run_id: str


def safe_exec(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    timeout: float = 180,
) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for it."""
    argv = [*prefix, str(EXECUTABLE), *map(str, arguments)]
    # ipykernel does not watch descriptors 1 and 2 where it believes to be under test itself.
    full = {k: v for k, v in {**os.environ, **(env or {})}.items() if k != "PYTEST_CURRENT_TEST"}
    return subprocess.run(
        argv, cwd=cwd, env=full, capture_output=True, text=True, timeout=timeout, check=False
    )


def run_notebook(
    path: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    cwd: Path | None = None,
    timeout: float = 180,
) -> Outcome:
    """``safe-exec run`` on a notebook; documents checked against their schemas, and nothing left behind.

    The cache of trials is one of its own, gone afterwards, unless ``env`` names one.
    """
    mark = secrets.token_hex(8)
    with private_directory() as own:
        given = {"XDG_CACHE_HOME": str(own), **(env or {}), MARK: mark}
        done = safe_exec("run", path, *options, env=given, prefix=prefix, cwd=cwd, timeout=timeout)
        kept = kept_folders(Path(given["XDG_CACHE_HOME"]))
    stem = path.with_suffix("")
    verdict_path, notebook_path = Path(f"{stem}.verdict.json"), Path(f"{stem}.out.ipynb")
    assert verdict_path.exists(), (
        f"no verdict; exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    verdict = json.loads(verdict_path.read_text())
    Draft202012Validator(load_schema()).validate(verdict)
    node = nbformat.read(notebook_path, as_version=4)
    nbformat.validate(node)
    assert verdict["exit_code"] == done.returncode
    assert left_behind(verdict["run_id"]) == []
    assert marked_processes(mark) == []
    if not (verdict["culprits"] or {"minimal": False})["minimal"]:
        kept = [name for name in kept if name != verdict["run_id"]]  # `bisect` may go on from there
    assert kept == []
    return Outcome(
        code=done.returncode,
        stdout=done.stdout,
        stderr=done.stderr,
        verdict=verdict,
        notebook=node,
        run_id=verdict["run_id"],
    )


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory of one's own with a short path, in no notebook's folder, that the ordinary user may write to as well."""
    with tempfile.TemporaryDirectory(prefix="se-", ignore_cleanup_errors=True) as name:
        path = Path(name)
        path.chmod(0o777)
        yield path


def kept_folders(cache_home: Path) -> list[str]:
    """Runs of which a cache keeps the folder as it was."""
    folders = cache_home / "safe-exec" / "folders"
    return [path.name for path in folders.iterdir()] if folders.is_dir() else []


def groups_of(run_id: str) -> list[Path]:
    """Control groups of a run; groups of other runs that go while we walk are no error."""
    name = f"safe-exec-{run_id}"
    return [Path(top) / name for top, names, _ in os.walk(CGROUP_ROOT) if name in names]


def left_behind(run_id: str) -> list[str]:
    """Control groups of a run that still stand, and processes that still carry its runtime directory in their command."""
    groups = [str(path) for path in groups_of(run_id)]
    notes = [str(path) for path in Path("/tmp").glob(f"safe-exec-*/{run_id}.json")]
    return groups + notes


def orphaned_groups() -> list[Path]:
    """Control groups of any run whose keeper is gone: trials of a search have names that nobody else knows."""
    groups = [
        Path(top) / name
        for top, names, _ in os.walk(CGROUP_ROOT)
        for name in names
        if re.match("safe-exec-[0-9a-f]{12}", name)
    ]
    names = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            names.append(path.read_text().strip())
    kept = {name.removeprefix("se-") for name in names}
    return [
        path
        for path in groups
        if path.name.removeprefix("safe-exec-") not in kept and path.exists()
    ]


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll a condition until it holds; fails when it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def make_notebook(
    path: Path, *sources: str, kernel: str = "python3", language: str = "python", **metadata: Any
) -> Path:
    """Write a notebook of code cells."""
    node = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(source, id=f"cell-{n}") for n, source in enumerate(sources)
        ],
        metadata={
            "kernelspec": {"name": kernel, "display_name": kernel, "language": language},
            "language_info": {"name": language},
            **metadata,
        },
    )
    path.write_text(nbformat.writes(node))
    return path


def marked_processes(mark: str) -> list[int]:
    """Live processes whose environment carries a mark: everything that a marked run has started, daemons too."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if mark.encode() in environment and state not in "ZX":
                found.append(int(entry.name))
    return found


def ordinary_user() -> list[str]:
    """A command prefix that makes what follows run as an ordinary user without any privilege.

    Where this interpreter lies in a directory that only root may enter, the one capability is left that lets the user read it;
    it gives no right to write, to control groups or past resource limits.
    """
    base = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # setpriv itself still holds root's rights when it executes what follows: env gives them up first.
    none = [*base, "--inh-caps=-all", "--bounding-set=-all", "env"]
    if (
        subprocess.run(
            [*none, str(EXECUTABLE), "--version"], capture_output=True, check=False
        ).returncode
        == 0
    ):
        return none
    only = "-all,+dac_read_search"
    return [*base, f"--inh-caps={only}", f"--ambient-caps={only}", f"--bounding-set={only}", "env"]


def ordinary_user_with_namespaces() -> list[str]:
    """The same for a user who is to get a user namespace, where a capability over root's files counts for nothing.

    A directory that only root may enter is replaced, in a mount namespace, by one that everybody may, with our interpreter in it.
    """
    prefix = ordinary_user()
    closed = sorted(
        {
            path
            for need in (sys.base_prefix, sys.prefix, ROOT)
            for path in _closed(Path(need).resolve())
        }
    )
    if not closed:
        return prefix
    script = ["set -e", "hold=$(mktemp -d)", 'mount -t tmpfs safe-exec-test "$hold"']
    needed = [
        str(path)
        for path in (Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT)
        if set(closed) & set(path.parents)
    ]
    for number, path in enumerate(needed):
        script += [f'mkdir "$hold/{number}"', f"mount --bind '{path}' \"$hold/{number}\""]
    script += [
        f"mount -t tmpfs -o mode=755 safe-exec-test '{path}'"
        for path in closed
        if not set(closed) & set(path.parents)
    ]
    for number, path in enumerate(needed):
        script += [f"mkdir -p '{path}'", f"mount --bind \"$hold/{number}\" '{path}'"]
    script += ['umount -R -l "$hold"', 'rmdir "$hold"', 'exec "$@"']
    base = [
        part for part in prefix if "caps" not in part and "bounding" not in part and part != "env"
    ]
    none = ["--inh-caps=-all", "--bounding-set=-all", "env"]
    return [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        "\n".join(script),
        "sh",
        *base,
        *none,
    ]


def _closed(path: Path) -> list[Path]:
    """The directories above that others may not enter."""
    return [parent for parent in (path, *path.parents) if not parent.stat().st_mode & 0o001]


def without_namespaces() -> list[str]:
    """A command prefix that makes what follows run where no namespace of its own is to be had, as the user it is.

    Counts of namespaces are limited in each user namespace for itself (namespaces(7)): in one of our own, to none.
    """
    limits = (
        "echo 0 > /proc/sys/user/max_mnt_namespaces && echo 0 > /proc/sys/user/max_user_namespaces"
    )
    prefix = [
        "unshare",
        "--user",
        "--map-current-user",
        "--keep-caps",
        "sh",
        "-c",
        f'{limits} && exec "$@"',
        "sh",
    ]
    # Where not even this one can be made, there are none in the first place.
    return (
        prefix
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
        else []
    )
