"""Detects changes of the kernel process since its start: resource limits and program."""

from __future__ import annotations

import time
from collections.abc import Mapping

from safe_exec.keeper import procfs
from safe_exec.kernel.processes import command_text, read_bytes
from safe_exec.model.observed import ChangedLimit

# Rows of /proc/PID/limits (proc(5)) and their names in getrlimit(2).
NAMES: Mapping[str, str] = {
    "Max cpu time": "RLIMIT_CPU",
    "Max file size": "RLIMIT_FSIZE",
    "Max data size": "RLIMIT_DATA",
    "Max stack size": "RLIMIT_STACK",
    "Max core file size": "RLIMIT_CORE",
    "Max processes": "RLIMIT_NPROC",
    "Max open files": "RLIMIT_NOFILE",
    "Max locked memory": "RLIMIT_MEMLOCK",
    "Max address space": "RLIMIT_AS",
}

PAUSE_SECONDS = 0.05

# Soft limits by name, ``None`` for unlimited.
Limits = Mapping[str, int | None]


def parse(text: str) -> Limits:
    """Return the soft limits in the text of /proc/PID/limits."""
    limits: dict[str, int | None] = {}
    for line in text.splitlines():
        title = line[:26].strip()
        fields = line[26:].split()
        if title in NAMES and fields:
            limits[NAMES[title]] = None if fields[0] == "unlimited" else int(fields[0])
    return limits


class ProcessChanges:
    """Observes one kernel process repeatedly; keeps the last state after its end."""

    def __init__(self, pid: int, original: ProcessChanges | None = None) -> None:
        """Note the present state; ``original`` observed the process that this one is a fork of."""
        self._pid = pid
        self._program = read_bytes(f"/proc/{pid}/cmdline")
        self._current = self._read()
        self._limits: Limits = self._current if original is None else original.initial()
        self._noted = time.monotonic()
        self.executed: str | None = None

    def _read(self) -> Limits:
        text = read_bytes(f"/proc/{self._pid}/limits").decode("utf-8", "replace")
        try:
            return parse(text)
        except ValueError:
            return {}

    def initial(self) -> Limits:
        """Return the limits at the start."""
        return self._limits

    def note_now_and_then(self) -> None:
        """Record the state, at most once per PAUSE_SECONDS."""
        # A notebook can run hundreds of cells per second.
        if time.monotonic() - self._noted >= PAUSE_SECONDS:
            self.note()

    def note(self) -> None:
        """Record the current limits and program of the process."""
        self._noted = time.monotonic()
        status = procfs.stat(self._pid)
        if status is None:
            return
        self._current = self._read() or self._current
        # The command line of a zombie is empty; its limits can still be read.
        program = read_bytes(f"/proc/{self._pid}/cmdline")
        if program and program != self._program:
            self.executed = command_text(program)

    def limits(self) -> tuple[ChangedLimit, ...]:
        """Return the soft limits that differ from those at the start."""
        return tuple(
            ChangedLimit(name=name, initial_value=initial, current_value=self._current[name])
            for name, initial in self._limits.items()
            if name in self._current and self._current[name] != initial
        )
