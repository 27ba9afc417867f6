"""Servers, event loops and futures that a cell waits for, from the stacks and calls of real notebooks."""

from __future__ import annotations

import pytest

from safe_exec.diagnosis.rules import services
from safe_exec.model.evidence import ActivityObservation, Frame
from safe_exec.model.verdict import Activity

A = Activity
CELL = Frame(function="<module>", line=1, file="/tmp/cell.py", cell=3)
LOOP_OF_KERNEL = Frame(
    function="run_forever", line=9, file="/usr/lib/python3/asyncio/base_events.py"
)
SELECT = Frame(function="select", line=468, file="/usr/lib/python3/selectors.py")
RUN = Frame(function="run_until_complete", line=9, file="/venv/nest_asyncio.py")
WAIT = Frame(function="wait", line=320, file="/usr/lib/python3/threading.py")
RESULT = Frame(function="result", line=451, file="/usr/lib/python3/concurrent/futures/_base.py")
QUEUE_POOL = Frame(
    function="_do_get", line=166, file="/venv/lib/python3.11/site-packages/sqlalchemy/pool/impl.py"
)
WORKER = Frame(function="run", line=58, file="/usr/lib/python3/concurrent/futures/thread.py")


def observation(
    *stack: Frame, listening: tuple[str, ...] = (), thread: tuple[Frame, ...] = ()
) -> ActivityObservation:
    return ActivityObservation(
        state="S",
        cpu_share=0.0,
        syscall="poll",
        stack=stack,
        listening=listening,
        threads=(thread,),
    )


TABLE = [
    (
        "server",
        observation(SELECT, CELL, listening=("127.0.0.1:80",)),
        A.WAITING_IO,
        "127.0.0.1:80",
    ),
    ("loop", observation(SELECT, RUN, CELL, LOOP_OF_KERNEL), A.WAITING_IO, "event loop"),
    ("future", observation(WAIT, RESULT, CELL, LOOP_OF_KERNEL), A.WAITING_LOCK, "future"),
    ("connection", observation(WAIT, QUEUE_POOL, CELL), A.WAITING_LOCK, "connection of a pool"),
    ("connection-async", observation(SELECT, RUN, CELL, thread=(QUEUE_POOL,)), A.WAITING_LOCK, ""),
    ("socket", observation(SELECT, CELL, LOOP_OF_KERNEL), A.WAITING_IO, ""),
    ("lock", observation(WAIT, CELL, LOOP_OF_KERNEL), A.WAITING_LOCK, ""),
    ("executor", observation(WAIT, RESULT, CELL, thread=(CELL, WORKER)), A.WAITING_LOCK, ""),
    ("busy-loop", observation(RUN, CELL), A.PYTHON_LOOP, ""),
]


@pytest.mark.parametrize(
    ("seen", "activity", "text"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_what_does_not_end_by_its_nature(
    seen: ActivityObservation, activity: Activity, text: str
) -> None:
    said = services.waiting_text(seen, activity)
    assert text in said
    assert bool(said) == bool(text) == bool(services.advice(seen, activity))
