"""What a run depends on, as one key: two runs with the same key need not both be made. May import job and notebook.

Two keys: that of a run (content, limits, walls, kernel, options) says whether a finished notebook of a batch that was cut short is still
the same; that of a pass also holds the kernel's environment and the inputs that the notebook declares
(``metadata.safe_exec.inputs``, patterns relative to its folder), and says whether one that passed before has to be run again.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from safe_exec._version import __version__
from safe_exec.errors import NotebookError
from safe_exec.experiments.trial_cache import key_of
from safe_exec.files import one_line
from safe_exec.notebook.notebook import METADATA_KEY
from safe_exec.workflows.prepare import PreparedJob

ASK_SECONDS = 30
_PIECE = 1 << 20
_ASK = (
    "import importlib.metadata as m, json, platform, sys; "
    "print(json.dumps([sys.version, platform.platform(), sorted({(d.metadata['Name'] or '', d.version) for d in m.distributions()})]))"
)


def key_of_run(prepared: PreparedJob) -> str:
    """Of content, limits, walls, kernel and options; of nothing that is outside the notebook's file and this call."""
    job = prepared.job
    return key_of(
        {
            "sha256": prepared.notebook.sha256,
            "limits": prepared.limits.values.as_dict(),
            "isolation": asdict(prepared.limits.isolation),
            "kernel": prepared.kernel_name,
            "allow_errors": job.allow_errors,
            "required": [str(name) for name in prepared.limits.required],
            "mechanisms": job.mechanisms,
            "cwd": None if job.cwd is None else str(job.cwd),
        }
    )


def key_of_pass(prepared: PreparedJob, kernels: Kernels, inputs: Mapping[str, str | None]) -> str:
    """The same, and the kernel's environment and the declared inputs as they were before the run (:func:`inputs_of`)."""
    return key_of(
        {
            "run": key_of_run(prepared),
            "version": __version__,
            "cwd": str(prepared.paths.cwd),
            "environment": kernels.environment(prepared.kernel_name),
            "inputs": inputs,
        }
    )


# --- inputs -----------------------------------------------------------------------------------------------------


def declared_inputs(metadata: Mapping[str, Any], error_prefix: object) -> tuple[str, ...]:
    """The patterns of ``metadata.safe_exec.inputs``. Raises NotebookError where they are no list of texts."""
    ours = metadata.get(METADATA_KEY)
    patterns = ours.get("inputs") if isinstance(ours, Mapping) else None
    if patterns is None:
        return ()
    if not isinstance(patterns, list) or not all(
        isinstance(pattern, str) and pattern for pattern in patterns
    ):
        raise NotebookError(
            f'{one_line(error_prefix)}: metadata.safe_exec.inputs: expected a list of patterns such as ["data/*.csv"]'
        )
    return tuple(patterns)


def inputs_of(prepared: PreparedJob) -> dict[str, str | None]:
    """A hash of each file that the patterns match, by its path; a directory stands for all below it.

    A pattern that matches nothing is in it by itself: the first file that comes is a change.
    """
    folder = prepared.job.path.absolute().parent
    hashes: dict[str, str | None] = {}
    for pattern in declared_inputs(prepared.node.metadata, prepared.job.path):
        hits = glob.glob(pattern, root_dir=folder, recursive=True, include_hidden=True)
        hashes |= {
            path: _hash_of(folder / path) for hit in hits for path in _files(folder, hit)
        } or {pattern: None}
    return hashes


def _files(folder: Path, hit: str) -> list[str]:
    if not (folder / hit).is_dir():
        return [hit]
    return [
        os.path.relpath(os.path.join(top, name), folder)
        for top, _, names in os.walk(folder / hit)
        for name in names
    ]


def _hash_of(path: Path) -> str | None:
    """``None`` for what cannot be read, or is no file: a pipe must not hold us up."""
    digest = hashlib.sha256()
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()


# --- kernels ----------------------------------------------------------------------------------------------------


class Kernels:
    """The environments of kernels, each asked once. Any thread may ask."""

    def __init__(self) -> None:
        self._environments: dict[str, str] = {}
        self._turn = threading.Lock()

    def environment(self, name: str) -> str:
        """What a kernel is now: its command and, of a Python one, version and packages; of others the program's file."""
        with self._turn:
            if name not in self._environments:
                self._environments[name] = _environment_of(name)
            return self._environments[name]


def _environment_of(name: str) -> str:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    from safe_exec.kernel.launch import speaks_ipc

    try:
        spec = KernelSpecManager().get_kernel_spec(name)
    except NoSuchKernel:
        return "none"
    # As jupyter_client does: a bare name of Python is the one that we run in.
    program = (
        sys.executable if re.fullmatch(r"python(3(\.[0-9]+)?)?", spec.argv[0]) else spec.argv[0]
    )
    packages = _packages_of(program) if speaks_ipc(spec.argv) else None
    return json.dumps(
        [spec.argv, spec.env, packages if packages is not None else _file_of(program)],
        sort_keys=True,
        default=str,
    )


def _packages_of(python: str) -> str | None:
    try:
        # Not from the directory that we are in: it may be the notebooks' own, and Python imports from there first.
        process = subprocess.run(
            [python, "-c", _ASK],
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            check=True,
            cwd="/",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout


def _file_of(program: str) -> list[object]:
    try:
        status = os.stat(program)
    except OSError:
        return [program]
    return [program, status.st_size, status.st_mtime_ns]
