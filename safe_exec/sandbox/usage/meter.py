"""Reads the resource use of a sandbox from its cgroups, or from its processes.

A figure that cannot be read is ``None``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.model.evidence import ProcessCount
from safe_exec.sandbox.mechanisms import rlimits
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.usage.process_tree import ProcessTree, TreeUse

_Number = TypeVar("_Number", int, float)
PAGE = os.sysconf("SC_PAGE_SIZE")
# Linux gives these files out whole; the longest, memory.stat, has some 2 KiB.
MOST_BYTES = 16384


class Reading(Struct, frozen=True, kw_only=True):
    """One reading of a sandbox: unreclaimable memory in bytes, processor seconds, tasks.

    ``children_memory`` is the memory of processes other than the kernel, without shared memory. If
    ``upper_bound`` is set, pages that several processes share may be counted for each of them.
    """

    memory: int | None = None
    cpu_seconds: float | None = None
    tasks: int | None = None
    children_memory: int | None = None
    upper_bound: bool = False


class Counters(Struct, frozen=True, kw_only=True):
    """Counters of Linux: OOM kills, refused forks, the highest charge including page cache.

    ``limit_hits`` counts the OOM situations at the cgroup's own memory limit (version 2 only).
    """

    oom_kills: int | None = None
    limit_hits: int | None = None
    fork_refusals: int | None = None
    memory_peak_raw: int | None = None
    tasks_peak: int | None = None
    cpu_seconds: float | None = None

    def since(self, origin: Counters) -> Counters:
        """Return what was counted after ``origin``.

        A peak is unknown if it may be an earlier one.
        """
        kills = _minus(self.oom_kills, origin.oom_kills)
        # A kill for memory says that the limit was reached again.
        has_peak = bool(kills) or _is_higher(self.memory_peak_raw, origin.memory_peak_raw)
        has_tasks = _is_higher(self.tasks_peak, origin.tasks_peak)
        return replace(
            self,
            oom_kills=kills,
            memory_peak_raw=self.memory_peak_raw if has_peak else None,
            tasks_peak=self.tasks_peak if has_tasks else None,
            limit_hits=_minus(self.limit_hits, origin.limit_hits),
            fork_refusals=_minus(self.fork_refusals, origin.fork_refusals),
            cpu_seconds=_minus(self.cpu_seconds, origin.cpu_seconds),
        )

    def plus_kill(self) -> Counters:
        """Add an OOM kill at the cgroup's own limit."""
        return replace(
            self, oom_kills=(self.oom_kills or 0) + 1, limit_hits=(self.limit_hits or 0) + 1
        )


class Bound(Struct, frozen=True, kw_only=True):
    """A memory limit in bytes on an ancestor cgroup; ``hits`` counts its OOM situations."""

    group: Path
    limit: int
    hits: int


def bounds_above(group: Path) -> tuple[Bound, ...]:
    """Return the memory limits of a cgroup's ancestors in the unified tree, nearest first."""
    # The root of the tree has no memory.max.
    limits: list[Bound] = []
    for above in group.parents:
        text = _text(above / "memory.max")
        if text is None:
            break
        limit, hits = _parse_number(text), _table(above / "memory.events.local").get("oom")
        if limit is not None and hits is not None:
            limits.append(Bound(group=above, limit=limit, hits=hits))
    return tuple(limits)


class CounterFile:
    """A counter file that stays open: reading it again takes a tenth of the time of opening it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def read(self) -> bytes | None:
        """Return the current text, ``None`` if the file cannot be read."""
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._fd, MOST_BYTES, 0)
        except OSError:
            # The file may appear later. That of a removed group, or of a process that has ended,
            # never comes back, and its descriptor never reads another one's.
            return None

    def close(self) -> None:
        """Close the file. Can be called again; ``read`` would open it anew."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


MEMORY_EVENTS = ("memory.oom_control", "memory.events")


def has_memory_group(plan: SpawnPlan) -> bool:
    """Whether a cgroup counts the memory of the sandbox."""
    return any(Path(path).name in MEMORY_EVENTS for path in plan.cgroup.counter_files)


