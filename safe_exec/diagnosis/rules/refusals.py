"""Refused requests that a library reports in its own words: threads, descriptors, memory maps.

Each library has its own wording, and one error number stands for several limits. A measurement from
outside decides which limit it was; the wording only shows that the failure is related to it. Two
errors resemble a limit of the run and are none: inotify's own limits (inotify(7)), and the nesting
depth of Python's parser, which raises MemoryError.
"""

from __future__ import annotations

import errno
import re

from safe_exec.diagnosis.context import Context, exit_facts, inside, make, outside
from safe_exec.diagnosis.rules.last_message import last_message
from safe_exec.diagnosis.rules.waiting_text import holder_text, lock_advice, lock_text
from safe_exec.model.ending import CellError, CellFailed, Died
from safe_exec.model.evidence import Channel
from safe_exec.model.limits import LimitName
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact
from safe_exec.units import format_size

# From this share of a limit on, it counts as reached: a failed call frees some of what it had
# taken.
NEARLY = 0.9
MOST_WORDS = 300

THREAD_REFUSED = lazy_pattern(
    # Rust's rayon and tokio, libgomp, OpenBLAS, libc++, Go, the JVM, TBB
    r"ThreadPoolBuildError|[Tt]hread (?:creation|constructor) failed|pthread_create|newosproc"
    r"|(?:could not|couldn't|can't|cannot|unable to|failed to) (?:create|start|spawn"
    r"|launch)[^\n]{0,40}\b(?:thread|process|worker)",
    re.IGNORECASE,
)
# EAGAIN (strerror(3)). Sockets, pipes and locks give it, too.
TRY_AGAIN = lazy_pattern(r"Resource temporarily unavailable|\bEAGAIN\b|os error 11\b|\[Errno 11\]")

# Words of SQLite, HDF5, GDAL, libraries of sockets and others, for a file or socket that could not
# be opened.
DESCRIPTOR_WANTED = lazy_pattern(
    # multiprocessing: a descriptor that was passed did not arrive (recvmsg(2), MSG_CTRUNC)
    r"items of ancdata"
    r"|(?:unable to|could not|couldn't|can't|cannot|failed to) (?:\w+ly )?(?:open|create|load"
    r"|dup|accept|connect|map|start|initiali[sz]e)"
    r"|\bepoll|\bsocket|\bpipe\b|\bdescriptors?\b|not open(?:ed)?\b|error opening",
    re.IGNORECASE,
)

MAP_REFUSED = lazy_pattern(r"memory|\bmmap|\bmap\b|\bmapp|alloc|\[Errno 12\]", re.IGNORECASE)
INOTIFY = lazy_pattern(r"inotify", re.IGNORECASE)
WATCHES, INSTANCES = (
    ("watches", "fs.inotify.max_user_watches"),
    ("instances", "fs.inotify.max_user_instances"),
)
PARSER_WORDS = lazy_pattern(
    r"Parser stack overflowed|s_push: parser stack overflow|too complex to parse"
)
# Calls that hand text to Python's parser (ast, sympy, pandas).
PARSER_CALL = lazy_pattern(
    r"\b(?:eval|exec|compile|literal_eval|parse|parse_expr|sympify|query)\s*\("
)
_ANSI = lazy_pattern(r"\x1b\[[0-9;]*m")
# The line that a traceback of IPython's points to.
_RAISED_AT = lazy_pattern(r"^-+> ?\d+ (.*)$", re.MULTILINE)


# --- threads and processes ------------------------------------------------------------------------


def died_without_threads(context: Context) -> Cause | None:
    """Recognise a kernel that ended because the limit kept a library from starting a thread."""
    evidence = context.evidence
    if not isinstance(context.ending, Died) or evidence.exit is None:
        return None
    if evidence.termination is not None or context.ending.asked_to_exit or evidence.exit_caller:
        return None
    message = last_message(evidence)
    text = "\n".join(message.lines) if message is not None else ""
    if message is None or not (THREAD_REFUSED.search(text) or TRY_AGAIN.search(text)):
        return None
    if not _threads_were_refused(context):
        return None
    summary = (
        f"too many processes: the kernel ended because a library could not start another thread"
        f"{_allowed(context)}; {' '.join(message.text.split())}"
    )
    facts = (*exit_facts(evidence), message.fact, *_process_facts(context))
    return make(
        context,
        CauseKind.TOO_MANY_PROCESSES,
        summary,
        Confidence.LIKELY,
        facts,
        _fewer_threads(context),
    )


def threads(context: Context) -> Cause | None:
    """Recognise a cell error in which a library reports that it could not start a thread."""
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    if not THREAD_REFUSED.search(error.evalue) or not _threads_were_refused(context):
        return None
    summary = f"too many processes: a library could not start another thread{_allowed(context)}"
    facts = (_said(error), *_process_facts(context))
    return make(
        context,
        CauseKind.TOO_MANY_PROCESSES,
        summary,
        Confidence.LIKELY,
        facts,
        _fewer_threads(context),
    )


