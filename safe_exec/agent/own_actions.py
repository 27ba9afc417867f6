"""Reports the notebook's actions on its own process: signals, limits, trace functions, exec.

Each action is reported before it happens, with the place of the call: after a fatal signal nobody
inside could report anything. The source is Python's audit events; ``signal.raise_signal`` has none.
"""

import contextlib
import os
import re
import sys
import threading
import time

KILLS = ("os.kill", "os.killpg", "signal.pthread_kill")
LIMITS = ("resource.setrlimit", "resource.prlimit")
TRACES = ("sys.settrace", "sys.setprofile")
PROGRAMS = ("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec")
LOCKS = ("fcntl.flock", "fcntl.lockf")
EVENTS = frozenset((*KILLS, *LIMITS, *TRACES, *PROGRAMS, *LOCKS, "ctypes.dlsym"))
# LOCK_SH | LOCK_EX, and LOCK_UN (flock(2)).
LOCK_SH_EX, LOCK_UN = 3, 8
# Commands that send signals, or end other processes.
KILLING = re.compile(r"\b(?:p?kill|killall|skill|fuser|shutdown|reboot)\b")
# C functions that send signals.
SYMBOLS = ("kill", "killpg", "raise", "tgkill", "abort")
MOST_ROWS = 12
LONGEST_COMMAND = 300
# Calls in one cell that are told: a debugger makes one for each step.
MOST_TRACES = 50


class OwnActions:
    """Reports the actions of one kernel. ``traces`` counts the calls that set a trace function."""

    def __init__(self, inside):
        self.inside = inside
        self.group = os.getpgrp()
        self.traces = 0
        self.tracing = ()
        self.unsent = []

    def note(self, event, args, frame):
        """Handle an audit event; ``frame`` is that of the caller."""
        if event in KILLS:
            self.note_kill(event, args, frame)
        elif event in PROGRAMS:
            self.note_program(event, args, frame)
        elif event in LOCKS:
            self.note_lock(event, args, frame)
        elif self.inside.child:
            return
        elif event in LIMITS:
            self.note_limit(args, frame)
        elif event in TRACES:
            self.note_trace(event, frame)
        elif len(args) > 1 and args[1] in SYMBOLS:
            self.tell(frame, action="symbol", call=f"the C function {args[1]}()")

    def note_kill(self, event, args, frame):
        """Report a signal that reaches the kernel's own process or its parent."""
        number = args[1]
        target = self.target(event, args[0])
        if target and isinstance(number, int) and number:
            self.tell(frame, action="signal", call=event, target=target, number=int(number))

    def target(self, event, process):
        """Return the target of a signal in one word: ``group``.

        Returns an empty text for other processes.
        """
        if event == "signal.pthread_kill":
            return "" if self.inside.child else "process"
        kernel = self.inside.page.pid
        if event == "os.killpg":
            return "group" if process in (0, self.group) else ""
        if process in (0, -self.group):
            return "group"
        if process == -1:
            return "everybody"
        if process == kernel:
            return "process"
        return "parent" if process == os.getppid() and not self.inside.child else ""

    def note_program(self, event, args, frame):
        """Report a program that may send signals, or one that replaces the kernel."""
        command = args[0] if event == "os.system" else args[1]
        if isinstance(command, (list, tuple)):
            command = b" ".join(map(os.fsencode, command))
        text = os.fsdecode(command) if isinstance(command, (str, bytes)) else str(command)
        if event == "os.exec" and not self.inside.child:
            self.tell(frame, action="exec", call="os.exec", value=text[:LONGEST_COMMAND])
        elif KILLING.search(text):
            self.tell(frame, action="program", call=event, value=text[:LONGEST_COMMAND])

    def note_lock(self, event, args, frame):
        """Report a requested file lock, by the file's path."""
        if args[1] & LOCK_SH_EX and not args[1] & LOCK_UN:
            path = os.readlink(f"/proc/self/fd/{int(args[0])}")
            self.tell(frame, action="lock", call=event, value=path[:LONGEST_COMMAND])

    def note_limit(self, args, frame):
        """Report a resource limit set for this process."""
        *process_ids, number, limits = args
        if limits is not None and (not process_ids or process_ids[0] in (0, os.getpid())):
            soft = limits[0] if isinstance(limits, (list, tuple)) and limits else None
            self.tell(
                frame, action="limit", call="resource.setrlimit", number=int(number), value=soft
            )

    def note_raise(self, number, frame):
        """Report ``signal.raise_signal``, which has no audit event."""
        if not self.inside.child:
            self.tell(
                frame,
                action="signal",
                call="signal.raise_signal",
                target="process",
                number=int(number),
            )

    def note_trace(self, event, frame):
        """Record that a trace function is about to be set or removed; it is reported later."""
        # From CPython 3.11 on, setting a trace function fails in any thread while the audit hook of
        # such a call runs in another (a flag of the whole process). Sending lets other threads run,
        # and debugpy then waited forever for one of them.
        if self.inside.coverage.installs(frame):
            return
        self.traces += 1
        if self.traces <= MOST_TRACES:
            self.unsent.append(self.action(frame, action="trace", call=event))

    def send_traces(self):
        """Report the noted trace functions. Called by the sampler and at the start of a cell."""
        while self.unsent:
            # Both threads may come here at a time.
            with contextlib.suppress(IndexError):
                self.inside.fact_of_any(**self.unsent.pop(0))

    def begin_cell(self):
        """Report the active trace functions at the start of a cell, if they have changed."""
        self.send_traces()
        self.traces = 0
        on = tuple(
            name
            for name, function in (
                ("sys.settrace", sys.gettrace()),
                ("sys.setprofile", sys.getprofile()),
                ("threading.settrace", getattr(threading, "_trace_hook", None)),
                ("threading.setprofile", getattr(threading, "_profile_hook", None)),
            )
            if function is not None and not self.inside.coverage.owns(function)
        )
        if on != self.tracing:
            self.tracing = on
            self.inside.fact(tracing=on, cell=self.inside.page.cell)

    def tell(self, frame, **fields):
        """Report an action with its place, even from a forked child."""
        self.inside.fact_of_any(**self.action(frame, **fields))

    def action(self, frame, **fields):
        """Return the fact of an action with its place and time."""
        inside = self.inside
        rows = inside.frames(frame, MOST_ROWS)
        place = {"rows": rows, "cell": inside.page.cell, "at": time.monotonic()}
        return {**place, "child": inside.child, **fields}