class Meter:
    """Reads the resource use of one sandbox."""

    # With cgroups a reading takes about 20 microseconds, cheap enough for the end of every cell.
    def __init__(
        self,
        plan: SpawnPlan,
        keeper_pid: int,
        kernel_pid: int | None = None,
        tree: ProcessTree | None = None,
        on_use: Callable[[TreeUse], None] | None = None,
        *,
        origin: Counters | None = None,
    ) -> None:
        """Open the counter files; ``on_use`` is called with each reading of the processes.

        ``origin`` are the counters of an earlier kernel in the same groups, which do not count.
        """
        self._origin = origin or Counters()
        self._plan = plan
        self._on_use = on_use
        files = {Path(path).name: Path(path) for path in plan.cgroup.counter_files}
        self._open_files: list[CounterFile] = []
        self._memory_stat = self._keep(_beside(files, MEMORY_EVENTS, "memory.stat"))
        self._tasks = self._keep(_beside(files, ("pids.events",), "pids.current"))
        self._cpu = self._keep(files.get("cpuacct.usage") or files.get("cpu.stat"))
        self._kills = self._keep(files.get("memory.events") or files.get("memory.oom_control"))
        self._memory_map = self._keep(Path(f"/proc/{kernel_pid}/statm") if kernel_pid else None)
        self._files = files
        self._above = (
            bounds_above(files["memory.events"].parent) if "memory.events" in files else ()
        )
        self._tree = None
        if not (self._memory_stat and self._cpu):
            self._tree = tree or ProcessTree(
                keeper_pid, kernel_pid, counts_shared=not has_memory_group(plan)
            )

    def leave_out(self, pid: int | None) -> None:
        """Do not count a sleeping copy of the kernel where processes are counted one by one."""
        if self._tree is not None:
            self._tree.left_out = pid

    def _keep(self, path: Path | None) -> CounterFile | None:
        if path is None:
            return None
        self._open_files.append(CounterFile(path))
        return self._open_files[-1]

    def close(self) -> None:
        """Close the files. Can be called again."""
        for file in self._open_files:
            file.close()

    def read(self) -> Reading:
        """Return the current use."""
        use = self._tree.read() if self._tree else None
        if use is not None and self._on_use is not None:
            self._on_use(use)
        cpu = self._read_cpu() if self._cpu else (use.cpu_seconds if use else None)
        tasks = _parse_number(self._tasks.read()) if self._tasks else (use.tasks if use else None)
        if self._memory_stat is not None:
            anonymous, shared = self._read_memory(self._memory_stat)
            kernel = self._kernel_memory()
            return Reading(
                memory=None if anonymous is None else anonymous + shared,
                cpu_seconds=cpu,
                tasks=tasks,
                children_memory=None
                if anonymous is None or not kernel
                else max(0, anonymous - kernel),
            )
        # No process is left. That is not a reading of zero memory.
        if use is None or not use.tasks:
            return Reading(cpu_seconds=cpu, tasks=tasks or None)
        return Reading(
            memory=use.memory,
            cpu_seconds=cpu,
            tasks=tasks,
            children_memory=use.children_memory,
            upper_bound=use.upper_bound,
        )

    @staticmethod
    def _read_memory(file: CounterFile) -> tuple[int | None, int]:
        """Return anonymous and shared memory, which cannot be reclaimed."""
        # Version 1 calls anonymous memory ``total_rss``, version 2 ``anon``.
        text = file.read()
        if not text:
            return None, 0
        anonymous, shared = _entry(text, b"anon"), _entry(text, b"shmem")
        if anonymous is None:
            anonymous, shared = _entry(text, b"total_rss"), _entry(text, b"total_shmem")
        return anonymous or 0, shared or 0

    def _kernel_memory(self) -> int | None:
        """Return the anonymous memory of the kernel process, ``None`` after its end."""
        fields = ((self._memory_map.read() if self._memory_map else None) or b"").split()
        return max(0, int(fields[1]) - int(fields[2])) * PAGE if fields else None

    def _read_cpu(self) -> float | None:
        assert self._cpu is not None
        return _minus(_cpu_seconds(self._cpu.read()), self._origin.cpu_seconds)

    def oom_kills(self) -> int | None:
        """Read only the number of OOM kills, from one small file."""
        kills = _entry((self._kills.read() if self._kills else None) or b"", b"oom_kill")
        return _minus(kills, self._origin.oom_kills)

    def bound_hit(self) -> Bound | None:
        """Return the nearest ancestor's limit that was hit since this meter was made."""
        # A kill for an ancestor's limit increases ``oom_kill`` in our cgroup too, so only the
        # ancestor's own counter tells whose limit it was.
        earlier_hits = {limit.group: limit.hits for limit in self._above}
        current = (limit for last in self._above[:1] for limit in bounds_above(last.group / "any"))
        return next(
            (limit for limit in current if limit.hits > earlier_hits.get(limit.group, limit.hits)),
            None,
        )

    def tasks_bound(self, limit: int | None) -> tuple[Path, int] | None:
        """Return the ancestor that allows the fewest tasks, if fewer than ``limit``."""
        # Tasks in the sandbox count in each ancestor, so such an ancestor is full before the
        # sandbox is. Its counter cannot decide: before Linux 6.11 a refusal for an ancestor's limit
        # was counted in the sandbox's own cgroup.
        if "pids.events" not in self._files:
            return None
        limits = [
            (_number(above / "pids.max"), above)
            for above in self._files["pids.events"].parent.parents
        ]
        fewest, group = min(
            ((most, above) for most, above in limits if most is not None), default=(None, None)
        )
        return (
            (group, fewest)
            if group is not None and fewest is not None and (limit is None or fewest < limit)
            else None
        )

    def process_count(self, limit: int | None) -> ProcessCount | None:
        """Return tasks and their limit in the cgroup or by RLIMIT_NPROC.

        ``None`` if neither enforces it, or if it cannot be read.
        """
        if self._tasks is not None:
            tasks, hit = _parse_number(self._tasks.read()), self.tasks_bound(limit)
            allowed = hit[1] if hit is not None else limit
            if tasks is None or allowed is None:
                return None
            # Other tasks in the ancestor use up its limit too.
            if hit is not None:
                tasks = _number(hit[0] / "pids.current") or tasks
            return ProcessCount(tasks=tasks, allowed=allowed, refused=self.counters().fork_refusals)
        return (
            None
            if self._tree is None
            else rlimits.process_count(self._plan, self._tree.read().tasks, limit)
        )

    def counters(self) -> Counters:
        """Read the counters of the cgroups."""
        texts = {str(path): _text(path) for path in self._files.values()}
        return parse_counters(texts).since(self._origin)

    def discount(self, base: Counters) -> None:
        """Leave out these counters, of an earlier kernel or of a copy of this one."""
        self._origin = base


