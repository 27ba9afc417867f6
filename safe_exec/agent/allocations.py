"""Records every allocation with memray, in an extra trial that finds the allocating lines.

The runner sends the descriptor of an unlinked file. The records in that file survive SIGKILL.
"""

import importlib
import socket


def record_allocations(inside):
    """Start memray if the runner sent a file and the kernel's environment has memray."""
    if not inside.config.get("thorough"):
        return
    try:
        _, descriptors, _, _ = socket.recv_fds(inside.facts, 100, 1)
    except OSError:
        # No descriptor was sent.
        return
    for descriptor in descriptors:
        try:
            memray = importlib.import_module("memray")
            destination = memray.FileDestination(
                "/proc/self/fd/{}".format(descriptor), overwrite=True, compress_on_exit=False
            )
            # The tracker ends with the process.
            inside.tracker = memray.Tracker(destination=destination)
            inside.tracker.__enter__()
        except ImportError:
            # Not installed: growth is sampled all the same.
            return
        except (OSError, RuntimeError, TypeError) as error:
            # Too old, or the notebook's user may not open the file.
            inside.fact(recording_failed="{}: {}".format(type(error).__name__, error)[:200])
            return
