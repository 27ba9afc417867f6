"""Describes a kernel whose time was up: its activity, the awaited object, the remedy. Pure."""

from __future__ import annotations

from safe_exec.diagnosis.context import Context, inside, outside
from safe_exec.diagnosis.rules import services, waiting, waiting_text
from safe_exec.diagnosis.rules.last_message import clean
from safe_exec.diagnosis.rules.own_actions import place_of
from safe_exec.model.evidence import ActivityObservation
from safe_exec.model.observed import ObservedLock
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Activity, Fact

MOST_WORDS = 200
# Libraries that refuse to work in a forked process (libgomp of numba, gRPC, Objective-C).
FORK = lazy_pattern(r"\bfork(?:\(\)|ed|ing)?\b")
AFTER_FORK = (
    "The library does not work in a process that is forked after its first use: start the workers "
    "afresh (multiprocessing.get_context('spawn') with the function in a module, or joblib), or "
    "start them before the notebook uses the library."
)

DOING = {
    Activity.PYTHON_LOOP: "it was running Python code, most likely a loop",
    Activity.NATIVE_CODE: "it was computing in native code",
    Activity.SLEEPING: "it was sleeping",
    Activity.WAITING_IO: "it was waiting for input or output (a socket, a pipe, a file)",
    Activity.WAITING_LOCK: "it was waiting for a lock, a queue or a thread",
    Activity.WAITING_CHILD: "it was waiting for a child process",
    Activity.STOPPED: "the process was stopped (SIGSTOP)",
}


# The activities in which the kernel waits for nothing.
BUSY_ACTIVITIES = (Activity.PYTHON_LOOP, Activity.NATIVE_CODE, Activity.STOPPED)

# The description of a kernel in which no code of ours runs.
COMPUTING = "it was computing"

ADVICE: dict[Activity | None, str] = {
    Activity.PYTHON_LOOP: "Check the condition that should end the loop.",
    Activity.NATIVE_CODE: "The line shown calls into native code that does not come back; give "
    "it less to do.",
    Activity.SLEEPING: "It waits on purpose: shorten the sleep or poll with a deadline.",
    Activity.WAITING_IO: "The other side does not answer: give the call a timeout of its own.",
    Activity.WAITING_LOCK: "Find the thread that should release the lock or fill the queue: it may "
    "have ended, or wait itself. If no other thread is left, this one took the lock before.",
    Activity.WAITING_CHILD: "Look at the child process it waits for; give the call a timeout.",
    Activity.STOPPED: "Something sent SIGSTOP; continue it with SIGCONT, or remove that call.",
}


def doing_text(context: Context, activity: Activity) -> str:
    """Describe the activity with its details: ``it was waiting for the child process ...``."""
    observation = context.evidence.observation
    if (
        activity is Activity.NATIVE_CODE
        and observation is not None
        and not observation.instrumented
    ):
        return COMPUTING
    # A computing kernel waits for nothing, so its children are irrelevant.
    if observation is None or activity in BUSY_ACTIVITIES:
        return DOING[activity]
    return _lock_text(context, observation, activity) or _child_text(context, observation, activity)


def _lock_text(context: Context, observation: ActivityObservation, activity: Activity) -> str:
    """Describe a wait for a file lock or for the notebook's own pipe; empty for any other wait."""
    if (lock := waiting.awaited_lock(observation)) is not None:
        taken_text = _taken_text(context, lock)
        return (
            "it was waiting for "
            f"{waiting_text.lock_text(lock)}{f', taken {taken_text}' if taken_text else ''}"
        )
    if activity is Activity.WAITING_LOCK and waiting.polls_for_file_lock(observation):
        return "it was trying for the lock on a file again and again"
    if activity is not Activity.WAITING_CHILD and waiting.reads_own_pipe(observation):
        return "it was reading a pipe whose other end only the notebook itself holds"
    return ""


def _taken_text(context: Context, lock: ObservedLock) -> str:
    """Return where the notebook itself had taken the same lock before; empty if unknown."""
    # Another process's lock has no earlier call in this notebook.
    if not lock.own:
        return ""
    calls = [
        action
        for action in context.evidence.own_actions
        if action.kind == "lock" and action.text == lock.path
    ]
    return place_of(context, calls[-2]) if len(calls) > 1 else ""


def _child_text(context: Context, observation: ActivityObservation, activity: Activity) -> str:
    if activity is Activity.WAITING_CHILD:
        subject_name = waiting_text.waited_for(observation)
        return (
            f"it was waiting for {subject_name}" if subject_name else DOING[activity]
        ) + _failure_text(context)
    # A child that is stuck forever explains the hang even if the kernel waits for a thread.
    stuck = waiting.stuck_child(observation)
    stuck_text = f"; {waiting_text.sentence_of(stuck)}" if stuck is not None else ""
    return (
        (services.waiting_text(observation, activity) or DOING[activity])
        + stuck_text
        + (_failure_text(context) if activity is Activity.WAITING_LOCK else "")
    )


