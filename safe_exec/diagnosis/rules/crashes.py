"""Deaths by a fault in native code: the signal tells the kind, the fault handler the place.

``stack_overflow`` requires evidence of its own, read from /proc while the dying process was held in
its fault handler (see keeper/crash_output.py). Either the failing address is near the stack
pointer, past the end of the thread's stack; or, if the registers cannot be read, the main thread's
stack had grown to its limit. A thread without space for the handler leaves no report at all, which
makes an overflow likely.
"""

from __future__ import annotations

import signal

from safe_exec.diagnosis.context import Context, exit_facts, inside, make, outside
from safe_exec.diagnosis.rules.last_message import last_message
from safe_exec.model.ending import Died
from safe_exec.model.evidence import Channel, FaultReport, FaultSite
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact
from safe_exec.units import format_size

# The stack grows by pages, and a frame may jump over some, so a stack this near its limit was full.
STACK_MARGIN = 64 * 1024

# Memory that programs share or generate code in.
NO_LIBRARY = ("/dev/zero", "/dev/shm", "/memfd:")  # noqa: S108 - names in /proc/PID/maps, not files

# Titles of fault reports that repeat the signal. Any other is the reason that Python itself gave up
# (Py_FatalError).
SIGNAL_TITLES = frozenset(
    {
        "Aborted",
        "Segmentation fault",
        "Bus error",
        "Illegal instruction",
        "Floating-point exception",
        "",
    }
)

# What the fault handler catches beside SIGSEGV.
OTHER_FAULTS = frozenset({signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})

KINDS = {
    signal.SIGSEGV: (
        CauseKind.SEGFAULT,
        "segmentation fault: native code touched memory that is not there",
    ),
    signal.SIGABRT: (CauseKind.ABORT, "abort: native code gave up"),
    signal.SIGILL: (
        CauseKind.ILLEGAL_INSTRUCTION,
        "illegal instruction: a library was built for another processor, or jumped astray",
    ),
    signal.SIGBUS: (
        CauseKind.BUS_ERROR,
        "bus error: a mapped file is shorter than what was read, or its disk is full",
    ),
    # V8 and other programs built by Clang end themselves with a trap (brk, int3) if a check of
    # their own fails.
    signal.SIGTRAP: (CauseKind.ABORT, "abort by a trap: native code gave up"),
    signal.SIGFPE: (
        CauseKind.FLOATING_POINT_EXCEPTION,
        (
            "arithmetic fault in native code: an integer division by zero, or one whose result is "
            "too large"
        ),
    ),
}

ADVICE = {
    CauseKind.SEGFAULT: "Look at the native library in the innermost frames: its version, its "
    "arguments, array bounds and lifetimes.",
    CauseKind.ABORT: "A last message, if there is one, tells why: look it up together with the "
    "library's name. A heap that was found"
    " corrupted or a pointer that was invalid was damaged earlier than it was noticed.",
    CauseKind.ILLEGAL_INSTRUCTION: "Install a build of the library for this processor (AVX and "
    "the like), or reinstall it.",
    CauseKind.BUS_ERROR: "Check whether a memory-mapped file was shortened or its disk or "
    "/dev/shm is full; reinstall a truncated library.",
    CauseKind.FLOATING_POINT_EXCEPTION: "Check integer divisors that reach native code; numpy "
    "and Python check theirs, C does not.",
    CauseKind.STACK_OVERFLOW: "Recurse less deeply (a loop, a smaller sys.setrecursionlimit), "
    "or flatten what was nested or chained.",
}
IN_THREAD = (
    " Or give the thread a larger stack: threading.stack_size(256 << 20) before it is started; "
    "a thread that a library"
    " starts has a setting of its own for that."
)
# Packages of the kernel itself: sound code, which fails only in memory that others damaged.
OF_KERNEL = ("ipykernel", "zmq", "tornado", "asyncio", "traitlets", "jupyter_client", "IPython")
DAMAGED_EARLIER = (
    "Look at native code that ran earlier (ctypes, an extension, compiled code): it most likely wrote "
    "past the end of its memory or freed it twice, and the kernel met the damage only here."
)