def parse_counters(texts: Mapping[str, str | None]) -> Counters:
    """Parse the texts of counter files, by path, of either version of cgroups."""
    by_name = {Path(path).name: text for path, text in texts.items()}
    events = _parse_table(by_name.get("memory.events") or by_name.get("memory.oom_control"))
    peak = by_name.get("memory.peak") or by_name.get("memory.max_usage_in_bytes")
    return Counters(
        oom_kills=events.get("oom_kill"),
        limit_hits=_parse_table(by_name.get("memory.events.local")).get("oom"),
        fork_refusals=_parse_table(by_name.get("pids.events")).get("max"),
        memory_peak_raw=_parse_number(peak),
        tasks_peak=_parse_number(by_name.get("pids.peak")),
        cpu_seconds=_cpu_seconds(by_name.get("cpuacct.usage") or by_name.get("cpu.stat")),
    )


def _minus(value: _Number | None, subtrahend: _Number | None) -> _Number | None:
    if value is None or subtrahend is None:
        return value
    return value - subtrahend if value > subtrahend else value - value


def _is_higher(value: int | None, other: int | None) -> bool:
    return value is not None and (other is None or value > other)


def _entry(text: bytes, key: bytes) -> int | None:
    """Return the number of a key, in a file with one key and number per line."""
    _, mark, value = (b"\n" + text).partition(b"\n" + key + b" ")
    return _parse_number(value.partition(b"\n")[0]) if mark else None


def _cpu_seconds(text: bytes | str | None) -> float | None:
    if text is None:
        return None
    microseconds = _entry(text.encode() if isinstance(text, str) else text, b"usage_usec")
    if microseconds is not None:
        return microseconds / 1e6
    number = _parse_number(text)
    return None if number is None else number / 1e9


def _beside(files: Mapping[str, Path], names: tuple[str, ...], file_name: str) -> Path | None:
    for name in names:
        if name in files:
            return files[name].with_name(file_name)
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _table(path: Path) -> dict[str, int]:
    return _parse_table(_text(path))


def _parse_table(text: str | None) -> dict[str, int]:
    table: dict[str, int] = {}
    for line in (text or "").splitlines():
        key, _, value = line.partition(" ")
        with contextlib.suppress(ValueError):
            table[key] = int(value)
    return table


def _number(path: Path) -> int | None:
    return _parse_number(_text(path))


def _parse_number(text: bytes | str | None) -> int | None:
    try:
        return int(text.strip()) if text else None
    except ValueError:
        return None
