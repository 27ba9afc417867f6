"""Causes related to memory: the kernel or a worker was killed for it, or an allocation was refused.

Sources: the kernel's documentation of cgroup v1 and v2 (``oom_kill``), systemd-oomd.service(8). The
counters are incremented before SIGKILL is sent, so they are available at the death.
"""

from __future__ import annotations

import re
import signal

from msgspec.structs import replace

from safe_exec.diagnosis.context import (
    Context,
    exit_facts,
    inside,
    leaves_reason_to_output,
    make,
    outside,
)
from safe_exec.diagnosis.rules.activity import activity_of
from safe_exec.model.ending import (
    CellFailed,
    Died,
    LimitHit,
    TerminationReason,
    TimedOut,
)
from safe_exec.model.limits import LimitName, Mechanism
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Activity, Cause, CauseKind, Confidence, Fact
from safe_exec.units import format_seconds, format_size

# The mode of vm.overcommit_memory in which no more is granted than there is (proc_sys_vm(5)).
NO_OVERCOMMIT = 2

MEMORY_ERRORS = (
    "MemoryError",
    "_ArrayMemoryError",
    "ArrayMemoryError",
    "OutOfMemoryError",
    "OutOfMemoryException",
    "ArrowMemoryError",
)
# Words of PyTorch, polars, C++ and TensorFlow, which report it in errors of other names.
REFUSED_TO_LIBRARY = lazy_pattern(
    r"DefaultCPUAllocator: can't allocate memory|\(os error 12\)|std::bad_alloc|\bOOM when "
    r"allocating.*\bcpu\b",
    re.DOTALL,
)
# From this share of the memory on, the text says whose memory it was.
MOSTLY = 0.5
# The same in other languages: R, C++, Julia.
REFUSED = lazy_pattern(
    r"\[Errno 12\]|Cannot allocate memory|cannot allocate vector of size|std::bad_alloc|Unable "
    r"to allocate "
)

# The last line of a Python program's traceback, and what the system and C++ say.
PROGRAM_REFUSED = lazy_pattern(
    r"^(?:\w+\.)*_?(?:Array)?MemoryError\b|\[Errno 12\]|Cannot allocate memory|std::bad_alloc"
)

# numpy's text with the size of the refused request.
ASKED_FOR = lazy_pattern(r"Unable to allocate (\d+(?:\.\d+)?) ([KMGTPE]iB)")
UNITS = {
    unit: 1 << 10 * power
    for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"), 1)
}
# Above this share of the limit, a refusal is credible.
NEAR = 0.9
TRACEBACK = "Traceback (most recent call last):"
WAITING = (Activity.WAITING_CHILD, Activity.WAITING_IO, Activity.WAITING_LOCK, Activity.SLEEPING)


def _peak_of_limit(context: Context) -> str:
    peak, limit = context.evidence.memory_peak, context.limits.memory
    if peak is None or limit is None:
        return ""
    return f"peak {format_size(peak)} of {format_size(limit)}"


def _facts(context: Context) -> tuple[Fact, ...]:
    evidence = context.evidence
    facts = list(exit_facts(evidence)) if isinstance(context.ending, Died) else []
    if evidence.oom_kills:
        facts.append(
            outside(
                "killed by the system",
                evidence.oom_kills,
                "oom_kill of the sandbox's control group",
            )
        )
    if evidence.memory_peak is not None:
        facts.append(_peak(context, evidence.memory_peak))
    if context.limits.memory is not None:
        facts.append(outside("memory limit", context.limits.memory, "limits of this run"))
    children = _children(context)
    if children is not None:
        facts.append(
            outside("memory of child processes", children, "of the peak, at the highest look")
        )
    elif (own := _small_kernel(context)) is not None:
        facts.append(outside("memory of the kernel, at most", own, "rusage of the kernel process"))
    return tuple(facts)


