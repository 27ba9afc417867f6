"""Reports the variables that hold the kernel's memory.

A census lists the largest holders. The agent takes one at the end of a cell if the memory changed,
and the sampling thread takes one as the memory approaches the limit: after the system has killed
the kernel, it is too late. All censuses together take at most one percent of the cells' time. The
runner treats each figure as a claim.
"""

import _thread
import os
import resource
import sys
import time

from .allocations import record_allocations
from .growth import Growth
from .holders import (
    Modules,
    figures,
    local_variables,
    outputs,
    tracebacks,
    unreached,
    variables,
)
from .library_objects import library_handlers
from .object_sizes import OutOfTime, Residency, Walk
from .summaries import describe

SHARE_OF_TIME = 0.01
LONGEST_SECONDS = 0.05
# What a census may take before any cell earned it.
FIRST_SECONDS = 0.002
# A census in less time would see nothing.
LEAST_SECONDS = 0.0003
# Smaller changes of the memory are not worth a census.
LEAST_CHANGE_BYTES = 8 << 20
LEAST_CHANGE_SHARE = 0.03
# The room below the limit that a census needs: it takes up to half of it.
ROOM_BYTES = 16 << 20
# An object that a census remembers takes less.
BYTES_FOR_OBJECT = 200
MOST_HOLDERS = 20
LEAST_HOLDER_BYTES = 256 << 10
LONGEST_NAME = 100
MOST_NAMES = 5000
# A shorter statement is not charged apart from the next one.
LEAST_STATEMENT_SECONDS = 0.002
NEW_NAMES = 200
# Since Python 3.13 a frame's variables can be read without a copy that keeps them alive.
SAFE_LOCALS = sys.version_info >= (3, 13)
# Memory without a holder from which on installed modules are looked at.
LEAST_UNEXPLAINED_BYTES = 32 << 20
# A trial that only looks for the holders has more time for each census.
THOROUGH_SECONDS = 0.5


