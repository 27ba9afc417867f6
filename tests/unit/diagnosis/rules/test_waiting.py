"""Which process or file lock a kernel waits for, and why that does not end: from what /proc showed, as it was seen on real notebooks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.diagnosis.context import Context
from safe_exec.diagnosis.rules import hangs, waiting, waiting_text
from safe_exec.diagnosis.rules.activity import activity_of
from safe_exec.diagnosis.rules.waiting import Blockage, find_blocker
from safe_exec.model.ending import ExitStatus, TimedOut
from safe_exec.model.evidence import ActivityObservation, Evidence, Frame
from safe_exec.model.limits import Limits
from safe_exec.model.observed import EndedChild, ObservedLock, ObservedProcess
from safe_exec.model.verdict import Activity
from safe_exec.trial.printed import printed_traceback, stderr_tail

KERNEL = 100
A, B = Activity, Blockage
FORKED = "python -m ipykernel_launcher -f c.json"
SPAWNED = "python -c 'from multiprocessing.spawn import spawn_main; spawn_main(pipe_handle=76)' --multiprocessing-fork"
TRACKER = "python -c 'from multiprocessing.resource_tracker import main;main(61)'"
SUBPROCESS = "wait@/usr/lib/python3.11/subprocess.py"
POOL = "get@/usr/lib/python3.11/multiprocessing/pool.py"
QUEUE = "get@/usr/lib/python3.11/multiprocessing/queues.py"
FUTURE = "result@/usr/lib/python3.11/concurrent/futures/_base.py"
BASH = "in_thread@site-packages/IPython/core/magics/script.py"
MANAGER = "run@/usr/lib/python3.11/concurrent/futures/process.py"
WORKER_THREAD = "worker@/usr/lib/python3.11/multiprocessing/pool.py"
TASK_OF_THREAD = ("work@cell", "run@/usr/lib/python3.11/concurrent/futures/thread.py")
LOKY = "_retrieve@site-packages/joblib/parallel.py"
FILELOCK = "acquire@site-packages/filelock/_api.py"


def frames(*places: str) -> tuple[Frame, ...]:
    rows = (place.partition("@") for place in places)
    return tuple(Frame(function=function, line=1, file=file) for function, _, file in rows)


def process(pid: int = 200, command: str = "sleep 1000", **facts: Any) -> ObservedProcess:
    """A child at rest, unless changed."""
    rest = {
        "local_pid": pid,
        "parent": KERNEL,
        "state": "S",
        "cpu_share": 0.0,
        "age": 3.0,
        "syscall": "clock_nanosleep",
    }
    return ObservedProcess(pid=pid, command=command, **{**rest, **facts})


def worker(pid: int, **facts: Any) -> ObservedProcess:
    """A worker of a pool that waits for work."""
    return process(pid, FORKED, **{"forked": True, "syscall": "futex", **facts})


def kernel(
    *processes: ObservedProcess, stack: tuple[str, ...] = (), **facts: Any
) -> ActivityObservation:
    rest: dict[str, Any] = {
        "state": "S",
        "cpu_share": 0.0,
        "syscall": "futex",
        "gil_waits": (0.0002,) * 9,
        "starved": False,
    }
    children = sum(not other.adopted for other in processes)
    return ActivityObservation(
        stack=frames(*stack), processes=processes, children=children, **{**rest, **facts}
    )


def reading(*processes: ObservedProcess, **facts: Any) -> ActivityObservation:
    """A kernel that reads a pipe of which it holds no other end."""
    return kernel(
        *processes, **{"syscall": "read", "targets": ("pipe:[1]",), "reads": ("pipe:[1]",), **facts}
    )


FULL: dict[str, Any] = {
    "syscall": "write",
    "targets": ("pipe:[1]",),
    "full_pipe": "pipe:[1]",
    "pipe_bytes": 65536,
    "writes": ("pipe:[1]",),
}
STDIN: dict[str, Any] = {"syscall": "read", "targets": ("pipe:[2]",), "reads": ("pipe:[2]",)}
ORPHAN: dict[str, Any] = {"adopted": True, "parent": 1, "writes": ("pipe:[1]",)}

# Name, look, activity, the process waited for, why it does not end.
TABLE: list[tuple[str, ActivityObservation, Activity, int | None, Blockage | None]] = [
    ("os.system", kernel(process(), syscall="wait4", awaited=200), A.WAITING_CHILD, 200, B.SLEEPS),
    (
        "the child that wait4 names",
        kernel(process(201), process(202), syscall="wait4", awaited=202),
        A.WAITING_CHILD,
        202,
        B.SLEEPS,
    ),
    (
        "what a shell waits for",
        kernel(
            process(201, "bash", syscall="wait4"),
            process(202, parent=201),
            syscall="wait4",
            awaited=201,
        ),
        A.WAITING_CHILD,
        202,
        B.SLEEPS,
    ),
    (
        "Popen.wait() with a full pipe",
        kernel(process(**FULL), syscall="wait4", awaited=200, reads=("pipe:[1]",)),
        A.WAITING_CHILD,
        200,
        B.FULL_PIPE,
    ),
    (
        "a full pipe in a thread of the child (Queue)",
        kernel(
            worker(200, **{**FULL, "syscall": "futex", "threads": 2}), syscall="wait4", awaited=200
        ),
        A.WAITING_CHILD,
        200,
        B.FULL_PIPE,
    ),
    (
        "the sibling of an idle one is stuck",
        kernel(worker(200), process(201, **FULL), syscall="wait4", awaited=200),
        A.WAITING_CHILD,
        201,
        B.FULL_PIPE,
    ),
    (
        "stdin is not closed",
        kernel(
            process(command="sort", **STDIN), syscall="wait4", awaited=200, writes=("pipe:[2]",)
        ),
        A.WAITING_CHILD,
        200,
        B.INPUT,
    ),
    (
        "stdout is read, stdin not flushed",
        reading(process(command="cat", writes=("pipe:[1]",), **STDIN), writes=("pipe:[2]",)),
        A.WAITING_CHILD,
        200,
        B.INPUT,
    ),
    (
        "the parent writes, the child too",
        kernel(
            process(command="tr a b", reads=("pipe:[2]",), **FULL),
            syscall="write",
            targets=("pipe:[2]",),
            writes=("pipe:[2]",),
            reads=("pipe:[1]",),
        ),
        A.WAITING_CHILD,
        200,
        B.FULL_PIPE,
    ),
    (
        "SIGSTOP",
        kernel(process(state="T"), syscall="wait4", awaited=200),
        A.WAITING_CHILD,
        200,
        B.STOPPED,
    ),
    (
        "%%bash with &",
        kernel(
            process(adopted=True, parent=1, writes=("pipe:[1]",)),
            stack=(BASH,),
            reads=("pipe:[1]",),
        ),
        A.WAITING_CHILD,
        200,
        B.HOLDS_OUTPUT,
    ),
    (
        "communicate() and a grandchild",
        kernel(
            process(201, "sh", state="Z", exit=ExitStatus(0)),
            process(202, **ORPHAN),
            stack=(SUBPROCESS,),
            syscall="poll",
            targets=("pipe:[1]",),
            reads=("pipe:[1]",),
        ),
        A.WAITING_CHILD,
        202,
        B.HOLDS_OUTPUT,
    ),
    (
        "os.popen().read() of an orphan",
        reading(process(**ORPHAN)),
        A.WAITING_CHILD,
        200,
        B.HOLDS_OUTPUT,
    ),
    (
        "bash in %%bash still lives",
        kernel(
            process(201, "bash", syscall="wait4", writes=("pipe:[1]",)),
            process(202, parent=201, writes=("pipe:[1]",)),
            stack=(BASH,),
            reads=("pipe:[1]",),
        ),
        A.WAITING_CHILD,
        202,
        B.SLEEPS,
    ),
    (
        "a child at work",
        kernel(process(state="R", cpu_share=1.0), syscall="wait4", awaited=200),
        A.WAITING_CHILD,
        200,
        B.COMPUTES,
    ),
    (
        "fork with a lock held",
        kernel(worker(200, private_wait=True), syscall="wait4", awaited=200),
        A.WAITING_CHILD,
        200,
        B.LOST_LOCK,
    ),
    (
        "a lock in a child with threads",
        kernel(worker(200, private_wait=True, threads=2), syscall="wait4", awaited=200),
        A.WAITING_CHILD,
        200,
        B.IDLE,
    ),
    (
        "a pool at rest",
        kernel(worker(200), worker(201), stack=(POOL,)),
        A.WAITING_CHILD,
        200,
        B.IDLE,
    ),
    (
        "a pool with a task that sleeps",
        kernel(worker(200), worker(201, syscall="clock_nanosleep"), stack=(POOL,)),
        A.WAITING_CHILD,
        201,
        B.SLEEPS,
    ),
    (
        "a pool of threads",
        kernel(process(), stack=(POOL,), threads=(frames("work@cell", WORKER_THREAD),)),
        A.WAITING_LOCK,
        None,
        None,
    ),
    ("a pool without any process", kernel(stack=(POOL,)), A.WAITING_LOCK, None, None),
    (
        "an executor of processes",
        kernel(worker(200, syscall="clock_nanosleep"), stack=(FUTURE,), threads=(frames(MANAGER),)),
        A.WAITING_CHILD,
        200,
        B.SLEEPS,
    ),
    (
        "an executor of threads",
        kernel(process(), stack=(FUTURE,), threads=(frames(*TASK_OF_THREAD),)),
        A.WAITING_LOCK,
        None,
        None,
    ),
    (
        "both, and a thread is at work",
        kernel(worker(200), stack=(FUTURE,), threads=(frames(MANAGER), frames(*TASK_OF_THREAD))),
        A.WAITING_LOCK,
        None,
        None,
    ),
    (
        "joblib's processes",
        kernel(
            process(200, "python -m joblib.externals.loky.backend.popen_loky_posix"),
            stack=(LOKY,),
            syscall="clock_nanosleep",
        ),
        A.WAITING_CHILD,
        200,
        B.SLEEPS,
    ),
    (
        "joblib's threads",
        kernel(stack=(LOKY,), syscall="clock_nanosleep"),
        A.WAITING_LOCK,
        None,
        None,
    ),
    (
        "Queue.get() and the worker is dead",
        kernel(
            process(state="Z", syscall=None, exit=ExitStatus(256)),
            stack=(QUEUE,),
            syscall="read",
            targets=("pipe:[3]",),
            reads=("pipe:[3]",),
            writes=("pipe:[3]",),
        ),
        A.WAITING_CHILD,
        200,
        B.ENDED,
    ),
    (
        "Python's helpers are nobody",
        kernel(process(200, TRACKER, **STDIN), syscall="clock_nanosleep", writes=("pipe:[2]",)),
        A.SLEEPING,
        None,
        None,
    ),
    (
        "a spawned worker at rest",
        kernel(process(200, SPAWNED, syscall="read"), stack=(POOL,)),
        A.WAITING_CHILD,
        200,
        B.IDLE,
    ),
    (
        "R's mclapply",
        kernel(
            worker(200, syscall="pselect6", targets=(), writes=("pipe:[1]",)),
            syscall="pselect6",
            targets=("pipe:[1]",),
            reads=("pipe:[1]",),
            instrumented=False,
        ),
        A.WAITING_CHILD,
        200,
        B.SLEEPS,
    ),
    (
        "R's Sys.sleep",
        kernel(syscall="pselect6", targets=(), instrumented=False),
        A.SLEEPING,
        None,
        None,
    ),
    (
        "a shell behind a terminal",
        kernel(
            process(201, "bash", syscall="wait4"),
            process(202, parent=201),
            syscall="pselect6",
            targets=("/dev/ptmx",),
            instrumented=False,
        ),
        A.WAITING_CHILD,
        202,
        B.SLEEPS,
    ),
    (
        "a file lock in a child",
        kernel(process(syscall="flock", targets=("/x/a.lock",)), syscall="wait4", awaited=200),
        A.WAITING_CHILD,
        200,
        B.FILE_LOCK,
    ),
    (
        "a child reads a terminal",
        kernel(
            process(syscall="read", targets=("/dev/pts/3",), reads_terminal=True),
            syscall="wait4",
            awaited=200,
        ),
        A.WAITING_CHILD,
        200,
        B.TERMINAL,
    ),
]


@pytest.mark.parametrize(
    ("observation", "activity", "pid", "blockage"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_who_is_waited_for(
    observation: ActivityObservation, activity: Activity, pid: int | None, blockage: Blockage | None
) -> None:
    assert activity_of(observation) is activity
    if activity is A.WAITING_CHILD:
        blocker = find_blocker(observation)
        assert blocker is not None
        assert (blocker.process.pid, blocker.blockage) == (pid, blockage)
        assert waiting_text.waited_for(observation)
        assert waiting_text.advice(observation, python=True)


def test_every_blockage_is_in_the_table_but_those_of_a_chain() -> None:
    assert {row[4] for row in TABLE if row[4] is not None} | {B.CHILD, B.OTHER} == set(Blockage)
    assert set(waiting.ORDER) == set(Blockage)


def test_a_worker_that_died_is_said_to_have_died() -> None:
    gone = EndedChild(local_pid=7, command=FORKED, forked=True)
    observation = kernel(worker(200, age=1.0), worker(201), stack=(POOL,), ended=(gone,))
    assert (
        waiting_text.waited_for(observation)
        == "a worker process that ended before its work was done and was replaced"
    )
    assert "BrokenProcessPool" in waiting_text.advice(observation, python=True)


OMP = "Terminating: fork() called from a process already using GNU OpenMP, this is unsafe.\n"
AT_REST = kernel(worker(200), worker(201), stack=(POOL,))
REPLACED = kernel(
    worker(200, age=1.0),
    worker(201),
    stack=(POOL,),
    ended=(EndedChild(local_pid=7, command=FORKED, forked=True),),
)
AT_WORK = kernel(worker(200, syscall="clock_nanosleep"), stack=(POOL,))


@pytest.mark.parametrize(
    ("observation", "stderr", "said", "advised"),
    [
        (REPLACED, f"x\n{OMP}{OMP}", "fork() called", "get_context('spawn')"),
        # Pools replace a worker so soon that nobody may have seen the first one.
        (AT_REST, OMP, "fork() called", "get_context('spawn')"),
        (REPLACED, "E0000 bad magic number in index\n", "bad magic number", "BrokenProcessPool"),
        (REPLACED, "", "", "BrokenProcessPool"),
        (AT_WORK, OMP, "", "sleeps on purpose"),
    ],
)
def test_the_last_line_of_workers_that_ended(
    observation: ActivityObservation, stderr: str, said: str, advised: str
) -> None:
    evidence = Evidence(observation=observation, stderr_in_time=stderr)
    ending = TimedOut(cell=2, whole_notebook=False, allowed=3.0, answered=True)
    context = Context(
        ending=ending, evidence=evidence, limits=Limits(), language="python", current=2
    )
    text = hangs.doing_text(context, A.WAITING_CHILD)
    assert ("its last line on stderr: " in text) == bool(said)
    assert said in text
    assert advised in hangs.advice_text(context, A.WAITING_CHILD)
    facts = [fact.fact for fact in hangs.waiting_facts(context, A.WAITING_CHILD)]
    assert ("last line on stderr" in facts) == bool(said)


def test_a_sleep_beside_a_stuck_child() -> None:
    observation = kernel(process(command="yes", **FULL), syscall="clock_nanosleep")
    assert activity_of(observation) is A.SLEEPING
    stuck = waiting.stuck_child(observation)
    assert stuck is not None
    assert waiting_text.sentence_of(stuck).startswith(
        "the child process `yes` (pid 200) is blocked writing to a full pipe"
    )


def test_a_pipe_whose_other_end_only_the_kernel_holds() -> None:
    alone = reading(writes=("pipe:[1]",))
    assert waiting.reads_own_pipe(alone)
    assert not waiting.reads_own_pipe(reading(process(writes=("pipe:[1]",)), writes=("pipe:[1]",)))
    assert not waiting.reads_own_pipe(reading())


@pytest.mark.parametrize(
    ("lock", "facts", "awaited"),
    [
        (ObservedLock(path="/a.lock", kind="flock", own=True), {"syscall": "flock"}, True),
        (ObservedLock(path="/a.lock", kind="fcntl", holder=7), {"syscall": "fcntl"}, True),
        (
            ObservedLock(path="/a.db", kind="sqlite"),
            {"syscall": "clock_nanosleep", "switches": 10.0},
            True,
        ),
        # One long sleep is no busy handler, whatever stands open.
        (
            ObservedLock(path="/a.db", kind="sqlite"),
            {"syscall": "clock_nanosleep", "switches": 0.0},
            False,
        ),
        (
            ObservedLock(path="/a.lock", kind="lock file"),
            {"syscall": "clock_nanosleep", "stack": (FILELOCK,)},
            True,
        ),
        (ObservedLock(path="/a.lock", kind="lock file"), {"syscall": "clock_nanosleep"}, False),
    ],
)
def test_the_lock_on_a_file(lock: ObservedLock, facts: dict[str, Any], awaited: bool) -> None:
    observation = kernel(lock=lock, **facts)
    assert (waiting.awaited_lock(observation) is lock) is awaited
    assert activity_of(observation) is (A.WAITING_LOCK if awaited else A.SLEEPING)
    assert lock.path in waiting_text.lock_text(lock)
    assert waiting_text.lock_advice(lock)


THREAD = """Exception in thread Thread-7 (_handle_results):
Traceback (most recent call last):
  File "/usr/lib/python3.11/threading.py", line 1038, in _bootstrap_inner
    self.run()