def _peak(context: Context, peak: int) -> Fact:
    # Without the right to read smaps, shared pages count once for each process.
    if context.evidence.memory_upper_bound:
        return outside(
            "memory peak, at most",
            peak,
            "sum over processes; some could not be looked into, so shared pages count for each",
        )
    return outside(
        "memory peak", peak, "control group, or all processes with shared pages counted once"
    )


def _children(context: Context) -> int | None:
    """Return the memory of child processes, if it was most of the total."""
    children, peak = context.evidence.memory_children, context.evidence.memory_peak
    return children if children is not None and peak and children >= MOSTLY * peak else None


def _small_kernel(context: Context) -> int | None:
    """Return the kernel process's own peak if it was the smaller part of the memory."""
    own, peak = context.evidence.memory_kernel, context.evidence.memory_peak
    return own if own is not None and peak and own <= (1 - MOSTLY) * peak else None


def _advice(context: Context) -> str:
    children = _children(context)
    if children is not None:
        return (
            f"Most of it, {format_size(children)}, was in processes that the notebook had "
            "started, not in the kernel: start fewer of"
            " them, give each less to do, or end those that are done (close and join a pool)."
        ) + context.if_limited(
            LimitName.MEMORY,
            " Or raise the limit with --memory, which covers the kernel and all its processes "
            "together.",
        )
    own = _small_kernel(context)
    if own is not None:
        return (
            f"The kernel itself never had more than {format_size(own)}: the rest was in "
            "processes that the notebook"
            " had started, or in files that lie in memory (/dev/shm, a limited disk). Start "
            "fewer processes, or give"
            " each less to do."
        ) + context.if_limited(
            LimitName.MEMORY,
            " Or raise the limit with --memory, which covers the kernel and all its processes "
            "together.",
        )
    accumulators = context.accumulators()
    more = "Load and keep less at a time, or give the machine more memory."
    parts = [
        f"{accumulators} before." if accumulators else "",
        context.if_limited(
            LimitName.MEMORY, "Raise the limit with --memory, or load and keep less at a time."
        )
        or more,
    ]
    return " ".join(part for part in parts if part)


def watchdog_kill(context: Context) -> Cause | None:
    """Recognise a process tree that safe-exec killed because its memory exceeded the limit."""
    if (
        not isinstance(context.ending, Died)
        or context.evidence.termination is not TerminationReason.MEMORY
    ):
        return None
    peak_of_limit = _peak_of_limit(context)
    passed = "the sandbox passed its limit" + (f" ({peak_of_limit})" if peak_of_limit else "")
    is_upper_bound = context.evidence.memory_upper_bound
    doubt = (
        "; some of its processes could not be looked into, so pages that they share may have "
        "been counted twice"
        if is_upper_bound
        else ""
    )
    summary = f"out of memory: {passed} and was ended by safe-exec's watchdog{doubt}"
    confidence = Confidence.LIKELY if is_upper_bound else Confidence.CERTAIN
    return make(
        context, CauseKind.OUT_OF_MEMORY, summary, confidence, _facts(context), _advice(context)
    )


def oom_kill(context: Context) -> Cause | None:
    """Recognise SIGKILL in a cell in which the sandbox's own counter of OOM kills increased."""
    evidence = context.evidence
    if (
        not isinstance(context.ending, Died)
        or not evidence.exit
        or evidence.exit.signal != signal.SIGKILL
    ):
        return None
    # A kill in an earlier cell explains nothing here.
    if not evidence.oom_kills_cell:
        return None
    # A container's limit struck although ours was not reached.
    if evidence.oom_elsewhere:
        return _not_our_limit(context)
    summary = (
        f"out of memory: {_peak_of_limit(context) or 'the memory limit was reached'}, and "
        "the system killed the kernel"
    )
    return make(
        context,
        CauseKind.OUT_OF_MEMORY,
        summary,
        Confidence.CERTAIN,
        _facts(context),
        _advice(context),
    )


