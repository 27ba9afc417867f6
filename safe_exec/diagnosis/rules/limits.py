"""Limits that end a run or raise an error in a cell.

They are those of output, processes, open files, file size, disk and system calls.
"""

from __future__ import annotations

import signal

from safe_exec.diagnosis.context import (
    Context,
    exit_facts,
    inside,
    leaves_reason_to_output,
    make,
    outside,
)
from safe_exec.model.ending import CellError, CellFailed, Died, LimitHit
from safe_exec.model.limits import LimitName
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact
from safe_exec.units import format_size

# The exceptions that carry an error number of the system.
OS_ERRORS = (
    "OSError",
    "IOError",
    "BlockingIOError",
    "FileNotFoundError",
    "PermissionError",
    "ConnectionError",
    "TimeoutError",
    "error",
    "gaierror",
    "NotADirectoryError",
    "InterruptedError",
    "ChildProcessError",
    "ProcessLookupError",
)
# The words of shells for a refused fork.
FORK_REFUSED = lazy_pattern(r"fork: (retry|Resource)|cannot fork")

# The words of shells, compilers and libraries about a program that SIGXFSZ or EFBIG ended.
FILE_REFUSED = lazy_pattern(
    r"\bFile size limit exceeded|\[Errno 27\]|\bFile too large\b|\bSIGXFSZ\b"
)

# The last message of libzmq, with the place in its source.
LIBRARY_REFUSED = lazy_pattern(r"Too many open files \(\S+:\d+\)")

# A failed call frees some of what it had taken, so the count is slightly below the limit.
NEARLY = 0.9


def output_flood(context: Context) -> Cause | None:
    """Recognise a run that safe-exec ended because a cell wrote many times its output limit."""
    if not isinstance(context.ending, LimitHit) or context.ending.limit not in (
        LimitName.OUTPUT,
        LimitName.CELL_OUTPUT,
    ):
        return None
    # The kernel's count may exceed the received bytes: the agent stops sending beyond the cap.
    size = context.evidence.cell_output_bytes or 0
    received, cap = (
        context.evidence.cell_output_received,
        context.limits.cell_output or context.limits.output,
    )
    # Beyond the cap a kernel with our agent only counts its output: then the figure is its own
    # claim.
    is_measured = received is not None and cap is not None and received > cap
    output_fact = (
        outside("output of the cell", size, "bytes received")
        if is_measured
        else inside("output of the cell", size, "the kernel's count")
    )
    facts = (
        output_fact,
        outside("bytes received of it", received, "messages"),
        outside("cap", context.limits.cell_output, "limits"),
    )
    summary = (
        f"endless output: {context.human(context.ending.cell)} had written "
        f"{format_size(size)} and continued"
    )
    capped = context.if_limited(
        LimitName.CELL_OUTPUT, " A long but finite log passes, cut at its cap (--cell-output)."
    )
    advice = f"End the loop or print less.{capped}"
    return make(
        context,
        CauseKind.OUTPUT_FLOOD,
        summary,
        Confidence.CERTAIN if is_measured else Confidence.LIKELY,
        facts,
        advice,
    )


def processes_watched(context: Context) -> Cause | None:
    """Recognise a run that safe-exec ended because it had too many processes."""
    if not isinstance(context.ending, LimitHit) or context.ending.limit is not LimitName.PROCESSES:
        return None
    facts = (
        outside("processes and threads at most", context.evidence.processes_peak, "watchdog"),
        outside("processes allowed", context.limits.processes, "limits of this run"),
    )
    summary = (
        f"too many processes: more than {context.limits.processes} processes and threads at a time"
    )
    advice = f"Use a pool of bounded size{_more_processes(context)}."
    return make(context, CauseKind.TOO_MANY_PROCESSES, summary, Confidence.CERTAIN, facts, advice)


def disk_watched(context: Context) -> Cause | None:
    """Recognise a run that safe-exec ended because it had written too much data to disk."""
    if not isinstance(context.ending, LimitHit) or context.ending.limit is not LimitName.DISK:
        return None
    allowed = context.limits.disk
    facts = (
        outside("killed by safe-exec for", "disk", "recorded before the signal was sent"),
        outside("disk allowed", allowed, "limits of this run"),
    )
    most = (
        ""
        if allowed is None
        else f": more than {format_size(allowed)} were written to its folder and temporary files"
    )
    summary = f"the run wrote too much{most}, and was ended by safe-exec's watchdog"
    more = context.if_limited(LimitName.DISK, " See --disk.")
    advice = (
        "Write less, or remove files that are no longer needed; look at the files of earlier "
        f"cells.{more}"
    )
    return make(context, CauseKind.DISK_FULL, summary, Confidence.CERTAIN, facts, advice)


