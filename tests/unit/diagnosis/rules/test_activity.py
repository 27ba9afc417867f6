"""What a kernel was doing, from looks at real ones: figures as they were measured, on an idle machine and on a busy one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.diagnosis.rules.activity import activity_of
from safe_exec.model.evidence import ActivityObservation, Frame
from safe_exec.model.verdict import Activity

A = Activity
Facts = dict[str, Any]

# How long the sampling thread waited for the interpreter, in seconds.
FORCED = (
    0.0052,
    0.0053,
    0.0052,
    0.0054,
    0.0052,
    0.0053,
) * 8  # Python code gives way after 5 ms, when asked
CROWDED = (
    0.0053,
    0.008,
    0.0119,
    0.0053,
    0.0106,
    0.0066,
    0.0202,
    0.0091,
) * 6  # the same with two such kernels on two processors
AT_ONCE = (0.0002, 0.0003, 0.0002, 0.0002) * 12  # the interpreter was free
NOW_AND_THEN = (
    0.0002,
    0.0039,
    0.0002,
    0.0002,
    0.0018,
    0.0002,
) * 10  # free, but the processor was not
LATE = (
    0.0002,
    0.0041,
    0.0159,
    0.0002,
    0.0037,
    0.008,
    0.0058,
    0.0111,
    0.0002,
    0.0028,
) * 6  # the same, in a crowd
HELD = (0.406, 0.026, 0.404, 0.392)  # native code kept it for 0.4 s at a time


def frame(place: str) -> Frame:
    """``function@path`` as a frame."""
    function, _, file = place.partition("@")
    return Frame(function=function, file=file, line=1, cell=1 if file == "cell" else None)


def seen(*places: str, **facts: Any) -> Facts:
    """A main thread at rest, unless changed; ``places`` are its frames, innermost first, above the cell's own."""
    stack = tuple(frame(place) for place in (*places, "<module>@cell"))
    rest = {
        "state": "S",
        "cpu_share": 0.0,
        "syscall": None,
        "stack": stack,
        "gil_waits": AT_ONCE,
        "lines": 1,
        "starved": False,
    }
    return {**rest, "children": 0, "children_cpu_share": 0.0, "reads_terminal": False, **facts}


def busy(*places: str, **facts: Any) -> Facts:
    """A main thread that computes."""
    return seen(*places, **{"state": "R", "cpu_share": 1.0, **facts})


def awaits(what: str, **facts: Any) -> Facts:
    """A cell that awaits: no frame of it is on the stack, the event loop stands in epoll."""
    return seen(awaiting=what, syscall="epoll_wait", **facts)


THREADING = "wait@/usr/lib/python3.11/threading.py"
SUBPROCESS = "/usr/lib/python3.11/subprocess.py"
MULTI = "/usr/lib/python3.11/multiprocessing"