def open_own_memory():
    """Open the figures of this process's memory; ``None`` if the system has none."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


class Census:
    """Takes the censuses of one kernel, and decides when one is due."""

    def __init__(self, inside):
        self.inside = inside
        self.namespace = None
        self.residency = Residency()
        self.clock = time.perf_counter
        self.limit = inside.config.get("memory")
        self.is_thorough = bool(inside.config.get("thorough"))
        self.statm = open_own_memory()
        self.growth = Growth()
        self.modules = None
        self.first_bytes = None
        self.lock = _thread.allocate_lock()
        self.credit = FIRST_SECONDS
        self.started = None
        self.charged_at = 0.0
        # The memory at the last census, and at the last one between two cells.
        self.last_bytes = None
        self.settled_bytes = None
        self.next_bytes = None
        self.active = False
        # Name -> number of the cell after which it was first there.
        self.bindings = {}
        self.last_holders = ()

    def reopen(self):
        """Go on in a forked copy of the kernel: its memory is read from a file of its own."""
        if self.statm is not None:
            os.close(self.statm)
        self.statm = open_own_memory()
        self.lock = _thread.allocate_lock()

    def own_bytes(self):
        """Return this process's memory in bytes, without pages of files; ``None`` if unknown."""
        if self.statm is None:
            return None
        try:
            fields = os.pread(self.statm, 200, 0).split()
            return (int(fields[1]) - int(fields[2])) * resource.getpagesize()
        except (OSError, ValueError, IndexError):
            # The notebook has closed our descriptor.
            self.statm = None
            return None

    def begin_cells(self):
        """Record the state before the first cell."""
        # The benchmark of its cost compares with a run without any.
        if not self.inside.config.get("census", True):
            self.turn_off()
            return
        try:
            self.look_before_cells()
        except Exception:
            # A shell of another kind. The notebook runs all the same.
            self.turn_off()

    def look_before_cells(self):
        """Take the first census: the memory before any cell ran."""
        record_allocations(self.inside)
        self.namespace = self.inside.shell.user_ns
        self.bindings = dict.fromkeys(self.namespace, 0)
        self.last_bytes = self.settled_bytes = self.own_bytes()
        self.set_threshold()
        self.growth.begin(self.last_bytes)
        self.modules = Modules()
        self.first_bytes = self.last_bytes
        if self.last_bytes is not None:
            self.inside.fact(
                census=[],
                cell=0,
                total=0,
                memory=self.last_bytes,
                complete=True,
                finished=True,
                settled=True,
                lines=[],
            )

    def begin_cell(self):
        """Record when a cell began."""
        self.started = self.charged_at = self.clock()

    def set_threshold(self):
        """Choose the memory at which the sampling thread takes the next census."""
        if self.limit is None or self.last_bytes is None:
            self.next_bytes = None
            return
        remaining = self.limit - ROOM_BYTES - self.last_bytes
        step = max(remaining // 2, ROOM_BYTES // 2)
        self.next_bytes = self.last_bytes + step if remaining > 0 else None

    def earn(self):
        """Add one percent of the time since the last call to the budget for censuses."""
        moment = self.clock()
        if self.started is not None:
            self.credit += (moment - self.started) * SHARE_OF_TIME
            self.started = moment

    def turn_off(self):
        """Take no more censuses."""
        self.namespace = self.statm = self.started = None

    def end_cell(self):
        """Take a census after a cell if the memory changed."""
        if self.started is not None:
            try:
                self.look_after_cell()
            except BaseException:
                # An interrupt came too late for the cell, or memory ran out. The cell's reply must
                # not be lost because of that.
                self.turn_off()

    def look_after_cell(self):
        """Take a census if the memory changed and the cell took long enough to change it."""
        seconds = self.clock() - self.started
        self.earn()
        self.started = None
        self.note_names()
        # A cell that took no time allocated little: the next longer one finds it.
        current = self.own_bytes() if seconds > LEAST_STATEMENT_SECONDS else None
        if current is None or self.settled_bytes is None:
            return
        with self.lock:
            self.growth.charge(current)
        # A census during the cell may have come before its result had a name.
        change = abs(current - self.settled_bytes)
        if change >= max(LEAST_CHANGE_BYTES, LEAST_CHANGE_SHARE * current):
            if self.take(current, settled=True):
                self.settled_bytes = current

    def begin_statement(self, line):
        """Charge the previous statement for the memory that it allocated."""
        growth, moment = self.growth, self.clock()
        # What allocates much takes its time; a cell may have thousands of short statements.
        current = None
        if moment - self.charged_at > LEAST_STATEMENT_SECONDS:
            self.charged_at = moment
            current = self.own_bytes()
        # Do not wait for the lock: the sampling thread charges at the same moment.
        if self.lock.acquire(False):
            try:
                growth.at_statement(current, ("<module>", line, self.inside.page.cell))
            finally:
                self.lock.release()

    def sample(self, rows):
        """Charge growth to the running line; take a census if the memory came near the limit.

        Called by the sampling thread.
        """
        if self.namespace is None:
            return
        current = self.own_bytes()
        if current is None:
            return
        if self.lock.acquire(False):
            try:
                self.growth.at_sample(current, rows)
            finally:
                self.lock.release()
        if self.next_bytes is not None and current >= self.next_bytes:
            self.earn()
            self.take(current)

    def note_names(self):
        """Record the names that the cell added: a dictionary keeps the order of insertion."""
        cell, bindings = self.inside.page.cell, self.bindings
        if self.namespace is None or len(bindings) >= MOST_NAMES:
            return
        try:
            for number, name in enumerate(reversed(self.namespace)):
                if type(name) is not str or name in bindings or number >= NEW_NAMES:
                    break
                bindings[name] = cell
            for number in reversed(self.namespace.get("_oh", {})):
                name = "Out[{}]".format(number)
                if name in bindings:
                    break
                bindings[name] = cell
        except (RuntimeError, TypeError):
            # Another thread changed the namespace, or the notebook replaced it.
            return

    def take(self, current, settled=False):
        """Take a census and report it.

        Returns false if the time budget or the free memory does not allow one.
        """
        seconds = THOROUGH_SECONDS if self.is_thorough else min(LONGEST_SECONDS, self.credit)
        room = self.limit is None or current + ROOM_BYTES <= self.limit
        if self.active or seconds < LEAST_SECONDS or not room:
            return False
        self.active = True
        begin = time.thread_time()
        try:
            self.report(current, seconds, settled)
        except Exception as error:
            self.inside.fact(census_failed=type(error).__name__, cell=self.inside.page.cell)
        finally:
            self.credit -= time.thread_time() - begin
            self.last_bytes = current
            self.set_threshold()
            self.active = False
        return True

    def report(self, current, seconds, settled):
        """Measure the holders, and send the largest."""
        walk = Walk(self.residency, seconds, library_handlers(), self.skipped())
        if self.limit is not None:
            room = (self.limit - current) // 2
            walk.most_objects = min(walk.most_objects, room // BYTES_FOR_OBJECT)
        rows = []
        finished = self.measure(walk, self.roots(walk, settled), rows)
        if finished and self.is_thorough:
            finished = self.measure(walk, unreached(walk), rows)
        self.send(walk, rows, current, settled, finished)
        # Installed modules hold much only rarely, and are many: what is not looked at there counts
        # like the interpreter. The kernel may die meanwhile.
        unexplained = current - self.first_bytes - walk.total
        if finished and (self.is_thorough or unexplained > LEAST_UNEXPLAINED_BYTES):
            if not settled and not self.is_thorough:
                # The running cell may only just have taken the memory: half of the time stays for
                # the census after the cell.
                walk.deadline -= seconds / 2
            self.measure(walk, self.modules.variables(self.modules.installed), rows)
            self.send(walk, rows, current, settled, finished)
        self.last_holders = [name for _, name, _, _ in rows[:MOST_HOLDERS]]

    def send(self, walk, rows, current, settled, finished):
        """Send the largest holders that were measured so far."""
        rows.sort(key=lambda row: -row[0])
        self.inside.fact(
            census=[self.holder(*row) for row in rows[:MOST_HOLDERS]],
            cell=self.inside.page.cell,
            total=walk.total,
            memory=current,
            complete=finished and walk.exact,
            finished=finished,
            settled=settled,
            lines=self.growth.report(),
        )

    def measure(self, walk, roots, rows):
        """Append a row for each holder to ``rows``; return false if the time ran out first."""
        try:
            for name, thing in roots:
                try:
                    walk.measure(thing, name)
                finally:
                    size = int(walk.partial)
                    walk.total += size
                    if size >= LEAST_HOLDER_BYTES:
                        rows.append((size, name, thing, walk.object_bytes))
        except (OutOfTime, RuntimeError):
            # The second one: another thread changed the namespace.
            return False
        return True

    def holder(self, size, name, thing, object_bytes):
        """Return the report's row for one holder."""
        kind, summary = describe(thing, object_bytes)
        return [name[:LONGEST_NAME], kind, size, summary, self.binding(name)]

    def binding(self, name):
        """Return the number of the cell that bound a name, 0 if unknown."""
        cell = self.bindings.get(name)
        if cell is None and name in self.namespace and len(self.bindings) < MOST_NAMES:
            # The running cell bound it.
            return self.inside.page.cell
        return cell or 0

    def skipped(self):
        """Return the ids of objects to leave out, those of the kernel.

        They are its namespace, the modules, the shell and the agent.
        """
        shell = self.inside.shell
        return [id(thing) for thing in (self.namespace, sys.modules, shell, self)] + [
            id(thing) for thing in (self.inside, self.inside.page)
        ]

    def roots(self, walk, settled):
        """Yield the names and values of possible holders, the likeliest first."""
        namespace, modules = self.namespace, self.modules
        modules.update()
        yield from variables(walk, namespace, self.last_holders)
        if not settled and (self.is_thorough or SAFE_LOCALS):
            yield from local_variables(self.inside.main, namespace)
        yield from outputs(namespace)
        yield from tracebacks()
        yield from figures()
        yield from modules.variables(modules.own)
