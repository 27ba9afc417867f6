"""Adds the notebook's own actions to a cause: a signal, a resource limit, a trace function. Pure.

The rules decide by observations from outside: the wait status, the limits in /proc, the exceeded
time. Who caused them, and where, is the kernel's claim. Nothing here therefore changes the kind of
a cause or raises its confidence.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from safe_exec.diagnosis.context import Context, inside, outside
from safe_exec.model.ending import CellFailed, Died, TimedOut, signal_name
from safe_exec.model.evidence import OwnAction
from safe_exec.model.observed import ChangedLimit
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Activity, Cause, CauseKind, Fact
from safe_exec.units import format_size

# A signal to oneself arrives at once; on a busy machine the process may take a moment to end.
SIGNAL_SECONDS = 2.0
# The signals that stop a process.
STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

# The resource limits that each kind of cause may come from.
LIMITS_OF: Mapping[CauseKind, tuple[str, ...]] = {
    CauseKind.MEMORY_ERROR: ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_STACK"),
    CauseKind.TOO_MANY_OPEN_FILES: ("RLIMIT_NOFILE",),
    CauseKind.FILE_TOO_LARGE: ("RLIMIT_FSIZE",),
    # A thread needs address space for its stack, too.
    CauseKind.TOO_MANY_PROCESSES: ("RLIMIT_NPROC", "RLIMIT_AS", "RLIMIT_DATA"),
    CauseKind.CPU_TIME: ("RLIMIT_CPU",),
    CauseKind.STACK_OVERFLOW: ("RLIMIT_STACK",),
    CauseKind.SEGFAULT: ("RLIMIT_STACK", "RLIMIT_AS", "RLIMIT_DATA"),
    CauseKind.BUS_ERROR: ("RLIMIT_STACK",),
    CauseKind.ABORT: ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_NOFILE"),
    CauseKind.EXIT: ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_NPROC"),
    CauseKind.EXCEPTION: (
        "RLIMIT_AS",
        "RLIMIT_DATA",
        "RLIMIT_NPROC",
        "RLIMIT_NOFILE",
        "RLIMIT_FSIZE",
        "RLIMIT_MEMLOCK",
    ),
}
MEANINGS = {
    "RLIMIT_AS": "address space",
    "RLIMIT_DATA": "data size",
    "RLIMIT_STACK": "stack size",
    "RLIMIT_NOFILE": "open files",
    "RLIMIT_FSIZE": "file size",
    "RLIMIT_NPROC": "processes",
    "RLIMIT_CPU": "processor seconds",
    "RLIMIT_MEMLOCK": "locked memory",
}
# The limits that are sizes in bytes.
SIZES = ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_FSIZE", "RLIMIT_MEMLOCK")
ALLOWED_BY_RUN = lazy_pattern(
    r": \d+ are allowed to each process| \(\d+ are allowed to each process\)"
)
# Words by which an error of another kind is known to come from a limit.
REFUSALS: Mapping[str, tuple[str, ...]] = {
    "RLIMIT_AS": (
        "allocat",
        "emory",
        "failed to map segment",
        "bad_alloc",
        "Errno 12",
        "Errno 11",
        "new thread",
        "pthread_create",
    ),
    "RLIMIT_DATA": (
        "allocat",
        "emory",
        "bad_alloc",
        "Errno 12",
        "Errno 11",
        "new thread",
        "pthread_create",
    ),
    "RLIMIT_NPROC": (
        "Errno 11",
        "Resource temporarily unavailable",
        "cannot fork",
        "new thread",
        "pthread_create",
    ),
    "RLIMIT_NOFILE": ("Errno 24", "Too many open files"),
    "RLIMIT_FSIZE": ("Errno 27", "File too large"),
    "RLIMIT_MEMLOCK": ("Errno 12", "lock"),
}


def with_own_actions(context: Context, cause: Cause) -> Cause:
    """Return the cause with the notebook's own contribution to it."""
    for amend in (
        _with_signal,
        _with_interrupt,
        _with_stop,
        _with_program_in_its_place,
        _with_limit,
        _with_trace,
    ):
        cause = amend(context, cause)
    return cause


def place_of(context: Context, action: OwnAction) -> str:
    """Return the place of an action: ``in stop() (code cell 6, line 3)``.

    If another cell called the function, that cell is added.
    """
    # The innermost frame of the notebook is the line that a reader can change.
    frame = next((frame for frame in action.stack if frame.cell is not None), None)
    inner = frame or next(iter(action.stack), None)
    if inner is None:
        return f"in {context.human(action.cell)}"
    location_text = (
        f"{context.human(inner.cell)}, line {inner.line}"
        if inner.cell is not None
        else f"{inner.file}, line {inner.line}"
    )
    if action.cell is not None and action.cell != inner.cell:
        called = any(frame.cell == action.cell for frame in action.stack)
        location_text += (
            f", {'called from' if called else 'while'} "
            f"{context.human(action.cell)}{'' if called else ' ran'}"
        )
    return (
        f"in {location_text}"
        if inner.function == "<module>"
        else f"in {inner.function}() ({location_text})"
    )


