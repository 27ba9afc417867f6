"""The client between kernel and notebook: caps and their marks, and what is put back of a dead kernel's output. No kernel."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient.exceptions import DeadKernelError

from safe_exec.agent import page as inside_page
from safe_exec.kernel.client import MERGE_AFTER, TrialClient
from safe_exec.kernel.outputs import TRACEBACK_BYTES
from safe_exec.kernel.shared_page import Page

NB: Any = nbformat  # which has no types, as
KERNEL_SIDE: Any = inside_page  # has none
MARK = "[safe-exec: output cut here"
KERNEL = 77


class Bench:
    """A client with one cell that runs, and messages as a kernel would send them."""

    def __init__(self, cell_cap: int | None = None, total_cap: int | None = None) -> None:
        self.node = NB.v4.new_notebook(
            cells=[NB.v4.new_code_cell("first"), NB.v4.new_code_cell("second")]
        )
        self.told: list[tuple[int, int]] = []
        self.client = TrialClient(
            self.node, None, died=asyncio.Event(), on_output=lambda *told: self.told.append(told)
        )
        self.client.reset_execution_trackers()
        self.client.kernel_pid = KERNEL
        self.client.total_cap = total_cap
        self.serial = 0
        self.begin(0, cell_cap)

    def begin(self, index: int, cell_cap: int | None = None) -> None:
        self.client.begin_cell(cell_cap)
        self.client.clear_before_next_output = False  # what nbclient sets when it executes a cell
        self.node.cells[index].metadata["execution"] = {}
        self.client.running = (f"request-{index}", self.node.cells[index], index)

    @property
    def cell(self) -> Any:
        assert self.client.running is not None
        return self.client.running[1]

    def message(self, kind: str, content: dict[str, Any], pid: int = KERNEL) -> dict[str, Any]:
        self.serial += 1
        header = {"msg_id": f"session_{pid}_{self.serial}", "msg_type": kind}
        return {
            "msg_type": kind,
            "header": header,
            "parent_header": {},
            "metadata": {},
            "content": content,
            "buffers": [],
        }

    def send(self, kind: str, pid: int = KERNEL, **content: Any) -> dict[str, Any]:
        message = self.message(kind, content, pid)
        assert self.client.running is not None
        self.client.process_message(message, self.cell, self.client.running[2])
        return message

    def prints(self, text: str, name: str = "stdout", pid: int = KERNEL) -> None:
        self.send("stream", pid, name=name, text=text)

    def shows(self, text: str, **more: Any) -> dict[str, Any]:
        return self.send("display_data", data={"text/plain": text}, metadata={}, **more)

    @property
    def text(self) -> str:
        return "".join(
            part for o in self.cell.outputs for part in o.get("text", "")
        )  # a text, or a list of parts

    @property
    def marks(self) -> int:
        return self.text.count(MARK)


def test_without_caps_all_is_kept() -> None:
    bench = Bench()
    bench.prints("x" * 10**6)
    bench.shows("y" * 10**6)
    assert len(bench.text) == 10**6 and not bench.client.accounts.truncated
    assert bench.told == [(0, 10**6), (0, 10**6)]


def test_text_is_cut_at_the_cap_with_one_mark() -> None:
    bench = Bench(cell_cap=1000)
    for _ in range(5):
        bench.prints("x" * 700)
    accounts = bench.client.accounts
    assert (
        bench.marks == 1
        and bench.text.startswith("x" * 700)
        and 700 <= bench.text.count("x") <= 1000
    )
    assert (accounts.truncated, accounts.received, accounts.messages) == (True, 3500, 5)
    assert "this cell" in bench.text and "1000 B" in bench.text.replace("\xa0", " ")


def test_a_display_that_does_not_fit_leaves_a_mark_in_its_place() -> None:
    bench = Bench(cell_cap=1000)
    bench.prints("before\n")
    bench.shows("y" * 5000)
    assert [o.output_type for o in bench.cell.outputs] == ["stream", "stream"] and bench.marks == 1


def test_an_error_is_shown_even_beyond_the_cap() -> None:
    bench = Bench(cell_cap=1000)
    bench.prints("x" * 5000)
    bench.send("error", ename="ValueError", evalue="v", traceback=["line"])
    assert bench.cell.outputs[-1].ename == "ValueError"


def test_the_cap_of_the_notebook_counts_all_cells() -> None:
    bench = Bench(cell_cap=2000, total_cap=2500)
    bench.prints("x" * 1500)
    bench.begin(1, 2000)
    bench.prints("x" * 1500)
    assert bench.marks == 1 and "the notebook" in bench.text
    assert bench.client.total_stored <= 2500


def test_a_flood_of_empty_outputs_is_bounded_too() -> None:
    bench = Bench(cell_cap=2000)
    for _ in range(1000):
        bench.shows("")
    assert len(bench.cell.outputs) < 15


def test_each_cell_has_a_cap_of_its_own() -> None:
    bench = Bench(cell_cap=1000)
    bench.prints("x" * 5000)
    bench.begin(1, 1000)
    bench.prints("fine")
    assert bench.text == "fine" and not bench.client.accounts.truncated


@settings(deadline=None)
@given(
    texts=st.lists(st.text(max_size=400) | st.just("😀" * 400), max_size=12),
    cap=st.integers(0, 3000),
    total=st.none() | st.integers(0, 3000),
)
def test_no_more_is_stored_than_the_caps_allow(
    texts: list[str], cap: int, total: int | None
) -> None:
    bench = Bench(cell_cap=cap, total_cap=total)
    for text in texts:
        bench.prints(text)
    stored = len(bench.text.partition("\n" + MARK)[0].encode())
    assert stored <= min(cap, cap if total is None else total)
    assert bench.marks == bench.client.accounts.truncated


def test_clear_output_gives_the_cap_back() -> None:
    bench = Bench(cell_cap=1000, total_cap=1500)
    for n in range(50):
        bench.prints(f"step {n} " + "x" * 500)
        if n < 49:
            bench.send("clear_output", wait=False)
    assert bench.text == "step 49 " + "x" * 500 and not bench.client.accounts.truncated


def test_clear_output_that_waits_gives_the_cap_back() -> None:
    bench = Bench(cell_cap=1000, total_cap=1500)
    for n in range(50):
        bench.send("clear_output", wait=True)
        bench.shows(f"step {n} " + "x" * 500)
    assert [o.data["text/plain"][:8] for o in bench.cell.outputs] == ["step 49 "]
    assert not bench.client.accounts.truncated


def test_a_second_cut_after_clear_output_is_marked_too() -> None:
    bench = Bench(cell_cap=1000)
    bench.prints("x" * 5000)
    bench.send("clear_output", wait=False)
    bench.prints("y" * 5000)
    assert bench.text.startswith("y" * 100) and bench.marks == 1


def test_very_many_pieces_of_a_stream_are_joined() -> None:
    bench = Bench()
    for n in range(2 * MERGE_AFTER):
        bench.shows("x")
        bench.prints(f"{n}\n")
    for _ in range(1000):
        bench.prints(".")
    assert len(bench.cell.outputs) <= 4 * MERGE_AFTER
    assert bench.text.count(".") == 1000


def test_a_long_traceback_keeps_its_ends() -> None:
    bench = Bench(cell_cap=500_000)
    bench.send(
        "error", ename="E", evalue="v", traceback=[f"frame {n} " + "x" * 20000 for n in range(50)]
    )
    (error,) = bench.cell.outputs
    assert sum(map(len, error.traceback)) <= 2 * TRACEBACK_BYTES
    assert error.traceback[0].startswith("frame 0 ") and error.traceback[-1].startswith("frame 49 ")


def test_a_display_too_large_to_be_sent_is_marked_once() -> None:
    bench = Bench(cell_cap=1000)
    bench.client.cut_display(10**9)
    bench.client.cut_display(10**9)
    assert bench.marks == 1 and bench.client.accounts.received == 2000, (
        "each counts as a cell's worth, not as a flood"
    )


@pytest.mark.parametrize(
    ("payload", "asked"),
    [
        (None, None),
        ([], None),
        ([{"source": "page"}], None),
        (["nonsense"], None),
        ([{"source": "ask_exit", "keepkernel": False}], 1),
    ],
)
def test_who_asks_to_exit_is_noted(payload: Any, asked: int | None) -> None:
    bench = Bench()
    bench.client._detect_exit_request({"status": "ok", "payload": payload}, 1)
    assert bench.client.asked_to_exit == asked
    bench.client._detect_exit_request({"payload": [{"source": "ask_exit"}]}, 2)
    assert bench.client.asked_to_exit == (1 if asked == 1 else 2), "the first that asks"


# --- one request ------------------------------------------------------------------------------------------------


class Channels:
    """Stands in for a kernel's channels: keeps what is sent, and delivers messages on request."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.deliver: dict[str, Any] = {}
        self.allow_stdin = False
        self.shell_channel = SimpleNamespace(
            consume=lambda call: self._attach("shell", call), request=self._request
        )
        self.iopub_channel = SimpleNamespace(
            consume=lambda call: self._attach("iopub", call), is_exhausted=lambda: True
        )

    def _attach(self, name: str, call: Any) -> None:
        self.deliver[name] = call

    def _request(self, kind: str, content: dict[str, Any]) -> str:
        self.sent.append(f"{kind} {content['code']} {content['stop_on_error']}")
        return f"request-{len(self.sent)}"


