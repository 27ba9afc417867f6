"""Observes a kernel from outside over a short window, once, when its time is up.

State, processor time and system call come from /proc and are facts; stacks are the kernel's claim.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import Struct

from safe_exec.keeper import procfs
from safe_exec.kernel import file_locks, processes
from safe_exec.kernel.blocked import Call, blocked_call
from safe_exec.kernel.shared_page import Page
from safe_exec.model.evidence import ActivityObservation, Frame
from safe_exec.model.observed import EndedChild
from safe_exec.sandbox.usage import sockets

WINDOW_SECONDS = 0.4
# A kernel that has work to do but gets no processor shows little in 0.4 s, so watch it longer.
LONGEST_SECONDS = 1.2
# With less processor time than this, a kernel counts as starving.
STARVING_SECONDS = 0.1
LOOKS = 20
STARVED_SECONDS = 0.25
# Within 0.2 s, five of 540 kernels gave no usable stack on a machine with seven times as many
# tasks as processors.
ANSWER_SECONDS = 0.5
ANSWER_LOOKS = 50

Stacks = tuple[tuple[Frame, ...], tuple[tuple[Frame, ...], ...]]
"""The main thread's stack, and those of the others."""


class ObservedKernel(Struct, frozen=True, kw_only=True):
    """The kernel to observe.

    ``dump(False)`` requests the stack of the main thread, ``dump(True)`` those of all threads, none
    of which may be running; ``dump`` is ``None`` if the kernel cannot answer. ``dumped`` returns
    the main thread's stack and those of the others. ``ended`` returns the children that ended since
    the cell began, ``known_children`` all children that were seen alive.
    """

    pid: int
    keeper: int
    page: Page | None
    number: int
    dump: Callable[[bool], None] | None
    dumped: Callable[[], Stacks]
    ended: Callable[[], tuple[EndedChild, ...]]
    known_children: Callable[[], Mapping[int, EndedChild]]
    frames: Callable[[list[tuple[str, int, str, int]]], tuple[Frame, ...]]


async def observe(subject: ObservedKernel) -> ActivityObservation:
    """Watch the kernel for 0.4 s, then request its stacks."""
    pid = subject.pid
    cpu_before, members_before, rests = (
        _cpu(pid),
        processes.snapshot(pid, subject.keeper),
        procfs.voluntary_switches(pid),
    )
    calls: list[Call] = []
    states: list[str | None] = []
    clock = asyncio.get_running_loop().time
    start = clock()
    delayed = procfs.run_delay(pid)
    while len(states) < LOOKS or (
        _is_starved(pid, cpu_before, states) and clock() - start < LONGEST_SECONDS
    ):
        # Take many looks over the window: a single one could catch a short wait and report it as
        # the hang.
        await asyncio.sleep(WINDOW_SECONDS / LOOKS)
        if (call := blocked_call(pid)) is not None:
            calls.append(call)
        states.append(_state(pid) if subject.page is not None else _busiest(pid))
    window = clock() - start
    cpu_after, rests_after = _cpu(pid), procfs.voluntary_switches(pid)
    members = processes.inspect(
        pid, subject.keeper, members_before, window, subject.known_children()
    )
    call = _most_common(calls)
    targets = processes.targets_of(pid, call) if call else None
    lock = file_locks.lock_of(pid, call, [process.pid for process in members])
    delay = procfs.run_delay(pid)
    main = procfs.stat(pid, pid)
    stack, threads, awaiting = await _stacks(subject, main.state if main else None)
    waits, places, starved = _samples(subject, start_age=window)
    reads, writes = processes.pipes(pid)
    return ActivityObservation(
        state=main.state if main else None,
        cpu_share=None
        if cpu_before is None or cpu_after is None
        else max(0.0, cpu_after - cpu_before) / window,
        syscall=call.name if call else None,
        targets=targets,
        listening=sockets.listening(pid, targets or ()),
        awaited=processes.local_child(pid, call) if call else None,
        reads=reads,
        writes=writes,
        switches=None if rests is None or rests_after is None else (rests_after - rests) / window,
        runnable=states.count("R") / len(states),
        stack=stack,
        threads=threads,
        gil_waits=waits,
        lines=places,
        awaiting=awaiting,
        children=sum(not process.adopted for process in members),
        children_cpu_share=sum(
            process.cpu_share or 0.0 for process in members if not process.adopted
        ),
        window=window,
        cpu_wait_share=None
        if delay is None or delayed is None
        else max(0.0, delay - delayed) / window,
        starved=starved,
        reads_terminal=any(process.reads_terminal and not process.adopted for process in members),
        ignores_interrupt=procfs.ignores(pid, signal.SIGINT),
        processes=members,
        ended=subject.ended(),
        lock=lock,
        instrumented=subject.page is not None,
    )


