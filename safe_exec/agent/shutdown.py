"""The end of a kernel that is done: at once."""

import _thread
import functools
import os

CONTROL_SECONDS = 1.0


def fit_shutdown(inside):
    """Let a kernel that is done end at once."""
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
        return process_children(kernel)

    Kernel._process_children = process_children_if_any
    stop = IOPubThread.stop

    @functools.wraps(stop)
    def stop_after_control(thread):
        # The thread of the control channel has taken the request to shut down and flushes, while the main thread ends the one that answers a
        # flush: where both meet, neither comes to its end before the flush gives up, in ten seconds or never.
        control = getattr(IPKernelApp._instance, "control_thread", None)
        if control is not None and control.is_alive() and control.ident != _thread.get_ident():
            control.stop()
            control.join(CONTROL_SECONDS)
        stop(thread)

    IOPubThread.stop = stop_after_control
