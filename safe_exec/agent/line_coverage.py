"""Records which lines of library code run (``--coverage``), with the kernel's package coverage.

The record is written to an unlinked file, whose descriptor the runner holds too. So it outlives the
kernel, and isolation needs no exception for it. Rows are only appended: each names a file and its
new lines, or arcs between lines. A kernel that dies loses the lines since its last row. So rows are
written at the end of each cell, before calls that end the process, and at growing intervals while a
cell runs.
"""

import _thread
import atexit
import functools
import importlib
import json
import os
import socket
import sys
import threading
import time

# In a cell that runs long: the first interval, and the longest.
FIRST_SECONDS = 0.05
LONGEST_SECONDS = 1.0
# Writing takes at most this share of the time.
SHARE = 0.05
# A cell ends without its rows if they take longer.
WAIT_SECONDS = 5.0
# Since Python 3.12; branches since 3.14.
MONITORS_LINES, MONITORS_BRANCHES = (3, 12), (3, 14)


def is_of_coverage(function):
    """Tell whether a trace function belongs to the package coverage."""
    owner = type(getattr(function, "__self__", function))
    return owner.__module__.partition(".")[0] == "coverage"


class NoCoverage:
    """Stands in for ``LineCoverage`` if coverage was not requested."""

    def start(self):
        """Do nothing."""

    begin_cell = end_cell = save = start

    def owns(self, function):
        """Return false: without coverage, every trace function is the notebook's."""
        return False

    def installs(self, frame):
        """Return false: without coverage, every trace function is the notebook's."""
        return False


class RowData:
    """Receives the lines that coverage collects.

    coverage's own database would take ten times longer. This class has the methods of
    ``coverage.CoverageData`` that are called while a measurement runs.
    """

    def __init__(self, take):
        self.take = take

    def add_lines(self, line_data):
        """Collect the lines that ran, by file."""
        for name, numbers in line_data.items():
            self.take(name, numbers)

    add_arcs = add_lines

    def touch_file(self, filename, plugin_name=""):
        """Collect a file of which no line ran."""
        self.take(filename, ())

    def touch_files(self, filenames, plugin_name=""):
        """Collect files of which no line ran."""
        for name in filenames:
            self.take(name, ())

    def add_file_tracers(self, file_tracers):
        """Do nothing: no plugins are loaded."""

    def set_context(self, context):
        """Do nothing: the runner names the context."""


