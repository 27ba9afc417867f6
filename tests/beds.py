"""The beds that tests lie in: what a machine must have for a test to mean something there.

A test names what it needs: ``@pytest.mark.bed("cgroup-v1-root", "bash")``, and so does a row of a table (``pytest.param(..., marks=...)``).
Each bed is tried once per run (``BEDS``). Where one is absent the tests that need it are left out, and the end of the run lists bed,
reason and number of tests. ``SAFE_EXEC_BEDS=a,b`` pins beds: each that is pinned and absent fails the run. ``--bed NAME`` selects the
tests that need one.

A new bed is a function and a line in ``BEDS``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from safe_exec.keeper import landlock
from safe_exec.sandbox.host.capabilities import HostCapabilities, detect, probe_isolation
from tests.support import EXECUTABLE, ordinary_user, ordinary_user_with_namespaces

PINNED = "SAFE_EXEC_BEDS"
FOUND = "SAFE_EXEC_BEDS_FOUND"
"""What the first process found, for the workers: all must leave out the same tests."""
SECONDS = 30
LANDLOCK = 6
"""The oldest version of Landlock (its ABI) that does all that is tested."""
REPORTED = "safe_exec_beds"
LINGERING = "notebooks"
"""A user of the machines that are made for tests (tests/vm)."""


@cache
def _machine() -> HostCapabilities:
    return probe_isolation(detect())


def _tried(argv: Sequence[str]) -> str:
    """Why a command does not end well; empty where it does."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
    return f"exit {done.returncode}: {said}" if done.returncode else ""


def _root() -> str:
    return "" if os.geteuid() == 0 else "these tests are not run as root"


def _ordinary_user() -> str:
    return _root() or _tried([*ordinary_user(), str(EXECUTABLE), "--version"])


def _user_namespaces() -> str:
    who = ordinary_user_with_namespaces() if os.geteuid() == 0 else []
    return _tried([*who, "unshare", "--user", "--map-root-user", "--mount", "true"])


def _mount() -> str:
    return _root() or _tried(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs safe-exec-test /mnt"]
    )


def _cgroup_v1_root() -> str:
    machine = _machine()
    missing = [name for name in ("memory", "pids", "cpu") if name not in machine.v1]
    return _root() or (
        f"no group of {', '.join(missing)} can be made: {machine.v1_why_not}" if missing else ""
    )


def _cgroup2_root() -> str:
    """Tests make groups of their own right below the root of the tree, and enter them."""
    top = Path("/sys/fs/cgroup")
    try:
        has = (top / "cgroup.controllers").read_text().split()
    except OSError as error:
        return f"the unified hierarchy is not mounted there: {error}"
    missing = [name for name in ("memory", "pids", "cpu") if name not in has]
    unwritable = (
        ""
        if os.access(top / "cgroup.subtree_control", os.W_OK)
        else f"{top} is not ours to write to"
    )
    return _root() or (f"{top} has no controllers {', '.join(missing)}" if missing else unwritable)


def _cgroup2_user() -> str:
    return _cgroup2_root() or _ordinary_user()


def _systemd_root() -> str:
    return _root() or _tried(["systemd-run", "--scope", "--quiet", "true"])


def _systemd_user() -> str:
    """A user whose systemd runs without a login, and sessions (``su`` makes one where PAM asks logind)."""
    return _root() or _tried(
        ["su", "--login", "-c", "systemd-run --user --scope --quiet true", LINGERING]
    )


def _bubblewrap() -> str:
    return _machine().bubblewrap_why_not


def _runexec() -> str:
    """BenchExec's runexec can make and read control groups here. It writes the program's output to a file."""
    return _tried(
        [
            str(EXECUTABLE.with_name("runexec")),
            "--no-container",
            "--output",
            os.devnull,
            "--",
            "true",
        ]
    )


def _landlock() -> str:
    return (
        ""
        if landlock.abi() >= LANDLOCK
        else f"the version here is {landlock.abi()}, tests need {LANDLOCK}"
    )