TypeError: QualityError.__init__() missing 1 required positional argument: 'value'
"""
WORKER = """Process SpawnPoolWorker-2:
Traceback (most recent call last):
  File "<string>", line 1, in <module>
AttributeError: Can't get attribute 'f' on <module '__main__' (built-in)>
"""


@pytest.mark.parametrize(
    ("text", "owner", "error", "advice"),
    [
        (
            THREAD,
            "Thread-7 (_handle_results)",
            "TypeError: QualityError.__init__() missing",
            "__reduce__",
        ),
        (
            WORKER,
            "SpawnPoolWorker-2",
            "AttributeError: Can't get attribute 'f'",
            "module beside the notebook",
        ),
        (
            THREAD.replace("TypeError", "my.pkg.BadRow"),
            "Thread-7 (_handle_results)",
            "my.pkg.BadRow: ",
            "Mend that error",
        ),
        (
            "hello\n" + WORKER + "more\n" + THREAD,
            "Thread-7 (_handle_results)",
            "TypeError",
            "__reduce__",
        ),
    ],
)
def test_a_traceback_that_a_thread_printed(text: str, owner: str, error: str, advice: str) -> None:
    traceback = waiting_text.printed_traceback(text)
    assert traceback is not None
    assert traceback.owner == owner
    assert traceback.error.startswith(error)
    if "my.pkg" not in error:
        assert advice in waiting_text.traceback_advice(traceback)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Exception in thread",
        "Exception in thread T:\nTraceback (most recent call last):",
        "ValueError: 3",
    ],
)
def test_other_text_is_no_traceback(text: str) -> None:
    assert waiting_text.printed_traceback(text) is None


texts = (
    st.none()
    | st.tuples()
    | st.lists(st.sampled_from(["pipe:[1]", "pipe:[2]", "/a", "?"]), max_size=3).map(tuple)
)
calls = st.none() | st.sampled_from(
    ["read", "write", "futex", "poll", "wait4", "flock", "openat", "999"]
)
pipes = st.lists(st.sampled_from(["pipe:[1]", "pipe:[2]"]), max_size=2).map(tuple)
processes = st.builds(
    ObservedProcess, pid=st.integers(1, 9), local_pid=st.integers(1, 9), parent=st.integers(0, 9), command=st.text(max_size=9),
    state=st.sampled_from("RSDTtZX"), cpu_share=st.none() | st.floats(0, 9), age=st.floats(0, 99), threads=st.integers(1, 3), syscall=calls,
    targets=texts, private_wait=st.booleans(), awaited=st.none() | st.integers(-1, 9), reads=pipes, writes=pipes,
    full_pipe=st.none() | st.just("pipe:[1]"), pipe_bytes=st.none() | st.integers(0, 99), forked=st.booleans(), adopted=st.booleans(),
    exit=st.none() | st.builds(ExitStatus, st.sampled_from([0, 9, 256])), reads_terminal=st.booleans(),
)  # fmt: skip


@settings(deadline=None)
@given(
    others=st.lists(processes, max_size=4).map(tuple),
    syscall=calls,
    targets=texts,
    reads=pipes,
    writes=pipes,
    awaited=st.none() | st.integers(1, 9),
    python=st.booleans(),
)
def test_whatever_stands_in_proc_there_is_a_sentence(
    *,
    others: tuple[ObservedProcess, ...],
    syscall: str | None,
    targets: Any,
    reads: Any,
    writes: Any,
    awaited: int | None,
    python: bool,
) -> None:
    observation = kernel(
        *others, syscall=syscall, targets=targets, reads=reads, writes=writes, awaited=awaited
    )
    blocker = find_blocker(observation)
    assert (blocker is None) == (waiting.other_processes(observation) == [])
    assert isinstance(waiting_text.waited_for(observation), str)
    assert waiting_text.advice(observation, python=python)
    if blocker is not None:
        assert waiting_text.fact_text(blocker)


def cell(*outputs: tuple[str, str]) -> dict[str, Any]:
    return {
        "outputs": [{"output_type": "stream", "name": name, "text": text} for name, text in outputs]
    }


def test_a_traceback_is_found_whole_whatever_cells_it_was_divided_between() -> None:
    first, second = THREAD[:60], THREAD[60:]
    cells = list(
        enumerate(
            [
                cell(("stdout", "20")),
                cell(("stdout", "20"), ("stderr", first)),
                cell(("stderr", second), ("stdout", "x")),
            ]
        )
    )
    assert printed_traceback(cells, {}) == (1, THREAD)
    assert printed_traceback(cells[:1], {0: THREAD}) == (0, THREAD)
    assert printed_traceback(cells[:1], {}) is None
    assert printed_traceback([(5, cell(("stderr", WORKER + THREAD)))], {}) == (5, THREAD)


def test_the_end_of_stderr_includes_what_arrived_late() -> None:
    assert stderr_tail(cell(("stdout", "a"), ("stderr", "b\n")), "\x1b[31mc\x1b[0m") == "b\nc"


def test_a_coloured_traceback_is_read_as_a_plain_one() -> None:
    """As Python 3.13 prints it under ipykernel, which sets FORCE_COLOR."""
    coloured = (
        "Exception in thread Thread-3 (work):\nTraceback (most recent call last):\n"
        '  File \x1b[35m"x.py"\x1b[0m, line \x1b[35m4\x1b[0m, in \x1b[35mwork\x1b[0m\n'
        "\x1b[1;35mZeroDivisionError\x1b[0m: \x1b[35mdivision by zero\x1b[0m\n"
    )
    for cells, late in (([(0, cell(("stderr", coloured)))], {}), ([(0, cell())], {0: coloured})):
        text = printed_traceback(cells, late)
        assert text is not None
        traceback = waiting_text.printed_traceback(text[1])
        assert traceback is not None
        assert traceback.error == "ZeroDivisionError: division by zero"