TABLE: list[tuple[str, Facts, Activity | None]] = [
    # Computing.
    ("while True: pass", busy(gil_waits=FORCED), A.PYTHON_LOOP),
    ("a loop over many lines", busy(gil_waits=AT_ONCE, lines=30), A.PYTHON_LOOP),
    ("a loop on a busy machine", busy(gil_waits=CROWDED, cpu_share=0.7), A.PYTHON_LOOP),
    ("a comprehension", busy("<genexpr>@cell", gil_waits=FORCED, lines=2), A.PYTHON_LOOP),
    (
        "sum(range(10**12)): nobody else gets a turn",
        busy(gil_waits=(), lines=0, starved=True),
        A.NATIVE_CODE,
    ),
    (
        "starved from the first look on",
        busy(gil_waits=(), starved=True, cpu_share=0.03, runnable=1.0, window=1.2),
        None,
    ),
    (
        "starved, with one turn",
        busy(gil_waits=HELD, cpu_share=0.05, runnable=0.9, window=1.2, lines=1),
        None,
    ),
    (
        "starved for so long that its turns add up",
        busy(
            gil_waits=HELD,
            starved=True,
            cpu_share=0.02,
            runnable=1.0,
            window=15.0,
            cpu_wait_share=0.97,
            lines=1,
        ),
        None,
    ),
    (
        "native code that shares its processor",
        busy(
            gil_waits=(), starved=True, cpu_share=0.3, runnable=1.0, window=0.4, cpu_wait_share=0.7
        ),
        A.NATIVE_CODE,
    ),
    (
        "a loop that got little time",
        busy(gil_waits=CROWDED, cpu_share=0.04, runnable=1.0, window=1.2, lines=5),
        A.PYTHON_LOOP,
    ),
    (
        "native code that got a little time",
        busy(starved=True, gil_waits=(), cpu_share=0.3, runnable=1.0, window=0.4),
        A.NATIVE_CODE,
    ),
    (
        "10**10**9 from the very start",
        busy(gil_waits=(0.0002, 0.0003), starved=True),
        A.NATIVE_CODE,
    ),
    (
        "re.match that goes back for ever",
        busy("match@/usr/lib/python3.11/re.py", gil_waits=(), starved=True),
        A.NATIVE_CODE,
    ),
    ("pbkdf2_hmac lets the interpreter go", busy(gil_waits=AT_ONCE), A.NATIVE_CODE),
    ("pbkdf2_hmac on a busy machine", busy(gil_waits=NOW_AND_THEN, cpu_share=0.6), A.NATIVE_CODE),
    ("numba without the interpreter", busy(gil_waits=AT_ONCE, lines=1), A.NATIVE_CODE),
    ("numpy with threads", busy(gil_waits=AT_ONCE, cpu_share=7.9), A.NATIVE_CODE),
    (
        "another program in the same process",
        busy(gil_waits=(), lines=None, starved=None),
        A.NATIVE_CODE,
    ),
    # Stopped, whatever else.
    ("SIGSTOP", seen(state="T", syscall=None), A.STOPPED),
    ("under a debugger", seen(state="t", cpu_share=0.9), A.STOPPED),
    # Sleeping.
    ("time.sleep", seen(syscall="clock_nanosleep"), A.SLEEPING),
    ("an old libc's sleep", seen(syscall="nanosleep"), A.SLEEPING),
    ("sleep by select", seen("sleep@cell", syscall="pselect6"), A.SLEEPING),
    ("signal.pause", seen(syscall="pause"), A.SLEEPING),
    (
        "sleeps of 10 ms in a loop",
        seen(syscall="clock_nanosleep", cpu_share=0.02, lines=2),
        A.SLEEPING,
    ),
    ("asyncio.sleep", awaits("tasks.sleep"), A.SLEEPING),
    # Input and output.
    ("recv of a socket", seen(syscall="recvfrom"), A.WAITING_IO),
    ("recv with a timeout", seen(syscall="poll"), A.WAITING_IO),
    ("accept", seen("accept@/usr/lib/python3.11/socket.py", syscall="accept4"), A.WAITING_IO),
    ("urlopen", seen("readinto@/usr/lib/python3.11/socket.py", syscall="recvfrom"), A.WAITING_IO),
    ("connect", seen(syscall="connect"), A.WAITING_IO),
    ("select on a socket", seen(syscall="pselect6"), A.WAITING_IO),
    (
        "selectors",
        seen("select@/usr/lib/python3.11/selectors.py", syscall="epoll_wait"),
        A.WAITING_IO,
    ),
    ("read of a pipe", seen(syscall="read"), A.WAITING_IO),
    ("write to a full pipe", seen(syscall="write"), A.WAITING_IO),
    ("open of a FIFO", seen(syscall="openat"), A.WAITING_IO),
    ("a disk that does not answer", seen(syscall="pread64", state="D"), A.WAITING_IO),
    ("StreamReader.read", awaits("streams._wait_for_data"), A.WAITING_IO),
    (
        "multiprocessing's Connection.recv",
        seen(f"_recv@{MULTI}/connection.py", syscall="read"),
        A.WAITING_IO,
    ),
    # Locks, queues, threads.
    ("Lock.acquire", seen(syscall="futex"), A.WAITING_LOCK),
    ("Event.wait", seen(THREADING, syscall="futex"), A.WAITING_LOCK),
    (
        "Queue.get",
        seen(THREADING, "get@/usr/lib/python3.11/queue.py", syscall="futex"),
        A.WAITING_LOCK,
    ),
    (
        "Thread.join",
        seen("_wait_for_tstate_lock@/usr/lib/python3.11/threading.py", syscall="futex"),
        A.WAITING_LOCK,
    ),
    (
        "Future.result",
        seen(THREADING, "result@/usr/lib/python3.11/concurrent/futures/_base.py", syscall="futex"),
        A.WAITING_LOCK,
    ),
    (
        "Pool.map",
        seen(THREADING, f"get@{MULTI}/pool.py", syscall="futex", children=2),
        A.WAITING_CHILD,
    ),
    ("a lock where calls cannot be read", seen(THREADING), A.WAITING_LOCK),
    ("asyncio.Event", awaits("locks.wait"), A.WAITING_LOCK),
    ("asyncio.Lock", awaits("locks.acquire"), A.WAITING_LOCK),
    ("asyncio.Queue", awaits("queues.get"), A.WAITING_LOCK),
    ("asyncio.wait_for", awaits("tasks.wait_for"), A.WAITING_LOCK),
    ("a future nobody sets", awaits("a future"), A.WAITING_LOCK),
    # Children.
    ("os.system", seen(syscall="wait4", children=1), A.WAITING_CHILD),
    ("os.waitid", seen(syscall="waitid", children=1), A.WAITING_CHILD),
    (
        "subprocess.run",
        seen(f"_try_wait@{SUBPROCESS}", f"_wait@{SUBPROCESS}", syscall="wait4", children=1),
        A.WAITING_CHILD,
    ),
    (
        "subprocess.run with captured output",
        seen(
            "select@/usr/lib/python3.11/selectors.py",
            f"_communicate@{SUBPROCESS}",
            syscall="poll",
            children=1,
        ),
        A.WAITING_CHILD,
    ),
    (
        "check_output",
        seen(f"communicate@{SUBPROCESS}", syscall="read", children=1),
        A.WAITING_CHILD,
    ),
    (
        "a child that computes",
        seen(syscall="wait4", children=1, children_cpu_share=1.0),
        A.WAITING_CHILD,
    ),
    (
        "Process.join",
        seen(f"poll@{MULTI}/popen_fork.py", syscall="wait4", children=1),
        A.WAITING_CHILD,
    ),
    (
        "Process.join with a timeout",
        seen(f"wait@{MULTI}/popen_fork.py", syscall="poll", children=1),
        A.WAITING_CHILD,
    ),
    ("asyncio's Process.wait", awaits("base_subprocess._wait", children=1), A.WAITING_CHILD),
    ("asyncio's communicate", awaits("subprocess.communicate", children=1), A.WAITING_CHILD),
    # Not to be told.
    ("nothing seen", {"state": None, "cpu_share": None, "syscall": None, "stack": ()}, None),
    ("a call without a name", seen(syscall="999"), None),
]

