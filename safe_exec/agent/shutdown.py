"""Makes a kernel exit at once after a shutdown request."""

import _thread
import asyncio
import functools
import os
import signal

# The control thread flushes within milliseconds; a hung one must not delay the end.
CONTROL_SECONDS = 1.0
# The pauses between SIGTERMs. Most children end at the first.
CHILDREN_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0)


def is_alive(child):
    """Tell whether a child still runs; a zombie does not."""
    try:
        return child.status() != "zombie"
    except Exception:
        # psutil.NoSuchProcess, by a name that needs no import: the child is gone.
        return False


async def terminate_children(kernel):
    """Ask the children of an ending kernel to end."""
    # ipykernel waits 14 seconds and then kills them. The keeper kills all remaining processes
    # anyway.
    for seconds in CHILDREN_SECONDS:
        if not kernel._process_children():
            return
        kernel._signal_children(signal.SIGTERM)
        await asyncio.sleep(seconds)


def patch_shutdown(inside):
    """Remove the delays from the shutdown of a kernel."""
    from ipykernel.iostream import IOPubThread
    from ipykernel.kernelapp import IPKernelApp
    from ipykernel.kernelbase import Kernel

    process_children = Kernel._process_children

    @functools.wraps(process_children)
    def process_children_if_any(kernel):
        # psutil need not be imported, and all of /proc read, only to learn that there are none.
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return []
        return [child for child in process_children(kernel) if is_alive(child)]

    Kernel._process_children = process_children_if_any
    if hasattr(Kernel, "_progressively_terminate_all_children") and hasattr(
        Kernel, "_signal_children"
    ):
        Kernel._progressively_terminate_all_children = terminate_children
    stop = IOPubThread.stop

    @functools.wraps(stop)
    def stop_after_control(thread):
        # The thread of the control channel has taken the request to shut down and flushes, while
        # the main thread ends the one that answers a flush: where both meet, neither comes to its
        # end before the flush gives up, in ten seconds or never.
        control = getattr(IPKernelApp._instance, "control_thread", None)
        if control is not None and control.is_alive() and control.ident != _thread.get_ident():
            control.stop()
            control.join(CONTROL_SECONDS)
        stop(thread)

    IOPubThread.stop = stop_after_control
