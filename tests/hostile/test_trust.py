"""The runner trusts nothing that a kernel says: messages of any size, shape and signature, and whatever is written into its channels.

Every notebook's first cell gets hold of the kernel's own key and sockets (``weapons``). The arena checks after each run that the runner
took less than 200 MB, that the documents are valid, and that nothing is left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from safe_exec.model.verdict import Status
from tests.hostile.arena import PLACES, Arena, Fight, in_turn
from tests.hostile.weapons import WEAPONS
from tests.support import make_notebook

pytestmark = pytest.mark.hostile

ROOT, USER = (
    pytest.mark.parametrize("arena", [place], ids="-".join, indirect=True) for place in PLACES
)
"""For what is told to the runner, and judged by it, in the same way whoever the kernel is: one of the places will do."""

PASSED, DIED, ERROR, TIMEOUT, LIMIT = (
    Status.PASSED,
    Status.KERNEL_DIED,
    Status.CELL_ERROR,
    Status.TIMEOUT,
    Status.LIMIT_EXCEEDED,
)


def fight(
    arena: Arena, *cells: str, timeout: str = "20", options: Sequence[str] = (), **env: str
) -> Fight:
    """Run cells behind the weapons. IPython's own files go beside the notebook: in profile default the home is the user's own."""
    more = {"IPYTHONDIR": str(arena.mkdir("ipython")), **env}
    return arena.run(WEAPONS, *cells, options=("--cell-timeout", timeout, *options), env=more)


def said(found: Fight) -> str:
    return "\n".join(found.verdict["warnings"])


def outputs(found: Fight, code_index: int) -> list[Any]:
    cells = [cell for cell in found.notebook.cells if cell.cell_type == "code"]
    return list(cells[code_index].outputs)


# --- size -------------------------------------------------------------------------------------------------------

BIG = {
    "display": "from IPython.display import HTML, display\ndisplay(HTML('x' * 500_000_000))\nprint('after')",
    "stream": "print('x' * 500_000_000)\nprint('after')",
    "display past ipykernel": "say('display_data', data={'text/plain': 'x' * 500_000_000}, metadata={})\nprint('after')",
    "stream past ipykernel": "say('stream', name='stdout', text='x' * 500_000_000)\nprint('after')",
    "parts": "iopub([b't', *message('stream', {'name': 'stdout', 'text': 'x'}), *[b'y' * 5_000_000] * 100])\nprint('after')",
    "empty parts": "iopub([b't', *message('stream', {'name': 'stdout', 'text': 'x'}), *[b''] * 200_000])\nprint('after')",
}


@pytest.mark.parametrize(("arena", "name"), in_turn(BIG, both=("display",)), indirect=["arena"])
def test_half_a_gigabyte_at_once_is_cut(arena: Arena, name: str) -> None:
    found = fight(arena, BIG[name], "print('next cell')", timeout="60")
    # What ipykernel itself is given counts by its own record: so much at once may be seen as the flood that it is.
    assert found.status in (PASSED, LIMIT), found
    if found.status == PASSED:
        assert "next cell" in found.text and "was cut at its limit" in said(found), found


@USER
def test_a_flood_past_ipykernel_ends_the_run(arena: Arena) -> None:
    cell = "text = 'x' * 4_000_000\nfor _ in range(1000): say('stream', name='stdout', text=text)"
    found = fight(arena, cell, timeout="60")
    assert (found.status, found.cause, found.cell) == (LIMIT, "output_flood", 1), found


@ROOT
def test_a_reply_of_many_megabytes_is_an_error_of_its_cell(arena: Arena) -> None:
    found = fight(
        arena,
        "answer(status='error', ename='E', evalue='x' * 60_000_000, traceback=[])\nraise ValueError('x' * 60_000_000)",
    )
    assert found.status == ERROR and found.cell == 1, found
    assert "too large" in str(found), found


SWELLING = {
    "objects": "b'{},' * 5_000_000",
    "lists": "b'[],' * 5_000_000",
    "texts": "b'\"ab\",' * 3_000_000",
    "numbers": "b'1.5,' * 4_000_000",
}


@ROOT  # whose profile has a cap for output so large that the text itself is let through
@pytest.mark.parametrize("name", list(SWELLING))
def test_json_that_swells_in_memory_is_not_parsed(arena: Arena, name: str) -> None:
    cell = f"iopub([b't', *message('display_data', b'{{\"data\":{{\"application/json\":[' + {SWELLING[name]} + b'1]}}}}')])"
    found = fight(arena, cell, "print('next cell')")
    assert found.status == PASSED and "next cell" in found.text and "malformed" in said(found), (
        found
    )


@USER
def test_much_text_that_looks_like_structure_is_text(arena: Arena) -> None:
    found = fight(arena, "print('{[,:\"' * 600_000)")
    assert found.status == PASSED and found.text.count('{[,:"') == 600_000 and said(found) == ""


# --- shape ------------------------------------------------------------------------------------------------------


def test_what_is_nested_too_deeply_is_left_out(arena: Arena) -> None:
    cell = """
