"""A kernel of another version of Python than the runner's, or of another ipykernel: a run that passes,
a crash and an endless loop say the same as ever. The runner is the Python that runs these tests.

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

from tests.beds import interpreter
from tests.support import make_notebook, run_notebook
from tests.versions import PROPERTY, RUNNER, row

CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safe-exec-beds" / "kernels"
)
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
PACKAGES = ("6.20.*", "6.*", "7.*")
"""Of ipykernel: the oldest supported, and the latest of each major version."""
PAIRS = [
    *((version, "") for version in VERSIONS if version != RUNNER),
    *((RUNNER, package) for package in PACKAGES),
]


def kernel(version: str, package: str) -> Path:
    """An environment with ipykernel for a version of Python, made once."""
    folder = CACHE / f"{version}-{package.rstrip('.*') or 'latest'}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix="making-", dir=CACHE))
        python = interpreter(version)
        assert python is not None
        wanted = f"ipykernel=={package}" if package else "ipykernel"
        # Its own pip, where it has one: pip 23.0, which Debian 12 puts into virtual environments, does not
        # run on Python 3.12 and newer (`--python` has that interpreter run it).
        own = [str(python), "-m", "pip"]
        has_pip = (
            subprocess.run([*own, "--version"], capture_output=True, check=False).returncode == 0
        )
        pip = [
            *(own if has_pip else [sys.executable, "-m", "pip", "--python", str(python)]),
            "install",
            "-q",
        ]
        target = ["--only-binary=:all:", "--target", str(making / "site")]
        try:
            subprocess.run([*pip, *target, wanted], check=True, capture_output=True, text=True)
            making.rename(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder / "site"


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
    says = "import sys, ipykernel\nprint('%d.%d' % sys.version_info[:2], ipykernel.__version__)\n'result'"
    crash = "import ctypes\ndef read(at):\n    return ctypes.string_at(at)"
    loop = "n = 0\nwhile True:\n    n += 1"
    first = make_notebook(tmp_path / "crash.ipynb", says, crash, "print('last words')\nread(0)")
    done = run_notebook(first, "--kernel", "other", "--no-bisect", env=spec)
    cells = [cell for cell in done.notebook.cells if cell.cell_type == "code"]
    text = "".join(o.get("text", "") for o in cells[0].outputs)
    assert text.startswith(f"{version} {package.rstrip('*')}"), text
    assert "last words" in "".join(o.get("text", "") for o in cells[2].outputs)
    verdict = done.verdict
    crash_cell = verdict["crash_cell"]
    assert (verdict["status"], verdict["cause"]["kind"]) == ("kernel_died", "segfault"), done.stdout
    assert (crash_cell["code_index"], crash_cell["line"]) == (2, 2), done.stdout
    assert [(f["function"], f["line"]) for f in crash_cell["stack"]][-2:] == [
        ("read", 3),
        ("<module>", 2),
    ]

    second = make_notebook(tmp_path / "loop.ipynb", "'passes'", loop)
    done = run_notebook(
        second, "--kernel", "other", "--no-bisect", "--cell-timeout", "3s", env=spec
    )
    cause = done.verdict["cause"]
    assert (cause["kind"], cause["activity"]) == ("cell_timeout", "python_loop"), done.stdout
    assert done.verdict["crash_cell"]["line"] in (2, 3)
    assert done.verdict["cells"][0]["status"] == "passed"
    record_property(PROPERTY, row(version, text.split()[1], package))