def stack_overflow(context: Context) -> Cause | None:
    """Recognise a segmentation fault past the end of the thread's stack."""
    evidence = context.evidence
    fault = evidence.fault
    if not _died_of(context, (signal.SIGSEGV, signal.SIGBUS)) or fault is None:
        return None
    # Without the registers, only the size of the main thread's stack is known.
    if fault.site is None:
        return _full_main_stack(context, fault)
    site = fault.site
    # A bad access anywhere else is an ordinary segmentation fault.
    if not site.overflow:
        return None
    facts = (*exit_facts(evidence), *_site_facts(site), *_stack_facts(context, fault))
    limit = (
        f"{format_size(fault.stack_limit)} " if site.main and fault.stack_limit is not None else ""
    )
    used = "" if site.stack_bytes is None else f" ({format_size(site.stack_bytes)} in use)"
    stack = f"the {limit}stack" if site.main else "the stack of a thread"
    summary = f"stack overflow: {_location_text(fault)}{stack} had no room for another call{used}"
    advice = ADVICE[CauseKind.STACK_OVERFLOW] + (
        "" if site.main or not context.is_python else IN_THREAD
    )
    return make(context, CauseKind.STACK_OVERFLOW, summary, Confidence.CERTAIN, facts, advice)


def unreported_overflow(context: Context) -> Cause | None:
    """Recognise a segmentation fault without a report, although the fault handler was armed.

    The thread had no space left for the handler, which makes a stack overflow likely.
    """
    # The handler has a stack of its own in the main thread and in Python's threads
    # (agent/threads.py). In any other thread it runs on the thread's stack. If that is full, the
    # system cannot call the handler and ends the process. The same happens in a thread that blocks
    # the signal, so this cause is never certain.
    evidence = context.evidence
    caught = evidence.caught_signals
    if not _died_of(context, (signal.SIGSEGV,)) or evidence.fault is not None or caught is None:
        return None
    if not caught >= OTHER_FAULTS or signal.SIGSEGV in caught or evidence.handler_replaced:
        # The handler was turned off, or something else handles these signals.
        return None
    facts = (
        *exit_facts(evidence),
        outside(
            "fault report",
            "none, though the handler was armed",
            "SigCgt in /proc/PID/status, fault descriptor",
        ),
    )
    summary = (
        "stack overflow, most likely, in a thread that was not started through Python's "
        "threading module: the kernel"
        " crashed, and its fault handler found no room on the thread's stack to report it"
    )
    return make(
        context,
        CauseKind.STACK_OVERFLOW,
        summary,
        Confidence.LIKELY,
        facts,
        ADVICE[CauseKind.STACK_OVERFLOW] + IN_THREAD,
    )


def _full_main_stack(context: Context, fault: FaultReport) -> Cause | None:
    """Recognise a main thread whose stack had grown to its limit."""
    evidence = context.evidence
    # VmStk describes the main thread's stack only.
    if fault.main is False:
        return None
    if (
        fault.stack_bytes is None
        or fault.stack_limit is None
        or fault.stack_bytes < fault.stack_limit - STACK_MARGIN
    ):
        return None
    facts = (
        *exit_facts(evidence),
        outside(
            "stack size", fault.stack_bytes, "VmStk in /proc/PID/status while the fault handler ran"
        ),
        outside("stack limit", fault.stack_limit, "/proc/PID/limits"),
        *_stack_facts(context, fault),
    )
    summary = (
        f"stack overflow: {_location_text(fault)}the {fault.stack_limit >> 20} MiB stack "
        "was full when the kernel crashed"
    )
    return make(
        context,
        CauseKind.STACK_OVERFLOW,
        summary,
        Confidence.CERTAIN,
        facts,
        ADVICE[CauseKind.STACK_OVERFLOW],
    )