def _not_our_limit(context: Context) -> Cause:
    advice = (
        "Give the container or machine more memory, or set --memory below what it has, so "
        "that this run is stopped first."
    )
    group_limit = context.evidence.oom_bound
    if group_limit is None:
        reason = (
            "a group above the sandbox (a container, a session) or the machine itself had "
            "no memory left"
        )
        facts: tuple[Fact, ...] = (
            outside(
                "ran out in", "a group above the sandbox, or the machine", "counters of the groups"
            ),
        )
    else:
        group, limit = group_limit
        reason = (
            f"the limit of {format_size(limit)} on {group}, a group above the sandbox (a "
            "container, a session), was reached"
        )
        facts = (
            outside("ran out in", group, "its memory.events.local counted it"),
            outside("memory limit there", limit, "its memory.max"),
        )
    summary = f"out of memory, but not by this run's limit: {reason}"
    confidence = Confidence.LIKELY if group_limit is None else Confidence.CERTAIN
    return make(
        context, CauseKind.OUT_OF_MEMORY, summary, confidence, (*_facts(context), *facts), advice
    )


def oomd_kill(context: Context) -> Cause | None:
    """Recognise a kernel whose cgroup systemd-oomd killed under memory pressure and marked."""
    # systemd-oomd leaves an extended attribute on the group that it killed.
    if not isinstance(context.ending, Died) or not context.evidence.oomd_killed:
        return None
    facts = (
        *_facts(context),
        outside("marked by", "systemd-oomd", "extended attribute oomd_kill of the group"),
    )
    summary = (
        "out of memory: systemd-oomd ended the sandbox because the machine was under "
        "memory pressure"
    )
    return make(
        context,
        CauseKind.OUT_OF_MEMORY,
        summary,
        Confidence.CERTAIN,
        facts,
        "Set --memory to less than the machine has.",
    )


def worker_kill(context: Context) -> Cause | None:
    """Recognise a child process that was killed for memory while the kernel survived.

    The notebook then got an error, hung, or continued.
    """
    evidence = context.evidence
    lives = isinstance(context.ending, CellFailed | TimedOut) or (
        isinstance(context.ending, LimitHit) and context.ending.limit is LimitName.MEMORY
    )
    if not lives or evidence.termination is TerminationReason.MEMORY:
        return None
    # A run that ended for a killed worker has no current cell.
    killed = evidence.oom_kills if isinstance(context.ending, LimitHit) else evidence.oom_kills_cell
    if not killed or (isinstance(context.ending, TimedOut) and evidence.oom_kills_in_time == 0):
        # A worker that was killed after the time was up did not use up the time.
        return None
    facts = _facts(context)
    if evidence.error is not None:
        facts = (
            *facts,
            inside(
                "then raised",
                f"{evidence.error.ename}: {evidence.error.evalue}"[:300],
                "the cell's error",
            ),
        )
    cell_name = context.human(getattr(context.ending, "cell", None))
    peak_of_limit = _peak_of_limit(context)
    summary = f"a worker process was killed for memory in {cell_name}{_hang(context)}" + (
        f" ({peak_of_limit})" if peak_of_limit else ""
    )
    # Users expect the limit to apply to the kernel alone.
    covers = ", or raise --memory: the limit covers the kernel and all its processes together"
    ours = "" if evidence.oom_elsewhere else context.if_limited(LimitName.MEMORY, covers)
    advice = f"Use fewer or smaller workers{ours}."
    confidence = Confidence.LIKELY if isinstance(context.ending, TimedOut) else Confidence.CERTAIN
    cause = make(context, CauseKind.WORKER_OUT_OF_MEMORY, summary, confidence, facts, advice)
    if (
        isinstance(context.ending, TimedOut)
        and evidence.observation
        and not _ended_by_itself(context)
    ):
        return replace(cause, activity=activity_of(evidence.observation))
    return cause