deep = b'[' * 100_000 + b']' * 100_000
for content in (deep, b'{"data":{"text/plain":' + deep + b'}}', b'{"data":{"application/json":' + deep + b'}}'):
    iopub([b't', *message('display_data', content)])
    shell(message('execute_reply', content))
for at in (2, 3, 4):
    parts = message('display_data', {'data': {'text/plain': 'no'}, 'metadata': {}})
    parts[at] = deep
    iopub([b't', *parts[:1], session.sign(parts[2:6]), *parts[2:]])
middling = b'[' * 400 + b']' * 400
iopub([b't', *message('display_data', b'{"data":{"application/json":' + middling + b'},"metadata":{}}')])
print('after')
"""
    found = fight(arena, cell, "print('next cell')")
    assert found.status == PASSED and "after" in found.text and "next cell" in found.text, found
    assert "malformed" in said(found)


def test_no_numbers_and_half_characters_are_made_harmless(arena: Arena) -> None:
    cell = r"""
iopub([b't', *message('stream', b'{"name":"stdout","text":"a\\ud800b"}')])
iopub([b't', *message('display_data', b'{"data":{"text/plain":"\\udc00","application/json":{"\\ud800":NaN,"b":-Infinity}},"metadata":{"x":NaN}}')])
raise ValueError('\ud800 \x1b]0;title\x07')
"""
    found = fight(arena, cell)
    assert (found.status, found.cell) == (ERROR, 1), found
    text = Path(found.verdict["outputs"]["notebook"]).name
    assert text.endswith(".out.ipynb")
    assert outputs(found, 1)[0].text == "a\ufffdb"
    assert outputs(found, 1)[1].data["application/json"] == {"\ufffd": None, "b": None}
    assert "\x1b]0;" not in found.stdout + found.stderr + json.dumps(
        found.verdict["cause"], ensure_ascii=False
    )


BUNDLES = r"""
for data in ([1], 5, None, {"text/plain": 5}, {"text/plain": None, "text/html": "kept"}, {"text/plain": {"a": 1}}, {"text/plain": [1]},
             {"image/png": "<script>", "text/html": "kept"}, {str(n): "x" for n in range(100_000)}, {"x" * 10_000: "y"}):
    say("display_data", data=data, metadata={})
    say("execute_result", data=data, metadata=[], execution_count="x")
    say("update_display_data", data=data, metadata={}, transient={"display_id": "d"})
for content in ({"name": 5, "text": "x"}, {"name": "stdout", "text": 5}, {"name": "stdout"}, {}):
    say("stream", **content)
say("error", ename=1, evalue=2, traceback="x"); say("error", ename="E", evalue="v", traceback=[1])
for count in ("one", -5, 10 ** 30, [1], True, 1.5):
    say("execute_input", code="x", execution_count=count)
    say("execute_result", data={"text/plain": "counted"}, metadata={}, execution_count=count)
for transient in (5, [1], {"display_id": [1]}, {"display_id": {"a": 1}}):
    say("display_data", data={"text/plain": "x"}, metadata={}, transient=transient)
