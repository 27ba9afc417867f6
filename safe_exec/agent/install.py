"""Patches the kernel that is about to start."""

import _thread

from .cells import patch_shell
from .commands import patch_commands
from .shutdown import patch_shutdown
from .errors import patch_errors
from .forks import patch_forks
from .faults import arm, watch, watch_handler
from .interrupts import patch_interrupts
from .lazy_imports import patch_client, patch_collector, patch_debugger
from .line_coverage import patch_coverage
from .output import patch_descriptors, patch_messages, patch_streams
from .sampler import sample_forever
from .snapshots import patch_snapshots
from .restore_points import patch_restore_points
from .threads import patch_threads

PARTS = (
    # First: it replaces what the others wrap.
    patch_forks,
    patch_client,
    patch_debugger,
    patch_collector,
    patch_shell,
    # After it: a copy is made before the cell begins.
    patch_snapshots,
    patch_streams,
    patch_messages,
    patch_descriptors,
    patch_shutdown,
    patch_commands,
    patch_interrupts,
    patch_errors,
    patch_threads,
    patch_coverage,
    # Last: a snapshot is taken before anything else is done for a cell.
    patch_restore_points,
)


def patch_kernel(inside):
    """Apply every patch that fits the installed ipykernel; report the others as missing."""
    arm(inside)
    watch(inside)
    watch_handler(inside)
    missing = {}
    for part in PARTS:
        try:
            part(inside)
        except Exception as error:
            missing[part.__name__] = f"{type(error).__name__}: {error}"
    _thread.start_new_thread(sample_forever, (inside,))
    inside.missing = missing
    inside.say_hello()