def _hang(context: Context) -> str:
    """Describe a timed-out cell after its worker was killed; empty without a timeout."""
    if not isinstance(context.ending, TimedOut):
        return ""
    if _ended_by_itself(context):
        return f", and its error came when its {format_seconds(context.ending.allowed)} were over"
    observation = context.evidence.observation
    if observation is not None and activity_of(observation) in WAITING:
        return " and the cell waited for it forever"
    return f", and the cell ran past its {format_seconds(context.ending.allowed)}"


def _ended_by_itself(context: Context) -> bool:
    """Whether a timed-out cell failed with its own error, rather than because of our interrupt."""
    error, observation = context.evidence.error, context.evidence.observation
    if error is None or error.ename == "KeyboardInterrupt":
        return False
    return observation is None or activity_of(observation) not in (
        Activity.WAITING_CHILD,
        Activity.WAITING_LOCK,
    )


def refused(context: Context) -> Cause | None:
    """Recognise a refused allocation that raised an error; the kernel is alive."""
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    is_memory_error = error.ename.rpartition(".")[2] in MEMORY_ERRORS
    system = error.ename == "OSError" and error.evalue.startswith("[Errno 12]")
    foreign = context.language not in (None, "python") and REFUSED.search(error.evalue) is not None
    by_library = REFUSED_TO_LIBRARY.search(error.evalue) is not None
    if not (is_memory_error or system or foreign or by_library):
        return None
    facts = [
        inside("raised", f"{error.ename}: {error.evalue}"[:300], "the cell's error"),
        *_facts(context),
    ]
    detail = error.evalue.split("\n", 1)[0][:200]
    summary = f"an allocation was refused: {detail or error.ename}; the kernel lives"
    confidence = Confidence.CERTAIN if _was_short(context, error.evalue) else Confidence.LIKELY
    return make(
        context,
        CauseKind.MEMORY_ERROR,
        summary,
        confidence,
        tuple(facts),
        _advice_for_refusal(context),
    )


def refused_to_program(context: Context) -> Cause | None:
    """Recognise a program of the cell that got no memory, according to its last output."""
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    if not leaves_reason_to_output(context):
        return None
    output = context.evidence.last_words
    # A program may print "MemoryError" for any reason. Python's own report begins with a traceback.
    if "MemoryError" in output and TRACEBACK not in output:
        return None
    lines = reversed(output.splitlines())
    line = next((line.strip() for line in lines if PROGRAM_REFUSED.search(line)), None)
    if line is None:
        return None
    facts = (
        inside("raised", f"{error.ename}: {error.evalue}"[:300], "the cell's error"),
        inside("a program said", line[:300], "output of the cell"),
        *_facts(context),
    )
    return make(
        context,
        CauseKind.MEMORY_ERROR,
        f"a program that the cell started was refused an allocation: {line[:200]}",
        Confidence.LIKELY,
        facts,
        _advice_for_refusal(context),
    )


def _advice_for_refusal(context: Context) -> str:
    less = "ask for less (a smaller shape or dtype, chunks, a file)"
    enforcement = context.enforcement.get(LimitName.MEMORY)
    if (
        context.limits.memory is not None
        and enforcement is not None
        and enforcement.by is Mechanism.RLIMIT
    ):
        return (
            "This run limits what a process may allocate, whether it uses it or not "
            f"(RLIMIT_DATA): {less}, or raise --memory."
        )
    advice = f"The system turned the request down before any memory was used: {less}."
    if context.evidence.overcommit == NO_OVERCOMMIT:
        advice += (
            " This machine grants no more memory than it has (vm.overcommit_memory is 2); "
            "on others the cell may be killed instead."
        )
    return advice


def _was_short(context: Context, message: str) -> bool:
    """Tell whether observations from outside confirm that memory was refused."""
    # Either the memory in use was near the limit, or the request exceeded the limit.
    peak, limit = context.evidence.memory_peak, context.limits.memory
    if limit is None:
        return False
    match = ASKED_FOR.search(message)
    # NumPy names the size in the error, so the request can be compared with the limit.
    request = float(match[1]) * UNITS[match[2]] if match else 0.0
    return request > limit or (peak is not None and peak >= NEAR * limit)
