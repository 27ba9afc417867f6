"""Waits that never end by design: a server, an event loop, or the loop that runs the cell.

A listening socket was observed outside. Python stacks are the kernel's claims and only refine the
advice. Pure; imports model.
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
# Where clients of databases and servers wait for a free connection.
PARTS_OF_POOLS = (
    "sqlalchemy/pool/",
    "psycopg_pool/",
    "psycopg2/pool.py",
    "asyncpg/pool.py",
    "mysql/connector/pooling.py",
    "oracledb/pool.py",
    "pymongo/",
    "redis/connection.py",
    "urllib3/connectionpool.py",
    "playhouse/pool.py",
)


def waiting_text(observation: ActivityObservation, activity: Activity) -> str:
    """Describe the wait of a service: ``it was waiting for connections ...``; else empty."""
    if serves(observation, activity):
        addresses = ", ".join(observation.listening[:MOST_ADDRESSES])
        return f"it was waiting for connections: it runs a server that listens on {addresses}"
    if drives_loop(observation, activity):
        return "it was running an event loop of asyncio, and the task that it waits for did not end"
    if waits_for_connection(observation, activity):
        return "it was waiting for a free connection of a pool, all of which are in use"
    if waits_for_future(observation, activity):
        return "it was waiting for the result of a future"
    if awaits(observation, activity):
        return "it was awaiting a result that nothing delivered"
    return ""


def advice(observation: ActivityObservation, activity: Activity | None) -> str:
    """Return the remedy for a server, a bot or another service; empty for other activities."""
    if serves(observation, activity):
        return (
            "A server runs until somebody stops it: start it in a thread (daemon=True) or as a "
            "background process, use it,"
            " and stop it in a later cell."
        )
    if drives_loop(observation, activity):
        return (
            "Give the task a deadline (asyncio.wait_for), or let it run in the background of "
            "the notebook's own event loop"
            " (asyncio.create_task); a bot or a server runs until somebody stops it."
        )
    if waits_for_connection(observation, activity):
        return (
            "Give connections back: close those that this and earlier cells have opened (with "
            "engine.connect() as connection: does), or create a larger pool (pool_size, "
            "max_overflow and the like)."
        )
    if waits_for_future(observation, activity):
        return (
            "Check the thread that should deliver the result: a task of a pool that waits for another "
            "task of the same pool takes the thread that it needs. A coroutine on the notebook's own "
            "event loop (asyncio.run_coroutine_threadsafe) cannot run while a cell blocks that loop: "
            "await it instead."
        )
    if awaits(observation, activity):
        return (
            "Find the code that should set the future or event, put the item or end the task; await it "
            "with a deadline (asyncio.wait_for)."
        )
    return ""


def serves(observation: ActivityObservation, activity: Activity | None) -> bool:
    """Tell whether the kernel is blocked at a socket that listens for connections."""
    return activity is Activity.WAITING_IO and bool(observation.listening)


def drives_loop(observation: ActivityObservation, activity: Activity | None) -> bool:
    """Tell whether the cell itself runs an idle event loop, inside the loop that runs the cell."""
    return activity in (Activity.WAITING_IO, Activity.SLEEPING) and any(
        frame.function in RUNS_LOOP and _is_of(frame, FILES_OF_LOOPS)
        for frame in _inside_the_cell(observation.stack)
    )


def waits_for_future(observation: ActivityObservation, activity: Activity | None) -> bool:
    """Tell whether a future is awaited while no worker of a thread executor is working."""
    return (
        activity is Activity.WAITING_LOCK
        and any(_is_of(frame, FILES_OF_FUTURES) for frame in _inside_the_cell(observation.stack))
        and not any(
            _is_of(frame, FILES_OF_WORKERS) for stack in observation.threads for frame in stack
        )
    )


def waits_for_connection(observation: ActivityObservation, activity: Activity | None) -> bool:
    """Tell whether a client waits for a thread to give a connection back to its pool."""
    return activity in (Activity.WAITING_LOCK, Activity.SLEEPING) and any(
        part in (frame.file or "")
        for frame in _inside_the_cell(observation.stack)
        for part in PARTS_OF_POOLS
    )


def awaits(observation: ActivityObservation, activity: Activity | None) -> bool:
    """Tell whether the cell awaits something while the loop that runs the cell is idle."""
    return activity is Activity.WAITING_LOCK and observation.awaiting is not None


def _inside_the_cell(stack: Sequence[Frame]) -> Iterator[Frame]:
    """Yield the frames of the functions that the cell had called, innermost first."""
    for frame in stack:
        if frame.cell is not None:
            return
        yield frame


def _is_of(frame: Frame, files: Sequence[str]) -> bool:
    return (frame.file or "").endswith(tuple(files))
