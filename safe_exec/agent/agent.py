"""The state that the agent's parts share: the reporting channels, and the running cell."""

import _thread
import collections
import faulthandler
import json
import os
import socket
import sys

from . import layout
from .bodies import Bodies
from .census import Census
from .line_coverage import NoCoverage
from .own_actions import OwnActions
from .page import Page
from .sources import line_of


class Inside:
    """The shared state of the agent in one kernel: channels, running cell, and known code."""

    def __init__(self, page_fd, facts_fd, fault_fd, config):
        for fd in (page_fd, facts_fd, fault_fd):
            os.set_inheritable(fd, False)
        self.page = Page(page_fd)
        os.close(page_fd)
        self.facts = socket.socket(fileno=facts_fd)
        self.facts.setblocking(False)
        self.fault_fd = fault_fd
        self.config = config
        self.main = _thread.get_ident()
        # File name of a cell's own code -> its Source.
        self.files = {}
        # Id of a code object made of a cell's body -> its Source.
        self.codes = {}
        self.bodies = Bodies(self)
        # Id of a header of the running cell -> the header, which keeps the id from being used
        # again.
        self.headers = {}
        # The same id -> the header in the form that names ipykernel's buffers.
        self.keys = {}
        # The last of these headers, and its form in ``keys``.
        self.live = [None, None]
        # References to the coroutines of statements, the innermost last.
        self.running = []
        self.request = None
        self.in_cell = False
        # Nothing of the running cell was run yet.
        self.first_text = False
        self.before_cells = lambda: None
        self.check_handler = lambda: None
        self.msg_id = None
        self.hosts = set()
        # Audit events of the files opened last.
        self.opened = collections.deque(maxlen=100)
        # The name of the SQLite database opened last.
        self.database = None
        # The host, or the path of a socket, that was connected to last.
        self.dialled = None
        self.dialled_port = None
        # The id of the error whose attributes were told.
        self.told_error = None
        self.actions = OwnActions(self)
        # IPython's shell, from the first cell on.
        self.shell = None
        self.census = Census(self)
        self.write_text = None
        self.coverage = NoCoverage()
        # Of an interactive kernel that can be restored.
        self.restore_points = None
        self.instrumented = []
        self.missing = {}
        # Memory that holds 0 in a forked child.
        self.is_not_forked = None
        self.child = False

    def say_hello(self):
        """Introduce this process to the runner."""
        self.fact(
            hello=os.getpid(),
            python=sys.version.split()[0],
            executable=sys.executable,
            path=[p for p in sys.path if p][:20],
            instrumented=self.instrumented,
            missing=self.missing,
            main=self.main,
        )

    def fact(self, **fields):
        """Report a fact. Never waits and never raises.

        If the socket is full, the fact is lost, because waiting would delay the notebook.
        """
        if not self.child:
            self.fact_of_any(**fields)

    def fact_of_any(self, **fields):
        """Report a fact, even from a forked child."""
        try:
            self.facts.send(json.dumps(fields).encode("utf-8", "replace"))
        except (OSError, ValueError):
            pass

    def frames(self, frame, limit=30):
        """Return a stack, innermost first, as rows of (function, line, file, cell number).

        It ends at the cell's own code, or after ``limit`` rows.
        """
        rows = []
        while frame is not None and len(rows) < limit:
            row = self.row(frame.f_code, frame.f_lineno)
            rows.append(row)
            # IPython 7.31 to 8.4 call a cell's own code "<cell line: 3>".
            if (
                row[3]
                and row[0].startswith(("<module>", "<cell line"))
                and not self.nested(frame.f_back)
            ):
                break
            frame = frame.f_back
        return rows

    def row(self, code, line):
        """Return a row (function, line, file, cell number).

        Lines of a cell count within the cell.
        """
        source = self.codes.get(id(code)) or self.files.get(code.co_filename)
        line_in_cell = line_of(source.line_map, line) if source is not None and line else 0
        if line_in_cell:
            return (code.co_name, line_in_cell, code.co_filename, source.cell)
        return (code.co_name, line, code.co_filename, 0)

    def nested(self, frame):
        """Tell whether a cell's module frame runs inside another cell (``%run``, ``run_cell``)."""
        depth = 0
        while frame is not None and depth < 60:
            if frame.f_code.co_filename in self.files or id(frame.f_code) in self.codes:
                return True
            frame, depth = frame.f_back, depth + 1
        return False

    def here(self, frame):
        """Record the line of the current cell that the main thread executes; return its stack."""
        rows = self.frames(frame)
        line = next((row[1] for row in rows if row[3] == self.page.cell), None)
        if line:
            self.at(line)
        return rows

    def at(self, line):
        """Record the running line, except in a forked child.

        Between cells, keep the mark that the last cell has finished.
        """
        if not self.child:
            self.page.note_line(line if self.in_cell else line | layout.FINISHED)

    def forked(self):
        """Deactivate the agent in a forked child."""
        self.child = True
        self.page.lock = _thread.RLock()
        faulthandler.disable()
        faulthandler.unregister(layout.DUMP_SIGNAL)
        faulthandler.unregister(layout.DUMP_ALL_SIGNAL)