def _fact(context: Context, name: str, action: OwnAction) -> Fact:
    return inside(
        name,
        f"{action.call} {place_of(context, action)}",
        "audit event of the call, told before it",
    )


def _last(actions: tuple[OwnAction, ...], fits: Callable[[OwnAction], bool]) -> OwnAction | None:
    return next((action for action in reversed(actions) if fits(action)), None)


# --- signals --------------------------------------------------------------------------------------


def _with_signal(context: Context, cause: Cause) -> Cause:
    """Add to the cause the sender of the signal that killed the kernel or its parent."""
    evidence = context.evidence
    if (
        not isinstance(context.ending, Died)
        or evidence.termination is not None
        or context.ending.asked_to_exit
    ):
        return cause
    # Without a wait status, the keeper itself was killed.
    number = evidence.exit.signal if evidence.exit is not None else None
    if (evidence.exit is not None and number is None) or cause.kind in (
        CauseKind.OUT_OF_MEMORY,
        CauseKind.CPU_TIME,
    ):
        return cause
    sending_action = _last(evidence.own_actions, lambda action: _sent(context, action, number))
    if sending_action is not None:
        name = signal_name(sending_action.signal or 0)
        summary = f"{_ended(cause, name)}: {_by(sending_action)} {place_of(context, sending_action)} sent it to {_whom(sending_action)}"
        facts = (*cause.evidence, _fact(context, "signal sent by", sending_action))
        return replace(
            cause, summary=summary, evidence=facts, advice=_advice_for_signal(sending_action)
        )
    if cause.kind not in (CauseKind.KILLED, CauseKind.TERMINATED):
        return cause
    return _with_program(context, cause, number)


def _sent(context: Context, action: OwnAction, number: int | None) -> bool:
    """Tell whether an action sent the signal shortly before the end."""
    # Without a wait status, any signal that ends the kernel's parent counts.
    died = context.evidence.died_at
    if action.kind != "signal" or (
        died is not None and not -SIGNAL_SECONDS < died - action.time < SIGNAL_SECONDS
    ):
        return False
    if number is None:
        return action.target in ("parent", "everybody")
    return action.signal == number and action.target in ("process", "group", "everybody", "parent")


def _ended(cause: Cause, name: str) -> str:
    verbs = {CauseKind.KILLED: "killed by", CauseKind.TERMINATED: "terminated by"}
    return f"{verbs.get(cause.kind, 'ended by')} {name}"


def _by(action: OwnAction) -> str:
    return f"{action.call}()" + (
        ", in a process that the notebook had forked," if action.child else ""
    )


def _whom(action: OwnAction) -> str:
    target_names = {
        "process": "the kernel's own process",
        "group": "its process group, to which the kernel itself belongs",
        "everybody": "every process that it may signal",
        "parent": "its parent process, which is safe-exec's",
    }
    return target_names.get(action.target or "", "itself")


def _advice_for_signal(action: OwnAction) -> str:
    # subprocess keeps children in the process group by default.
    if action.target == "group":
        return (
            "A child is in the kernel's process group unless it was started with "
            "start_new_session=True: start it so, or send the signal to that"
            " process alone (process.terminate())."
        )
    if action.target == "parent":
        return (
            "The parent of a kernel is the program that runs it: leave it alone. To end the "
            "notebook here, raise an exception."
        )
    if action.target == "everybody":
        return "Send signals to the processes that you started, by their ids."
    if action.signal == signal.SIGKILL:
        return (
            "A kernel cannot restart itself from within: remove that call, and start the "
            "notebook anew instead."
        )
    return "Remove that call; to end the notebook here, raise an exception."


def _with_program(context: Context, cause: Cause, number: int | None) -> Cause:
    """Add to the cause the cell's own command or function call that sends signals."""
    # An ending without a cell happened between two cells.
    cell = getattr(context.ending, "cell", None)
    program = _last(
        context.evidence.own_actions,
        lambda a: a.kind == "program" and a.cell == cell and cell is not None,
    )
    symbol = _last(
        context.evidence.own_actions, lambda a: a.kind == "symbol" and _just_before(context, a)
    )
    name = signal_name(number) if number is not None else "a signal"
    if program is not None:
        source = f"`{program.text}` {place_of(context, program)}"
        facts = (*cause.evidence, inside("command", program.text, "audit event of its start"))
    elif symbol is not None:
        source = f"{symbol.call}, which the notebook looked up {place_of(context, symbol)}"
        facts = (*cause.evidence, _fact(context, "looked up", symbol))
    elif context.evidence.kill_command is not None:
        line, text = context.evidence.kill_command
        source = f"`{text}` in {context.human(cell)}, line {line}"
        facts = (*cause.evidence, inside("command", text, "source of the cell"))
    else:
        return cause
    summary = f"{_ended(cause, name)}, most likely sent by {source}"
    return replace(
        cause,
        summary=summary,
        evidence=facts,
        advice="Kill processes by the ids of those that you started; $PPID is the kernel.",
    )


