"""A thread that samples the position of the main thread."""

import faulthandler
import json
import opcode
import signal
import sys
import time

from .holders import NEW_LOCALS
from .layout import DUMP_ALL_SIGNAL, DUMP_SIGNAL, HISTORY, HISTORY_AT, SAMPLE, SAMPLE_AT

# Short cells get a sample too; after ten seconds a slower rate is enough.
SAMPLE_SECONDS = 0.02
SLOW_SAMPLE_SECONDS = 0.05
# In a trial that only looks for the holders of memory.
THOROUGH_SAMPLE_SECONDS = 0.003
# The first instruction of a function since Python 3.11; its argument tells a start from a `yield`.
RESUME = opcode.opmap.get("RESUME")
AT_START = 0


def sample_forever(inside):
    """Sample the main thread and the wait for the interpreter lock about fifty times a second."""
    page, clock, slot, last_place = inside.page, time.monotonic, 0, None
    started, cell = 0.0, 0
    # The dump signals are for the main thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, (DUMP_SIGNAL, DUMP_ALL_SIGNAL))
    while True:
        if inside.census.is_thorough:
            pause = THOROUGH_SAMPLE_SECONDS
        else:
            pause = SAMPLE_SECONDS if clock() - started < 10 else SLOW_SAMPLE_SECONDS
        due_time = clock() + pause
        time.sleep(pause)
        if inside.child:
            return
        if not inside.in_cell:
            continue
        page.note_counts()
        if page.take_request():
            # With the interpreter lock held, so that no frame changes meanwhile.
            faulthandler.dump_traceback(file=inside.fault_fd, all_threads=True)
        inside.check_handler()
        inside.actions.send_traces()
        if page.cell != cell:
            cell, started = page.cell, clock()
        frame = running(sys._current_frames().get(inside.main))
        rows = inside.frames(frame) if frame else []
        line = next((row[1] for row in rows if row[3] == cell), 0)
        inside.census.sample(rows)
        awaiting = "" if line else awaited(inside, cell)
        if awaiting:
            rows, line = awaiting
        place = hash((rows[0][:3], frame.f_lasti)) & 0xFFFFFFFFFFFFFFFF if rows and frame else 0
        values = (cell, line, len(rows), clock(), clock() - due_time, time.process_time(), place, 0)
        SAMPLE.pack_into(page.memory, SAMPLE_AT, *values)
        SAMPLE.pack_into(page.memory, HISTORY_AT + slot * SAMPLE.size, *values)
        slot = (slot + 1) % HISTORY
        if place != last_place:
            last_place = place
            page.stack(json.dumps({"cell": cell, "rows": rows, "awaiting": bool(awaiting)}))
        frame = None


def running(frame):
    """Return the frame that has used the time so far.

    This is the caller's frame if a function has only just been entered. Python releases its lock at
    a function's first instruction, so the time and memory of the caller's previous call of a C
    function would otherwise be charged to the new function.
    """
    if frame is None or frame.f_back is None or frame.f_lineno != frame.f_code.co_firstlineno:
        return frame
    # A module's caller is the shell. Of a function on one line, only the instruction tells.
    if not frame.f_code.co_flags & NEW_LOCALS:
        return frame
    at, code = frame.f_lasti, frame.f_code.co_code
    entered = at < 0 or (code[at] == RESUME and code[at + 1] == AT_START)
    return frame.f_back if entered else frame


def awaited(inside, cell):
    """Return the stack of a suspended cell from its coroutines.

    While a cell awaits something, the main thread has no frame of it.
    """
    rows, depth = [], 0
    thing = inside.running[-1]() if inside.running else None
    while thing is not None and depth < 30:
        frame = (
            getattr(thing, "cr_frame", None)
            or getattr(thing, "gi_frame", None)
            or getattr(thing, "ag_frame", None)
        )
        if frame is not None:
            rows.append(inside.row(frame.f_code, frame.f_lineno))
        else:
            rows.append((type(thing).__name__, 0, type(thing).__module__, 0))
        thing = getattr(thing, "cr_await", None) or getattr(thing, "gi_yieldfrom", None)
        depth += 1
    rows.reverse()
    line = next((row[1] for row in rows if row[3] == cell), 0)
    return (rows, line) if line else ()
