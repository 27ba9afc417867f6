"""Which cell runs, from messages of two sockets whose order to each other is not defined."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safe_exec.interactive.front import ConnectionFile
from safe_exec.interactive.proxy import OnDeath, Proxy
from safe_exec.interactive.wire import Author, Message, Signer, parse

AUTHOR = Author(Signer(b"k"))


class Kernel:
    """In place of the sandboxed kernel: keeps the calls."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(current=None, request=SimpleNamespace(node=SimpleNamespace()))
        self.cells: list[SimpleNamespace] = []
        self.state.request.node.cells = self.cells
        self.limits = SimpleNamespace(cell_timeout=None)
        self.ended: list[tuple[int, str]] = []
        self.session = SimpleNamespace(sandbox=SimpleNamespace(ask_to_end=lambda: True))
        self.congested = False

    def add_cell(self, source: str, _id: str | None, _msg_id: str) -> int:
        self.cells.append(SimpleNamespace(source=source, execution_count=None))
        return len(self.cells) - 1

    def begin(self, index: int, _msg_id: str) -> None:
        assert self.state.current is None
        self.state.current = index

    def end(self, index: int, *, failed: bool, counts: bool) -> None:
        assert self.state.current == index
        self.state.current = None
        self.ended.append((index, "failed" if failed else "passed" if counts else "no cell"))

    def discount(self, index: int) -> None:
        self.ended.append((index, "no cell"))

    def note_reply(self, _index: int, message: Message) -> dict[str, Any]:
        return message.content()

    def admit(self, message: Message) -> list[bytes]:
        return message.frames

    def send(self, *_: Any) -> bool:
        return True


class Front:
    """In place of the public sockets."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_a, **_k: None


class Session:
    """A proxy, and messages for it."""

    def __init__(self) -> None:
        file = ConnectionFile(
            path=Path("c.json"), transport="tcp", ip="", key=b"k", scheme="", ports={}, document={}
        )
        self.kernel = Kernel()
        self.proxy = Proxy(
            file,
            make_inner=lambda _on_message: self.kernel,  # type: ignore[arg-type,return-value]
            diagnose=lambda *_: pytest.fail("nothing died"),
            recording=None,
            on_death=OnDeath.EXIT,
            notes=[],
        )
        self.proxy._inner, self.proxy._front = self.kernel, Front()  # type: ignore[assignment]
        self.proxy._is_ready = True
        self.requests: list[Message] = []

    def execute(self, code: str) -> None:
        message = parse([b"client", *AUTHOR.frames("execute_request", {"code": code})])
        self.requests.append(message)
        self.proxy._from_client("shell", SimpleNamespace(name=b"client"), message)  # type: ignore[arg-type]

    def iopub(self, number: int, kind: str, **content: Any) -> None:
        parent = self.requests[number].header_frame
        self.proxy._from_kernel("iopub", parse([b"t", *AUTHOR.frames(kind, content, parent)]))

    def status(self, number: int, state: str) -> None:
        self.iopub(number, "status", execution_state=state)

    def reply(self, number: int, status: str) -> None:
        frames = AUTHOR.frames(
            "execute_reply", {"status": status}, self.requests[number].header_frame
        )
        self.proxy._from_kernel("shell", parse([b"client", b"client", *frames]))


def test_a_reply_that_arrives_after_the_output_of_the_next_cell() -> None:
    async def main() -> None:
        session = Session()
        for code in ("a", "b", "c"):
            session.execute(code)
        session.status(0, "busy")
        session.iopub(0, "error", ename="E")
        session.status(0, "idle")
        assert session.kernel.state.current == 0
        session.status(1, "busy")
        assert session.kernel.state.current == 1, "one socket keeps its order"
        session.status(1, "idle")
        session.reply(0, "error")
        session.reply(1, "ok")
        assert session.kernel.state.current == 2
        assert session.kernel.ended == [(0, "failed"), (1, "passed")]
        session.status(2, "idle")
        session.reply(2, "ok")
        assert session.kernel.state.current is None and not session.proxy._waiting

    asyncio.run(main())


def test_output_that_arrives_after_the_reply() -> None:
    async def main() -> None:
        session = Session()
        session.execute("a")
        session.execute("b")
        session.reply(0, "ok")
        session.reply(1, "ok")
        assert session.kernel.state.current == 0
        session.status(0, "idle")
        assert session.kernel.state.current == 1
        session.status(1, "idle")
        assert session.kernel.ended == [(0, "passed"), (1, "passed")]

    asyncio.run(main())


def test_a_cell_that_the_kernel_refused_is_no_cell_of_the_session() -> None:
    async def main() -> None:
        session = Session()
        session.execute("1 / 0")
        session.execute("b")
        for number, status in enumerate(("error", "aborted")):
            session.status(number, "busy")
            session.reply(number, status)
            session.status(number, "idle")
        assert session.kernel.ended == [(0, "failed"), (1, "no cell")]

    asyncio.run(main())
