"""``safe-exec doctor --cluster``: the diagnosis of every worker of a dask cluster."""

from __future__ import annotations

import asyncio
import json
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import click
from msgspec import Struct
from msgspec.structs import replace

from safe_exec._version import __version__
from safe_exec.batch.cluster.connection import connected, demand_dask, parse_cluster
from safe_exec.batch.fingerprint import Kernels, describe_differences
from safe_exec.cli import doctor, tables
from safe_exec.files import one_line
from safe_exec.reports.terminal import Style
from safe_exec.reports.text.common import counted
from safe_exec.units import format_size

WAIT_SECONDS = 60
"""The time that a cluster has to get its first worker."""
DEFAULT_KERNEL = "python3"


class WorkerDiagnosis(Struct, frozen=True, kw_only=True):
    """One worker: its size, its diagnosis as JSON values, and the environment of its kernel.

    ``error`` is the reason if safe-exec cannot run there.
    """

    address: str
    name: str
    threads: int
    memory: int
    machine: str = ""
    version: str = ""
    document: Mapping[str, Any] | None = None
    environment: str = ""
    error: str | None = None

    @property
    def exit_code(self) -> int:
        """0 if Linux enforces every limit there, else 1."""
        return 1 if self.document is None else int(self.document["exit_code"])


def show(cluster: str, profile: str | None, mechanisms: str | None, *, as_json: bool) -> int:
    """Print the diagnosis of all workers, and return the exit code. Raises SafeExecError."""
    address = parse_cluster(cluster)
    demand_dask(address)
    workers = asyncio.run(_collect(address, profile, mechanisms))
    code = max((worker.exit_code for worker in workers), default=1)
    if as_json:
        click.echo(json.dumps(_as_document(workers, code), indent=2))
    else:
        style = Style.of(sys.stdout)
        tables.write(report(workers, style), style)
    return code


async def _collect(
    address: Any, profile: str | None, mechanisms: str | None
) -> list[WorkerDiagnosis]:
    async with connected(address, None) as client:
        # dask types its client for synchronous use only.
        untyped_client: Any = client
        await untyped_client.wait_for_workers(1, timeout=WAIT_SECONDS)
        scheduler: Any = client.scheduler
        workers = (await scheduler.identity(n_workers=-1))["workers"]
        answers = await client.run(diagnose_worker, profile, mechanisms, on_error="return")
    return [
        _diagnosis(address, worker, answers.get(address))
        for address, worker in sorted(workers.items(), key=lambda row: str(row[1]["name"]))
    ]


def diagnose_worker(profile: str | None, mechanisms: str | None) -> tuple[str, str, Any, str]:
    """Diagnose this machine; runs on the workers."""
    document = doctor.as_document(doctor.diagnose(profile, mechanisms))
    return platform.node(), __version__, document, Kernels().environment(DEFAULT_KERNEL)


def _diagnosis(address: str, worker: Mapping[str, Any], answer: Any) -> WorkerDiagnosis:
    size = WorkerDiagnosis(
        address=address,
        name=str(worker["name"]),
        threads=worker["nthreads"],
        memory=worker["memory_limit"] or 0,
    )
    if not isinstance(answer, tuple):
        reason = "it left" if answer is None else one_line(answer)
        return replace(size, error=reason)
    machine, version, document, environment = answer
    error = None if version == __version__ else f"it has safe-exec {version}, this is {__version__}"
    return replace(
        size,
        machine=machine,
        version=version,
        document=document,
        environment=environment,
        error=error,
    )


# --- as text ------------------------------------------------------------------------------------


def report(workers: list[WorkerDiagnosis], style: Style) -> Iterator[str]:
    """Yield the lines: one row for each worker, then the differences and the problems."""
    machines = {worker.machine for worker in workers if worker.machine}
    yield style.paint(
        "bold",
        f"safe-exec {__version__} · {counted(len(workers), 'worker')} on "
        f"{counted(len(machines), 'machine')}",
    )
    yield ""
    yield from tables.table(list(_rows(workers)), style)
    errors = [worker for worker in workers if worker.error is not None]
    for worker in errors:
        yield from tables.labelled(worker.name, f"gets no notebooks: {worker.error}", style)
    by_machine = {worker.machine: worker.environment for worker in workers if worker.environment}
    difference = describe_differences(by_machine)
    if difference:
        yield ""
        yield from tables.labelled("differs", f"kernel {DEFAULT_KERNEL}: {difference}", style)
    if any(worker.exit_code for worker in workers):
        yield ""
        yield "`safe-exec doctor` on a machine says how to fix its weak limits and walls"


def _rows(workers: list[WorkerDiagnosis]) -> Iterator[tuple[str, ...]]:
    yield ("", "worker", "machine", "notebooks", "memory", "not enforced")
    for worker in workers:
        yield (
            "✗" if worker.error or worker.exit_code else "✓",
            one_line(worker.name),
            one_line(worker.machine) or "?",
            str(worker.threads),
            format_size(worker.memory) if worker.memory else "no limit",
            _weak(worker),
        )


def _weak(worker: WorkerDiagnosis) -> str:
    if worker.document is None:
        return "unknown"
    limits, walls = worker.document["weak"], worker.document["weak_walls"]
    names: dict[str, list[str]] = defaultdict(list)
    names["limits"], names["walls"] = limits, walls
    return "; ".join(f"{kind}: {', '.join(weak)}" for kind, weak in names.items() if weak) or "-"


# --- as JSON ------------------------------------------------------------------------------------


def _as_document(workers: list[WorkerDiagnosis], code: int) -> dict[str, Any]:
    return {
        "schema": "safe-exec/doctor-cluster/1",
        "safe_exec_version": __version__,
        "exit_code": code,
        "workers": [
            {
                "address": worker.address,
                "name": worker.name,
                "machine": worker.machine or None,
                "threads": worker.threads,
                "memory_limit": worker.memory or None,
                "safe_exec_version": worker.version or None,
                "error": worker.error,
                "doctor": worker.document,
            }
            for worker in workers
        ],
    }