def _threads_were_refused(context: Context) -> bool:
    """Tell whether the control group counted refusals, or the limit was nearly reached."""
    evidence, allowed = context.evidence, context.limits.processes
    if evidence.process_refusals:
        return True
    peak = evidence.processes_peak
    return peak is not None and allowed is not None and peak >= NEARLY * allowed


def _allowed(context: Context) -> str:
    group_limit, allowed = context.evidence.process_bound, context.limits.processes
    if group_limit is not None:
        return f" ({group_limit[1]} are allowed in {group_limit[0]}, a group above the sandbox)"
    return "" if allowed is None else f" ({allowed} processes and threads are allowed)"


def _process_facts(context: Context) -> tuple[Fact, ...]:
    evidence = context.evidence
    return (
        outside("forks refused", evidence.process_refusals, "pids.events of the control group"),
        outside(
            "processes and threads at most",
            evidence.processes_peak,
            "control group or the watchdog",
        ),
        outside("processes allowed", context.limits.processes, "limits of this run"),
    )


def _fewer_threads(context: Context) -> str:
    bounded = context.evidence.process_bound is not None
    more = "" if bounded else context.if_limited(LimitName.PROCESSES, "; or raise --processes")
    return (
        "Libraries start one thread for each processor unless told otherwise: set "
        "OMP_NUM_THREADS, OPENBLAS_NUM_THREADS,"
        " POLARS_MAX_THREADS or the like before they are imported, and end the threads of "
        f"earlier cells{more}."
    )


# --- descriptors ----------------------------------------------------------------------------------


def descriptors(context: Context) -> Cause | None:
    """Recognise a library that could not open something because few descriptors were left."""
    error = context.evidence.error
    count, allowed = context.evidence.open_files, context.limits.open_files
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    if count is None or allowed is None or count < NEARLY * allowed:
        return None
    if not DESCRIPTOR_WANTED.search(error.evalue):
        return None
    facts = (
        _said(error),
        outside("open files", count, "/proc/PID/fd after the error"),
        outside("open files allowed", allowed, "RLIMIT_NOFILE of each process"),
    )
    first = error.evalue.strip().split("\n", 1)[0][:120]
    summary = (
        f"too many open files: {count} are open of {allowed} allowed, and a library could "
        f"not have another one ({first})"
    )
    advice = (
        "Close files and sockets (use with), and look at earlier cells for what they leave "
        "open; see --open-files."
    )
    return make(context, CauseKind.TOO_MANY_OPEN_FILES, summary, Confidence.LIKELY, facts, advice)


# --- locks on files -------------------------------------------------------------------------------


def locked(context: Context) -> Cause | None:
    """Recognise a library that could not lock or open a file on which somebody holds a lock."""
    error, lock = context.evidence.error, context.evidence.named_lock
    if not isinstance(context.ending, CellFailed) or error is None or lock is None:
        return None
    first = error.evalue.strip().split("\n", 1)[0][:120]
    summary = f"{error.ename}: {first}; in the way is {lock_text(lock)}"
    facts = (
        _said(error),
        outside("file lock", lock.path, "/proc/locks, after the error"),
        outside("lock held by", holder_text(lock), "/proc/locks"),
    )
    # The lock is measured; that the error is about it follows from its words alone.
    return make(context, CauseKind.EXCEPTION, summary, Confidence.LIKELY, facts, lock_advice(lock))


# --- limits of the machine ------------------------------------------------------------------------


def inotify(context: Context) -> Cause | None:
    """Recognise inotify's own limits, which it reports as a full disk or too many open files."""
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    numbers = {row.number for row in context.evidence.raised}
    text = f"{error.ename}: {error.evalue}"
    full = errno.ENOSPC in numbers or "[Errno 28]" in text or "No space left" in text
    many = errno.EMFILE in numbers or "[Errno 24]" in text or "Too many open files" in text
    if not (full or many) or not _is_of_inotify(context, error):
        return None
    things, setting = WATCHES if full else INSTANCES
    summary = (
        f"the user has as many inotify {things} as this machine allows ({setting}):"
        f" {'the disk is not full' if full else 'it is no limit on open files'}"
    )
    advice = (
        "Watch fewer directories, or stop earlier watchers (observer.stop()). All of a user's "
        f"programs share {setting};"
        " an administrator can raise it with sysctl. No option of safe-exec changes it."
    )
    facts = (
        _said(error),
        outside("kernel process", "alive after the error", "the keeper had no wait status"),
    )
    return make(context, CauseKind.EXCEPTION, summary, Confidence.LIKELY, facts, advice)


