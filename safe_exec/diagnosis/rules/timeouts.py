"""Wall time and processor time: which one ran out, and the kernel's activity at that moment.

Observations of the system (state, processor time, blocking call) decide the activity; the Python
stack only refines the answer.
"""

from __future__ import annotations

import signal

from msgspec.structs import replace

from safe_exec.diagnosis.context import Context, exit_facts, inside, make, outside
from safe_exec.diagnosis.rules import hangs, waiting
from safe_exec.diagnosis.rules.waiting import MULTIPLEXERS, SLEEPS
from safe_exec.model.ending import Died, TerminationReason, TimedOut
from safe_exec.model.evidence import ActivityObservation
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import Activity, Cause, CauseKind, Confidence, Fact
from safe_exec.units import format_seconds, format_size

# With less processor time than this, a sampling thread may not have run even once.
STARVED_SECONDS = 0.1
# One or two lines may be stale samples; more show that Python code was running.
SEEN_PLACES = 2
# Share of looks at which the main thread had work to do, or processor seconds per second, from
# which it computes.
BUSY = 0.5

# A thread that runs Python code gives the interpreter up only when asked to, after 5 ms; native
# code that has released it lets another in at once.
FREE_SECONDS = 0.0015

# A few immediate acquisitions also happen while Python code runs.
FREE_SHARE = 0.15
# A kernel needs some time before it reports the start of a cell.
BEGIN_SECONDS = 1.5
# Python code yields after 5 ms, so a longer wait means that native code kept the lock.
HELD_SECONDS = 0.1
# A parallel library uses well over one processor while the main thread waits for it.
MANY_THREADS = 1.5

# Bytes per second. Ordinary logs are slower by orders of magnitude.
FLOOD_RATE = 100 * 1024
# A short burst at a high rate is no flood.
FLOOD_BYTES = 1 << 20
# A flood is still going on when the time is up.
FLOOD_AGE_SECONDS = 2.0
# RLIMIT_CPU is enforced with a granularity of about a second.
TOLERANCE_SECONDS = 1.0

# Of the operations of fcntl(2) only F_SETLKW blocks.
LOCKS = (
    "futex",
    "futex_waitv",
    "flock",
    "fcntl",
    "semop",
    "semtimedop",
)  # of all that fcntl(2) does only F_SETLKW waits
# The standard library's modules in which a thread waits for another one.
FILES_OF_LOCKS = ("threading.py", "queue.py", "locks.py", "queues.py", "_base.py")
# Deeper frames belong to the caller, not to the wait.
SEARCHED_FRAMES = 8


def activity_of(observation: ActivityObservation) -> Activity | None:
    """Return the activity of an observed kernel; ``None`` if it cannot be determined."""
    if observation.state in ("T", "t"):
        return Activity.STOPPED
    if computes(observation):
        return (
            _computing(observation)
            if not is_starved(observation) or _is_seen_at_work(observation)
            else None
        )
    if observation.awaiting:
        return _awaiting(observation.awaiting)
    return _waiting(observation)


def computes(observation: ActivityObservation) -> bool:
    """Tell whether the main thread, or native threads of a parallel library, are computing."""
    # On a busy machine a computing thread may get little processor time, so runnable counts more.
    share = observation.cpu_share or 0.0
    if observation.runnable is None or (not observation.instrumented and share >= BUSY):
        return share >= BUSY
    # The scheduler's state is sampled, so half of the samples is already clear.
    if observation.runnable >= BUSY:
        return True
    innermost = (observation.stack[0].file or "").rpartition("/")[2] if observation.stack else ""
    return (
        share >= MANY_THREADS
        and observation.syscall in LOCKS
        and innermost not in FILES_OF_LOCKS
        and _interpreter_free(observation)
    )


def is_starved(observation: ActivityObservation) -> bool:
    """Tell whether the kernel had work but hardly got a processor.

    If the sampling thread got no processor either, its samples prove nothing.
    """
    if (
        observation.runnable is None
        or observation.runnable < BUSY
        or observation.cpu_share is None
        or observation.window is None
    ):
        return False
    return observation.cpu_share * observation.window < STARVED_SECONDS


