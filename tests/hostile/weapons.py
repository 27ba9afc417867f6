"""What a notebook that means harm knows about its own kernel: its key, its sockets, and the channels of ``inside``.

``WEAPONS`` is the source of a cell that the others of such a notebook begin with. In them:

    message(kind, content, parent=..., ...)   the frames of a signed message; ``content`` may be bytes that are no JSON
    iopub(frames), shell(frames)              send frames as they are, past all that ipykernel or ``inside`` would check
    say(kind, **content), answer(**content)   a signed message over iopub; a signed execute_reply to the request that runs
    page, facts, fault                        the shared page (mmap), the facts socket, the descriptor of the fault handler
    die()                                     SIGKILL to itself
"""

from __future__ import annotations

WEAPONS = r'''
import gc, json, mmap, os, signal, socket, struct, sys, threading, time
from ipykernel.kernelapp import IPKernelApp
app = IPKernelApp.instance()
kernel, session = app.kernel, app.kernel.session
RUNTIME = os.path.dirname(app.abs_connection_file)

def here():
    return kernel.get_parent("shell")

def message(kind, content, parent=None, signature=None, **header):
    parent = here() if parent is None else parent
    head = {**session.msg_header(kind), **header}
    parts = [content if isinstance(content, bytes) else json.dumps(content, default=str).encode() for content in
             (head, parent.get("header", parent), {}, content)]
    return [b"<IDS|MSG>", session.sign(parts) if signature is None else signature, *parts]

def _there(loop, send):
    sent = threading.Event()
    def go():
        try:
            send()
        finally:
            sent.set()
    loop.add_callback(go)
    sent.wait(60)

def iopub(frames):
    _there(app.iopub_thread.io_loop, lambda: app.iopub_thread.socket.send_multipart(frames))

def ident():
    found = kernel._get_shell_context_var(kernel._shell_parent_ident)
    return found[0] if isinstance(found, list) else found

def shell(frames, to=None):
    to = to or ident()
    _there(app.shell_channel_thread.io_loop, lambda: app.shell_socket.send_multipart([to, *frames]))

def say(kind, **content):
    iopub([b"topic", *message(kind, content)])

def answer(parent=None, **content):
    shell(message("execute_reply", {"status": "ok", "execution_count": 1, "payload": [], "user_expressions": {}, **content}, parent))

def idle(parent=None):
    iopub([b"topic", *message("status", {"execution_state": "idle"}, parent)])

def later(steps):
    """The header of the request that comes so many requests after this one: ids are counted."""
    head = dict(here()["header"])
    stem, _, number = head["msg_id"].rpartition("_")
    return {**head, "msg_id": f"{stem}_{int(number) + steps}"}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

inside = next(o for o in gc.get_objects() if type(o).__name__ == "Inside" and hasattr(o, "page"))
page, facts, fault = inside.page.memory, inside.facts, inside.fault_fd
'''
"""The first cell."""
