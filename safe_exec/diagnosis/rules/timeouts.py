"""Wall time that ran out: what the kernel was waiting for, or busy with."""

from __future__ import annotations

from msgspec.structs import replace

from safe_exec.diagnosis.context import Context, inside, make, outside
from safe_exec.diagnosis.rules import hangs
from safe_exec.diagnosis.rules.activity import BUSY, activity_of, computes, is_starved
from safe_exec.model.ending import TimedOut
from safe_exec.model.evidence import ActivityObservation
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import Activity, Cause, CauseKind, Confidence, Fact
from safe_exec.units import format_seconds, format_size

# A kernel needs some time before it reports the start of a cell.
BEGIN_SECONDS = 1.5

# Bytes per second. Ordinary logs are slower by orders of magnitude.
FLOOD_RATE = 100 * 1024
# A short burst at a high rate is no flood.
FLOOD_BYTES = 1 << 20
# A flood is still going on when the time is up.
FLOOD_AGE_SECONDS = 2.0


def _facts(context: Context) -> tuple[Fact, ...]:
    ending, observation = context.ending, context.evidence.observation
    assert isinstance(ending, TimedOut)
    facts = [
        outside("wall time allowed", ending.allowed, "limits of this run"),
        *hangs.waiting_facts(context, activity_of(observation) if observation else None),
    ]
    if context.evidence.crowd_at_timeout is not None:
        facts.append(outside("threads at work", context.evidence.crowd_at_timeout, "/proc"))
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
    crowd = context.evidence.crowd_at_timeout
    if crowd is not None:
        doing = (
            f"; {crowd} threads of the notebook were at work and left safe-exec hardly any "
            "processor time, so the kernel was ended without a look at what it was doing"
        )
    subject = "the notebook" if ending.whole_notebook else context.human(ending.cell)
    summary = (
        f"{subject} ran past its "
        f"{format_seconds(ending.allowed)}{doing}{_resistance(context, activity)}"
    )
    kind = CauseKind.NOTEBOOK_TIMEOUT if ending.whole_notebook else CauseKind.CELL_TIMEOUT
    option = "--timeout" if ending.whole_notebook else "--cell-timeout"
    advice = hangs.advice_text(context, activity)
    if crowd is not None or (
        activity is None and observation is not None and _crowded(observation)
    ):
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