# Looks that tell the truth only with what an absolute share of one processor does not say.
BUSY_MACHINE: list[tuple[str, Facts, Activity | None]] = [
    (
        "two loops on one processor",
        busy(gil_waits=CROWDED, cpu_share=0.31, runnable=1.0),
        A.PYTHON_LOOP,
    ),
    (
        "a loop under --cpus 0.3",
        busy(gil_waits=CROWDED, cpu_share=0.3, runnable=1.0),
        A.PYTHON_LOOP,
    ),
    (
        "native code under --cpus 0.3",
        busy(gil_waits=(), cpu_share=0.3, starved=True, runnable=1.0),
        A.NATIVE_CODE,
    ),
    (
        "pbkdf2_hmac in a crowd",
        busy(gil_waits=NOW_AND_THEN, cpu_share=0.43, runnable=0.95),
        A.NATIVE_CODE,
    ),
    ("np.convolve in a crowd", busy(gil_waits=LATE, cpu_share=0.35, runnable=1.0), A.NATIVE_CODE),
    ("bytes(b) of 256 MiB again and again", busy(gil_waits=HELD, runnable=1.0), A.NATIVE_CODE),
    (
        "await asyncio.sleep(0) again and again",
        busy(gil_waits=AT_ONCE, awaiting="tasks.__sleep0", runnable=0.9),
        A.PYTHON_LOOP,
    ),
    (
        "sleep beside a busy thread",
        seen(syscall="clock_nanosleep", cpu_share=1.0, gil_waits=FORCED, runnable=0.0),
        A.SLEEPING,
    ),
    (
        "recv beside a busy thread",
        seen(syscall="recvfrom", cpu_share=1.0, gil_waits=FORCED, runnable=0.05),
        A.WAITING_IO,
    ),
    (
        "join of a busy thread",
        seen(THREADING, syscall="futex", cpu_share=1.0, gil_waits=FORCED, runnable=0.0),
        A.WAITING_LOCK,
    ),
    (
        "a lock beside a busy thread",
        seen(syscall="futex", cpu_share=1.0, gil_waits=FORCED, runnable=0.0),
        A.WAITING_LOCK,
    ),
    (
        "native threads at work for the main one",
        seen(syscall="futex", cpu_share=3.8, runnable=0.0),
        A.NATIVE_CODE,
    ),
]

