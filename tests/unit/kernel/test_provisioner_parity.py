"""The provisioner behaves as jupyter_client's own, for tools that use no other interface than a manager."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio
from jupyter_client.connect import LocalPortCache
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from safe_exec.kernel.local_parity import demand_command, standard_streams
from tests.support import wait_until

READY_SECONDS = 60


class Manager(AsyncKernelManager):  # type: ignore[misc]
    """A manager with a kernelspec of its own, so that nothing need be installed."""

    def use(self, provisioner: str, *argv: str, **metadata: Any) -> Manager:
        """Take a spec with this provisioner and command."""
        self._kernel_spec = KernelSpec(
            argv=list(argv)
            or [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            language="python",
            metadata={"kernel_provisioner": {"provisioner_name": provisioner}, **metadata},
        )
        return self


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    # A context of its own is gone after a shutdown, whatever the provisioner.
    context = zmq.asyncio.Context()
    yield Manager(connection_file=str(tmp_path / "c.json"), context=context).use("safe-exec")
    context.destroy(linger=0)


async def answer(manager: Any, code: str) -> dict[str, Any]:
    """The reply to a piece of code, in a kernel that is up."""
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=READY_SECONDS)
        reply = await client.execute(code, reply=True, timeout=READY_SECONDS)
        content: dict[str, Any] = reply["content"]
        return content
    finally:
        client.stop_channels()


@pytest.mark.kills
@pytest.mark.parametrize("provisioner", ["safe-exec", "local-provisioner"])
def test_encryption_that_is_required_is_there(provisioner: str, tmp_path: Path) -> None:
    manager = Manager(
        connection_file=str(tmp_path / "c.json"), transport_encryption="required"
    ).use(provisioner, supported_encryption="curve")

    async def run() -> tuple[dict[str, Any], Any]:
        await manager.start_kernel()
        try:
            return await answer(manager, "x = 1"), manager.curve_publickey
        finally:
            await manager.shutdown_kernel(now=True)

    content, key = asyncio.run(run())
    assert content["status"] == "ok" and key


def test_encryption_that_the_kernel_does_not_take_is_refused(manager: Manager) -> None:
    manager.transport_encryption = "required"
    with pytest.raises(RuntimeError, match="supported_encryption"):
        asyncio.run(manager.start_kernel())


@pytest.mark.kills
def test_a_manager_starts_twice_and_again_after_a_shutdown(manager: Manager) -> None:
    async def run() -> list[Any]:
        pids = []
        try:
            for shut_down in (False, True, True):
                await manager.start_kernel()
                content = await answer(manager, "assert 'x' not in dir(); x = 1")
                assert content["status"] == "ok", content
                pids.append(manager.provisioner.pid)
                if shut_down:
                    await manager.shutdown_kernel()
        finally:
            await manager.shutdown_kernel(now=True)
        return pids

    pids = asyncio.run(run())
    assert len(set(pids)) == 3
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 10, "all ended")


@pytest.mark.parametrize("provisioner", ["safe-exec", "local-provisioner"])
def test_a_missing_command_is_a_missing_file(provisioner: str, tmp_path: Path) -> None:
    manager = Manager(connection_file=str(tmp_path / "c.json"))
    manager.use(provisioner, "no-such-kernel-at-all", "{connection_file}")
    with pytest.raises(FileNotFoundError, match="no-such-kernel-at-all"):
        asyncio.run(manager.start_kernel())


def test_a_command_is_looked_for_as_popen_does(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    (tmp_path / "tool").chmod(0o755)
    demand_command(["tool"], {"PATH": str(tmp_path)}, "/")
    demand_command(["./tool"], {}, str(tmp_path))
    with pytest.raises(PermissionError):
        demand_command([str(tmp_path / "plain")], {}, "/")
    with pytest.raises(FileNotFoundError, match="absent"):
        demand_command(["sh"], {}, str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="tool"):
        demand_command(["tool"], {"PATH": "/usr/bin"}, "/")


@pytest.mark.kills
def test_its_own_output_goes_where_the_caller_wants_it(manager: Manager, tmp_path: Path) -> None:
    script = tmp_path / "kernel.py"
    script.write_text(
        "import os, sys\n"
        "os.write(1, b'first words'); os.write(2, b'first complaint')\n"
        "from ipykernel.kernelapp import launch_new_instance\nlaunch_new_instance()\n"
    )
    manager.use("safe-exec", sys.executable, str(script), "-f", "{connection_file}")

    async def run() -> bytes:
        with (tmp_path / "out.txt").open("wb") as out:
            await manager.start_kernel(stdout=out, stderr=subprocess.PIPE)
            try:
                assert (await answer(manager, "1"))["status"] == "ok"
                complaint: bytes = os.read(manager.provisioner.stderr.fileno(), 15)
                return complaint
            finally:
                await manager.shutdown_kernel(now=True)

    assert asyncio.run(run()) == b"first complaint"
    assert (tmp_path / "out.txt").read_bytes() == b"first words"


def test_streams_are_those_of_popen() -> None:
    with standard_streams(subprocess.PIPE, subprocess.STDOUT) as streams:
        assert streams.descriptors["stdout"] == streams.descriptors["stderr"]
        reader, none = streams.readers()
        os.write(streams.descriptors["stderr"], b"x")
    assert reader is not None and none is None and reader.read() == b"x"
    reader.close()
    with standard_streams(None, subprocess.DEVNULL) as streams:
        assert streams.descriptors["stdout"] == 1
        assert os.readlink(f"/proc/self/fd/{streams.descriptors['stderr']}") == os.devnull


@pytest.mark.kills
def test_the_facts_of_a_kernel(manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("")

    async def run() -> tuple[dict[str, Any], str, list[str | None]]:
        env = {**os.environ, "JPY_SESSION_NAME": "analysis.ipynb"}
        await manager.start_kernel(cwd=str(tmp_path), env=env)
        try:
            paths = [manager.resolve_path(path) for path in ("data.csv", "absent", str(tmp_path))]
            written = (tmp_path / "c.json").read_text()
            return await manager.provisioner.get_provisioner_info(), written, paths
        finally:
            await manager.shutdown_kernel(now=True)

    info, written, paths = asyncio.run(run())
    assert info["pid"] == info["pgid"] and info["pid"] > 1 and info["ip"] == "127.0.0.1"
    assert info["connection_info"]["shell_port"] > 0
    assert '"jupyter_session": "analysis.ipynb"' in written
    assert paths == [str(tmp_path / "data.csv"), None, str(tmp_path)]


@pytest.mark.kills
def test_ports_come_from_the_shared_cache_and_go_back(manager: Manager) -> None:
    manager.cache_ports = True
    cache = LocalPortCache.instance()

    async def run() -> int:
        await manager.start_kernel()
        try:
            assert manager.shell_port in cache.currently_used_ports
            return int(manager.shell_port)
        finally:
            await manager.shutdown_kernel(now=True)

    assert asyncio.run(run()) not in cache.currently_used_ports


@pytest.mark.kills
@pytest.mark.parametrize("now", [True, False])
def test_a_shutdown_before_the_kernel_is_up_is_no_news(
    manager: Manager, caplog: pytest.LogCaptureFixture, now: bool
) -> None:
    async def run() -> None:
        await manager.start_kernel()
        await manager.shutdown_kernel(now=now)

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert "kernel ended" not in caplog.text
