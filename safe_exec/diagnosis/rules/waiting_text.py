"""Describes a kernel that waits: for which object, why the wait does not end, the remedy. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable

from msgspec import Struct

from safe_exec.diagnosis.rules.waiting import (
    WRITES,
    Blockage,
    Blocker,
    find_blocker,
    is_worker,
    is_worker_command,
    other_processes,
    replaced_workers,
)
from safe_exec.model.evidence import ActivityObservation
from safe_exec.model.observed import ObservedLock, ObservedProcess
from safe_exec.model.patterns import lazy_pattern
from safe_exec.units import format_size


def waited_for(observation: ActivityObservation) -> str:
    """Return the awaited process: ``the child process `sleep 300` (pid 77), which is sleeping``.

    The text is empty if the process cannot be determined.
    """
    blocker = find_blocker(observation)
    if blocker is None:
        return _ended_process_text(observation)
    blockage = blocker.blockage
    ended_count, replaced = replaced_workers(observation)
    if blockage is Blockage.IDLE and (ended_count or replaced):
        return _ended_process_text(observation)
    if blockage is Blockage.IDLE:
        count = sum(is_worker(other) for other in other_processes(observation))
        return (
            f"its {count} worker processes, which have nothing to do"
            if count > 1
            else "its worker process, which has nothing to do"
        )
    return text_of(blocker)


def text_of(blocker: Blocker) -> str:
    """Describe a blocker as a noun: ``the child process `sleep 300` (pid 77), which sleeps``."""
    return f"{_name(blocker.process)}, which {_state(blocker.process, blocker.blockage)}"


def sentence_of(blocker: Blocker) -> str:
    """Describe a blocker as a clause: ``the child process `sleep 300` (pid 77) is sleeping``."""
    return f"{_name(blocker.process)} {_state(blocker.process, blocker.blockage)}"


def _ended_process_text(observation: ActivityObservation) -> str:
    ended_count, replaced = replaced_workers(observation)
    # A replaced worker has ended too, but may have been seen only once.
    count = max(ended_count, replaced)
    if count:
        fate = (
            " and was replaced"
            if count == 1 and replaced
            else " and were replaced"
            if replaced
            else ""
        )
        ended = (
            "a worker process that ended" if count == 1 else f"{count} worker processes that ended"
        )
        return f"{ended} before its work was done{fate}"
    child = observation.ended[-1] if observation.ended else None
    return (
        f"the child process `{child.command}` (pid {child.local_pid}), which has ended"
        if child
        else ""
    )


def _name(process: ObservedProcess) -> str:
    if process.forked:
        return f"a process that the notebook had forked (pid {process.local_pid})"
    if is_worker_command(process.command):
        return f"a worker process (pid {process.local_pid})"
    kind = "the background process" if process.adopted else "the child process"
    return f"{kind} `{process.command}` (pid {process.local_pid})"


def _state(process: ObservedProcess, blockage: Blockage) -> str:
    phrases: dict[Blockage, Callable[[], str]] = {
        Blockage.STOPPED: lambda: "is stopped (SIGSTOP, or a terminal that it may not use)",
        Blockage.FULL_PIPE: lambda: (
            f"is blocked writing to a full pipe{_fill(process)} that nobody reads"
        ),
        Blockage.LOST_LOCK: lambda: "waits for a lock that no thread is left to release",
        Blockage.FILE_LOCK: lambda: (
            f"waits for the lock on the file {process.targets[0]}"
            if process.targets
            else "waits for the lock on a file"
        ),
        Blockage.INPUT: lambda: "waits for input from a pipe that the notebook holds open",
        Blockage.TERMINAL: lambda: "waits for input from a terminal",
        Blockage.HOLDS_OUTPUT: lambda: "still holds the pipe from which its output is read",
        Blockage.ENDED: lambda: _ending(process),
        Blockage.COMPUTES: lambda: "is at work",
        Blockage.SLEEPS: lambda: "is sleeping",
        Blockage.IDLE: lambda: "has nothing to do",
        Blockage.CHILD: lambda: "waits for a process of its own",
        Blockage.OTHER: lambda: (
            f"is blocked in {process.syscall}"
            if (process.syscall or "").isidentifier()
            else "is waiting"
        ),
    }
    return phrases[blockage]()


def fact_text(blocker: Blocker) -> str:
    """Describe a blocker for the evidence: its command, its process id, and why it does not end."""
    process = blocker.process
    text = _state(process, blocker.blockage)
    return (
        f"{'forked by the notebook' if process.forked else process.command} (pid "
        f"{process.local_pid}) {text}"
    )


def _fill(process: ObservedProcess) -> str:
    return f" ({format_size(process.pipe_bytes)} in it)" if process.pipe_bytes else ""


def _ending(process: ObservedProcess) -> str:
    status = process.exit
    if status is None:
        return "has ended"
    return f"was killed by {status}" if status.signal is not None else f"has ended with {status}"


def advice(observation: ActivityObservation, *, python: bool) -> str:
    """Return advice for a wait; empty if there is none except to examine the child."""
    blocker = find_blocker(observation)
    if blocker is None or blocker.blockage is Blockage.IDLE:
        return _advice_for_lost_work(observation, python=python)
    process, blockage = blocker.process, blocker.blockage
    if blockage is Blockage.FULL_PIPE:
        return _advice_for_full_pipe(process, observation, python=python)
    if blockage is Blockage.HOLDS_OUTPUT:
        # An unusual command line could not be copied into a shell.
        command = process.command if _is_plain(process.command) else "COMMAND"
        ways = (
            " (with subprocess: stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"
            if python
            else ""
        )
        return (
            "Redirect the output of the background process, so that nobody waits for its "
            f"end: {command} >/dev/null 2>&1 &{ways}."
        )
    texts = {
        Blockage.STOPPED: "Find out what stopped it; SIGCONT lets it go on.",
        Blockage.LOST_LOCK: _lost_lock(process),
        Blockage.FILE_LOCK: "Find out who holds that lock (lslocks), and release it, or give "
        "the call a timeout.",
        Blockage.INPUT: "Close its input when all is written (process.stdin.close()), or pass "
        "the input with communicate() or run(input=...);"
        " flush what it should answer to."
        if python
        else "Close its input when all is written, or redirect it from a file or </dev/null.",
        Blockage.TERMINAL: "Pass the answer on the command line or from a file (read < file, "
        "yes |, --yes).",
        Blockage.ENDED: "It is gone: nothing that it should still send will come. Find out why "
        "it ended, and wait with a timeout.",
        Blockage.COMPUTES: "The child is busy: give it less to do.",
        Blockage.SLEEPS: "The child sleeps on purpose: shorten that, or give the call a timeout.",
    }
    return texts.get(blockage, "Look at the child process it waits for; give the call a timeout.")


def _lost_lock(process: ObservedProcess) -> str:
    if process.forked:
        return (
            "It was forked while another thread held a lock, and that thread is not in the "
            "copy: start it with"
            " multiprocessing.get_context('spawn'), or start processes before threads (and "
            "before libraries that make some)."
        )
    return (
        "Its only thread waits for a lock or a queue that only another thread could release: "
        "look at that program."
    )


def _advice_for_full_pipe(
    process: ObservedProcess, observation: ActivityObservation, *, python: bool
) -> str:
    if not python:
        return "Read its output while it runs, or send it into a file."
    if is_worker(process):
        return (
            "It cannot end before the queue or pipe that it fills is read: take all items out "
            "(get(), recv()) before join(),"
            " or let it send less."
        )
    if observation.syscall in WRITES:
        return (
            "It does not read on before its own output is read: use communicate(input=...) "
            "or subprocess.run(input=..., capture_output=True)."
        )
    if process.full_pipe in observation.reads:
        return (
            "Read its output before wait(): use communicate() or "
            "subprocess.run(capture_output=True), or send it into a file."
        )
    return (
        "Something has to read its output while it runs, or it goes into a file (stdout=open(...))."
    )


def _advice_for_lost_work(observation: ActivityObservation, *, python: bool) -> str:
    ended_count, replaced = replaced_workers(observation)
    if ended_count or replaced:
        if not python:
            return "Find out why it ended."
        return (
            "multiprocessing.Pool waits forever for the result of a worker that died: find out "
            "why it ended (os._exit, a crash, a kill),"
            " or use concurrent.futures.ProcessPoolExecutor, which raises BrokenProcessPool."
        )
    if observation.processes:
        return (
            "The workers are at rest and no result is on its way: look for an error of "
            "theirs in the cell's output; wait with a timeout."
        )
    return "Look at the child process it waits for; give the call a timeout."


def _is_plain(command: str) -> bool:
    return re.fullmatch(r"[\w./ =:,@%+-]{1,60}", command) is not None


# --- the lock on a file ---------------------------------------------------------------------------


def lock_text(lock: ObservedLock) -> str:
    """Describe a lock: ``the lock on the file corpus.lock, which the notebook itself holds``."""
    if lock.own:
        holder = ", which the notebook itself holds"
    elif lock.holder is not None:
        holder = (
            f", which {f'`{lock.command}`' if lock.command else 'another process'} (pid "
            f"{lock.holder}) holds"
        )
    else:
        holder = ""
    kind = "the database" if lock.kind == "sqlite" else "the file"
    return f"the lock on {kind} {lock.path}{holder}"


def holder_text(lock: ObservedLock) -> str | None:
    """Return the holder of a lock for the evidence."""
    if lock.own:
        return "the kernel itself"
    return None if lock.holder is None else f"{lock.command or 'process'} (pid {lock.holder})"


def lock_advice(lock: ObservedLock) -> str:
    """Return advice for a lock that is not released."""
    if lock.kind == "sqlite":
        owner = "Another connection of this notebook" if lock.own else "Another process"
        return (
            f"{owner} has a write transaction open on it: commit() or close() it before this "
            "statement."
        )
    if lock.own:
        return (
            "It was taken before, by another open file that is still open: close that file "
            "(with open(...) as file: does), or release the lock,"
            " before it is taken again."
        )
    if lock.holder is not None:
        return (
            f"End that process, or wait until it has released the lock (pid {lock.holder}); "
            "take the lock with a timeout."
        )
    return "Find out who holds it (lslocks); take the lock with a timeout."


# --- what threads and workers had printed ---------------------------------------------------------

_THREAD = lazy_pattern(r"^Exception in thread (.+?):$")
_PROCESS = lazy_pattern(r"^Process (\S*Process\S*|\S*Worker\S*):$")
_ERROR = lazy_pattern(
    r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Warning|Failure|Fault)\b.*|^(?:\w+\.)+\w+: .*"
)


class Traceback(Struct, frozen=True, kw_only=True):
    """A traceback in a cell's output: its thread or process, and its last line."""

    owner: str
    error: str
    thread: bool


def printed_traceback(text: str) -> Traceback | None:
    """Return the last traceback of a thread or worker process in a cell's output."""
    last = None
    owner: tuple[str, bool] | None = None
    # The header names the thread or process, the last line the error.
    for line in text.splitlines():
        if match := _THREAD.match(line):
            owner = (match[1], True)
        elif match := _PROCESS.match(line):
            owner = (match[1], False)
        elif owner is not None and _ERROR.match(line):
            last = Traceback(owner=owner[0], error=line.strip()[:200], thread=owner[1])
            owner = None
    return last


def traceback_advice(traceback: Traceback) -> str:
    """Explain how an error in a thread affects code that waits for its pool."""
    if "_handle_results" in traceback.owner and "__init__()" in traceback.error:
        return (
            "An exception of a worker could not be rebuilt in the notebook, and the pool's "
            "thread for results died of it: give the exception"
            " class a __reduce__, or pass all its arguments to super().__init__()."
        )
    if "Can't get attribute" in traceback.error:
        return (
            "Workers that are started anew (spawn, forkserver) cannot find what a notebook "
            "defines: put the function into a module beside the"
            " notebook and import it, or use joblib, which sends functions whole."
        )
    return f"Its traceback is in the output: {traceback.error}. Fix that error first."
