"""Starts a proxy from the options of ``safe-exec kernel``.

Imports workflows, since limits are resolved and checked as in ``run``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from nbformat.notebooknode import NotebookNode

from safe_exec.interactive.diagnosis import LOST, Diagnosis, idle_death
from safe_exec.interactive.front import read_connection_file
from safe_exec.interactive.inner import Inner
from safe_exec.interactive.proxy import OnDeath, Proxy
from safe_exec.interactive.recording import Recording, unseen_death
from safe_exec.interactive.wire import Message
from safe_exec.model.limits import Mechanism
from safe_exec.notebook import notebook
from safe_exec.reports.masking import mask_for
from safe_exec.sandbox import keeper_process
from safe_exec.sandbox.plan import SpawnPlan, require
from safe_exec.sandbox.stale_runs import sweep
from safe_exec.trial.request import Cancellation, TrialResult
from safe_exec.workflows.job import Bisect, Job, PreparedJob
from safe_exec.workflows.prepare import prepare
from safe_exec.workflows.run import request_for, run_info

log = logging.getLogger("safe_exec")


class KernelOptions(Struct, frozen=True, kw_only=True):
    """The options of ``safe-exec kernel``.

    ``limits`` names a profile or a file; ``figures`` and ``walls`` override parts of it.
    ``restores``: after a death the kernel goes on with its state from before the cell.
    ``arguments`` are the client's arguments for the kernel itself.
    """

    connection_file: Path
    kernel: str
    limits: str | None = None
    figures: Mapping[str, object] = {}
    walls: Mapping[str, Any] = {}
    require: str | None = None
    mechanisms: tuple[str, ...] | None = None
    on_death: OnDeath = OnDeath.EXIT
    restores: bool = False
    records: bool = True
    arguments: tuple[str, ...] = ()


def serve(options: KernelOptions) -> int:
    """Serve the clients of a connection file until the kernel ends; return the exit code.

    Raises SafeExecError.
    """
    file = read_connection_file(options.connection_file)
    prepared = _prepared(options)
    sweep()
    notes = _notes_of_former_kernel(options)
    recording = _recording(options) if options.records else None
    plans: list[SpawnPlan] = []

    def make_inner(on_message: Callable[[str, Message], None]) -> Inner:
        # A restarted kernel is a run of its own: new id, new sandbox, fresh counters.
        own = _anew(prepared)
        plan = own.plan()
        plans.append(plan)
        node = NotebookNode(prepared.node)
        node.cells = []
        request = request_for(own, plan, node, Cancellation(), lambda _event: None)
        request = replace(request, restorable=options.restores)
        return Inner(request, key=file.key, arguments=options.arguments, on_message=on_message)

    mask = mask_for(os.environ)

    def diagnose(inner: Inner, result: TrialResult) -> Diagnosis:
        run = replace(run_info(prepared, inner.state.request), run_id=inner.state.request.run_id)
        return Diagnosis(run, result, plans[-1], mask)

    plan = prepared.plan()
    require(plan, prepared.limits.required)
    proxy = Proxy(
        file,
        make_inner=make_inner,
        diagnose=diagnose,
        recording=recording,
        on_death=options.on_death,
        restores=options.restores,
        notes=[*notes, *(f"[safe-exec: {line}]\n" for line in weak_points(prepared, plan))],
    )
    try:
        return asyncio.run(proxy.run())
    finally:
        if recording is not None:
            recording.close()


def _prepared(options: KernelOptions) -> PreparedJob:
    """Prepare a job for an empty notebook in this folder, as ``run`` does. Raises UsageError."""
    cwd = Path.cwd()
    empty = {
        "cells": [],
        "metadata": {"kernelspec": {"name": options.kernel, "display_name": options.kernel}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path = cwd / "session.ipynb"
    job = Job(
        path=path,
        limits=options.limits,
        options=options.figures,
        walls=options.walls,
        kernel=options.kernel,
        cwd=cwd,
        require=options.require,
        mechanisms=options.mechanisms,
        # A person goes on after an error, and so must a search in the recorded session.
        allow_errors=True,
        command=("safe-exec", "kernel", options.kernel),
        bisect=Bisect.NEVER,
        writes=False,
    )
    prepared = prepare(job, source=notebook.Source.of_data(path, json.dumps(empty).encode()))
    # A session lasts for as long as its user wants, so limits for the whole notebook do not apply.
    # Output is capped per cell.
    values = replace(prepared.limits.values, timeout=None, output=None)
    resolved = replace(prepared.limits.resolved, limits=values)
    return replace(prepared, limits=replace(prepared.limits, resolved=resolved))


def _anew(prepared: PreparedJob) -> PreparedJob:
    return replace(
        prepared,
        run_id=keeper_process.new_run_id(),
        started=time.monotonic(),
        started_at=datetime.now(UTC),
    )


def _notes_of_former_kernel(options: KernelOptions) -> list[str]:
    """Return notes on an earlier kernel of the same client that died while no cell ran."""
    try:
        cause = unseen_death(str(options.connection_file.absolute())) if options.records else None
    except OSError as error:
        log.warning("the recorded sessions cannot be read: %s", error)
        return []
    return [] if cause is None else [idle_death(cause), LOST]


def _recording(options: KernelOptions) -> Recording | None:
    facts = {
        "kernel": options.kernel,
        "cwd": str(Path.cwd()),
        "limits": options.limits or "default",
        "connection": str(options.connection_file.absolute()),
    }
    try:
        return Recording.open(facts)
    except OSError as error:
        log.warning("the session is not recorded: %s", error)
        return None


def weak_points(prepared: PreparedJob, plan: SpawnPlan) -> list[str]:
    """Describe requested limits and walls that this machine cannot enforce, one line each."""
    limits = prepared.limits.values
    lines = [
        f"limit {name.value.replace('_', ' ')} is not enforced on this machine"
        for name, enforcement in plan.enforcement.items()
        if limits.of(name) is not None and enforcement.by is Mechanism.NONE
    ]
    walls = [wall.value for wall, holder in plan.walls.items() if holder.by is Mechanism.NONE]
    if walls:
        lines.append(f"isolation is not enforced on this machine: {', '.join(walls)}")
    return [f"{line}; `safe-exec doctor` says why" for line in lines]