# The call alone misleads: what it is made for says what is waited for.
WHAT_FOR: list[tuple[str, Facts, Activity | None]] = [
    (
        "subprocess.run with a timeout sleeps and looks",
        seen(f"_wait@{SUBPROCESS}", f"wait@{SUBPROCESS}", syscall="clock_nanosleep", children=1),
        A.WAITING_CHILD,
    ),
    (
        "!sleep 100",
        seen(
            "select_ignore_interrupts@pexpect/utils.py",
            "select@pexpect/pty_spawn.py",
            syscall="pselect6",
            children=1,
        ),
        A.WAITING_CHILD,
    ),
    (
        "%%bash",
        seen(
            THREADING,
            "result@futures/_base.py",
            "in_thread@IPython/core/magics/script.py",
            syscall="futex",
            children=2,
        ),
        A.WAITING_CHILD,
    ),
    ("fcntl.flock", seen(syscall="flock"), A.WAITING_LOCK),
    ("fcntl.lockf", seen(syscall="fcntl"), A.WAITING_LOCK),
    ("signal.sigwait, like signal.pause", seen(syscall="rt_sigtimedwait"), A.SLEEPING),
    ("asyncio.to_thread", awaits("threads.to_thread"), A.WAITING_LOCK),
    ("asyncio.wait", awaits("tasks._wait"), A.WAITING_LOCK),
    ("a group of tasks", awaits("taskgroups.__aexit__"), A.WAITING_LOCK),
]
EVERY = [*TABLE, *BUSY_MACHINE, *WHAT_FOR]


@pytest.mark.parametrize(
    ("facts", "activity"), [row[1:] for row in EVERY], ids=[row[0] for row in EVERY]
)
def test_what_it_was_doing(facts: Facts, activity: Activity | None) -> None:
    assert activity_of(ActivityObservation(**facts)) is activity


def test_every_activity_is_in_the_table() -> None:
    assert {activity for _, _, activity in EVERY} == {*Activity, None}


@pytest.mark.parametrize(
    "facts", [facts for _, facts, _ in TABLE], ids=[name for name, *_ in TABLE]
)
def test_a_stopped_process_is_stopped_whatever_it_did(facts: Facts) -> None:
    assert activity_of(ActivityObservation(**{**facts, "state": "T"})) is A.STOPPED


files = st.none() | st.sampled_from(["threading.py", "a/b", ""])
places = st.builds(Frame, function=st.text(max_size=5), line=st.none() | st.integers(), file=files)


@settings(deadline=None)
@given(
    observation=st.builds(
        ActivityObservation,
        state=st.none() | st.sampled_from("RSDTtZ"),
        cpu_share=st.none() | st.floats(0, 100),
        syscall=st.none() | st.sampled_from(["futex", "read", "poll", "wait4", "-1", "7"]),
        stack=st.lists(places, max_size=4).map(tuple),
        gil_waits=st.lists(st.floats(), max_size=9).map(
            tuple
        ),  # the kernel process wrote them: anything
        lines=st.none() | st.integers(0, 99),
        awaiting=st.none() | st.text(max_size=9),
        children=st.none() | st.integers(0, 9),
        starved=st.none() | st.booleans(),
        reads_terminal=st.none() | st.booleans(),
    )
)
def test_any_look_has_an_answer(observation: ActivityObservation) -> None:
    found = activity_of(observation)
    assert found is None or isinstance(found, Activity)
    if observation.state in ("T", "t"):
        assert found is A.STOPPED


def other(**facts: Any) -> ActivityObservation:
    """The main thread of a kernel in which no code of ours runs."""
    return ActivityObservation(
        **{
            "state": "S",
            "cpu_share": 0.0,
            "syscall": None,
            "stack": (),
            "children": 0,
            "instrumented": False,
            **facts,
        }
    )


@pytest.mark.parametrize(
    ("observation", "activity"),
    [
        # Which thread runs the cells nobody knows: any that is at work computes.
        (other(syscall="epoll_wait", cpu_share=0.9, runnable=0.0), A.NATIVE_CODE),
        (other(syscall="epoll_wait", cpu_share=0.2, runnable=1.0), A.NATIVE_CODE),
        # So waits a kernel for its own threads and timers, and for us: what the cell does cannot be told.
        (other(syscall="epoll_wait", runnable=0.0), None),
        (other(syscall="pselect6", runnable=0.0), None),
        (other(syscall="futex", runnable=0.0), None),
        (
            other(syscall="pselect6", runnable=0.0, children=1, children_cpu_share=0.9),
            A.WAITING_CHILD,
        ),
        (other(syscall="wait4", runnable=0.0, children=1), A.WAITING_CHILD),
        (other(syscall="clock_nanosleep", runnable=0.0), A.SLEEPING),
        (other(syscall="recvfrom", runnable=0.0), A.WAITING_IO),
        (other(state="T", syscall="epoll_wait", runnable=0.0), A.STOPPED),
    ],
)
def test_a_kernel_without_code_of_ours(
    observation: ActivityObservation, activity: Activity | None
) -> None:
    assert activity_of(observation) is activity
