"""Deaths without a fault in native code: the kernel exited, was killed, or was asked to exit."""

from __future__ import annotations

import signal

from safe_exec.diagnosis.context import (
    Context,
    alive,
    exit_facts,
    inside,
    make,
    outside,
)
from safe_exec.diagnosis.rules.last_message import last_message
from safe_exec.model.ending import Died, signal_name
from safe_exec.model.evidence import Channel
from safe_exec.model.verdict import Cause, CauseKind, Confidence

# The crash rules explain these signals.
FAULTS = {
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGILL,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGTRAP,
}


def supervisor_killed(context: Context) -> Cause | None:
    """Recognise a kernel that was killed together with its parent process.

    The kernel's exit status is unknown then.
    """
    if (
        not isinstance(context.ending, Died)
        or context.evidence.exit is not None
        or context.ending.asked_to_exit
    ):
        return None
    summary = (
        "the kernel was killed together with its parent process, which is safe-exec's; "
        "most likely by the notebook's own code"
    )
    advice = "Look for os.kill(os.getppid(), ...) or a kill of whole process groups in the cell."
    return make(
        context, CauseKind.KILLED, summary, Confidence.LIKELY, exit_facts(context.evidence), advice
    )


def asked_to_exit(context: Context) -> Cause | None:
    """Recognise ``exit()`` or ``quit()``: the reply asked the frontend to end the kernel.

    Cells that follow may still have run before the kernel ended.
    """
    if not isinstance(context.ending, Died) or not context.ending.asked_to_exit:
        return None
    cell_name = context.human(context.ending.cell)
    facts = (inside("asked to exit", True, "payload of the execute reply"), alive("when it asked"))
    summary = f"{cell_name} called exit() or quit(), which ends the kernel"
    # The kernel handles requests that are already queued before it ends.
    later_cells = [
        c for c in context.cells if c.index > (context.ending.cell or 0) and c.started is not None
    ]
    if later_cells:
        summary += (
            f"; {context.human(later_cells[-1].index)} still ran only because the kernel "
            "takes a moment to end"
        )
    advice = (
        "Guard the rest of the notebook with an if, or raise an exception; exit() ends the "
        "kernel of everyone who runs this."
    )
    return make(context, CauseKind.EXIT, summary, Confidence.CERTAIN, facts, advice)


def exited(context: Context) -> Cause | None:
    """Recognise a kernel that exited without a reply; even status 0 is no pass."""
    evidence = context.evidence
    if (
        not isinstance(context.ending, Died)
        or evidence.exit is None
        or evidence.exit.exit_code is None
    ):
        return None
    # An exit code of 137 is not SIGKILL here: the wait status is raw.
    code = evidence.exit.exit_code
    facts = list(exit_facts(evidence))
    by = ""
    exit_frame = next((frame for frame in evidence.exit_request if frame.cell is not None), None)
    if exit_frame is not None and not evidence.exit_caller and code == 0:
        place = f"{context.human(exit_frame.cell)}, line {exit_frame.line}"
        facts.append(inside("asked to exit", place, "noted before the call"))
        by = f", as exit() or quit() in {place} had asked it to"
    # The agent reports os._exit() before the call, since nothing can be reported after it.
    if evidence.exit_caller:
        caller = context.frame(evidence.exit_caller[0])
        facts.append(inside("exit called from", caller, "noted before the call"))
        by = f" by os._exit() in {caller}"
    # A known caller explains the exit better than any output.
    message = None if by else last_message(evidence, (Channel.DESCRIPTOR, Channel.STDERR))
    facts += [message.fact] if message else []
    summary = (
        "the kernel process exited with exit status "
        f"{code}{by or ', without a crash and without being killed'}"
    )
    summary += f"; {message.text}" if message else ""
    advice = (
        "Look for exit(), quit(), os._exit(), a stopped event loop, a watchdog thread or timer, "
        "or a library that ends the process"
        " itself; sys.exit() alone only raises SystemExit."
        if context.is_python
        else "Look for a call that ends the process, in the cell or in a library that it calls."
    )
    return make(context, CauseKind.EXIT, summary, Confidence.CERTAIN, tuple(facts), advice)


def signalled(context: Context) -> Cause | None:
    """Recognise a death by a signal that neither a limit nor a fault explains."""
    status = context.evidence.exit
    if (
        not isinstance(context.ending, Died)
        or status is None
        or status.signal is None
        or status.signal in FAULTS
    ):
        return None
    # No handler can run at SIGKILL, so there is no report and no message to look for.
    if status.signal == signal.SIGKILL:
        return _killed(context)
    name = signal_name(status.signal)
    # Timers raise these three signals (setitimer(2), alarm(2)).
    alarm = status.signal in (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF)
    origin = (
        "a timer expired that was neither cancelled nor handled"
        if alarm
        else (
            "another process sent it, or native code of the notebook; none of its Python code "
            "was seen to"
        )
        if context.evidence.agent
        else "an unknown process sent it, perhaps the notebook itself"
    )
    summary = f"terminated by {name}: {origin}"
    advice = (
        "Look for signal.alarm() or setitimer() that is still armed when its handler is gone."
        if alarm
        else (
            "A shutdown, a scheduler, a container stop or another process sent it; nothing in "
            "the limits of this run did."
        )
    )
    return make(
        context,
        CauseKind.TERMINATED,
        summary,
        Confidence.CERTAIN,
        exit_facts(context.evidence),
        advice,
    )


def _killed(context: Context) -> Cause:
    evidence = context.evidence
    facts = [*exit_facts(evidence)]
    if evidence.oom_kills is not None:
        facts.append(
            outside(
                "killed by the system in this cell",
                evidence.oom_kills_cell,
                "oom_kill of the control group",
            )
        )
    # The location comes from the kernel, so it is evidence but no proof.
    source = evidence.location.source if evidence.location else ""
    summary = (
        "killed by SIGKILL with no limit behind it: an unknown process sent it, perhaps the "
        "notebook itself"
    )
    itself = (
        "os.kill(os.getpid(), 9) or a restart idiom"
        if context.is_python
        else "a call that sends the signal"
    )
    advice = (
        f"Look for kill -9, {itself} in the cell; else a person, a scheduler or the "
        "machine's out-of-memory killer (dmesg)."
    )
    # Without the group's counter, the system may have killed the kernel for memory.
    confidence = Confidence.CERTAIN if evidence.oom_kills is not None else Confidence.LIKELY
    if source:
        facts.append(inside("place noted by", source, "shared page"))
    return make(context, CauseKind.KILLED, summary, confidence, tuple(facts), advice)
