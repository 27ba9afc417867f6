"""Deaths by a fault of native code: the signal says which, the fault handler where.

``stack_overflow`` needs evidence of its own: how far the main thread's stack had grown when the fault handler ran, read from
/proc while the dying process was held up (see keeper/crash_output.py).
"""

from __future__ import annotations

import signal

from safe_exec.diagnosis.context import Context, exit_facts, inside, make, outside, words
from safe_exec.model.ending import Died
from safe_exec.model.evidence import FaultReport
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact

STACK_MARGIN = 64 * 1024
"""The stack grows by pages and a frame may jump over some: this near its limit it was full."""

KINDS = {
    signal.SIGSEGV: (CauseKind.SEGFAULT, "segmentation fault: native code touched memory that is not there"),
    signal.SIGABRT: (CauseKind.ABORT, "abort: native code gave up"),
    signal.SIGILL: (
        CauseKind.ILLEGAL_INSTRUCTION,
        "illegal instruction: a library was built for another processor, or jumped astray",
    ),
    signal.SIGBUS: (CauseKind.BUS_ERROR, "bus error: a mapped file is shorter than what was read, or its disk is full"),
    # V8 and others built by Clang end themselves so (brk, int3) where a check of their own fails.
    signal.SIGTRAP: (CauseKind.ABORT, "abort by a trap: native code gave up"),
    signal.SIGFPE: (CauseKind.FLOATING_POINT_EXCEPTION, "arithmetic fault in native code: an integer division by zero"),
}

ADVICE = {
    CauseKind.SEGFAULT: "Look at the native library in the innermost frames: its version, its arguments, array bounds and lifetimes.",
    CauseKind.ABORT: "The library's last words, if any, are in the evidence; heap corruption shows later than where it was done.",
    CauseKind.ILLEGAL_INSTRUCTION: "Install a build of the library for this processor (AVX and the like), or reinstall it.",
    CauseKind.BUS_ERROR: "Check whether a memory-mapped file was shortened or its disk or /dev/shm is full; reinstall a truncated library.",
    CauseKind.FLOATING_POINT_EXCEPTION: "Check integer divisors that reach native code; numpy and Python check theirs, C does not.",
    CauseKind.STACK_OVERFLOW: "Recurse less deeply (a loop, a smaller sys.setrecursionlimit), or flatten what was nested or chained.",
}


def stack_overflow(context: Context) -> Cause | None:
    """A segmentation fault with the main thread's stack full to its limit."""
    evidence = context.evidence
    fault = evidence.fault
    if not _died_of(context, (signal.SIGSEGV, signal.SIGBUS)) or fault is None or fault.main is False:
        return None
    if fault.stack_bytes is None or fault.stack_limit is None or fault.stack_bytes < fault.stack_limit - STACK_MARGIN:
        return None
    facts = (
        *exit_facts(evidence),
        outside("stack size", fault.stack_bytes, "VmStk in /proc/PID/status while the fault handler ran"),
        outside("stack limit", fault.stack_limit, "/proc/PID/limits"),
        *_stack_facts(fault),
    )
    summary = f"stack overflow: {_where(fault)}the {fault.stack_limit >> 20} MiB stack was full when the kernel crashed"
    return make(context, CauseKind.STACK_OVERFLOW, summary, Confidence.CERTAIN, facts, ADVICE[CauseKind.STACK_OVERFLOW])


def fault(context: Context) -> Cause | None:
    """One of the signals of a fault."""
    if not _died_of(context, tuple(KINDS)):
        return None
    evidence = context.evidence
    assert evidence.exit is not None and evidence.exit.signal is not None
    number = signal.Signals(evidence.exit.signal)
    kind, text = KINDS[number]
    facts = (*exit_facts(evidence), *(_stack_facts(evidence.fault) if evidence.fault else ()), *words(evidence))
    said = next((f.value for f in facts if f.fact == "last words"), None)
    where = _where(evidence.fault) if evidence.fault else ""
    summary = f"{text}{f' ({where.rstrip(chr(32))})' if where else ''}"
    if said:
        summary += f"; last words: {said}"
    confidence = Confidence.CERTAIN
    if kind is CauseKind.SEGFAULT and (evidence.fault is None or evidence.fault.stack_bytes is None):
        confidence = Confidence.LIKELY  # without a look at the stack an overflow cannot be told from another fault
    return make(context, kind, summary, confidence, facts, ADVICE[kind])


def _died_of(context: Context, signals: tuple[int, ...]) -> bool:
    status = context.evidence.exit
    return isinstance(context.ending, Died) and status is not None and status.signal in signals


def _where(fault: FaultReport) -> str:
    if not fault.stack:
        return "in a thread without Python frames " if fault.main is False else ""
    frame = fault.stack[0]
    return f"in {frame.function}() "


def _stack_facts(fault: FaultReport) -> tuple[Fact, ...]:
    facts = [inside("fault handler", fault.title, "faulthandler on its own descriptor")]
    if fault.stack:
        frame = fault.stack[0]
        facts.append(inside("innermost frame", f"{frame.function} ({frame.file}, line {frame.line})", "fault stack"))
    if fault.main is False:
        facts.append(inside("thread", "not the main thread", "fault stack"))
    return tuple(facts)