def file_too_large_signal(context: Context) -> Cause | None:
    """Recognise SIGXFSZ, with which Linux ends a process that exceeds RLIMIT_FSIZE.

    Python itself ignores the signal.
    """
    status = context.evidence.exit
    if (
        not isinstance(context.ending, Died)
        or status is None
        or status.signal != getattr(signal, "SIGXFSZ", -1)
    ):
        return None
    facts = (
        *exit_facts(context.evidence),
        outside("file size allowed", context.limits.file_size, "RLIMIT_FSIZE"),
    )
    return make(
        context,
        CauseKind.FILE_TOO_LARGE,
        _file_summary(context),
        Confidence.CERTAIN,
        facts,
        _write_less(context),
    )


def aborted_for_descriptors(context: Context) -> Cause | None:
    """Recognise an abort of a library (mostly libzmq) that could not open a descriptor."""
    evidence = context.evidence
    status = evidence.exit
    if not isinstance(context.ending, Died) or status is None or status.signal != signal.SIGABRT:
        return None
    # libzmq prints to stderr, which may have reached the cell or the process's own descriptor.
    lines = [*evidence.last_words.splitlines(), *evidence.stderr_tail.splitlines()]
    message = next((line for line in reversed(lines) if LIBRARY_REFUSED.search(line)), None)
    # The main thread runs Python code, so the text may come from a print.
    if message is None or (evidence.fault is not None and evidence.fault.main):
        # Where Python code itself aborted, the words may be anything it printed.
        return None
    facts = (
        *exit_facts(evidence),
        inside("last message", message[:300], "stderr of the kernel process"),
        outside("open files allowed", context.limits.open_files, "RLIMIT_NOFILE"),
    )
    limit = (
        ""
        if context.limits.open_files is None
        else f" ({context.limits.open_files} are allowed to each process)"
    )
    summary = (
        f"too many open files{limit}: a library could not open another one and aborted the kernel"
    )
    return make(
        context,
        CauseKind.TOO_MANY_OPEN_FILES,
        summary,
        Confidence.LIKELY,
        facts,
        _close_files(context),
    )


def bad_system_call(context: Context) -> Cause | None:
    """Recognise SIGSYS, with which a seccomp filter ended the process."""
    status = context.evidence.exit
    if (
        not isinstance(context.ending, Died)
        or status is None
        or status.signal != getattr(signal, "SIGSYS", -1)
    ):
        return None
    summary = "bad system call: a seccomp filter ended the kernel for a forbidden call"
    advice = "The filter of this machine or container forbids a system call of the native code."
    return make(
        context,
        CauseKind.BAD_SYSTEM_CALL,
        summary,
        Confidence.CERTAIN,
        exit_facts(context.evidence),
        advice,
    )


def _write_less(context: Context) -> str:
    return f"Write less to one file{context.if_limited(LimitName.FILE_SIZE, '; see --file-size')}."


def _close_files(context: Context) -> str:
    advice = "Close files and sockets (use with), and look for files that earlier cells leave open"
    return f"{advice}{context.if_limited(LimitName.OPEN_FILES, '; see --open-files')}."


def _more_processes(context: Context) -> str:
    """Return advice to raise --processes; empty if a parent cgroup allows even less."""
    bounded = context.evidence.process_bound is not None
    return "" if bounded else context.if_limited(LimitName.PROCESSES, "; see --processes")


def _file_summary(context: Context) -> str:
    # Without a limit of ours, the file system's own maximum was reached.
    limit = context.limits.file_size
    return (
        f"a file grew past {format_size(limit)}"
        if limit is not None
        else "a file grew past the largest size allowed"
    )


# --- raised in a cell -----------------------------------------------------------------------------


def raised(context: Context) -> Cause | None:
    """Recognise a cell error that the system raised for a limit, by observations from outside."""
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    for number, phrase, judge in (
        (24, "Too many open files", _open_files),
        (23, "Too many open files in system", _open_files),
        (27, "File too large", _file_size),
        (11, "Resource temporarily unavailable", _processes),
    ):
        # An OSError carries the number that the system returned; a library's text may be anything.
        certain = error.ename in OS_ERRORS and error.evalue.startswith(f"[Errno {number}]")
        if certain or phrase in error.evalue:
            cause = judge(context, error, certain)
            if cause is not None:
                return cause
    return _by_text(context, error) or _program_wrote_too_much(context, error)


