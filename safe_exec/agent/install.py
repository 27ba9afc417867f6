"""Puts it all around the kernel that is about to start."""

import _thread
import os
import sys

from .cells import fit_shell
from .shutdown import fit_shutdown
from .errors import fit_errors
from .faults import arm, watch, watch_handler
from .interrupts import fit_interrupts
from .lazy_imports import fit_client, fit_collector, fit_debugger
from .output import fit_descriptors, fit_messages, fit_streams
from .sampler import sample_forever
from .threads import fit_threads

PARTS = (
    fit_client,
    fit_debugger,
    fit_collector,
    fit_shell,
    fit_streams,
    fit_messages,
    fit_descriptors,
    fit_shutdown,
    fit_interrupts,
    fit_errors,
    fit_threads,
)


def fit(inside):
    """Put everything around ipykernel that fits the one at hand; what does not is told and left out."""
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
    inside.fact(
        hello=os.getpid(),
        python=sys.version.split()[0],
        executable=sys.executable,
        path=[p for p in sys.path if p][:20],
        fitted=inside.fitted,
        missing=missing,
        main=inside.main,
    )