def fault(context: Context) -> Cause | None:
    """Recognise a death by a fault signal, such as SIGSEGV or SIGABRT."""
    # Other signals are no faults of native code; the exit rules explain them.
    if not _died_of(context, tuple(KINDS)):
        return None
    evidence = context.evidence
    assert evidence.exit is not None and evidence.exit.signal is not None
    number = signal.Signals(evidence.exit.signal)
    kind, text = KINDS[number]
    site = evidence.fault.site if evidence.fault else None
    # Code that gives up writes the reason first. For other faults a handler of the native code may
    # write one, if ours is not in place.
    gave_up = kind in (CauseKind.ABORT, CauseKind.ILLEGAL_INSTRUCTION)
    message = last_message(evidence, tuple(Channel) if gave_up else (Channel.DESCRIPTOR,))
    facts = (
        *exit_facts(evidence),
        *(_site_facts(site) if site and kind is not CauseKind.ABORT else ()),
        *(_stack_facts(context, evidence.fault) if evidence.fault else ()),
        *((message.fact,) if message else ()),
    )
    location_text = _location_text(evidence.fault) if evidence.fault else ""
    if site is not None and not site.faulted and kind is not CauseKind.ABORT:
        text = (
            f"{number.name} was sent to the kernel, and no instruction had failed: look for "
            "os.kill() or raise_signal()"
        )
    summary = f"{text}{f' ({location_text.rstrip(chr(32))})' if location_text else ''}"
    if kind is CauseKind.ABORT and evidence.fault and evidence.fault.title not in SIGNAL_TITLES:
        # Py_FatalError names its reason, and aborts: nothing that was written before is nearer to
        # it.
        summary += f"; fatal error in Python: {evidence.fault.title}"
    elif message and (gave_up or evidence.fault is None):
        summary += f"; {message.text}"
    confidence = Confidence.CERTAIN
    if kind is CauseKind.SEGFAULT and (evidence.fault is None or evidence.fault.site is None):
        # Without the failing address an overflow cannot be told from another fault: large frames
        # jump over the last part of the stack, so that it looks far from full.
        confidence = Confidence.LIKELY
    advice = ADVICE[kind]
    if kind in (CauseKind.SEGFAULT, CauseKind.ABORT) and _in_kernel_itself(evidence.fault):
        summary += "; no code of the notebook was running"
        advice = DAMAGED_EARLIER
    return make(context, kind, summary, confidence, facts, advice)


def _in_kernel_itself(fault: FaultReport | None) -> bool:
    """Tell whether the main thread failed in the kernel's own code, outside any cell."""
    if fault is None or fault.main is False or not fault.stack:
        return False
    if any(frame.cell is not None for frame in fault.stack):
        return False
    parts = (fault.stack[0].file or "").split("/")
    return any(package in parts for package in OF_KERNEL)


def _died_of(context: Context, signals: tuple[int, ...]) -> bool:
    status = context.evidence.exit
    return isinstance(context.ending, Died) and status is not None and status.signal in signals


def _location_text(fault: FaultReport) -> str:
    # Threads of native code have no Python frames at all.
    if not fault.stack:
        return "in a thread without Python frames " if fault.main is False else ""
    frame = fault.stack[0]
    return f"in {frame.function}() "


def _site_facts(site: FaultSite) -> tuple[Fact, ...]:
    """Return the registers at the fault that a person can interpret."""
    source = "registers saved at the signal"
    facts = []
    # si_code of the saved signal tells a fault from kill(2).
    if not site.faulted:
        facts.append(
            outside("sent signal", "no instruction failed: a process sent it (kill, raise)", source)
        )
    if site.address is not None:
        facts.append(outside("failing address", f"{site.address:#x}", source))
    if site.overflow:
        facts.append(outside("stack pointer", f"{site.stack_pointer:#x}", source))
        facts.append(outside("stack in use", site.stack_bytes, "/proc/PID/maps"))
    if site.library is not None and site.faulted:
        is_file = site.library.startswith("/") and not site.library.startswith(NO_LIBRARY)
        code = (
            f"{site.library} at offset {site.library_offset or 0:#x}"
            if is_file
            else "code generated at run time"
        )
        facts.append(outside("code that failed", code, source))
    return tuple(facts)


def _stack_facts(context: Context, fault: FaultReport) -> tuple[Fact, ...]:
    facts = [inside("fault handler", fault.title, "faulthandler on its own descriptor")]
    if fault.stack:
        facts.append(inside("innermost frame", context.frame(fault.stack[0]), "fault stack"))
    if fault.main is False:
        facts.append(inside("thread", "not the main thread", "fault stack"))
    return tuple(facts)