say("comm_open", comm_id=[1], data=5, target_name={}); say("comm_msg", comm_id="a", data=[]); say("comm_close")
say("clear_output", wait=[1]); say("status"); say("status", execution_state=[1])
"""


def test_wrong_mime_bundles_and_types_are_left_out(arena: Arena) -> None:
    found = fight(arena, BUNDLES + "die()", "print('never')")
    assert (found.status, found.cell) == (DIED, 1), found
    assert "malformed message(s) from the kernel were dropped or repaired" in said(found)
    for output in outputs(found, 1):
        for kind, value in output.get("data", {}).items():
            assert isinstance(value, str) and kind != "image/png" and len(output.data) <= 100, (
                output
            )
    assert found.verdict["crash_cell"]["execution_count"] is None or isinstance(
        found.verdict["crash_cell"]["execution_count"], int
    )


GARBAGE = r"""
iopub([b"x"]); iopub([b"<IDS|MSG>"]); iopub([b"t", b"<IDS|MSG>", b"", b"{}", b"{}", b"{}", b"{}"])
iopub([os.urandom(1000) for _ in range(100)])
iopub([b"t", *message("stream", {"name": "stdout", "text": "FORGED"}, signature=b"0" * 64)])
iopub([b"t", *message("stream", {"name": "stdout", "text": "FORGED"}, padding="y" * 5_000_000)])
iopub([b"t", *message("stream", {"name": "stdout", "text": "FORGED"}, {"header": {"msg_id": "nobody"}})])
replayed = [b"t", *message("stream", {"name": "stdout", "text": "once "})]
iopub(replayed); iopub(replayed)
for content in (b"5", b"[]", b"null", b"{", b"\xff\xfe", b""):
    iopub([b"t", *message("stream", content)]); shell(message("execute_reply", content))
for head in ({"msg_type": 5}, {"msg_id": [1]}, {"msg_type": None, "msg_id": None}, {"version": "1"}, {"version": 7, "date": "9999-99-99T99:99:99"}):
    iopub([b"t", *message("stream", {"name": "stdout", "text": ""}, **head)])
for parent in ([1], 5, "x", {"msg_id": [1]}, {"msg_id": {}}):
    parts = message("execute_reply", {"status": "ok"}); parts[3] = json.dumps(parent).encode(); parts[1] = session.sign(parts[2:6])
    shell(parts); iopub([b"t", *parts])
shell([b"x"]); shell([b""] * 3000)
shell(message("shutdown_reply", {"status": "ok", "restart": False})); shell(message("kernel_info_reply", {"status": 5}))
shell(message("input_request", {"prompt": "\x1b[2J", "password": True})); shell(message("execute_reply", {"status": ["ok"]}, {"header": later(1)}))
print("after")
"""


def test_frames_that_are_no_message_are_left_out(arena: Arena) -> None:
    found = fight(arena, GARBAGE, "print('next cell')")
    assert (
        found.status == PASSED and found.text.count("once") == 1 and "FORGED" not in found.text
    ), found
    assert "after" in found.text and "next cell" in found.text and "malformed" in said(found)


@ROOT
def test_a_greeting_that_goes_on_with_garbage_ends_in_silence(arena: Arena) -> None:
    """Bytes straight into the connection that no ZeroMQ library would send: the cell ends by its time."""
    cell = """
import stat
sent = 0
for fd in map(int, os.listdir('/proc/self/fd')):
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as found:
                if found.type == socket.SOCK_STREAM and found.family == socket.AF_UNIX and RUNTIME in str(found.getsockname()):
                    found.setblocking(False)
                    sent += 1
                    found.send(b'\\x02' + b'\\xff' * 8 + b'garbage' * 1000)
    except OSError:
        pass