def _kernel(name: str, program: str = "true") -> Callable[[], str]:
    """A bed of a language: its kernel is known to Jupyter, and the program that this starts is there."""

    def probe() -> str:
        from jupyter_core.paths import jupyter_path

        # jupyter_client's own search makes a folder in the home, which need not be writable.
        specs = [Path(folder, name, "kernel.json") for folder in jupyter_path("kernels")]
        if not any(spec.is_file() for spec in specs):
            return f"no kernel {name} is installed"
        return "" if shutil.which(program) else f"there is no {program}"

    return probe


def _slurm() -> str:
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    absent = [name for name in programs if not shutil.which(name)]
    return f"there is no {', '.join(absent)}" if absent else _root()


PYTHONS = tuple(f"3.{minor}" for minor in range(9, 16))


@cache
def interpreter(version: str) -> Path | None:
    """An interpreter of a version of Python: the tests' own, the system's, or one of pyenv's."""
    name = f"python{version}"
    own = (
        [Path(sys.executable)]
        if sys.version_info[:2] == tuple(map(int, version.split(".")))
        else []
    )
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    installed = sorted(pyenv.glob(f"{version}.*/bin/{name}"), reverse=True)
    for path in (*own, Path("/usr/bin") / name, Path("/usr/local/bin") / name, *installed):
        if path.exists() and not _tried([str(path), "-c", "import ctypes, sqlite3"]):
            return path
    return None


