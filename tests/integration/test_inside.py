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
