"""macOS, Windows and a Python without its global lock, faked in a process of its own: modules and
functions that these lack are gone, and every command says a clear sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import make_notebook

PRELUDE = """
import asyncio, click, contextlib, ctypes, json, os, platform, pathlib, shutil, signal, socket, subprocess, sys, tempfile, yaml, rich.console
import jupyter_client.kernelspec
system = sys.argv.pop(1)
sys.platform = system
for name in ("memfd_create", "pipe2", "splice", "eventfd", "sched_getaffinity", "getxattr", "O_TMPFILE"):
    if hasattr(os, name):
        delattr(os, name)
platform.system = lambda: {"darwin": "Darwin", "win32": "Windows"}[system]
platform.release = lambda: "23.1"
if system == "win32":
    for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"):
        sys.modules[name] = None
    for name in ("fork", "geteuid", "getuid", "getppid", "setsid", "chown", "mkfifo", "sysconf", "statvfs", "wait4", "uname"):
        delattr(os, name)
    for name in ("SIGKILL", "SIGSTOP", "SIGCHLD", "SIGHUP", "SIGQUIT", "SIGBUS", "SIGTRAP", "SIGXCPU", "SIGUSR2"):
        delattr(signal, name)
    del socket.AF_UNIX, os.O_NOFOLLOW, os.O_CLOEXEC, os.O_NONBLOCK, os.O_NOCTTY
for name in [name for name in sys.modules if name.startswith("safe_exec")]:
    del sys.modules[name]
"""
CALL = PRELUDE + "from safe_exec.cli import main as cli\nsys.exit(cli.call(sys.argv[1:]))"
SYSTEMS = pytest.mark.parametrize(
    ("system", "name", "way"),
    [("darwin", "macOS", "virtual machine"), ("win32", "Windows", "WSL 2")],
)


def faked(
    system: str, *arguments: str | Path, code: str = CALL
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, system, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@SYSTEMS
@pytest.mark.parametrize("command", ["run", "bisect", "probe", "replay", "batch"])
def test_what_runs_notebooks_refuses(
    system: str, name: str, way: str, command: str, tmp_path: Path
) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "print('ran')")
    done = faked(system, command, path)
    assert done.returncode == 7
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert (
        line.startswith(f"safe-exec: notebooks are run on Linux only, and this is {name}: ")
        and way in line
    )
    assert [found.name for found in tmp_path.iterdir()] == ["nb.ipynb"]


@SYSTEMS
def test_python_refuses(system: str, name: str, way: str) -> None:
    code = (
        PRELUDE
        + "import safe_exec\nfrom safe_exec.errors import PlatformError\ntry:\n    safe_exec.run\nexcept PlatformError as e:\n    print(e)"
    )
    done = faked(system, code=code)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout and way in done.stdout


@SYSTEMS
def test_doctor_says_that_nothing_holds(system: str, name: str, way: str) -> None:
    done = faked(system, "doctor")
    assert done.returncode == 1, done.stderr
    assert f"safe-exec runs notebooks on Linux only, not on {system}" in done.stdout
    assert "rlimit" not in done.stdout and "watchdog" not in done.stdout
    assert done.stderr == ""


@SYSTEMS
def test_limits_can_be_read_and_written_anywhere(
    system: str, name: str, way: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("limits:\n  memory: 1G\n")
    assert faked(system, "limits", "check", tmp_path / "mine.yaml").returncode == 0
    assert "512 MiB" in faked(system, "limits", "show", "strict").stdout
    assert faked(system, "--help").returncode == 0


FACTORY = f"""
import jupyter_client.provisioning.factory
{PRELUDE}
from jupyter_client.provisioning.factory import KernelProvisionerFactory
entry = KernelProvisionerFactory.instance().provisioners["safe-exec"]
try:
    entry.load()
except Exception as error:
    print(type(error).__name__, error)
"""
ENGINE = f"""
import papermill
{PRELUDE}
from types import SimpleNamespace
for name in [name for name in sys.modules if name.startswith("papermill")]:
    del sys.modules[name]
from papermill.engines import papermill_engines
try:
    papermill_engines.get_engine("safe-exec").execute_managed_notebook(SimpleNamespace(nb=None), "python3")
except Exception as error:
    print(type(error).__name__, error)
"""


@SYSTEMS
@pytest.mark.parametrize("loads", [FACTORY, ENGINE], ids=["provisioner", "papermill"])
def test_other_tools_that_choose_us_are_refused_in_a_sentence(
    system: str, name: str, way: str, loads: str
) -> None:
    """Jupyter and papermill load us by entry points, which must not fail for a module that these systems lack."""
    done = faked(system, code=loads)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith(
            f"PlatformError notebooks are run on Linux only, and this is {name}: "
        )
        and way in done.stdout
    )


@SYSTEMS
def test_pytest_starts_with_our_plugin_and_refuses_where_it_is_asked_for(
    system: str, name: str, way: str
) -> None:
    """Pytest loads the plugin at every start, wanted or not."""
    code = f"import pytest\n{PRELUDE}\nimport safe_exec.integrations.pytest_plugin as plugin\n"
    code += "from types import SimpleNamespace\n"
    code += "plugin.pytest_configure(SimpleNamespace(getoption=lambda name: False))\n"
    code += "asked = SimpleNamespace(getoption=lambda name: True, addinivalue_line=lambda *words: None, stash={})\n"
    code += "try:\n    plugin.pytest_configure(asked)\nexcept plugin.pytest.UsageError as error:\n    print(error)\n"
    done = faked(system, code=code)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith(f"notebooks are run on Linux only, and this is {name}: ")
        and way in done.stdout
    )


NO_LOCK = """
import sys
sys._is_gil_enabled = lambda: False
"""
SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:  # before Python 3.13
    import _xxsubinterpreters as interpreters
interpreters.run_string(interpreters.create(), {code!r})
"""
ASK = """
import sys
sys.path[:0] = {path!r}
from safe_exec.errors import PlatformError
import safe_exec
try:
    safe_exec.run
except PlatformError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("command", ["run", "bisect", "probe", "replay", "batch"])
def test_a_runner_without_the_interpreters_lock_declines(command: str, tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "print('ran')")
    code = f"{NO_LOCK}from safe_exec.cli import main as cli\nsys.exit(cli.call(sys.argv[2:]))"
    done = faked("linux", command, path, code=code)
    assert (done.returncode, done.stdout) == (7, "")
    (line,) = done.stderr.splitlines()
    assert "free-threaded" in line and "PYTHON_GIL=1" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["nb.ipynb"]


def test_python_without_the_interpreters_lock_declines() -> None:
    done = faked("linux", code=NO_LOCK + ASK.format(path=[]))
    assert done.returncode == 0, done.stderr
    assert "free-threaded" in done.stdout and "PYTHON_GIL=1" in done.stdout


def test_a_sub_interpreter_declines() -> None:
    """A real one: there, pyzmq and psutil could not even be imported."""
    done = faked("linux", code=SUBINTERPRETER.format(code=ASK.format(path=sys.path)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("safe-exec does not run in a sub-interpreter"), done.stderr
    assert len(done.stdout.splitlines()) == 1