def _just_before(context: Context, action: OwnAction) -> bool:
    died = context.evidence.died_at
    return died is not None and -SIGNAL_SECONDS < died - action.time < SIGNAL_SECONDS


def _with_interrupt(context: Context, cause: Cause) -> Cause:
    """Add to a KeyboardInterrupt that the notebook itself caused the sender of the interrupt."""
    ending = context.ending
    if not isinstance(ending, CellFailed) or ending.error.ename != "KeyboardInterrupt":
        return cause
    sending_action = _last(
        context.evidence.own_actions,
        lambda a: a.kind == "signal" and a.signal == signal.SIGINT and a.cell == ending.cell,
    )
    if sending_action is None:
        return cause
    summary = f"KeyboardInterrupt: {_by(sending_action)} {place_of(context, sending_action)} sent SIGINT to {_whom(sending_action)}"
    return replace(
        cause,
        summary=summary,
        evidence=(*cause.evidence, _fact(context, "signal sent by", sending_action)),
        advice=_advice_for_signal(sending_action),
    )


def _with_stop(context: Context, cause: Cause) -> Cause:
    """Add to the cause the sender of the signal with which a kernel stopped itself."""
    ending = context.ending
    if not isinstance(ending, TimedOut) or cause.activity is not Activity.STOPPED:
        return cause
    sending_action = _last(
        context.evidence.own_actions,
        lambda a: a.kind == "signal" and a.signal in STOPS and a.cell == ending.cell,
    )
    if sending_action is None:
        return cause
    summary = (
        f"{cause.summary}; {_by(sending_action)} {place_of(context, sending_action)} sent "
        f"{signal_name(sending_action.signal or 0)} to {_whom(sending_action)}"
    )
    advice = (
        "Remove that call: a stopped process does nothing until another process sends it SIGCONT."
    )
    return replace(
        cause,
        summary=summary,
        evidence=(*cause.evidence, _fact(context, "signal sent by", sending_action)),
        advice=advice,
    )


# --- another program ------------------------------------------------------------------------------


def _with_program_in_its_place(context: Context, cause: Cause) -> Cause:
    """Add to the cause the program that replaced the kernel; its ending was the kernel's ending."""
    actions = context.evidence.own_actions
    # A failed exec returns, and further actions follow it.
    executed = _last(actions, lambda action: action.kind == "exec")
    if executed is None or (context.evidence.replaced_by is None and executed is not actions[-1]):
        # The call failed, and the notebook went on.
        return cause
    if cause.kind is not CauseKind.UNRESPONSIVE and not (
        cause.kind is CauseKind.EXIT and isinstance(context.ending, Died)
    ):
        return cause
    if cause.kind is CauseKind.EXIT and context.evidence.exit_caller:
        return cause
    program = context.evidence.replaced_by or executed.text
    replacement = (
        f"os.exec*() {place_of(context, executed)} put `{program}` in the place of the kernel"
    )
    summary = (
        replacement
        if cause.kind is CauseKind.UNRESPONSIVE
        else f"{replacement}, and that program {_ending(cause)}"
    )
    facts = (*cause.evidence, _fact(context, "executed by", executed))
    advice = (
        "Start programs with subprocess.run(): os.exec*() ends the kernel without ending "
        "its process, and all variables are lost."
    )
    return replace(cause, summary=summary, evidence=facts, advice=advice)


def _ending(cause: Cause) -> str:
    return f"exited with exit status {cause.exit_code}" if cause.exit_code is not None else "ended"


# --- resource limits ------------------------------------------------------------------------------


