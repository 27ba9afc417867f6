"""Starts a kernel in its sandbox, with or without jupyter_client."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import NoSuchKernel

from safe_exec.errors import KernelMissingError
from safe_exec.kernel.installed_kernels import installed_kernels
from safe_exec.kernel.launch import (
    Launch,
    LaunchedKernel,
    extra_arguments,
    find_spec,
    forwarded,
    launch,
    speaks_ipc,
)
from safe_exec.kernel.manager import Manager
from safe_exec.kernel.provisioner import SandboxProvisioner
from safe_exec.kernel.session import ClientFactory, KernelSession, SessionRequest
from safe_exec.sandbox.keeper_process import runtime_directory
from safe_exec.sandbox.sandbox import Sandbox
from safe_exec.sandbox.usage import sockets

PORTS = ("shell", "iopub", "stdin", "hb", "control")
# In a network namespace of its own no other process listens.
FORWARDED_PORTS = (9001, 9002, 9003, 9004, 9005)


def open_sandbox(request: SessionRequest) -> Sandbox:
    """Start the keeper. It gets ready while the notebook client is set up."""
    return Sandbox(
        request.run_id,
        # The path is only computed here; the keeper makes the directory.
        directory=Path(runtime_directory(request.run_id)),
        delegation=request.plan.cgroup.delegation,
    )


async def open_session(
    request: SessionRequest,
    sandbox: Sandbox,
    make_client: ClientFactory,
    launched: LaunchedKernel | None = None,
) -> KernelSession:
    """Start the kernel process in its sandbox, or take over the ``launched`` one.

    Raises KernelStartError if the kernel is not installed or its command cannot be executed,
    SandboxError if the sandbox cannot be built. After an error the caller has to close the sandbox.
    """
    if launched is None and (spec := find_spec(request.kernel_name)) is not None:
        launch_request = Launch(
            spec=spec,
            kernel_name=request.kernel_name,
            plan=request.plan,
            limits=request.limits,
            cwd=request.cwd,
            env=request.env,
            key=request.key,
            arguments=request.arguments,
            strict_shell=request.strict_shell,
            thorough=request.allocations is not None,
            coverage=request.coverage,
            forks=request.forks is not None,
            snapshots=request.snapshots is not None,
            restorable=request.restorable,
        )
        # Building a sandbox blocks, and other runs share this event loop.
        launched = await _run_in_thread(partial(launch, sandbox, launch_request))
    km = Manager(kernel_name=request.kernel_name)
    km.connection_file = str(Path(runtime_directory(request.run_id)) / "c.json")
    if launched is not None:
        km.take_on(launched)
    provisioner = _provisioner(request, sandbox, km)
    try:
        forwarder_prefix = None
        if launched is not None:
            provisioner.adopt(launched)
        else:
            forwarder_prefix = await _start_by_jupyter(request, sandbox, km)
        return KernelSession(
            request,
            sandbox,
            manager=km,
            provisioner=provisioner,
            make_client=make_client,
            forwarder_prefix=forwarder_prefix,
            launched=launched,
        )
    except BaseException:
        provisioner.stop_watching()
        if provisioner.channels is not None:
            provisioner.channels.close()
        raise


def _provisioner(request: SessionRequest, sandbox: Sandbox, km: Any) -> SandboxProvisioner:
    provisioner = SandboxProvisioner(
        kernel_id=request.run_id, kernel_spec=_spec(km, request.kernel_name), parent=km
    )
    provisioner.on_limit = request.on_limit
    provisioner.prepare(limits=request.limits, plan=request.plan, sandbox=sandbox)
    provisioner.headless = request.key is None
    provisioner.strict_shell = request.strict_shell
    provisioner.coverage = request.coverage
    km.provisioner = provisioner
    return provisioner


def _spec(km: Any, kernel_name: str) -> Any:
    try:
        spec = km.kernel_spec
    except NoSuchKernel:
        spec = None
    if spec is None:
        raise KernelMissingError(kernel_name, installed_kernels())
    return spec


async def _start_by_jupyter(request: SessionRequest, sandbox: Sandbox, km: Any) -> str | None:
    """Start a kernel that ``find_spec`` does not support, through jupyter_client.

    Returns the prefix of the forwarder's sockets for a kernel on TCP behind a network of its own.
    """
    sandbox.wait_ready()
    prefix = str(Path(runtime_directory(request.run_id)) / "k")
    forwarder_prefix = None
    if speaks_ipc(km.kernel_spec.argv):
        km.transport, km.ip = "ipc", prefix
    elif request.plan.enclosed and not request.plan.isolation.network:
        # Each network namespace has its own loopback, so a port in there cannot be reached from
        # outside. A forwarder in there connects Unix sockets to it.
        forwarder_prefix = prefix
        for name, port in zip(PORTS, FORWARDED_PORTS, strict=True):
            setattr(km, f"{name}_port", port)
        # A copy: the manager of kernelspecs may give the same one to others.
        spec = copy.copy(km.kernel_spec)
        spec.argv = forwarded(spec.argv, prefix, FORWARDED_PORTS)
        km._kernel_spec = spec  # noqa: SLF001 - the property has no setter
    else:
        # Ports below the range of outgoing connections: no other process gets one by chance before
        # the kernel listens.
        for name, port in zip(PORTS, sockets.quiet_ports(len(PORTS)), strict=False):
            setattr(km, f"{name}_port", port)
    if request.key is not None:
        km.session.key = request.key.encode()
    extra = extra_arguments(km.kernel_name) if request.key is None else list(request.arguments)
    await km.start_kernel(cwd=request.cwd, env=dict(request.env), extra_arguments=extra)
    return forwarder_prefix


async def _run_in_thread(call: Callable[[], LaunchedKernel]) -> LaunchedKernel:
    """Run a blocking launch on a thread."""
    # After a cancellation, wait for the thread to finish: the canceller then removes the sandbox
    # that the thread works on.
    waiting = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            (await waiting).channels.close()
        raise