os.write(2, b'SENT %d' % sent)
time.sleep(60)
"""
    found = fight(arena, cell, timeout="3")
    assert (found.status, found.cell) == (TIMEOUT, 1), found
    assert re.search("SENT [3-9]", found.text + found.verdict["stderr_tail"]), (
        "shell, iopub and control"
    )


# --- floods -----------------------------------------------------------------------------------------------------

FLOODS = {
    "comms": "say_soon('comm_open', comm_id=str(n), target_name='jupyter.\\x1b[31m', data={'state': {'x': 'y' * 50}})",
    "comm messages": "say_soon('comm_msg', comm_id='one', data={'state': {str(n): 'y' * 50}})",
    "updates": "say_soon('update_display_data', data={'text/plain': 'x'}, metadata={}, transient={'display_id': str(n % 10)})",
    "displays with ids": "say_soon('display_data', data={'text/plain': ''}, metadata={}, transient={'display_id': str(n)})",
    "clears": "say_soon('clear_output', wait=True)",
    "nothing": "say_soon('stream', name='stdout', text='')",
    "of nobody": "iopub_soon([b't', *message('stream', {'name': 'stdout', 'text': 'x' * 100}, {'header': {'msg_id': 'nobody'}})])",
}
FLOOD = """
head, loop, unsent = here(), app.iopub_thread.io_loop, app.iopub_thread.socket.send_multipart
def iopub_soon(frames):
    loop.add_callback(unsent, frames)
def say_soon(kind, **content):
    iopub_soon([b't', *message(kind, content, head)])
began, n = time.time(), 0
while time.time() - began < 60:
    n += 1
    {attack}
    if n % 500 == 0:
        iopub([b't', *message('status', {{'execution_state': 'busy'}}, head)])
"""


@pytest.mark.parametrize(
    ("arena", "name"), in_turn(FLOODS, both=("comms", "updates")), indirect=["arena"]
)
def test_a_flood_of_small_messages_ends_by_the_cells_time(arena: Arena, name: str) -> None:
    found = fight(arena, FLOOD.format(attack=FLOODS[name]), timeout="3")
    assert found.status in (TIMEOUT, LIMIT) and found.cell == 1 and found.seconds < 25, found
    assert "No handler" not in found.stderr


# --- lies -------------------------------------------------------------------------------------------------------

LIES = {
    "ok and idle": "idle(); answer()",
    "idle": "idle()",
    "ok": "answer()",
    "an error": "answer(status='error', ename='Forged', evalue='no', traceback=[])",
    "aborted": "answer(status='aborted')",
    "many": "[(idle(), answer()) for _ in range(200)]",
    "a shutdown": "shell(message('shutdown_reply', {'status': 'ok', 'restart': False})); answer(); idle()",
    "a restart": "say('status', execution_state='restarting'); say('status', execution_state='dead'); answer(); idle()",
    "another count": "say('execute_input', code='x', execution_count=77); answer(execution_count=77); idle()",
    "of a later cell": "answer({'header': later(1)}); idle({'header': later(1)})",
}


@pytest.mark.parametrize(
    ("arena", "name"), in_turn(LIES, both=("ok and idle",)), indirect=["arena"]
)
def test_a_kernel_that_says_it_is_done_and_dies_died_in_that_cell(arena: Arena, name: str) -> None:
    found = fight(
        arena,
        f"{LIES[name]}\ntime.sleep(1)\nprint('last words')\ndie()",
        "print('never')",
        "print('never')",
    )
    assert (found.status, found.cell) == (DIED, 1), found
    assert "never" not in found.text and "last words" in found.text
    assert found.verdict["crash_cell"]["line"] == 4
    statuses = [cell["status"] for cell in found.verdict["cells"]]
    assert statuses == ["passed", "killed", "not_run", "not_run"]
    if name != "of a later cell":
        assert "code cell 2 was said to be done" in said(found), found


def test_a_reply_forged_from_a_thread_for_a_later_cell_is_not_believed(arena: Arena) -> None:
    lie = """
heads, to = [later(n) for n in range(4)], ident()
def lie():
    while True:
        for head in heads:
            shell(message('execute_reply', {'status': 'ok', 'execution_count': 1}, {'header': head}), to)
            iopub([b't', *message('status', {'execution_state': 'idle'}, {'header': head})])
        time.sleep(0.01)