class Requests(Bench):
    """A client that listens, and the messages that answer its requests."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = self.client.kc = Channels()
        self.note: Any = None
        self.client.note = lambda: self.note
        self.client.listen()

    def execute(self, index: int = 0) -> Any:
        self.client.begin_cell(None)
        return self.client.send_cell(self.node.cells[index], index)

    def answer(self, channel: str, kind: str, content: dict[str, Any], parent: str) -> None:
        message = self.message(kind, content) | {"parent_header": {"msg_id": parent}}
        self.channels.deliver[channel](message)

    def reply(self, parent: str = "request-1", status: str = "ok", **content: Any) -> None:
        self.answer("shell", "execute_reply", {"status": status} | content, parent)

    def idle(self, parent: str = "request-1") -> None:
        self.answer("iopub", "status", {"execution_state": "idle"}, parent)


def test_a_cell_is_done_with_both_its_reply_and_the_end_of_its_output() -> None:
    async def test(first: str) -> None:
        requests = Requests()
        done = requests.execute()
        requests.reply("another request")
        requests.idle("another request")
        assert not done.done()
        {"reply": requests.reply, "idle": requests.idle}[first]()
        assert not done.done()
        {"reply": requests.idle, "idle": requests.reply}[first]()
        assert done.done() and done.exception() is None
        assert requests.node.cells[0].execution_count == 1
        requests.answer("iopub", "stream", {"name": "stdout", "text": "late"}, "request-1")
        assert requests.node.cells[0].outputs == []
        assert requests.channels.sent == ["execute_request first True"]

    for first in ("reply", "idle"):
        asyncio.run(test(first))


def test_claims_that_the_agent_contradicts_end_no_cell() -> None:
    async def test() -> None:
        requests = Requests()
        done = requests.execute()
        requests.note = SimpleNamespace(cell=1, finished=False)
        requests.idle()
        requests.reply(forged=True)
        assert not done.done() and requests.client.disbelieved == {"idle", "its reply"}
        requests.note = SimpleNamespace(cell=1, finished=True)
        requests.idle()
        requests.reply()
        assert done.done() and "forged" not in requests.client.replies[0]

    asyncio.run(test())


def test_an_error_fails_the_request_unless_it_is_allowed() -> None:
    async def test(tags: list[str]) -> Any:
        requests = Requests()
        requests.node.cells[0].metadata["tags"] = tags
        done = requests.execute()
        requests.idle()
        requests.reply(status="error", ename="ValueError", evalue="v", traceback=["line"])
        return done.exception()

    assert type(asyncio.run(test([]))).__name__ == "CellExecutionError"
    assert asyncio.run(test(["raises-exception"])) is None


def test_a_death_fails_the_request_that_waits() -> None:
    async def test() -> None:
        requests = Requests()
        done = requests.execute()
        requests.client.died.set()
        with pytest.raises(DeadKernelError):
            await asyncio.wait_for(done, 20)

    asyncio.run(test())


# --- after a death ----------------------------------------------------------------------------------------------


class Dead(Bench):
    """A bench whose kernel left a journal."""

    def __init__(self, cell_cap: int | None = None) -> None:
        super().__init__(cell_cap)
        self.page = Page()
        self.inner: Any = KERNEL_SIDE.Page(self.page.fd)
        self.inner.cell = 1

    def recover(self, **residue: str) -> int:
        found = self.client.recover(self.page, 1, residue)
        self.inner.memory.close()
        self.page.close()
        return found


@pytest.mark.parametrize("arrived", ["", "first ", "first line\nse", "first line\nsecond äöü\n"])
def test_text_that_never_arrived_is_put_back(arrived: str) -> None:
    dead = Dead()
    whole = "first line\nsecond äöü\n"
    dead.inner.text(0, whole)
    if arrived:
        dead.prints(arrived)
    assert dead.recover() == len(whole) - len(arrived)
    assert dead.text == whole


def test_both_streams_and_a_display_come_back_in_order() -> None:
    dead = Dead()
    display = dead.message("display_data", {"data": {"text/plain": "shown"}, "metadata": {}})
    parts = [display["header"], {}, {}, display["content"]]
    dead.inner.text(0, "one\n")
    dead.inner.message(
        [
            b"display_data",
            b"<IDS|MSG>",
            b"signature",
            *(json.dumps(part).encode() for part in parts),
        ]
    )
    dead.inner.text(1, "two\n")
    dead.recover(stderr="from C\n")
    assert [o.get("text") or o.data["text/plain"] for o in dead.cell.outputs] == [
        "one\n",
        "shown",
        "two\n",
        "from C\n",
    ]


def test_a_display_that_arrived_is_not_shown_twice() -> None:
    dead = Dead()
    display = dead.shows("once")
    parts = [display["header"], {}, {}, {"data": {"text/plain": "once"}, "metadata": {}}]
    dead.inner.message([b"<IDS|MSG>", b"signature", *(json.dumps(part).encode() for part in parts)])
    assert dead.recover() == 0 and len(dead.cell.outputs) == 1


def test_what_a_forked_child_printed_is_not_taken_for_the_kernels() -> None:
    dead = Dead()
    dead.prints("child says much more than that\n", pid=KERNEL + 1)
    dead.inner.text(0, "kernel\n")
    dead.recover()
    assert dead.text.endswith("kernel\n")


def test_text_that_was_put_back_is_cut_at_the_cap_too() -> None:
    dead = Dead(cell_cap=1000)
    dead.inner.text(0, "x" * 5000)
    dead.recover()
    assert dead.marks == 1 and len(dead.text.partition("\n" + MARK)[0]) <= 1000


def test_text_of_another_cell_stays_there() -> None:
    dead = Dead()
    dead.inner.text(0, "mine")
    dead.inner.cell, dead.inner.last, dead.inner.counts = 2, None, [0, 0]
    dead.inner.text(0, "other")
    dead.recover()
    assert dead.text == "mine"


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"<IDS|MSG>"],
        [b"<IDS|MSG>", b"s", b"{}", b"{}", b"{}", b"{}"],
        [b"<IDS|MSG>", b"s", b"[", b"{}", b"{}", b"{}"],
        [b"<IDS|MSG>", b"s", b"5", b"5", b"5", b"5"],
        [b"<IDS|MSG>", b"s", b'{"msg_type": "stream"}', b"{}", b"{}", b"{}"],
        [b"<IDS|MSG>", b"s", b'{"msg_type": "display_data", "msg_id": "a"}', b"{}", b"{}", b"5"],
        [b"<IDS|MSG>", b"s", b'{"msg_type": "display_data", "msg_id": "a"}', b"{}", b"{}", b"{}"],
        [b"<IDS|MSG>", b"s", b'{"msg_type": "nonsense", "msg_id": "a"}', b"{}", b"{}", b"{}"],
        [
            b"<IDS|MSG>",
            b"s",
            b'{"msg_type": "status", "msg_id": "a"}',
            b"{}",
            b"{}",
            b'{"execution_state": "idle"}',
        ],
    ],
)
def test_a_hostile_journal_does_not_stop_the_rest(frames: list[bytes]) -> None:
    dead = Dead()
    dead.inner.message(frames)
    dead.inner.text(0, "after")
    dead.recover()
    assert dead.text == "after"
    NB.validate(dead.node)
