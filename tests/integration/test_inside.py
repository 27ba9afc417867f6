"""What ``inside`` mends in ipykernel, in an interpreter of its own: it is not taken back."""

from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT

ENDING = """
import os, socket, sys, time, types
from safe_exec.agent import agent, layout, shutdown
page = os.memfd_create("page")
os.ftruncate(page, layout.PAGE_BYTES + 2 * layout.SEGMENT_BYTES)
facts, fault = (socket.socketpair()[0].detach() for _ in range(2))
shutdown.patch_shutdown(agent.Inside(page, facts, fault, {"headless": True}))

import zmq
from ipykernel.control import ControlThread
from ipykernel.iostream import IOPubThread
from ipykernel.kernelapp import IPKernelApp

control, iopub, found = ControlThread(daemon=True), IOPubThread(zmq.Context.instance().socket(zmq.PUB)), []
IPKernelApp._instance = types.SimpleNamespace(control_thread=control)

def last_request():
    time.sleep(0.3)
    found.append(iopub.thread.is_alive())

iopub.start()
control.start()
control.io_loop.add_callback(last_request)
iopub.stop()
print(found, control.is_alive(), iopub.thread.is_alive(), flush=True)
os._exit(0)
"""


def test_the_last_request_is_done_before_the_thread_ends_that_its_flush_waits_for() -> None:
    """Else one kernel of some eighty took ten seconds to end, or was killed after three."""
    argv = [sys.executable, "-c", ENDING]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[True] False False\n", done.stderr


DUMP = """
import os, signal, sys, tempfile, threading, types
from safe_exec.agent import faults, layout
file = tempfile.TemporaryFile()
faults.arm(types.SimpleNamespace(fault_fd=file.fileno(), forked=lambda: None))
threading.Thread(target=threading.Event().wait, daemon=True).start()
os.kill(os.getpid(), layout.DUMP_SIGNAL)
own = os.pread(file.fileno(), 10000, 0).decode()
os.kill(os.getpid(), layout.DUMP_ALL_SIGNAL)
both = os.pread(file.fileno(), 10000, 0).decode()[len(own):]
print([text.count("most recent call first") for text in (own, both)], "wait" in own, flush=True)
os._exit(0)
"""


def test_a_dump_near_a_limit_reads_the_main_threads_frames_alone() -> None:
    """Those of a thread that runs on may be gone: one kernel of a hundred ended with SIGSEGV."""
    argv = [sys.executable, "-c", DUMP]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[1, 2] False\n", done.stderr
