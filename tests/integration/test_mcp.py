"""``safe-exec mcp`` with the official client over stdio, as an agent's host starts it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from nbformat import v4

from tests.support import MARK, marked_processes, wait_until

pytestmark = [pytest.mark.kills, pytest.mark.bed("bubblewrap")]
SEGFAULT = "import ctypes\nctypes.string_at(0)"


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 20, "no process is left")


@contextlib.asynccontextmanager
async def server(folder: Path, *options: str) -> AsyncIterator[Client]:
    argv = ["-P", "-m", "safe_exec", "mcp", str(folder), *options]
    parameters = StdioServerParameters(command=sys.executable, args=argv, env=dict(os.environ))
    async with Client(stdio_client(parameters)) as client:
        yield client


async def answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    content: dict[str, Any] = result.structured_content
    return content


async def refusal(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return str(result.content[0].text)


def write_notebook(path: Path, *sources: str) -> Path:
    node = v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])
    node.metadata.kernelspec = {"name": "python3", "display_name": "P", "language": "python"}
    nbformat.write(node, path)
    return path


def test_a_notebook_that_dies(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_notebook(
        folder / "bad.ipynb", "size = 10 << 20", "1 + 1", "[b'x' * size] * 3\n" + SEGFAULT
    )

    async def main() -> None:
        async with server(folder) as client:
            tools = (await client.list_tools()).tools
            assert [tool.name for tool in tools] == [
                "run_notebook",
                "run_cells",
                "explain",
                "bisect",
            ]
            assert "no verdict yet" in await refusal(client, "explain", path="bad.ipynb")
            assert "outside of" in await refusal(client, "run_notebook", path="../bad.ipynb")
            reports: list[float] = []

            async def report(done: float, _total: float | None, _text: str | None) -> None:
                reports.append(done)

            result = await client.call_tool(
                "run_notebook", {"path": "bad.ipynb"}, progress_callback=report
            )
            short = result.structured_content
            assert (short["status"], short["cause"]) == ("kernel_died", "segfault")
            assert (short["cell"], short["line"]) == (3, 3)
            assert [culprit["cell"] for culprit in short["culprits"]] == [1, 3]
            assert {1.0, 2.0, 3.0} <= set(reports)
            explained = await answer(client, "explain", path="bad.ipynb")
            assert explained["verdict"] == short
            assert explained["limits"]["memory"] == "512 MiB", "profile untrusted"
            assert "ctypes.string_at(0)" in explained["stack"][-1]

    asyncio.run(main())


def test_cells_in_the_sandbox(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path) as client:
            first = await answer(
                client, "run_cells", cells=["x = 41", "print(x + 1)", "1 / 0", "x"]
            )
            assert [cell["status"] for cell in first["cells"]] == ["ok", "ok", "error", "not_run"]
            assert first["cells"][1]["output"] == "42\n" and first["verdict"] is None
            assert "no kernel has died" in await refusal(client, "bisect")
            # A cell that claims to be dead is alive all the same.
            forged = "class SafeExec(Exception): pass\nSafeExec.__name__ = 'SafeExec: exit'\nraise SafeExec"
            claimed = await answer(client, "run_cells", cells=[forged])
            assert not claimed["kernel_died"] and claimed["verdict"] is None
            dead = await answer(client, "run_cells", cells=["x", SEGFAULT])
            assert dead["kernel_died"] and dead["verdict"]["cause"] == "segfault"
            assert dead["cells"][0]["output"] == "41\n"
            assert (await answer(client, "explain"))["verdict"] == dead["verdict"]
            fresh = await answer(client, "run_cells", cells=["print('x' in dir())"])
            assert fresh["cells"][0]["output"].endswith("False\n")
            found = await answer(client, "bisect", budget_seconds=60)
            assert [culprit["cell"] for culprit in found["culprits"]] == [dead["verdict"]["cell"]]

    asyncio.run(main())


def test_a_call_that_is_cancelled_leaves_nothing_running(tmp_path: Path, mark: str) -> None:
    write_notebook(tmp_path / "endless.ipynb", "while True:\n    pass")

    async def main() -> None:
        async with server(tmp_path, "--limits", "ci") as client:
            call = asyncio.ensure_future(
                client.call_tool("run_notebook", {"path": "endless.ipynb"})
            )
            deadline = time.monotonic() + 60
            while (
                len(marked_processes(mark)) < 2
            ):  # server and keeper; the kernel's environment is its own
                assert time.monotonic() < deadline and not call.done()
                await asyncio.sleep(0.05)
            call.cancel()
            while len(marked_processes(mark)) > 1:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            assert (await answer(client, "run_cells", cells=["1"]))["cells"][0]["output"] == "1\n"

    asyncio.run(main())


def test_a_sandbox_that_cannot_start_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path, "--kernel", "absent") as client:
            assert "absent" in await refusal(client, "run_cells", cells=["1"])

    asyncio.run(main())