threading.Thread(target=lie, daemon=True).start()
"""
    found = fight(arena, lie, "time.sleep(2)\nprint('second')\ndie()", "print('never')")
    assert (found.status, found.cell) == (DIED, 2), found
    assert "second" in found.text and "never" not in found.text


@USER
def test_a_kernel_that_says_it_is_done_and_goes_on_is_out_of_time(arena: Arena) -> None:
    found = fight(
        arena, "idle(); answer()\nwhile True: time.sleep(0.1)", "print('never')", timeout="3"
    )
    assert (found.status, found.cell) == (TIMEOUT, 1) and "was said to be done" in said(found), (
        found
    )


@ROOT
def test_a_kernel_that_says_it_is_done_and_then_is_passes(arena: Arena) -> None:
    found = fight(
        arena, "idle(); answer()\ntime.sleep(1)\nprint('really done')", "print('next cell')"
    )
    assert found.status == PASSED and "really done" in found.text and "next cell" in found.text, (
        found
    )
    assert "code cell 2 was said to be done" in said(found)


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        ({}, ERROR),
        ({"status": 5}, ERROR),
        ({"status": "error"}, ERROR),
        ({"status": "error", "ename": 5, "evalue": [], "traceback": {"x": 1}, "payload": 7}, ERROR),
        ({"status": "ok", "payload": 5, "execution_count": "x"}, PASSED),
        ({"status": "ok", "payload": [5, {"source": [1]}], "user_expressions": []}, PASSED),
    ],
    ids=str,
)
def test_a_reply_of_the_wrong_types(reply: dict[str, Any], status: Status) -> None:
    with Arena("root", "default") as arena:
        cell = f"""
real = session.send
def send(stream, kind, content=None, *rest, **more):
    return real(stream, kind, {reply!r} if kind == 'execute_reply' else content, *rest, **more)
session.send = send
"""
        found = fight(arena, cell)
        assert found.status == status, found
        assert status == PASSED or found.cell == 1


# --- names ------------------------------------------------------------------------------------------------------


def test_the_connection_file_is_not_read_again(arena: Arena) -> None:
    cell = """
import errno
path = app.abs_connection_file
info = json.load(open(path))
try:
    os.unlink(path)