class LineCoverage:
    """Measures line coverage in this kernel."""

    def __init__(self, inside, descriptor, settings):
        """Prepare to measure. Raises any error of an unsupported version of coverage."""
        self.inside, self.descriptor = inside, descriptor
        self.coverage = importlib.import_module("coverage")
        self.folder = os.path.dirname(os.path.abspath(self.coverage.__file__))
        self.version = self.coverage.__version__
        self.entries, self.replaced, self.is_ending, self.failed = {}, False, False, False
        self.branch = settings["branch"]
        self.data = RowData(self.take)
        self.measurement = self.make(settings)
        # Numbers of the latest request to write, and of the latest that was answered.
        self.requests, self.answers = 0, 0
        self.changed = threading.Condition()
        self.cell_started = time.monotonic()

    def make(self, settings):
        """Return coverage's measurement, without its warnings and other side effects."""
        base = self.coverage.Coverage
        agent = os.path.dirname(os.path.abspath(__file__))

        class Measurement(base):
            def _warn(self, *_args, **_options):
                # Warnings must not appear among the outputs of a cell. Those that matter are
                # noticed below.
                pass

            def _post_save_work(self):
                # The original looks for source files that never ran, at each call; only the last
                # call counts.
                pass

        options = {name: settings[name] or None for name in ("source", "include", "concurrency")}
        result = Measurement(
            data_file=None,
            config_file=False,
            branch=self.branch,
            cover_pylib=settings["cover_pylib"],
            timid=settings["timid"],
            # ipykernel names the code of cells after files that do not exist.
            omit=[*settings["omit"], "*/ipykernel_*/*", os.path.join(agent, "*")],
            **options,
        )
        result._data = self.data
        self.look_for_unrun = functools.partial(base._post_save_work, result)
        core = settings["core"] or self.best_core(settings["concurrency"])
        if core is not None:
            try:
                result.set_option("run:core", core)
            except self.coverage.CoverageException:
                # An older coverage has only one.
                pass
        return result

    def best_core(self, concurrency):
        """Return ``sysmon``, which leaves trace functions alone, if it supports these settings."""
        least = MONITORS_BRANCHES if self.branch else MONITORS_LINES
        has_only_threads = not set(concurrency) - {"thread", "multiprocessing"}
        return "sysmon" if sys.version_info >= least and has_only_threads else None

    # --- cells ------------------------------------------------------------------------------------

    def start(self):
        """Start to measure on the main thread, before the first cell."""
        if not self.call(self.measurement.start):
            # Another tool of the notebook's environment may hold what sysmon needs.
            self.inside.coverage = NoCoverage()
            return
        self.traces = self.owns(sys.gettrace())
        atexit.register(self.end)
        # The thread is not one of `threading`, so a notebook that lists its threads does not see
        # it.
        _thread.start_new_thread(self.write_forever, ())

    def begin_cell(self):
        """Install the trace function again if an earlier cell removed it."""
        self.cell_started = time.monotonic()
        if self.traces and sys.gettrace() is None:
            self.call(self.measurement.stop)
            self.call(self.measurement.start)

    def end_cell(self):
        """Write the lines that the cell ran; report the cell if it replaced the trace function."""
        if self.traces and not self.replaced and not self.owns(sys.gettrace()):
            self.replaced = True
            self.put(replaced=self.inside.page.cell)
        self.save()

    def owns(self, function):
        """Tell whether a trace function is the one of the measurement."""
        return function is not None and is_of_coverage(function)

    def installs(self, frame):
        """Tell whether a frame that sets a trace function does so for the measurement."""
        name = frame.f_code.co_filename
        return name.startswith(self.folder) or name == threading.__file__

    # --- rows -------------------------------------------------------------------------------------

    def save(self):
        """Ask the writing thread to write all recorded lines, and wait until it has."""
        if self.inside.child:
            return
        with self.changed:
            self.requests += 1
            number = self.requests
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.answers >= number, WAIT_SECONDS)

    def write_forever(self):
        """Write rows on request, and at growing intervals while a cell runs."""
        # All rows come from this thread: two would write the same lines twice.
        pause = FIRST_SECONDS
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.requests > self.answers, pause)
                number = self.requests
            if self.inside.child:
                return
            if number > self.answers or self.inside.in_cell:
                start_time = time.monotonic()
                self.write()
                end_time = time.monotonic()
                running = end_time - self.cell_started if self.inside.in_cell else 0
                least = min(LONGEST_SECONDS, max(FIRST_SECONDS, running / 2))
                pause = max(least, (end_time - start_time) / SHARE)
            with self.changed:
                self.answers = number
                self.changed.notify_all()

    def write(self):
        """Write rows for the lines recorded since the last call."""
        self.call(self.collect)
        if self.is_ending:
            self.call(self.look_for_unrun)

    def collect(self):
        """Collect the recorded lines. Raises RuntimeError if coverage stores them elsewhere."""
        if self.measurement.get_data() is not self.data:
            raise RuntimeError("coverage {} works differently".format(self.version))

    def call(self, function):
        """Call a function of coverage; on an error record it and return false."""
        try:
            function()
        except Exception as error:
            # Memory may have run out: the notebook meets its own error.
            self.put(problem="{}: {}".format(type(error).__name__, error))
            return False
        return True

    def take(self, name, entries):
        """Write the new lines, or arcs, of a file."""
        written_entries = self.entries.get(name)
        news = set(entries) - (written_entries or set())
        if news or written_entries is None:
            self.entries.setdefault(name, set()).update(news)
            self.put(file=name, **{"arcs" if self.branch else "lines": sorted(news)})

    def put(self, **row):
        """Append a row. Report lost rows to the runner."""
        data = json.dumps(row).encode("ascii") + b"\n"
        try:
            # A write that reaches a limit writes a part, and only the next one fails.
            while data:
                data = data[os.write(self.descriptor, data) :]
        except OSError as error:
            # The file system is full, or the notebook's limit on file sizes is reached.
            if not self.failed:
                self.failed = True
                self.inside.fact(coverage_failed=error.errno)

    def end(self):
        """Write the last rows when the process exits, with the source files that never ran."""
        if self.inside.child or os.getpid() != self.inside.page.pid:
            return
        self.is_ending = True
        self.save()


def patch_coverage(inside):
    """Prepare to measure line coverage, if the runner asks for it and has sent a file for it."""
    settings = inside.config.get("coverage")
    if settings is None:
        return
    _, descriptors, _, _ = socket.recv_fds(inside.facts, 100, 1)
    os.set_inheritable(descriptors[0], False)
    try:
        inside.coverage = LineCoverage(inside, descriptors[0], settings)
    except Exception as error:
        if isinstance(error, ImportError):
            row = {"missing": sys.executable}
        else:
            row = {"problem": "{}: {}".format(type(error).__name__, error)}
        os.write(descriptors[0], json.dumps(row).encode("ascii") + b"\n")
        return
    inside.coverage.put(started=inside.coverage.version)
    inside.instrumented.append("coverage")
