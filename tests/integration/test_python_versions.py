"""A kernel of another version of Python than the runner's, or of another ipykernel, and a runner with
other versions of its libraries: a run that passes, a crash and an endless loop say the same as ever.
The runner is the Python that runs these tests.

Kernels are made once, in the cache of the beds. ``make versions-table`` writes what passed into
docs/platforms.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.beds import free_threaded_interpreter, interpreter
from tests.support import make_notebook, run_notebook
from tests.versions import KERNELS, LIBRARIES, PROPERTY, RUNNER, lower_bounds

CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safe-exec-beds" / "kernels"
)
OLDEST = "3.11"
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
PACKAGES = ("6.20.*", "6.*", "7.*")
"""Of ipykernel: the oldest supported, and the latest of each major version."""
PAIRS = [
    *((version, "") for version in VERSIONS if version != RUNNER),
    *((RUNNER, package) for package in PACKAGES),
]


LIBRARY_SETS: dict[str, tuple[str, ...]] = {
    "latest": (),
    "oldest": ("nbclient", "nbformat", "jupyter_client"),
    "oldest-nbclient": ("nbclient",),
    "oldest-nbformat": ("nbformat",),
    "oldest-jupyter_client": ("jupyter_client",),
    # Wheels of that age are there for the oldest Python alone.
    **({"lower-bounds": tuple(lower_bounds())} if RUNNER == OLDEST else {}),
}
"""The libraries that are of the oldest version that pyproject.toml admits; all others are the latest."""


def environment(name: str, python: Path, *requirements: str) -> Path:
    """A folder of packages for a Python, made once."""
    folder = CACHE / name
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix="making-", dir=CACHE))
        making.chmod(0o755)
        # Its own pip, where it has one: pip 23.0, which Debian 12 puts into virtual environments, does not
        # run on Python 3.12 and newer (`--python` has that interpreter run it).
        own = [str(python), "-m", "pip"]
        version = subprocess.run([*own, "--version"], capture_output=True, check=False)
        pip = (
            own
            if version.returncode == 0
            else [sys.executable, "-m", "pip", "--python", str(python)]
        )
        target = ["--only-binary=:all:", "--target", str(making / "site")]
        try:
            subprocess.run(
                [*pip, "install", "-q", *target, *requirements],
                check=True,
                capture_output=True,
                text=True,
            )
            making.rename(folder)
        except subprocess.CalledProcessError as error:
            raise AssertionError(error.stderr) from error
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder / "site"


def kernel(version: str, package: str) -> Path:
    """The packages of ipykernel for a version of Python."""
    python = interpreter(version)
    assert python is not None
    wanted = f"ipykernel=={package}" if package else "ipykernel"
    return environment(f"{version}-{package.rstrip('.*') or 'latest'}", python, wanted)


@pytest.fixture
def spec(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment in which Jupyter finds the kernel."""
    version, package = request.param
    site = kernel(version, package)
    folder = tmp_path / "jupyter" / "kernels" / "other"
    folder.mkdir(parents=True)
    argv = [str(interpreter(version)), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    document: dict[str, Any] = {"argv": argv, "display_name": "other", "language": "python"}
    document["env"] = {"PYTHONPATH": str(site)}
    (folder / "kernel.json").write_text(json.dumps(document))
    return {"JUPYTER_PATH": str(tmp_path / "jupyter")}


@pytest.mark.kills
@pytest.mark.parametrize(
    ("spec", "version", "package"),
    [
        pytest.param(
            (v, p),
            v,
            p,
            id=f"{v}-{p.rstrip('.*')}" if p else v,
            marks=pytest.mark.bed(f"python{v}"),
        )
        for v, p in PAIRS
    ],
    indirect=["spec"],
)
def test_another_python(
    spec: dict[str, str], version: str, package: str, tmp_path: Path, record_property: Any
) -> None:
    python, ipykernel = check_runs("other", tmp_path, spec)
    assert python == version and ipykernel.startswith(package.rstrip("*"))
    case = f"{version}-{package.rstrip('.*')}" if package else version
    record_property(PROPERTY, KERNELS.row(case, version, ipykernel))


@pytest.mark.kills
@pytest.mark.parametrize("case", LIBRARY_SETS)
def test_other_libraries(case: str, tmp_path: Path, record_property: Any) -> None:
    bounds = lower_bounds()
    pins = [f"{name}=={bounds[name]}" for name in LIBRARY_SETS[case]]
    others = [name for name in bounds if name not in LIBRARY_SETS[case]]
    site = environment(f"{RUNNER}-{case}", Path(sys.executable), *pins, *others, "ipykernel")
    env = {"PYTHONPATH": str(site)}
    names = ("nbclient", "nbformat", "jupyter_client", "ipykernel")
    ask = f"from importlib.metadata import version\nprint(*map(version, {names!r}))"
    answer = subprocess.run(
        [sys.executable, "-c", ask],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    versions = dict(zip(names, answer.stdout.split(), strict=True))
    for name in set(names) & set(LIBRARY_SETS[case]):
        assert versions[name].startswith(bounds[name])
    assert check_runs("python3", tmp_path, env) == (RUNNER, versions["ipykernel"])
    record_property(PROPERTY, LIBRARIES.row(case, *versions.values()))


def check_runs(kernel_name: str, folder: Path, env: dict[str, str]) -> tuple[str, str]:
    """A run that passes, a crash and an endless loop. Returns the versions of Python and ipykernel."""
    says = "import sys, ipykernel\nprint('%d.%d' % sys.version_info[:2], ipykernel.__version__)\n'result'"
    crash = "import ctypes\ndef read(at):\n    return ctypes.string_at(at)"
    loop = "n = 0\nwhile True:\n    n += 1"
    first = make_notebook(folder / "crash.ipynb", says, crash, "print('last words')\nread(0)")
    done = run_notebook(first, "--kernel", kernel_name, "--no-bisect", env=env)
    cells = [cell for cell in done.notebook.cells if cell.cell_type == "code"]
    text = "".join(o.get("text", "") for o in cells[0].outputs)
    assert "last words" in "".join(o.get("text", "") for o in cells[2].outputs), done.stdout
    verdict = done.verdict
    crash_cell = verdict["crash_cell"]
    assert (verdict["status"], verdict["cause"]["kind"]) == ("kernel_died", "segfault"), done.stdout
    assert (crash_cell["code_index"], crash_cell["line"]) == (2, 2), done.stdout
    assert [(f["function"], f["line"]) for f in crash_cell["stack"]][-2:] == [
        ("read", 3),
        ("<module>", 2),
    ]

    second = make_notebook(folder / "loop.ipynb", "'passes'", loop)
    options = ("--kernel", kernel_name, "--no-bisect", "--cell-timeout", "3s")
    done = run_notebook(second, *options, env=env)
    cause = done.verdict["cause"]
    assert (cause["kind"], cause["activity"]) == ("cell_timeout", "python_loop"), done.stdout
    assert done.verdict["crash_cell"]["line"] in (2, 3)
    assert done.verdict["cells"][0]["status"] == "passed"
    python, ipykernel = text.split()
    return python, ipykernel


# --- Pythons whose threads run at the same time ------------------------------------------------------------------


def free_threaded_spec(folder: Path, argv: list[str], env: dict[str, str]) -> dict[str, str]:
    """The environment in which Jupyter finds a kernel of such a build."""
    home = folder / "jupyter" / "kernels" / "free"
    home.mkdir(parents=True)
    document = {
        "argv": [*argv, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "free",
        "language": "python",
        "env": env,
    }
    (home / "kernel.json").write_text(json.dumps(document))
    return {"JUPYTER_PATH": str(folder / "jupyter")}


def check_declined(folder: Path, env: dict[str, str]) -> None:
    """The kernel does not start, and the verdict says why and the remedy."""
    path = make_notebook(folder / "nb.ipynb", "print('ran')")
    done = run_notebook(path, "--kernel", "free", env=env)
    cause = done.verdict["cause"]
    assert (done.code, cause["kind"]) == (6, "kernel_start_failed"), done.stdout
    assert "free-threaded Python" in cause["summary"], done.stdout
    assert cause["advice"].startswith("Set PYTHON_GIL=1"), done.stdout
    assert done.verdict["cells"][0]["status"] == "not_run"


@pytest.mark.kills
def test_a_kernel_without_the_interpreters_lock_is_declined(tmp_path: Path) -> None:
    """A faked one: any Python, which says that its lock is off."""
    fake = tmp_path / "site"
    fake.mkdir()
    (fake / "sitecustomize.py").write_text("import sys\nsys._is_gil_enabled = lambda: False\n")
    check_declined(
        tmp_path, free_threaded_spec(tmp_path, [sys.executable], {"PYTHONPATH": str(fake)})
    )


@pytest.mark.kills
@pytest.mark.bed("free-threaded")
def test_a_free_threaded_build_is_declined_and_runs_with_its_lock(tmp_path: Path) -> None:
    python = free_threaded_interpreter()
    assert python is not None
    site = {"PYTHONPATH": str(environment("free-threaded", python, "ipykernel"))}
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
    check_declined(
        tmp_path / "without", free_threaded_spec(tmp_path / "without", [str(python)], site)
    )
    locked = free_threaded_spec(tmp_path / "with", [str(python)], {**site, "PYTHON_GIL": "1"})
    check_runs("free", tmp_path / "with", locked)


@pytest.mark.kills
def test_remote_debugging_is_off_behind_isolation(tmp_path: Path) -> None:
    """Since Python 3.14 another process of the user may have a kernel run its code (PEP 768)."""
    cell = """
import os, sys
print(os.environ.get("PYTHON_DISABLE_REMOTE_DEBUG"))
script = os.path.abspath("script.py")
open(script, "w").write("print('injected')")
try:
    sys.remote_exec(os.getpid(), script)
except (AttributeError, RuntimeError) as error:
    print(type(error).__name__)
for _ in range(1000):  # it would run between two instructions
    pass
"""
    path = make_notebook(tmp_path / "nb.ipynb", cell)
    done = run_notebook(path, "--limits", "untrusted")
    assert done.code == 0, done.stdout
    (output,) = next(cell for cell in done.notebook.cells if cell.cell_type == "code").outputs
    refusal = "RuntimeError" if sys.version_info >= (3, 14) else "AttributeError"
    assert output["text"].split() == ["1", refusal]