def _is_seen_at_work(observation: ActivityObservation) -> bool:
    """Tell whether Python code was observed in several places."""
    return (observation.lines or 0) > SEEN_PLACES


def _interpreter_free(observation: ActivityObservation) -> bool:
    """Tell whether code ran without the GIL: many samples (``FREE_SHARE``) got it at once."""
    # A wait below the switch interval means that the lock was free.
    free = sum(1 for wait in observation.gil_waits if wait < FREE_SECONDS)
    return free >= FREE_SHARE * len(observation.gil_waits)


def _computing(observation: ActivityObservation) -> Activity:
    """Describe the code that a busy kernel was executing: Python or native."""
    # Python code yields the interpreter on request. Native code either keeps it, so that the
    # sampler starves, or has released it, so that the sampler does not wait at all.
    if observation.awaiting:
        return Activity.PYTHON_LOOP
    # The median is robust against a single long wait.
    waits = sorted(observation.gil_waits)
    if observation.starved or not waits or waits[len(waits) // 2] >= HELD_SECONDS:
        return Activity.NATIVE_CODE
    if (observation.lines or 0) > max(2, len(waits) // 4) or not _interpreter_free(observation):
        return Activity.PYTHON_LOOP
    return Activity.NATIVE_CODE


def _awaiting(awaiting: str) -> Activity:
    # The name of the awaited coroutine tells what it waits for.
    module, _, function = awaiting.rpartition(".")
    if function == "sleep":
        return Activity.SLEEPING
    if "subprocess" in module or "process" in function:
        return Activity.WAITING_CHILD
    if module in ("locks", "queues", "tasks", "taskgroups", "threads", ""):
        return Activity.WAITING_LOCK
    return Activity.WAITING_IO


def _waiting(observation: ActivityObservation) -> Activity | None:  # noqa: PLR0911
    files = [(frame.file or "").rpartition("/")[2] for frame in observation.stack[:SEARCHED_FRAMES]]
    # The call is known only if the thread was blocked in it during the whole observation.
    call = observation.syscall
    # What a call is made for says more than the call: waiting for a child sleeps, polls and reads.
    if waiting.waits_for_processes(observation):
        return Activity.WAITING_CHILD
    if waiting.awaited_lock(observation) is not None or waiting.polls_for_file_lock(observation):
        return Activity.WAITING_LOCK
    if not observation.instrumented and (
        (call in MULTIPLEXERS and observation.targets != ()) or call in ("futex", "futex_waitv")
    ):
        # A kernel also waits like this for anything else that works for it: a thread, a timer, or
        # us.
        return Activity.WAITING_CHILD if (observation.children_cpu_share or 0.0) >= BUSY else None
    if call in SLEEPS or (call in MULTIPLEXERS and observation.targets == ()):
        return (
            Activity.WAITING_LOCK
            if any("joblib/" in (frame.file or "") for frame in observation.stack[:2])
            else Activity.SLEEPING
        )
    if call in LOCKS:
        return Activity.WAITING_LOCK
    if call in MULTIPLEXERS and observation.stack and observation.stack[0].function == "sleep":
        return Activity.SLEEPING
    if call is not None and call.replace("_", "").isalnum() and not call.lstrip("-").isdigit():
        return Activity.WAITING_IO
    if any(f in FILES_OF_LOCKS for f in files):
        return Activity.WAITING_LOCK
    return None


def _facts(context: Context) -> tuple[Fact, ...]:
    ending, observation = context.ending, context.evidence.observation
    assert isinstance(ending, TimedOut)
    facts = [
        outside("wall time allowed", ending.allowed, "limits of this run"),
        *hangs.waiting_facts(context, activity_of(observation) if observation else None),
    ]
    if observation is not None:
        facts += [
            outside("process state", observation.state, "/proc/PID/stat"),
            outside(
                "processor share",
                None if observation.cpu_share is None else round(observation.cpu_share, 2),
                "/proc/PID/stat, 0.4 s",
            ),
        ]
        if is_starved(observation) and observation.cpu_wait_share is not None:
            facts.append(
                outside(
                    "waited for a processor",
                    round(observation.cpu_wait_share, 2),
                    "/proc/PID/schedstat, share",
                )
            )
        if _crowded(observation):
            facts.append(outside("processes at work beside it", observation.children, "/proc"))
        if observation.syscall and not observation.syscall.isdigit():
            facts.append(outside("blocked in", observation.syscall, "/proc/PID/syscall"))
        if observation.stack:
            facts.append(
                inside("innermost frame", context.frame(observation.stack[0]), "stack dump")
            )
        if observation.awaiting:
            facts.append(inside("awaiting", observation.awaiting, "sampling thread"))
    if observation is not None and observation.ignores_interrupt:
        facts.append(outside("ignored SIGINT", True, "/proc/PID/status"))
    if ending.answered is not None:
        facts.append(
            outside(
                "ended at the interrupt", ending.answered, "execute reply within the grace time"
            )
        )
    return tuple(facts)


def _timed(
    context: Context, kind: CauseKind, summary: str, confidence: Confidence, advice: str
) -> Cause:
    observation = context.evidence.observation
    cause = make(context, kind, summary, confidence, _facts(context), advice)
    # The signal is ours: the way in which the kernel died after its time was up does not tell the
    # cause.
    return replace(
        cause,
        activity=activity_of(observation) if observation else None,
        signal=None,
        exit_code=None,
    )


def flood(context: Context) -> Cause | None:
    """Recognise a timeout while the cell was printing endlessly."""
    evidence = context.evidence
    if (
        not isinstance(context.ending, TimedOut)
        or not evidence.cell_output_bytes
        or not evidence.cell_seconds
    ):
        return None
    # Very short cells would give absurd rates.
    rate = evidence.cell_output_bytes / max(evidence.cell_seconds, 0.1)
    # A flood that ended earlier did not use up the time.
    recent = (
        evidence.cell_output_age is not None and evidence.cell_output_age < FLOOD_AGE_SECONDS + 3.0
    )
    if (
        evidence.cell_output_bytes < FLOOD_BYTES
        or rate < FLOOD_RATE
        or not (recent or evidence.cell_output_truncated)
    ):
        return None
    amount, span = format_size(evidence.cell_output_bytes), format_seconds(evidence.cell_seconds)
    summary = f"endless output: {amount} in {span}, and it was still printing when its time was up"
    cause = _timed(
        context, CauseKind.OUTPUT_FLOOD, summary, Confidence.LIKELY, _print_less(context)
    )
    fact = outside("output of the cell", evidence.cell_output_bytes, "bytes received")
    return replace(cause, evidence=(fact, *cause.evidence))


def _print_less(context: Context) -> str:
    return (
        "Print less, or end the loop"
        + context.if_limited(LimitName.CELL_OUTPUT, "; see --cell-output")
        + "."
    )


def replaced(context: Context) -> Cause | None:
    """Recognise a kernel process that executed another program.

    The process id stays, but all state is gone. The activity of that program is not an activity of
    the kernel.
    """
    program = context.evidence.replaced_by
    # The command line of the same pid has changed: only exec does that.
    if not isinstance(context.ending, TimedOut) or program is None:
        return None
    summary = f"another program took the place of the kernel (exec): `{program}`"
    advice = "Start programs as children: exec ends the kernel without ending its process."
    facts = (
        outside("wall time allowed", context.ending.allowed, "limits of this run"),
        outside(
            "command line",
            program,
            "/proc/PID/cmdline, which was another one when the kernel was ready",
        ),
    )
    return make(context, CauseKind.UNRESPONSIVE, summary, Confidence.CERTAIN, facts, advice)


def unresponsive(context: Context) -> Cause | None:
    """Recognise a kernel that is alive and idle, but neither works on the cell nor answers."""
    observation = context.evidence.observation
    if (
        not isinstance(context.ending, TimedOut)
        or context.evidence.cell_active is not False
        or observation is None
    ):
        return None
    # The request may still be on its way.
    if (context.evidence.cell_seconds or 0.0) < BEGIN_SECONDS:
        # The kernel had no time to begin.
        return None
    if observation.state in ("T", "t") or computes(observation):
        return None
    summary = "the kernel lives but does not answer: it is not at work on the cell"
    advice = (
        "Look for code that closes sockets or descriptors, stops the event loop, or blocks "
        "a thread of the kernel itself."
    )
    return _timed(context, CauseKind.UNRESPONSIVE, summary, Confidence.LIKELY, advice)


def waits_for_input(context: Context) -> Cause | None:
    """Recognise a child of the kernel that reads from a terminal, and so waits for a person."""
    observation = context.evidence.observation
    if (
        not isinstance(context.ending, TimedOut)
        or observation is None
        or not observation.reads_terminal
    ):
        return None
    if computes(observation) or (observation.children_cpu_share or 0) >= BUSY:
        return None
    summary = "it waits for input from a terminal, and nobody is there to type it"
    advice = "Pass the answer on the command line or from a file (read < file, yes |, --yes)."
    return _timed(context, CauseKind.STDIN, summary, Confidence.LIKELY, advice)


def processes_exhausted(context: Context) -> Cause | None:
    """Recognise a timeout while no further process or thread could be started.

    This is a fork bomb, or a pool that waits for a new process.
    """
    ending, count = context.ending, context.evidence.processes_at_timeout
    if not isinstance(ending, TimedOut) or count is None or not count.full:
        return None
    facts = [
        outside(
            "processes and threads",
            f"{count.tasks} of {count.allowed} when its time was up",
            "control group or /proc",
        )
    ]
    if count.of_user is not None:
        user, allowed = count.of_user
        facts.append(
            outside(
                "the user's processes and threads",
                f"{user} of {allowed}",
                "RLIMIT_NPROC counts all of a user",
            )
        )
    if count.refused:
        facts.append(outside("forks refused", count.refused, "pids.events of the control group"))
    subject = "the notebook" if ending.whole_notebook else context.human(ending.cell)
    refused = (
        f"; the system refused {count.refused} more"
        if count.refused
        else "; the system refuses more"
    )
    others = " (what else the user runs counts too)" if count.of_user is not None else ""
    summary = (
        f"{subject} ran past its {format_seconds(ending.allowed)} with {count.tasks} of "
        f"{count.allowed} processes and threads"
        f" in use{refused}{others}"
    )
    # A group above the sandbox may allow fewer processes than this run: raising our limit would not
    # help then.
    group_limit = context.evidence.process_bound
    option = (
        context.if_limited(LimitName.PROCESSES, " than --processes allows")
        if group_limit is None
        else ""
    )
    allows = option or " than that"
    advice = (
        "Look for a loop that starts processes or threads, or for a pool that is "
        f"larger{allows}; end"
        " and join those that are done."
    )
    cause = _timed(context, CauseKind.TOO_MANY_PROCESSES, summary, Confidence.LIKELY, advice)
    return replace(cause, evidence=(*facts, *cause.evidence))


def timed_out(context: Context) -> Cause | None:
    """Recognise an exceeded limit of wall time."""
    ending = context.ending
    if not isinstance(ending, TimedOut):
        return None
    observation = context.evidence.observation
    activity = activity_of(observation) if observation else None
    doing = f"; {hangs.doing_text(context, activity)}" if activity else ""
    if activity is None and observation is not None and is_starved(observation):
        doing = f"; {_starving_text(observation)}"
    subject = "the notebook" if ending.whole_notebook else context.human(ending.cell)
    summary = (
        f"{subject} ran past its "
        f"{format_seconds(ending.allowed)}{doing}{_resistance(context, activity)}"
    )
    kind = CauseKind.NOTEBOOK_TIMEOUT if ending.whole_notebook else CauseKind.CELL_TIMEOUT
    option = "--timeout" if ending.whole_notebook else "--cell-timeout"
    advice = hangs.advice_text(context, activity)
    if activity is None and observation is not None and _crowded(observation):
        advice = "Look for a loop that starts processes; end and join those that are done."
    return _timed(
        context,
        kind,
        summary,
        Confidence.CERTAIN,
        f"{advice} If it only needs longer: {option}.".strip(),
    )


def _starving_text(observation: ActivityObservation) -> str:
    """Explain why a kernel with work to do got no processor, as far as that is known."""
    if _crowded(observation):
        return (
            f"the {observation.children} processes that it had started were at work, and it "
            "hardly got a processor itself"
        )
    return "it waited for a processor, so nothing can be said of what it was doing"


def _crowded(observation: ActivityObservation) -> bool:
    """Whether a starved kernel's own processes took the processor time."""
    return (
        is_starved(observation)
        and (observation.children or 0) > 1
        and (observation.children_cpu_share or 0.0) >= BUSY
    )


def _resistance(context: Context, activity: Activity | None) -> str:
    """Return why an interrupt did not end the cell, if one was sent."""
    ending, observation = context.ending, context.evidence.observation
    if (
        not isinstance(ending, TimedOut)
        or ending.answered is not False
        or activity is Activity.STOPPED
    ):
        return ""
    if (
        observation is not None
        and observation.ignores_interrupt
        and activity is not Activity.WAITING_CHILD
    ):
        return "; it ignores interrupts (SIGINT)"
    return "; an interrupt did not end it"


def cpu_time(context: Context) -> Cause | None:
    """Recognise an exceeded limit of processor time.

    SIGXCPU, the hard limit behind it, or safe-exec's own check ended the run.
    """
    evidence = context.evidence
    if not isinstance(context.ending, Died):
        return None
    status = evidence.exit
    ours = evidence.termination is TerminationReason.CPU_TIME
    # The soft limit raises SIGXCPU, the hard limit SIGKILL (setrlimit(2)).
    soft = status is not None and status.signal == getattr(signal, "SIGXCPU", -1)
    own_hard = _own_hard_cpu(context)
    if not (ours or soft or own_hard or _hard_cpu(context)):
        return None
    facts = list(exit_facts(evidence))
    # The watchdog counts the whole tree, RLIMIT_CPU the process alone.
    used = evidence.cpu_seconds if ours else evidence.kernel_cpu_seconds
    source = "sum over the sandbox" if ours else "rusage of the kernel process"
    facts.append(outside("processor time", None if used is None else round(used, 2), source))
    limit = context.limits.cpu_time
    own = (
        limit is None
        or own_hard
        or (soft and used is not None and used < limit - TOLERANCE_SECONDS)
    )
    if own:
        summary = (
            "the processor time ran out: the notebook's own code had set a limit "
            "(RLIMIT_CPU), and it struck here"
        )
        advice = "Look for resource.setrlimit(RLIMIT_CPU, ...) in an earlier cell."
    else:
        summary = (
            f"the processor time ran out: {format_seconds(used or 0)} used of "
            f"{format_seconds(limit or 0)}"
        )
        advice = "Compute less, or raise --cpu-time."
    # Only the kernel itself reported the limit that SIGKILL enforced.
    confidence = Confidence.LIKELY if own_hard else Confidence.CERTAIN
    return make(context, CauseKind.CPU_TIME, summary, confidence, tuple(facts), advice)


def _own_hard_cpu(context: Context) -> bool:
    """Tell whether the notebook lowered RLIMIT_CPU, and SIGKILL came as soon as it was used up."""
    # If the soft limit equals the hard one, there is no SIGXCPU (setrlimit(2)).
    evidence = context.evidence
    used = evidence.kernel_cpu_seconds
    own_limits = [
        action.value
        for action in evidence.own_actions
        if action.kind == "limit" and action.limit == "RLIMIT_CPU" and not action.child
    ]
    if (
        not own_limits
        or own_limits[-1] is None
        or used is None
        or evidence.exit is None
        or evidence.exit.signal != signal.SIGKILL
        or evidence.termination is not None
        or evidence.oom_kills_cell
    ):
        return False
    # The system counts whole ticks and checks at each of them.
    return own_limits[-1] - TOLERANCE_SECONDS <= used <= own_limits[-1] + 1


def _hard_cpu(context: Context) -> bool:
    """Tell whether the hard limit of RLIMIT_CPU killed a process that ignored SIGXCPU."""
    evidence, limit = context.evidence, context.limits.cpu_time
    if (
        evidence.exit is None
        or evidence.exit.signal != signal.SIGKILL
        or limit is None
        or evidence.oom_kills_cell
    ):
        return False
    return evidence.kernel_cpu_seconds is not None and evidence.kernel_cpu_seconds >= limit