@cache
def free_threaded_interpreter() -> Path | None:
    """A free-threaded Python, whose lock is off: the system's or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    names = [f"python{version}t" for version in reversed(PYTHONS)]
    installed = [path for name in names for path in sorted(pyenv.glob(f"*/bin/{name}"))]
    system = [Path(folder) / name for folder in ("/usr/bin", "/usr/local/bin") for name in names]
    lock_is_off = "import ctypes, sqlite3, sys; sys.exit(sys._is_gil_enabled())"
    for path in (*system, *installed):
        if path.exists() and not _tried([str(path), "-c", lock_is_off]):
            return path
    return None


def _free_threaded() -> str:
    return "" if free_threaded_interpreter() else "neither the system nor pyenv has such a build"


def _jupytext() -> str:
    return "" if importlib.util.find_spec("jupytext") else "not installed (extra jupytext)"


def _python(version: str) -> Callable[[], str]:
    return lambda: "" if interpreter(version) else "neither the system nor pyenv has it"


BEDS: Mapping[str, Callable[[], str]] = {
    "root": _root,
    "ordinary-user": _ordinary_user,
    "user-namespaces": _user_namespaces,
    "mount": _mount,
    "cgroup-v1-root": _cgroup_v1_root,
    "cgroup2-root": _cgroup2_root,
    "cgroup2-user": _cgroup2_user,
    "systemd-root": _systemd_root,
    "systemd-user": _systemd_user,
    "bubblewrap": _bubblewrap,
    "landlock": _landlock,
    "runexec": _runexec,
    "jupytext": _jupytext,
    "bash": _kernel("bash", "bash"),
    "R": _kernel("ir", "R"),
    "deno": _kernel("deno"),
    "slurm": _slurm,
    **{f"python{version}": _python(version) for version in PYTHONS},
    "free-threaded": _free_threaded,
}
"""Each bed with its probe, which says why the bed is not to be had here; empty where it is."""


_BOOTED = "`make test-cgroup2` boots a machine that has it, and runs the tests of this bed there"
REMEDIES: Mapping[str, str] = {
    "root": "run the tests as root",
    "ordinary-user": "run the tests as root, in a checkout that every user can read",
    "cgroup2-root": _BOOTED,
    "cgroup2-user": _BOOTED,
    "systemd-root": _BOOTED,
    "systemd-user": _BOOTED,
    "bubblewrap": "`make system` installs it; in a container, allow user namespaces",
    "bash": "`make install` installs its kernel",
    "deno": "`make install` installs its kernel",
    "R": "`make system` installs its kernel",
    "slurm": "`make system-tests` installs it",
}
"""How to get a bed, where that takes more than another machine."""


def table(answers: Mapping[str, str]) -> str:
    """The beds that are here, and each absent one with its reason and its remedy."""
    here = [name for name, why_not in answers.items() if not why_not]
    lines = [f"test beds here: {', '.join(here) or 'none'}"]
    for name, why_not in answers.items():
        if why_not:
            remedy = f"; {REMEDIES[name]}" if name in REMEDIES else ""
            lines.append(f"test bed absent: {name}: {why_not}{remedy}")
    if len(here) < len(answers):
        lines.append("tests of absent beds are left out, and counted at the end")
    return "\n".join(lines)


class AbsentBed(pytest.Item):
    """What fails in place of tests that had to lie in a bed which is not there."""

    def __init__(self, *, why_not: str, **more: Any) -> None:
        super().__init__(**more)
        self.why_not = why_not

    def runtest(self) -> None:
        """Fail."""
        pytest.fail(
            f"{PINNED} pins this bed, and it is not to be had here: {self.why_not}", pytrace=False
        )

    def reportinfo(self) -> tuple[os.PathLike[str], int | None, str]:
        """Where this is written down."""
        return self.path, None, self.name


class Beds:
    """The plugin: finds out what is absent, leaves out the tests that need it, and says so."""

    def __init__(
        self, *, known: Collection[str], absent: Mapping[str, str], pinned: Sequence[str]
    ) -> None:
        self.known = known
        self.absent = absent
        self.pinned = pinned
        self.left_out: Counter[str] = Counter()
        self._check(pinned, PINNED)

    def _check(self, names: Sequence[str], where: str) -> None:
        wrong = sorted(set(names) - set(self.known))
        if wrong:
            raise pytest.UsageError(
                f"{where}: {', '.join(wrong)} is no bed; there are {', '.join(self.known)}"
            )

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Last, so that what other options leave out is not counted, and what must fail is not left out."""
        wanted = config.getoption("--bed")
        self._check(wanted, "--bed")
        stay: list[pytest.Item] = []
        out: list[pytest.Item] = []
        for item in items:
            needs = [name for mark in item.iter_markers("bed") for name in mark.args]
            self._check(needs, item.nodeid)  # a name that is none would leave the test out for ever
            missing = [name for name in needs if name in self.absent]
            self.left_out.update(set(missing))
            (out if missing or not set(wanted) <= set(needs) else stay).append(item)
        if out:
            config.hook.pytest_deselected(items=out)
        stay += [
            AbsentBed.from_parent(session, name=f"bed[{name}]", why_not=self.absent[name])
            for name in self.pinned
            if name in self.absent
        ]
        items[:] = stay

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A worker hands what it left out to the process that reports."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[REPORTED] = dict(self.left_out)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """All workers have left out the same."""
        self.left_out = (
            Counter(getattr(node, "workeroutput", {}).get(REPORTED, {})) or self.left_out
        )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List the absent beds that tests wanted."""
        if self.left_out:
            terminalreporter.section("beds absent here")
            for name, count in sorted(self.left_out.items()):
                terminalreporter.write_line(
                    f"{name} ({count} test{'' if count == 1 else 's'}): {self.absent[name]}"
                )


def register(config: pytest.Config, beds: Mapping[str, Callable[[], str]] = BEDS) -> None:
    """Try the beds in the first process; workers inherit what it found. Raises UsageError for a pinned name that is none."""
    if FOUND in os.environ:
        absent = json.loads(os.environ[FOUND])
    else:
        answers = {name: probe() for name, probe in beds.items()}
        absent = {name: why_not for name, why_not in answers.items() if why_not}
        os.environ[FOUND] = json.dumps(absent)
    pinned = [name.strip() for name in os.environ.get(PINNED, "").split(",") if name.strip()]
    config.pluginmanager.register(
        Beds(known=beds.keys(), absent=absent, pinned=pinned), "safe-exec-beds"
    )


if __name__ == "__main__":
    print(table({name: probe() for name, probe in BEDS.items()}))
