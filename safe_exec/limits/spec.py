"""The limits: one row for each. The ONLY table of them.

The command line and its help, the kernels, the pytest plugin, the parser of files, the formatter,
``--require``, ``doctor`` and the JSON Schema read these rows. A new limit is a field of ``Limits``
and a word of ``LimitName`` (``model.limits``), a row here, and a part of the ``offer`` of each
mechanism that can enforce it (``sandbox.mechanisms``). Imports the standard library only: pytest
imports this module at every start.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """The quantity of a limit, and thereby its syntax (``parse_*`` in ``units.py``)."""

    SIZE = "bytes"
    COUNT = "count"
    PROCESSORS = "processors"
    TIME = "seconds"

    # Seconds that may be 0 and never unlimited.
    GRACE = "grace"


METAVARS = {
    Kind.SIZE: "SIZE",
    Kind.COUNT: "N",
    Kind.PROCESSORS: "N",
    Kind.TIME: "T",
    Kind.GRACE: "T",
}


class LimitSpec(NamedTuple):
    """The definition of one limit: its name, its syntax, and where it may be set."""

    # The key in files and in the verdict.
    name: str
    kind: Kind
    help: str
    # The runner enforces it, because the runner waits for cells and receives their output.
    by_runner: bool = False
    # ``--require all`` includes it if it is set.
    in_require_all: bool = False
    # The metadata of a single cell may set it.
    of_cell: bool = False
    # A session without an end may have it (`safe-exec kernel`).
    of_session: bool = True
    # jupyter_client's provisioner alone can enforce it: it does not see cells.
    by_provisioner: bool = False
    # The commands have an option for it.
    has_option: bool = True

    @property
    def option(self) -> str:
        """The option of the command line, without its dashes: ``cell-timeout``."""
        return self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        """The placeholder of the value in help texts."""
        return METAVARS[self.kind]


ROWS = (
    LimitSpec(
        "memory",
        Kind.SIZE,
        "Memory of all processes (512M, 1.5GiB, 50%).",
        in_require_all=True,
        by_provisioner=True,
    ),
    LimitSpec(
        "cpus",
        Kind.PROCESSORS,
        "Processors in use at a time (0.5, 2).",
        in_require_all=True,
        by_provisioner=True,
    ),
    LimitSpec(
        "cpu_time",
        Kind.TIME,
        "Processor time of all processes (90s, 5m).",
        by_provisioner=True,
    ),
    LimitSpec(
        "cell_timeout", Kind.TIME, "Time of each cell (90s, 5m, 1h).", by_runner=True, of_cell=True
    ),
    LimitSpec(
        "timeout",
        Kind.TIME,
        "Time of the whole run, with the kernel's start.",
        by_runner=True,
        of_session=False,
    ),
    LimitSpec(
        "start_timeout",
        Kind.TIME,
        "Time in which the kernel must start.",
        by_runner=True,
    ),
    LimitSpec(
        "processes",
        Kind.COUNT,
        "Processes and threads at a time.",
        in_require_all=True,
        by_provisioner=True,
    ),
    LimitSpec(
        "open_files",
        Kind.COUNT,
        "Open files of each process.",
        in_require_all=True,
        by_provisioner=True,
    ),
    LimitSpec(
        "file_size",
        Kind.SIZE,
        "Size of any file that the notebook writes.",
        in_require_all=True,
        by_provisioner=True,
    ),
    LimitSpec(
        "cell_output",
        Kind.SIZE,
        "Output that is kept of each cell.",
        by_runner=True,
        of_cell=True,
    ),
    LimitSpec(
        "output",
        Kind.SIZE,
        "Output that is kept of all cells together.",
        by_runner=True,
        of_session=False,
    ),
    LimitSpec(
        "disk",
        Kind.SIZE,
        "Bytes written to the folder, /tmp and home.",
    ),
    LimitSpec("shm", Kind.SIZE, "Size of shared memory (/dev/shm)."),
    LimitSpec(
        "interrupt_grace",
        Kind.GRACE,
        "Time to answer an interrupt before the kernel is killed.",
        has_option=False,
    ),
)

SPECS = {row.name: row for row in ROWS}
OPTIONS = tuple(row for row in ROWS if row.has_option)