def _failure_text(context: Context) -> str:
    failure = _printed_failure(context)
    if failure is None:
        last_line = _last_line_of_workers(context)
        return f"; its last line on stderr: {last_line}" if last_line else ""
    cell, traceback = failure
    name = f"the thread {traceback.owner}" if traceback.thread else f"the worker {traceback.owner}"
    return f"; {name} had failed before ({traceback.error}, in the output of {context.human(cell)})"


def advice_text(context: Context, activity: Activity | None) -> str:
    """Return advice for the activity; empty if there is none."""
    observation = context.evidence.observation
    if (
        activity is Activity.NATIVE_CODE
        and observation is not None
        and not observation.instrumented
    ):
        return ADVICE[Activity.PYTHON_LOOP]
    if observation is None or activity in (None, *BUSY_ACTIVITIES):
        return ADVICE.get(activity, "")
    return _lock_advice(observation, activity) or _child_advice(context, observation, activity)


def _lock_advice(observation: ActivityObservation, activity: Activity | None) -> str:
    if (lock := waiting.awaited_lock(observation)) is not None:
        return waiting_text.lock_advice(lock)
    if activity is Activity.WAITING_LOCK and waiting.polls_for_file_lock(observation):
        return (
            "Find out who holds the lock; a file that is a lock by being there may be left "
            "over: remove it. Take the lock with a timeout."
        )
    if activity is not Activity.WAITING_CHILD and waiting.reads_own_pipe(observation):
        return (
            "Close the end that is written to (os.close) when all is written, in the "
            "notebook too: only then a reader sees the end."
        )
    return ""


def _child_advice(
    context: Context, observation: ActivityObservation, activity: Activity | None
) -> str:
    stuck = waiting.stuck_child(observation)
    failure = _printed_failure(context)
    if (
        failure is not None
        and stuck is None
        and activity in (Activity.WAITING_CHILD, Activity.WAITING_LOCK)
    ):
        return waiting_text.traceback_advice(failure[1])
    if FORK.search(_last_line_of_workers(context)):
        return AFTER_FORK
    if activity is Activity.WAITING_CHILD or stuck is not None:
        return waiting_text.advice(observation, python=context.is_python)
    return services.advice(observation, activity) or ADVICE.get(activity, "")


def waiting_facts(context: Context, activity: Activity | None) -> list[Fact]:
    """Return the facts about the awaited process or lock, which a reader needs first."""
    observation = context.evidence.observation
    if observation is None or activity in BUSY_ACTIVITIES:
        return []
    facts = []
    lock = waiting.awaited_lock(observation)
    blocker = (
        waiting.find_blocker(observation)
        if activity is Activity.WAITING_CHILD
        else waiting.stuck_child(observation)
    )
    if blocker is not None:
        name = "background process" if blocker.process.adopted else "child process"
        facts.append(outside(name, waiting_text.fact_text(blocker), "/proc of that process"))
    if services.serves(observation, activity):
        addresses = ", ".join(observation.listening)
        facts.append(outside("listens on", addresses, "/proc/PID/net/tcp"))
    if lock is not None:
        facts.append(outside("file lock", lock.path, "/proc/locks"))
        facts.append(outside("lock held by", waiting_text.holder_text(lock), "/proc/locks"))
    if observation.ended and activity is Activity.WAITING_CHILD:
        facts.append(
            outside(
                "child processes that ended", len(observation.ended), "/proc, while the cell ran"
            )
        )
    if last_line := _last_line_of_workers(context):
        facts.append(
            inside("last line on stderr", last_line, "the cell's stderr, before the interrupt")
        )
    if (failure := _printed_failure(context)) is not None:
        cell, traceback = failure
        name = "thread with an error" if traceback.thread else "process with an error"
        facts.append(
            inside(
                name, f"{traceback.owner}: {traceback.error}", f"output of {context.human(cell)}"
            )
        )
    return facts


def _last_line_of_workers(context: Context) -> str:
    """Return the last line on the cell's stderr, if the workers ended early or have no work."""
    observation = context.evidence.observation
    if observation is None:
        return ""
    # A pool replaces a worker so soon that nobody may have seen the first one.
    blocker = waiting.find_blocker(observation)
    at_rest = blocker is not None and blocker.blockage is waiting.Blockage.IDLE
    if not at_rest and not any(waiting.replaced_workers(observation)):
        return ""
    lines = clean(context.evidence.stderr_in_time)
    return lines[-1].strip()[:MOST_WORDS] if lines else ""


def _printed_failure(context: Context) -> tuple[int, waiting_text.Traceback] | None:
    """Return the last traceback that a thread or worker printed, and its cell."""
    # The text was saved before our interrupt, which makes workers print tracebacks too.
    index, text = context.evidence.printed or (0, "")
    traceback = waiting_text.printed_traceback(text)
    return None if traceback is None else (index, traceback)
