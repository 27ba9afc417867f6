"""Compute hashes of everything that a run depends on, so that equal runs can be recognised.

The key of a run covers content, limits, walls, kernel and options; ``--resume`` uses it to
recognise finished notebooks. The key of a pass also covers the kernel's environment and the inputs
that the notebook declares (``metadata.safe_exec.inputs``, patterns relative to its folder);
``--only-changed`` uses it to skip notebooks that passed before.
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

from msgspec import to_builtins
from msgspec.structs import asdict

from safe_exec._version import __version__
from safe_exec.cache import key_of
from safe_exec.errors import NotebookError
from safe_exec.files import one_line
from safe_exec.notebook.notebook import METADATA_KEY
from safe_exec.workflows.job import PreparedJob

ASK_SECONDS = 30
# Inputs may be larger than the memory, so they are hashed in pieces.
_PIECE = 1 << 20
_ASK = (
    "import importlib.metadata as m, json, platform, sys; "
    "packages = sorted({(d.metadata['Name'] or '', d.version) for d in m.distributions()}); "
    "print(json.dumps([sys.version, platform.platform(), packages]))"
)


def key_of_run(prepared: PreparedJob) -> str:
    """Return the key of content, limits, walls, kernel and options."""
    job = prepared.job
    return key_of(
        {
            "sha256": prepared.notebook.sha256,
            "limits": prepared.limits.values.as_dict(),
            "isolation": asdict(prepared.limits.isolation),
            "kernel": prepared.kernel_name,
            "allow_errors": job.allow_errors,
            "keep_going": job.keep_going,
            "inputs": to_builtins(job.inputs),
            "comparison": job.comparison.as_dict() if job.comparison is not None else None,
            "required": [str(name) for name in prepared.limits.required],
            "mechanisms": job.mechanisms,
            "cwd": None if job.cwd is None else str(job.cwd),
        }
    )


def key_of_pass(prepared: PreparedJob, kernels: Kernels, inputs: Mapping[str, str | None]) -> str:
    """Return the key of a run, its kernel's environment and its inputs (see ``inputs_of``)."""
    environment = kernels.environment(prepared.kernel_name)
    return pass_key(key_of_run(prepared), prepared.paths.cwd, environment, inputs)


def pass_key(run: str, cwd: Path, environment: str, inputs: Mapping[str, str | None]) -> str:
    """Return the key of a pass: the key of its run, combined with environment and inputs."""
    # The inputs are hashed before the run, because a notebook may overwrite its own inputs.
    return key_of(
        {
            "run": run,
            "version": __version__,
            "cwd": str(cwd),
            "environment": environment,
            "inputs": inputs,
        }
    )


# --- inputs ---------------------------------------------------------------------------------


def declared_inputs(metadata: Mapping[str, Any], error_prefix: object) -> tuple[str, ...]:
    """Return the patterns of ``metadata.safe_exec.inputs``. Raises NotebookError."""
    ours = metadata.get(METADATA_KEY)
    patterns = ours.get("inputs") if isinstance(ours, Mapping) else None
    if patterns is None:
        return ()
    if not isinstance(patterns, list) or not all(
        isinstance(pattern, str) and pattern for pattern in patterns
    ):
        raise NotebookError(
            f"{one_line(error_prefix)}: metadata.safe_exec.inputs: "
            'expected a list of patterns such as ["data/*.csv"]'
        )
    return tuple(patterns)


def inputs_of(prepared: PreparedJob) -> dict[str, str | None]:
    """Hash every file that matches a declared pattern; a directory stands for all files in it.

    A pattern without a match is recorded as well, so the first matching file counts as a change.
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
    """Return the SHA-256 of a file, or ``None`` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        # A pipe would block the batch, and a device may never end: only regular files are read.
        if not path.is_file():
            return None
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()


# --- kernels --------------------------------------------------------------------------------


class Kernels:
    """The environments of kernels, each collected once. Safe to use from any thread."""

    def __init__(self) -> None:
        self._environments: dict[str, str] = {}
        self._lock = threading.Lock()

    def environment(self, name: str) -> str:
        """Describe a kernel: its command, and its Python packages or the file of its program."""
        # Held while the environment is collected, so that two threads never start two interpreters.
        with self._lock:
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
    # jupyter_client replaces a bare `python` in a kernelspec by the interpreter it runs in.
    program = (
        sys.executable if re.fullmatch(r"python(3(\.[0-9]+)?)?", spec.argv[0]) else spec.argv[0]
    )
    # Only Python can list its packages. For other kernels a new version is a new program file.
    packages = _packages_of(program) if speaks_ipc(spec.argv) else None
    return json.dumps(
        [spec.argv, spec.env, packages if packages is not None else _file_of(program)],
        sort_keys=True,
        default=str,
    )


def _packages_of(python: str) -> str | None:
    try:
        # Python imports from the working directory first, and that may be the notebooks' own
        # folder, so the interpreter starts in the root directory.
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


MOST_DIFFERENCES = 5


def describe_differences(environments: Mapping[str, str]) -> str:
    """Describe the versions that differ between machines, from their kernel environments.

    ``numpy 1.26.4 (node-a), 2.1.0 (node-b)``; an empty text if there is no difference.
    """
    versions: dict[str, dict[str, list[str]]] = {}
    for machine, text in environments.items():
        for package, version in _versions_in(text).items():
            versions.setdefault(package, {}).setdefault(version, []).append(machine)
    count = len(environments)
    texts = [
        f"{package} " + ", ".join(f"{v} ({', '.join(names)})" for v, names in sorted(rows.items()))
        for package, rows in sorted(versions.items())
        if len(rows) > 1 or sum(map(len, rows.values())) < count
    ]
    more = [f"and {len(texts) - MOST_DIFFERENCES} more"] if len(texts) > MOST_DIFFERENCES else []
    return "; ".join([*texts[:MOST_DIFFERENCES], *more])


def _versions_in(environment: str) -> dict[str, str]:
    """Return Python and packages of a kernel's environment; nothing for kernels without Python."""
    try:
        packages = json.loads(json.loads(environment)[2])
        return {"Python": packages[0].split()[0], **dict(packages[2])}
    except (ValueError, TypeError, LookupError, AttributeError):
        return {}
