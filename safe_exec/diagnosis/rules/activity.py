"""The kernel's activity at the moment when its time was up.

Observations of the system (state, processor time, blocking call) decide the activity; the Python
stack only refines the answer.
"""

from __future__ import annotations

from safe_exec.diagnosis.rules import waiting
from safe_exec.diagnosis.rules.waiting import MULTIPLEXERS, SLEEPS
from safe_exec.model.evidence import ActivityObservation
from safe_exec.model.verdict import Activity

# With less processor time than this, a sampling thread may not have run even once.
STARVED_SECONDS = 0.1
# The same as a share of the time that it waited for one.
STARVED_SHARE = 0.1
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
# Python code yields after 5 ms, so a longer wait means that native code kept the lock.
HELD_SECONDS = 0.1
# A parallel library uses well over one processor while the main thread waits for it.
MANY_THREADS = 1.5
# Of the operations of fcntl(2) only F_SETLKW blocks.
LOCKS = (
    "futex",
    "futex_waitv",
    "flock",
    "fcntl",
    "semop",
    "semtimedop",
)
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
    # A long window among a crowd: what it got adds up, and is still next to nothing.
    waited = observation.cpu_wait_share or 0.0
    return (
        observation.cpu_share * observation.window < STARVED_SECONDS
        or observation.cpu_share < STARVED_SHARE * waited
    )


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