def _program_wrote_too_much(context: Context, error: CellError) -> Cause | None:
    """Recognise a program of the cell that was ended because its file became too large.

    Its status or its output shows that.
    """
    if context.limits.file_size is None or not leaves_reason_to_output(context):
        return None
    lines = [error.evalue, *reversed(context.evidence.last_words.splitlines())]
    line = next((line for line in lines if FILE_REFUSED.search(line)), None)
    if line is None:
        return None
    source = "the cell's error" if line is error.evalue else "output of the cell"
    facts = (
        _raised_fact(error),
        inside("a program said", line.strip()[:300], source),
        outside("file size allowed", context.limits.file_size, "RLIMIT_FSIZE of each process"),
    )
    summary = f"a program that the cell started was ended because {_file_summary(context)}"
    return make(
        context,
        CauseKind.FILE_TOO_LARGE,
        summary,
        Confidence.LIKELY,
        facts,
        _write_less(context),
    )


def _by_text(context: Context, error: CellError) -> Cause | None:
    """Recognise a refusal by the wording of Python and of libraries."""
    if error.ename == "RuntimeError" and error.evalue.startswith("can't start new thread"):
        return _processes(context, error, True)
    if context.language not in (None, "python") and FORK_REFUSED.search(error.evalue):
        return _processes(context, error, True)
    return None


def _raised_fact(error: CellError) -> Fact:
    return inside("raised", f"{error.ename}: {error.evalue}"[:300], "the cell's error")


def _open_files(context: Context, error: CellError, certain: bool) -> Cause | None:
    count, limit = context.evidence.open_files, context.limits.open_files
    # The kernel was alive, so its open files could be counted.
    near = count is not None and limit is not None and count >= NEARLY * limit
    if not certain and not near:
        return None
    facts = [
        _raised_fact(error),
        outside("open files allowed", limit, "RLIMIT_NOFILE of each process"),
    ]
    if near:
        facts.append(outside("open files", count, "/proc/PID/fd after the error"))
    count_text = f": {count} are open" if near else ""
    allowed = (
        ""
        if limit is None
        else f" of {limit} allowed"
        if near
        else f": {limit} are allowed to each process"
    )
    confidence = Confidence.CERTAIN if certain and near else Confidence.LIKELY
    summary = f"too many open files{count_text}{allowed}"
    return make(
        context,
        CauseKind.TOO_MANY_OPEN_FILES,
        summary,
        confidence,
        tuple(facts),
        _close_files(context),
    )


def _file_size(context: Context, error: CellError, certain: bool) -> Cause | None:
    # Any text may contain these words; only the error number is reliable.
    if not certain:
        return None
    facts = (
        _raised_fact(error),
        outside("file size allowed", context.limits.file_size, "RLIMIT_FSIZE"),
    )
    confidence = Confidence.CERTAIN if context.limits.file_size is not None else Confidence.LIKELY
    return make(
        context,
        CauseKind.FILE_TOO_LARGE,
        _file_summary(context),
        confidence,
        facts,
        _write_less(context),
    )


def _processes(context: Context, error: CellError, certain: bool) -> Cause | None:
    """Return the cause of a refused start of a process or a thread."""
    # EAGAIN comes from forks and threads but also from sockets; the control group's counter or the
    # stack must tell which it was.
    refusals = context.evidence.process_refusals
    location = context.evidence.location
    # These are the functions of the standard library that create processes and threads.
    forks = any(
        frame.function
        in (
            "_fork_exec",
            "_execute_child",
            "fork",
            "fork_exec",
            "_launch",
            "start",
            "start_new_thread",
            "spawn",
        )
        for frame in (location.stack if location else ())
    )
    says = "can't start new thread" in error.evalue or FORK_REFUSED.search(error.evalue) is not None
    # `os.fork()` in the cell itself leaves no frame: the count seen outside says that it was
    # refused for the limit.
    peak, limit = context.evidence.processes_peak, context.limits.processes
    # A pool that starts at the limit fails at its first worker.
    at_limit = peak is not None and limit is not None and peak >= NEARLY * limit
    if not (refusals or forks or says or at_limit) or not certain:
        return None
    facts = [
        _raised_fact(error),
        outside("forks refused", refusals, "pids.events of the control group"),
        outside(
            "processes and threads at most",
            context.evidence.processes_peak,
            "control group or psutil",
        ),
        outside("processes allowed", context.limits.processes, "limits of this run"),
    ]
    group_limit = context.evidence.process_bound
    allowed = "" if limit is None else f", {limit} are allowed"
    if group_limit is not None:
        group, fewest = group_limit
        facts.append(outside("processes allowed there", f"{fewest} in {group}", "its pids.max"))
        allowed = (
            f", but not by this run's limit: {fewest} are allowed in {group}, a group "
            "above the sandbox (a container, a session)"
        )
    summary = f"too many processes: the system refused a new process or thread{allowed}"
    confidence = Confidence.CERTAIN if refusals else Confidence.LIKELY
    advice = (
        "Threads count: use a pool of bounded size, join what is done, and look at "
        f"earlier cells{_more_processes(context)}."
    )
    return make(context, CauseKind.TOO_MANY_PROCESSES, summary, confidence, tuple(facts), advice)
