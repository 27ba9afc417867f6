"""What the notebook did to itself is added to a cause, and neither changes its kind nor makes it surer."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from safe_exec.diagnosis.context import Context
from safe_exec.diagnosis.rules import find_cause, own_actions
from safe_exec.model.ending import CellError, CellFailed, Died, Ending, ExitStatus, TimedOut
from safe_exec.model.evidence import ActivityObservation, Evidence, Frame, OwnAction
from safe_exec.model.limits import Limits
from safe_exec.model.observed import ChangedLimit
from safe_exec.model.verdict import Cause, CauseKind, CellRecord, CellStatus, Origin

K = CauseKind
CELLS = tuple(
    CellRecord(index=n, code_index=n, id=None, status=CellStatus.PASSED) for n in range(4)
)
STOP = (
    Frame(function="stop", line=3, file="cell", cell=1),
    Frame(function="<module>", line=1, file="cell", cell=3),
)
TOP = (Frame(function="<module>", line=2, file="cell", cell=3),)
LIBRARY = (Frame(function="terminate", line=90, file="/lib/psutil.py"),)
LOOP = ActivityObservation(
    state="R",
    cpu_share=1.0,
    syscall=None,
    stack=TOP,
    gil_waits=(0.0052,) * 40,
    lines=1,
    runnable=1.0,
)
STOPPED = ActivityObservation(state="T", cpu_share=0.0, syscall=None, stack=())
MIB = 1 << 20


def action(
    kind: str = "signal", call: str = "os.kill", *, stack: tuple[Frame, ...] = STOP, **facts: Any
) -> OwnAction:
    rest = {"time": 99.9, "cell": 3, "target": "process" if kind == "signal" else None}
    return OwnAction(kind=kind, call=call, stack=stack, **{**rest, **facts})


def died(number: int) -> Died:
    return Died(cell=3, exit=ExitStatus(number))


def failed(name: str, text: str = "") -> CellFailed:
    return CellFailed(cell=3, error=CellError(ename=name, evalue=text))


def timed_out() -> TimedOut:
    return TimedOut(cell=3, whole_notebook=False, allowed=3.0, answered=True)


def cause_of(ending: Ending, *actions: OwnAction, **facts: Any) -> Cause:
    evidence = Evidence(
        exit=getattr(ending, "exit", None),
        error=getattr(ending, "error", None),
        died_at=100.0,
        own_actions=actions,
        **facts,
    )
    cause = find_cause(
        Context(ending=ending, evidence=evidence, limits=Limits(), cells=CELLS, current=3)
    )
    assert cause is not None
    return cause


TERM, KILL, SEGV, INT, STOP_SIGNAL = (
    signal.SIGTERM,
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGINT,
    signal.SIGSTOP,
)


@pytest.mark.parametrize(
    ("number", "sent", "kind", "texts"),
    [
        (TERM, action(signal=TERM), K.TERMINATED, ("os.kill() in stop() (code cell 2, line 3, called from code cell 4)", "own process")),
        (TERM, action(call="os.killpg", signal=TERM, target="group"), K.TERMINATED, ("os.killpg()", "process group", "start_new_session")),
        (KILL, action(signal=KILL, stack=TOP), K.KILLED, ("killed by SIGKILL: os.kill() in code cell 4, line 2", "start the notebook anew")),
        (TERM, action(signal=TERM, target="everybody"), K.TERMINATED, ("every process",)),
        (SEGV, action(signal=SEGV), K.SEGFAULT, ("ended by SIGSEGV: os.kill()",)),
        (TERM, action(signal=TERM, child=True), K.TERMINATED, ("in a process that the notebook had forked",)),
        (TERM, action(signal=TERM, stack=LIBRARY), K.TERMINATED, ("in terminate() (/lib/psutil.py, line 90, while code cell 4 ran)",)),
        (KILL, action("program", "os.system", text="kill -9 77"), K.KILLED, ("most likely sent by `kill -9 77`",)),
        (KILL, action("symbol", "the C function kill()"), K.KILLED, ("most likely sent by the C function kill()",)),
    ],
)  # fmt: skip
def test_who_sent_a_signal(
    number: int, sent: OwnAction, kind: CauseKind, texts: tuple[str, ...]
) -> None:
    cause, plain = cause_of(died(number), sent), cause_of(died(number))
    assert (cause.kind, cause.confidence, cause.signal) == (kind, plain.confidence, -number)
    assert all(text in cause.summary + cause.advice for text in texts), cause
    assert cause.evidence[-1].origin is Origin.INSIDE


@pytest.mark.parametrize(
    ("number", "sent"),
    [
        (KILL, action(signal=TERM)),  # another signal
        (TERM, action(signal=TERM, time=90.0)),  # long before: a handler took it
        (TERM, action("program", "os.system", text="kill 77", cell=1)),  # in another cell
        (TERM, action("limit", "resource.setrlimit", limit="RLIMIT_AS", value=1)),
    ],
)
def test_what_did_not_send_it_is_not_named(number: int, sent: OwnAction) -> None:
    assert cause_of(died(number), sent) == cause_of(died(number))


def test_a_script_that_kills_is_quoted() -> None:
    cause = cause_of(died(TERM), kill_command=(3, "kill $PPID"))
    assert "most likely sent by `kill $PPID` in code cell 4, line 3" in cause.summary


def test_the_parent_was_killed() -> None:
    cause = cause_of(Died(cell=3, exit=None), action(signal=KILL, target="parent"))
    assert cause.kind is K.KILLED
    assert "its parent process, which is safe-exec's" in cause.summary


def test_a_keyboard_interrupt_of_ones_own() -> None:
    cause = cause_of(failed("KeyboardInterrupt"), action(signal=INT))
    assert cause.kind is K.EXCEPTION
    assert cause.summary.startswith("KeyboardInterrupt: os.kill() in stop()")
    assert (
        "os.kill" not in cause_of(failed("KeyboardInterrupt"), action(signal=INT, cell=1)).summary
    )


def test_a_kernel_that_stopped_itself() -> None:
    cause = cause_of(timed_out(), action(signal=STOP_SIGNAL), observation=STOPPED)
    assert (
        "os.kill() in stop() (code cell 2, line 3, called from code cell 4) sent SIGSTOP"
        in cause.summary
    )


def test_another_program_in_the_kernels_place() -> None:
    executed = action("exec", "os.exec", text="sleep 9")
    cause = cause_of(timed_out(), executed, observation=STOPPED, replaced_by="sleep 9")
    assert (cause.kind, cause.activity) == (K.UNRESPONSIVE, None)
    assert cause.summary.startswith("os.exec*() in stop()") and "`sleep 9`" in cause.summary
    ended = cause_of(died(0), executed)
    assert ended.kind is K.EXIT
    assert "and that program exited with exit status 0" in ended.summary
    # It failed, and the notebook went on.
    assert "os.exec" not in cause_of(timed_out(), executed, observation=STOPPED).summary
    assert "os.exec" not in cause_of(died(0), executed, action("trace", "sys.settrace")).summary


NOFILE = ChangedLimit(name="RLIMIT_NOFILE", initial_value=4096, current_value=64)
FSIZE = ChangedLimit(name="RLIMIT_FSIZE", initial_value=None, current_value=MIB)
AS = ChangedLimit(name="RLIMIT_AS", initial_value=None, current_value=2000 * MIB)
SET = action("limit", "resource.setrlimit", limit="RLIMIT_AS", value=2000 * MIB)


@pytest.mark.parametrize(
    ("ending", "limit", "kind", "names"),
    [
        (failed("MemoryError", "Unable to allocate 1.46 GiB"), AS, K.MEMORY_ERROR, True),
        (failed("RuntimeError", "can't start new thread"), AS, K.TOO_MANY_PROCESSES, True),
        (failed("ImportError", "x.so: failed to map segment from shared object"), AS, K.EXCEPTION, True),
        (failed("ValueError", "no such column"), AS, K.EXCEPTION, False),
        (failed("OSError", "[Errno 24] Too many open files"), NOFILE, K.TOO_MANY_OPEN_FILES, True),
        (failed("OSError", "[Errno 27] File too large"), FSIZE, K.FILE_TOO_LARGE, True),
        (failed("OSError", "[Errno 24] Too many open files"), AS, K.TOO_MANY_OPEN_FILES, False),
        (failed("MemoryError"), ChangedLimit(name="RLIMIT_AS", initial_value=1000, current_value=2000), K.MEMORY_ERROR, False),  # it was raised
        (failed("MemoryError"), ChangedLimit(name="RLIMIT_AS", initial_value=1000, current_value=None), K.MEMORY_ERROR, False),
        (failed("MemoryError"), ChangedLimit(name="RLIMIT_CORE", initial_value=None, current_value=0), K.MEMORY_ERROR, False),
    ],
)  # fmt: skip
def test_a_limit_of_its_own(
    ending: Ending, limit: ChangedLimit, kind: CauseKind, names: bool
) -> None:
    cause = cause_of(ending, SET, changed_limits=(limit,))
    assert cause.kind is kind
    assert (limit.name in cause.summary) is names
    assert (
        limit.name in [fact.fact for fact in cause.evidence if fact.origin is Origin.OUTSIDE]
    ) is names
    if names:
        assert "--" not in cause.advice
    assert "overcommits" not in cause.advice


def test_a_limit_that_was_only_told_counts_for_a_kernel_that_died() -> None:
    assert "RLIMIT_AS" not in cause_of(failed("MemoryError"), SET).summary
    xcpu = cause_of(
        died(signal.SIGXCPU), action("limit", "resource.setrlimit", limit="RLIMIT_CPU", value=2)
    )
    assert xcpu.kind is K.CPU_TIME
    assert "RLIMIT_CPU in stop()" in xcpu.summary


def trace(cell: int, call: str = "sys.settrace") -> OwnAction:
    return action("trace", call, cell=cell, stack=TOP)


@pytest.mark.parametrize(
    ("actions", "tracing", "says"),
    [
        ((trace(1),), ("sys.settrace",), True),
        ((trace(1, "sys.setprofile"),), ("sys.setprofile",), True),
        ((trace(3),), (), True),  # set in the cell that ran
        ((trace(3), trace(3)), (), False),  # and taken away again
        ((trace(1), trace(3)), ("sys.settrace",), False),
        ((trace(1), trace(1)), (), False),
        ((), (), False),
        ((trace(1),), ("threading.settrace",), False),
    ],
)
def test_a_trace_function_that_was_left_on(
    actions: tuple[OwnAction, ...], tracing: tuple[str, ...], says: bool
) -> None:
    cause = cause_of(timed_out(), *actions, observation=LOOP, tracing=tracing)
    was_left_on = says and bool({"sys.settrace", "sys.setprofile"} & set(tracing))
    assert ("had left on" in cause.summary) is was_left_on
    assert ("switched on" in cause.summary) is (says and not was_left_on)
    waits = cause_of(timed_out(), *actions, observation=STOPPED, tracing=tracing)
    assert "had left on" not in waits.summary


def test_a_place_without_any_frame_names_the_cell() -> None:
    context = Context(ending=timed_out(), evidence=Evidence(), limits=Limits(), cells=CELLS)
    assert own_actions.place_of(context, action(stack=())) == "in code cell 4"