def _is_of_inotify(context: Context, error: CellError) -> bool:
    location = context.evidence.location
    files = [frame.file or "" for frame in location.stack[:3]] if location is not None else []
    return INOTIFY.search(error.evalue) is not None or any(INOTIFY.search(file) for file in files)


def memory_maps(context: Context) -> Cause | None:
    """Recognise a refused allocation in a process that had too many memory maps."""
    error, maps = context.evidence.error, context.evidence.memory_maps
    if not isinstance(context.ending, CellFailed) or error is None or maps is None:
        return None
    count, allowed = maps
    if count < NEARLY * allowed or not MAP_REFUSED.search(f"{error.ename} {error.evalue}"):
        return None
    summary = (
        f"an allocation was refused: the kernel has {count} memory maps, and the system allows "
        f"a process {allowed}"
        " (vm.max_map_count); memory is not short"
    )
    facts = (
        _said(error),
        outside("memory maps", count, "/proc/PID/maps after the error"),
        outside("memory maps allowed", allowed, "/proc/sys/vm/max_map_count"),
    )
    advice = (
        "Map fewer files at a time: close what is no longer needed, merge small files, or read "
        "them instead of mapping them."
        " An administrator can raise vm.max_map_count with sysctl. No option of safe-exec "
        "changes it."
    )
    return make(context, CauseKind.MEMORY_ERROR, summary, Confidence.CERTAIN, facts, advice)


def died_of_memory_error(context: Context) -> Cause | None:
    """Recognise a kernel that exited because Python had no memory left to handle an error."""
    evidence = context.evidence
    if not isinstance(context.ending, Died) or evidence.exit is None:
        return None
    if evidence.exit.exit_code != 1 or evidence.termination is not None:
        return None
    if context.ending.asked_to_exit or evidence.exit_caller:
        return None
    message = last_message(evidence, (Channel.DESCRIPTOR, Channel.STDERR))
    if message is None or not message.lines[-1].startswith("MemoryError"):
        return None
    peak, limit = evidence.memory_peak, context.limits.memory
    facts = (*exit_facts(evidence), message.fact, *_memory_facts(context))
    summary = (
        "the kernel exited with status 1: an allocation was refused (MemoryError), and so were "
        "those that Python needed to report it"
    )
    is_short = peak is not None and limit is not None and peak >= NEARLY * limit
    if not is_short and peak is not None:
        summary += f". Memory itself was not short (peak {format_size(peak)})"
    advice = (
        "Load and keep less at a time."
        if is_short
        else (
            "Look for a great number of mapped files or small mappings (the system allows a process "
            "vm.max_map_count), or for a limit that the notebook sets itself (RLIMIT_AS, "
            "RLIMIT_DATA): either refuses memory that the machine has."
        )
    )
    return make(context, CauseKind.MEMORY_ERROR, summary, Confidence.LIKELY, facts, advice)


def parser(context: Context) -> Cause | None:
    """Recognise a MemoryError of Python's parser for code that is nested too deeply.

    Memory is not short then.
    """
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None or error.ename != "MemoryError":
        return None
    says_so = PARSER_WORDS.search(error.evalue) is not None
    if not says_so and (error.evalue.strip() or not _is_of_parser(error)):
        return None
    peak, limit = context.evidence.memory_peak, context.limits.memory
    if peak is not None and limit is not None and peak >= NEARLY * limit:
        return None
    summary = (
        "Python's parser gave up: the code that it was given is nested too deeply. It "
        "says so with a MemoryError, but memory is not short"
    )
    facts = (_said(error), *_memory_facts(context))
    advice = (
        "Build the value in steps instead of one expression, or nest fewer parentheses and "
        "operators; text of such a depth"
        " should not be evaluated as Python code."
    )
    return make(context, CauseKind.EXCEPTION, summary, Confidence.LIKELY, facts, advice)


def _is_of_parser(error: CellError) -> bool:
    """Tell whether the innermost line of the traceback calls the parser."""
    lines = _RAISED_AT.findall(_ANSI.sub("", "\n".join(error.traceback)))
    return bool(lines) and PARSER_CALL.search(lines[-1]) is not None


def _memory_facts(context: Context) -> list[Fact]:
    """Return the memory peak and the memory limit, as far as they are known."""
    peak, limit = context.evidence.memory_peak, context.limits.memory
    facts = []
    if peak is not None:
        facts.append(outside("memory peak", peak, "control group or sum over processes"))
    if limit is not None:
        facts.append(outside("memory limit", limit, "limits of this run"))
    return facts


def _said(error: CellError) -> Fact:
    return inside("raised", f"{error.ename}: {error.evalue}"[:MOST_WORDS], "the cell's error")