except OSError as error:  # inside bubblewrap it is mounted, and cannot be written either
    assert error.errno == errno.EBUSY
    refused = 0
    for flags in (os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
        try:
            os.open(path, flags)
        except OSError:
            refused += 1
    assert refused == 2
else:
    json.dump({**info, 'key': 'x', 'ip': '/nowhere', 'shell_port': 99}, open(path, 'w'))
    os.rename(path, path + '.moved')
    os.mkfifo(path)
"""
    found = fight(arena, cell, "print('next cell')")
    assert found.status == PASSED and "next cell" in found.text, found


def test_a_socket_put_in_the_place_of_the_kernels_is_never_reached(arena: Arena) -> None:
    """Its own sockets closed, others listening under their names, by a link too: nobody may come."""
    cell = """
import zmq
names = [RUNTIME + '/' + name for name in os.listdir(RUNTIME) if name.startswith('k-')]
caught = []
def listen(path, link):
    os.unlink(path)
    found = socket.socket(socket.AF_UNIX)
    found.bind(path + '.x' if link else path)
    found.listen(50)
    if link:
        os.symlink(path + '.x', path)
    while True:
        found.accept()
        caught.append(path)
for n, name in enumerate(names):
    threading.Thread(target=listen, args=(name, n % 2), daemon=True).start()
for found in [o for o in gc.get_objects() if isinstance(o, zmq.Socket)]:
    try:
        found.close(0)
    except Exception:
        pass
time.sleep(2.5)
os.write(2, b'CAUGHT' if caught else b'NOBODY CAME')
os.kill(os.getpid(), 11)
"""
    found = fight(arena, cell)
    assert (found.status, found.cell) == (DIED, 1), found
    assert "NOBODY CAME" in found.text + found.verdict["stderr_tail"], found


def test_a_kernel_without_sockets_is_out_of_time(arena: Arena) -> None:
    cell = """
import zmq
for found in [o for o in gc.get_objects() if isinstance(o, zmq.Socket)]:
    try:
        found.close(0)
    except Exception:
        pass
time.sleep(60)
"""
    found = fight(arena, cell, timeout="2")
    assert (found.status, found.cell) == (TIMEOUT, 1), found


# --- the channels of inside -------------------------------------------------------------------------------------

CHANNELS = {
    "facts of bytes": """
for _ in range(3000):
    facts.setblocking(True); facts.send(os.urandom(200))
""",
    "facts of shapes": r"""
facts.setblocking(True)
for value in (5, [], "x", None, True, {}, {"cell": 1e400}, {"cell": -1, "msg_id": "x"}, {"cell": 10 ** 400, "msg_id": 5}, {"file": [], "cell": []},
              {"file": "\ud800", "cell": "1"}, {"error": 5, "cell": 1, "line": 1}, {"error": [[1, 2]], "line": -1, "cell": 2},
              {"error": [["f" * 60000, 10 ** 30, "\x1b[31m", -1]], "line": 10 ** 12, "cell": 2}, {"exit_caller": [["x", 1, "y", 2]] * 900},
              {"remote": ["x"]}, {"oversize": -10 ** 18}, {"oversize": 1e400}, {"oversize": "x"}, {"exec": {"a": 1}},
              {"hello": 1, "main": "x", "uid": [], "path": 5, "python": {"x": "y"}, "fitted": 7}, {"pipe": "stdout"}, {"pipe": ["x"]}):
    facts.send(json.dumps(value).encode("utf-8", "surrogatepass"))
facts.send(b'{"cell": Infinity, "msg_id": NaN}'); facts.send(b'[' * 60000); facts.send(b'{"cell": ' + b'9' * 60000 + b'}')
""",
    "facts without end": """
def flood():
    facts.setblocking(True)
    n = 0
    while True:
        n += 1
        facts.send(json.dumps({"file": f"/x/{n}" * 50, "cell": 2}).encode())
for _ in range(3):
    threading.Thread(target=flood, daemon=True).start()
time.sleep(2)
""",
    "descriptors": """
facts.setblocking(True)
for _ in range(3000):
    r, w = os.pipe(); os.write(w, b'STRANGE')
    socket.send_fds(facts, [b'{"pipe": "stdout"}'], [r]); socket.send_fds(facts, [b'x'], [w, w, w, w, w])
    socket.send_fds(facts, [b'{"pipe": "stderr"}'], [fault])
    os.close(r); os.close(w)
""",
    "page of bytes": "page[:] = os.urandom(len(page))",
    "page of ones": "page[:] = b'\\xff' * len(page)",
    "page without a size": """
import fcntl
for name in os.listdir('/proc/self/fd'):
    try:
        os.ftruncate(int(name), 0)
    except OSError:
        pass
""",
    "page of empty records": """
from struct import pack_into
segment = 8192 + 128 * 1024
for base in (segment, segment + 4 * 1024 * 1024):
    pack_into('<I', page, base, 0xffffffff)
    for at in range(base + 4, base + 4 * 1024 * 1024 - 40, 24):
        pack_into('<IQBBHQ', page, at, 0, 2 ** 63, 1, 255, 0, inside.page.cell)
""",
    "page of a lying journal": """
from struct import pack_into
segment = 8192 + 128 * 1024
deep = b'[' * 200000
for base in (segment, segment + 4 * 1024 * 1024):
    pack_into('<I', page, base, 0xffffffff); at = base + 4
    for frames in ([b'<IDS|MSG>', b'', deep, deep, deep, deep], [b'<IDS|MSG>'], [b'<IDS|MSG>', b'', b'5', b'5', b'5', b'5'],
                   [b'<IDS|MSG>', b'', b'{"msg_id": [1], "msg_type": "stream"}', b'{}', b'{}', b'{"name": 5, "text": 7}'],
                   [b'<IDS|MSG>', b'', b'{"msg_id": "a", "msg_type": "error"}', b'{}', b'{}', b'{"traceback": 7}']):
        body = struct.pack('<I', 2 ** 32 - 1) + b''.join(struct.pack('<I', len(f)) + f for f in frames) + b'\\xff' * 7
        pack_into('<IQBBHQ', page, at, len(body), 0, 2, 0, 0, inside.page.cell); page[at + 24 : at + 24 + len(body)] = body
        at += 24 + len(body)
    text = b'\\xff\\xfe\\x1b[31m' * 1000
    pack_into('<IQBBHQ', page, at, len(text), 5, 1, 0, 0, inside.page.cell); page[at + 24 : at + 24 + len(text)] = text
""",
    "page of a stack": """
found = json.dumps({"cell": 1e400, "rows": [["f", 1e400, "p", 1]], "awaiting": []}).replace('Infinity', 'Infinity').encode()
struct.pack_into('<I', page, 8192, 2 ** 31); page[8196 : 8196 + len(found)] = found
time.sleep(0.5)
""",
    "counts without end": "struct.pack_into('<QQ', page, 256, 2 ** 64 - 1, 2 ** 64 - 1)",
    "times that are none": """
struct.pack_into('<d', page, 24, float('nan'))
for slot in range(64):
    struct.pack_into('<QIIdddQQ', page, 512 + slot * 56, inside.page.cell, 2 ** 31, 0, float('nan'), float('-inf'), float('inf'), 0, 0)
""",
    "fault of bytes": """
for _ in range(400):
    os.write(fault, os.urandom(65536))
""",
    "fault of lies": r"""
os.write(fault, b'Fatal Python error: \x1b]0;title\x07\xff\nCurrent thread 0x' + b'f' * 3000 + b' (most recent call first):\n  File "' +
         b'x' * 60000 + b'", line 99999999999999999999 in \x1b[2J\n')
""",
}


READ_WHILE_ALIVE = [
    "facts without end",
    "descriptors",
    "page of bytes",
    "page of a stack",
    "times that are none",
    "fault of bytes",
]


@pytest.mark.parametrize(("arena", "name"), in_turn(CHANNELS), indirect=["arena"])
def test_garbage_in_the_channels_of_the_inside_changes_no_verdict(arena: Arena, name: str) -> None:
    """The kernel dies after it: of that, in that cell, whatever stands in its channels."""
    found = fight(arena, CHANNELS[name] + "\ndie()", "print('never')")
    assert (found.status, found.cell) == (DIED, 1), found
    assert found.verdict["cause"]["signal"] == -9 and found.cause == "killed", found
    assert found.seconds < 30 and "Traceback" not in found.stderr, found
    shown = found.stdout + found.stderr
    assert "\x1b]" not in shown and "\x1b[2J" not in shown and "STRANGE" not in shown


@pytest.mark.parametrize(("arena", "name"), in_turn(READ_WHILE_ALIVE), indirect=["arena"])
def test_garbage_in_the_channels_and_a_timeout(arena: Arena, name: str) -> None:
    """Now they are read while the kernel lives: to see what it is doing."""
    found = fight(arena, CHANNELS[name] + "\nwhile True: time.sleep(0.05)", timeout="3")
    assert (found.status, found.cell) == (TIMEOUT, 1), found
    assert found.seconds < 30 and "Traceback" not in found.stderr, found


# --- what is seen -----------------------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b31m\u202egnp.exe\u200b\r\b\x00"
RAW = re.compile(r"\x1b\][^\x07]*|\x1b\[2J|\x9b|\x07|\u202e|\u200b|\x00|\x08")


SHOUTS = {
    "exception": f"class E(Exception): pass\nE.__name__ = E.__qualname__ = {EVIL!r}\nraise E({EVIL!r})",
    "death": f"import os, sys\nprint({EVIL!r}); print({EVIL!r}, file=sys.stderr); os.write(2, {EVIL!r}.encode())\nos.abort()  # {{source}}",
    "function": f"import os\ndef f(): os._exit(3)\nf.__code__ = f.__code__.replace(co_name={EVIL!r}.replace(chr(0), ''))\nf()",
}


@pytest.mark.parametrize(("arena", "name"), in_turn(SHOUTS, both=("death",)), indirect=["arena"])
def test_no_escape_reaches_the_terminal(arena: Arena, name: str) -> None:
    folder = arena.mkdir("\x1b[31mred\x9b\u202e")
    source = SHOUTS[name].replace("{source}", EVIL.replace("\r", "").replace("\x00", ""))
    path = make_notebook(
        folder / "nb\x1b]0;owned\x07.ipynb", f"# {EVIL[:-1]}\nx = 1".replace("\r", ""), source
    )
    env = {"TERM": "xterm-256color", "IPYTHONDIR": str(arena.mkdir("ipython"))}
    found = arena.run_notebook(path, env=env, terminal=True)
    assert (
        found.status == (ERROR if name == "exception" else DIED) and "code cell 2" in found.stdout
    ), found
    assert RAW.findall(found.stdout) == [], repr(found.stdout)
    banner = found.notebook.cells[0].source
    assert RAW.findall(banner) == [], repr(banner)


@ROOT
def test_no_escape_of_a_kernels_name_reaches_the_terminal(arena: Arena) -> None:
    path = make_notebook(arena.folder / "nb.ipynb", "1", kernel=EVIL)
    env = {"TERM": "xterm", "IPYTHONDIR": str(arena.mkdir("ipython"))}
    for options, told in (
        ((), "is not installed"),
        (("--kernel-fallback", "never"), "did not start"),
    ):
        seen = arena.launch(path, options=options, env=env, terminal=True).stdout
        assert told in seen and RAW.findall(seen) == [], repr(seen)


@ROOT
def test_markup_is_inert_in_the_banner(arena: Arena) -> None:
    evil = "</b><script>alert(1)</script> ![x](http://evil/x.png) [a](javascript:1) $\\\\href{javascript:1}{x}$ `` ` ``` | <img src=x onerror=1>"
    found = fight(
        arena,
        f"class E(Exception): pass\nE.__name__ = {evil!r}\nimport os\nprint({evil!r})\nraise MemoryError({evil!r})",
    )
    banner = found.notebook.cells[0].source
    assert found.notebook.cells[0].cell_type == "markdown"
    outside = re.sub(
        r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"(?ms)^(`{3,})text\n.*?\n\1$", "", banner)
    )
    assert (
        "<script" not in outside
        and "<img" not in outside
        and "](http" not in outside
        and "](javascript" not in outside
    ), banner


# --- secrets ----------------------------------------------------------------------------------------------------


@USER
def test_secrets_of_the_environment_are_masked_in_reports_and_left_in_outputs(arena: Arena) -> None:
    secret = "hunter2-Zq93/+xyz="
    cells = (
        f"import os, sys\nos.write(2, b'{secret}\\n'); print('{secret}')\nsys.stderr.write('terminate called: {secret}\\n')",
        f"token = '{secret}'; raise RuntimeError('cannot log in with {secret}')",
    )
    log = arena.folder / "events.jsonl"
    found = fight(arena, *cells, options=("--events", str(log)), MY_API_TOKEN=secret)
    assert (found.status, found.cell) == (ERROR, 2), found
    assert secret in found.text, "the user's own outputs stay"
    assert secret not in found.stdout + found.stderr + json.dumps(found.verdict) + log.read_text()
    assert (
        "***" in found.verdict["cause"]["summary"]
        and "***" in found.verdict["crash_cell"]["source_line"]
    )
    assert secret not in found.notebook.cells[0].source
    assert secret not in json.dumps(found.notebook.metadata)


@ROOT
def test_secrets_are_masked_in_our_error_output(arena: Arena) -> None:
    secret = "s3cr3t-value-42"
    found = fight(
        arena,
        f"x = '{secret}'\nos.write(2, b'terminate called {secret}')\nos.abort()  # {secret}",
        DB_PASSWORD=secret,
    )
    assert (found.status, found.cell) == (DIED, 1), found
    ours = [output for output in outputs(found, 1) if output.output_type == "error"]
    assert ours and secret not in json.dumps(ours) and "***" in json.dumps(ours)
    assert secret not in json.dumps(found.verdict) + found.stdout + found.stderr
