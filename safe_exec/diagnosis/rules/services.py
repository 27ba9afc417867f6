"""What a cell waits for that does not end by its nature: a server that it runs, an event loop that it drives, the loop that it blocks.

Pure; imports model. That a socket listens was seen outside; Python stacks are the kernel's word, and only make the advice better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from safe_exec.model.evidence import ActivityObservation, Frame
from safe_exec.model.verdict import Activity

FILES_OF_LOOPS = (
    "asyncio/base_events.py",
    "asyncio/runners.py",
    "nest_asyncio.py",
    "nest_asyncio2.py",
    "uvloop/__init__.py",
)
RUNS_LOOP = ("run_until_complete", "run_forever", "run", "_run_once")
FILES_OF_FUTURES = ("concurrent/futures/_base.py",)
FILES_OF_WORKERS = ("concurrent/futures/thread.py",)
MOST_ADDRESSES = 3


def waiting_text(observation: ActivityObservation, activity: Activity) -> str:
    """``it was waiting for connections ...``; empty where it is none of these."""
    if serves(observation, activity):
        addresses = ", ".join(observation.listening[:MOST_ADDRESSES])
        return f"it was waiting for connections: it runs a server that listens on {addresses}"
    if drives_loop(observation, activity):
        return "it was running an event loop of asyncio, and the task that it waits for did not end"
    if waits_for_future(observation, activity):
        return "it was waiting for the result of a future"
    return ""


def advice(observation: ActivityObservation, activity: Activity | None) -> str:
    """What helps; empty where it is none of these."""
    if serves(observation, activity):
        return (
            "A server runs until somebody stops it: start it in a thread (daemon=True) or as a background process, use it,"
            " and stop it in a later cell."
        )
    if drives_loop(observation, activity):
        return (
            "Give the task a deadline (asyncio.wait_for), or let it run in the background of the notebook's own event loop"
            " (asyncio.create_task); a bot or a server runs until somebody stops it."
        )
    if waits_for_future(observation, activity):
        return (
            "A coroutine cannot run on the notebook's own event loop (asyncio.run_coroutine_threadsafe) while a cell blocks that loop to"
            " wait for it: await it instead. Otherwise check the thread that should deliver the result."
        )
    return ""


def serves(observation: ActivityObservation, activity: Activity | None) -> bool:
    """Whether what it is blocked at is a socket that listens for connections."""
    return activity is Activity.WAITING_IO and bool(observation.listening)


def drives_loop(observation: ActivityObservation, activity: Activity | None) -> bool:
    """Whether the cell itself runs an event loop that is at rest. The loop that runs the cell stands outside of it."""
    return activity in (Activity.WAITING_IO, Activity.SLEEPING) and any(
        frame.function in RUNS_LOOP and _is_of(frame, FILES_OF_LOOPS)
        for frame in _inside_the_cell(observation.stack)
    )


def waits_for_future(observation: ActivityObservation, activity: Activity | None) -> bool:
    """Whether a future's result is waited for, and no worker of an executor of threads is at work."""
    return (
        activity is Activity.WAITING_LOCK
        and any(_is_of(frame, FILES_OF_FUTURES) for frame in _inside_the_cell(observation.stack))
        and not any(
            _is_of(frame, FILES_OF_WORKERS) for stack in observation.threads for frame in stack
        )
    )


def _inside_the_cell(stack: Sequence[Frame]) -> Iterator[Frame]:
    """The frames that code of the notebook had called, innermost first."""
    for frame in stack:
        if frame.cell is not None:
            return
        yield frame


def _is_of(frame: Frame, files: Sequence[str]) -> bool:
    return (frame.file or "").endswith(tuple(files))