async def _stacks(
    subject: ObservedKernel, state: str | None
) -> tuple[tuple[Frame, ...], tuple[tuple[Frame, ...], ...], str | None]:
    """Return the stacks of the main thread and of the others, and the awaited coroutine's name."""
    # faulthandler answers the signal in C, so even a kernel whose C code holds the GIL answers.
    # Other kernels' stacks come from the last samples.
    rows, awaits = _sampled(subject)
    if awaits:
        return subject.frames(rows), (), _what_is_awaited(rows)
    # A stopped process (T, t) handles no signal until it continues.
    if subject.dump is not None and state not in ("T", "t"):
        # The main thread's own dump is exact. While the others may run, the sampling thread writes
        # theirs: it holds the interpreter lock. One after the other, since both write to the same
        # channel in small pieces.
        is_lock_held = _is_lock_held(subject)
        subject.dump(is_lock_held)
        stacks = await _dumped(subject, lambda stacks: bool(stacks[0]))
        if subject.page is not None and not is_lock_held:
            subject.page.request_stacks(True)
            stacks = await _dumped(subject, lambda stacks: bool(stacks[1]))
            subject.page.request_stacks(False)
        if stacks[0]:
            return *stacks, None
    return subject.frames(rows), (), None


async def _dumped(subject: ObservedKernel, is_answer: Callable[[Stacks], bool]) -> Stacks:
    """Wait at most half a second for the requested stacks, and return those that arrived."""
    last_stacks: Stacks = ((), ())
    for _ in range(ANSWER_LOOKS):
        await asyncio.sleep(ANSWER_SECONDS / ANSWER_LOOKS)
        stacks = subject.dumped()
        # A dump arrives in small pieces. It is complete once it stops growing.
        if stacks == last_stacks and is_answer(stacks):
            break
        last_stacks = stacks
    return last_stacks


def _is_lock_held(subject: ObservedKernel) -> bool:
    """Whether the sampling thread has waited for the interpreter lock for a while."""
    page = subject.page
    return page is None or time.monotonic() - page.sample().time > STARVED_SECONDS


def _sampled(subject: ObservedKernel) -> tuple[list[tuple[str, int, str, int]], bool]:
    if subject.page is None:
        return [], False
    cell, rows, awaits = subject.page.stack()
    return (rows, awaits) if cell == subject.number else ([], False)


def _what_is_awaited(rows: list[tuple[str, int, str, int]]) -> str:
    """Return the innermost named coroutine, as ``module.function``."""
    for function, _, file, cell in rows:
        if cell:
            # The notebook's own code awaits the future itself.
            break
        if function not in ("Future", "FutureIter", "Task", "_GatheringFuture", "future_iterator"):
            return f"{Path(file).stem if '/' in file else file}.{function}"
    return "a future"


def _samples(
    subject: ObservedKernel, start_age: float
) -> tuple[tuple[float, ...], int | None, bool | None]:
    """Return the sampling thread's waits for the interpreter lock, in seconds.

    The second value is the number of places where it found the main thread, the third is true if it
    has had no processor or lock for a while.
    """
    # The sampling thread needs the GIL for each sample. If it has not run for a while, other code
    # held the GIL.
    if subject.page is None or not subject.page.alive:
        return (), None, None
    read_at = time.monotonic()
    recent = [
        s
        for s in subject.page.history()
        if s.cell == subject.number and read_at - s.time < start_age + 1.0
    ]
    last = subject.page.sample().time
    return (
        tuple(s.wait for s in recent),
        len({s.place for s in recent}),
        read_at - last > STARVED_SECONDS,
    )


def _is_starved(pid: int, cpu_before: float | None, states: list[str | None]) -> bool:
    """Whether the kernel is runnable but gets hardly any processor time."""
    cpu = _cpu(pid)
    return (
        cpu_before is not None
        and cpu is not None
        and cpu - cpu_before < STARVING_SECONDS
        and states.count("R") > len(states) / 2
    )


def _state(pid: int) -> str | None:
    status = procfs.stat(pid, pid)
    return status.state if status else None


def _busiest(pid: int) -> str | None:
    """Return "R" if one of the threads has work to do, else "S"; ``None`` for an ended process."""
    # In a kernel without our agent, any thread may be the one that runs the cells.
    try:
        tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return None
    return next(
        (
            "R"
            for task in tasks
            if (status := procfs.stat(pid, task)) is not None and status.state == "R"
        ),
        "S",
    )


def _most_common(calls: list[Call]) -> Call | None:
    """Of the calls with the most frequent name, return the last one."""
    names = [call.name for call in calls]
    return (
        max(calls, key=lambda call: (names.count(call.name), calls.index(call))) if calls else None
    )


def _cpu(pid: int) -> float | None:
    status = procfs.stat(pid)
    return status.cpu if status else None