def _with_limit(context: Context, cause: Cause) -> Cause:
    """Add to the cause a resource limit that the notebook lowered, if the two may be related."""
    limit = next((limit for limit in _lowered(context) if _may_come_from(cause, limit)), None)
    if limit is None:
        return cause
    # The last call counts: a notebook may lower a limit step by step.
    setter = _last(
        context.evidence.own_actions, lambda a: a.kind == "limit" and a.limit == limit.name
    )
    meaning = MEANINGS[limit.name]
    location_text = f" {place_of(context, setter)}" if setter is not None else ""
    # The generic text about the notebook's own limit is replaced by the exact one.
    struck = cause.summary.partition(": the notebook's own code")[0]
    # The limit of the run was not the one that refused.
    struck = ALLOWED_BY_RUN.sub("", struck)
    summary = (
        f"{struck}; the notebook itself had limited its {meaning} to "
        f"{_amount(limit.name, limit.current_value)} ({limit.name}{location_text})"
    )
    facts = [*cause.evidence]
    if any(changed.name == limit.name for changed in context.evidence.changed_limits):
        initial_amount = _amount(limit.name, limit.initial_value)
        facts.append(
            outside(
                limit.name,
                f"{_amount(limit.name, limit.current_value)}, at the start {initial_amount}",
                "/proc/PID/limits",
            )
        )
    if setter is not None:
        facts.append(_fact(context, "limit set by", setter))
    place = f", {place_of(context, setter)}" if setter is not None else ""
    advice = (
        "Raise or remove the limit that the notebook sets itself "
        f"(resource.setrlimit{place}); options of safe-exec do not change it."
    )
    return replace(cause, summary=summary, evidence=tuple(facts), advice=advice)


def _lowered(context: Context) -> list[ChangedLimit]:
    """Return the resource limits that are lower than at the start.

    They were observed from outside, or the kernel reported the change just before its end.
    """
    observed_limits = [
        limit
        for limit in context.evidence.changed_limits
        if _is_lower(limit.current_value, limit.initial_value)
    ]
    # Observed limits take precedence over reported ones.
    names = {limit.name for limit in context.evidence.changed_limits}
    last: dict[str, OwnAction] = {
        a.limit: a
        for a in context.evidence.own_actions
        if a.kind == "limit" and a.limit in MEANINGS
    }
    if not isinstance(context.ending, Died):
        # The kernel was alive at the end: what was seen then counts.
        return observed_limits
    reported_limits = [
        ChangedLimit(name=name, initial_value=None, current_value=action.value)
        for name, action in last.items()
        if name not in names and action.value is not None and action.value >= 0
    ]
    return [*observed_limits, *reported_limits]


def _is_lower(value: int | None, initial_value: int | None) -> bool:
    return value is not None and (initial_value is None or value < initial_value)


def _may_come_from(cause: Cause, limit: ChangedLimit) -> bool:
    if limit.name not in LIMITS_OF.get(cause.kind, ()):
        return False
    if cause.kind not in (CauseKind.EXCEPTION, CauseKind.ABORT, CauseKind.SEGFAULT, CauseKind.EXIT):
        return True
    if cause.kind is CauseKind.SEGFAULT and limit.name == "RLIMIT_STACK":
        return True
    text = " ".join([cause.summary, *(str(fact.value) for fact in cause.evidence)])
    return any(phrase in text for phrase in REFUSALS.get(limit.name, ()))


def _amount(name: str, value: int | None) -> str:
    if value is None:
        return "unlimited"
    return format_size(value) if name in SIZES else str(value)


# --- trace functions ------------------------------------------------------------------------------

COMPUTING = (Activity.PYTHON_LOOP, Activity.NATIVE_CODE)


def _with_trace(context: Context, cause: Cause) -> Cause:
    """Add to the cause an active trace function, which slows down each line or call."""
    ending = context.ending
    if not isinstance(ending, TimedOut) or cause.activity not in COMPUTING:
        return cause
    name = next(
        (
            name
            for name in ("sys.settrace", "sys.setprofile")
            if _is_traced(context, name, ending.cell)
        ),
        None,
    )
    if name is None:
        return cause
    setter = _last(context.evidence.own_actions, lambda a: a.kind == "trace" and a.call == name)
    location_text = f" {place_of(context, setter)}" if setter is not None else ""
    often = "each line" if name == "sys.settrace" else "each call"
    # A profiler that the running cell itself switched on (%%prun) is in use, not forgotten.
    was_left_on = name in context.evidence.tracing
    verb = "had left on" if was_left_on else "switched on"
    summary = (
        f"{cause.summary}; a function that {name}(){location_text} {verb} runs at "
        f"{often} of Python code and slows it down"
    )
    facts = (
        *cause.evidence,
        inside(
            "left on" if was_left_on else "switched on",
            f"{name}{location_text}",
            "audit event, and the state at the start of the cell",
        ),
    )
    advice = (
        f"Turn it off when it is no longer needed: {name}(None). {cause.advice}"
        if was_left_on
        else f"{cause.advice} Without the profiler or tracer the cell is faster."
    )
    return replace(cause, summary=summary, evidence=facts, advice=advice)


def _is_traced(context: Context, name: str, cell: int | None) -> bool:
    """Tell whether a trace function is active."""
    # It was active when the cell began, unless an odd number of calls in the cell changed that.
    calls = sum(
        a.kind == "trace" and a.call == name and a.cell == cell
        for a in context.evidence.own_actions
    )
    return (name in context.evidence.tracing) is not bool(calls % 2)
