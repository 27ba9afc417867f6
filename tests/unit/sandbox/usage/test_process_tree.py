"""Who belongs to a sandbox's tree and what its processes use: against a /proc made up for the test, and against real processes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.model.limits import LimitName, Limits
from safe_exec.sandbox.mechanisms.watchdog import PERIOD_SECONDS, Watchdog
from safe_exec.sandbox.usage.process_files import PAGE, Member, ProcessFiles
from safe_exec.sandbox.usage.process_tree import ProcessTree, TreeUse
from safe_exec.sandbox.usage.shared_pages import (
    SMALL,
    SharedCount,
    count_once,
    estimate,
    lower_bound,
    upper_bound,
)
from tests.support import ROOT, ordinary_user, wait_until

MIB = 1 << 20
KEEPER, KERNEL = 100, 101
ENDED = ("Z", "X", "R, and its memory is gone")
"""The states of a process that has ended, and of one that is about to: it gives up its memory first."""


@dataclass
class Process:
    """A process of the made-up /proc; sizes in MiB. ``share``: its part of anonymous memory, an error where it cannot be read.

    ``image``: the address of its stack, which an execution draws anew and a fork keeps; 0 where it may not be read.
    """

    parent: int
    anonymous: int = 40
    share: int | OSError | None = None
    shmem: int = 0
    shmem_share: int = 0
    started: int = 1
    state: str = "S"
    threads: int = 1
    ticks: int = 0
    waited_ticks: int = 0
    name: str = "python3"
    image: int = 0
    others: dict[int, int] = field(default_factory=dict)

    def pages(self, size: int) -> int:
        return size * MIB // PAGE


class MadeUp(ProcessFiles):
    """Reads processes that a test made up. ``on_share`` is called before each look at shares, with the process id."""

    def __init__(self, processes: dict[int, Process]) -> None:
        super().__init__()
        self.processes = processes
        self.on_share: Callable[[int], object] = lambda _pid: None
        self.same: set[frozenset[int]] = set()
        self.shares_read = 0

    def pids(self) -> list[int]:
        return list(self.processes)

    def text(self, path: str) -> bytes:
        pid, *_, name = path.split("/")
        if name == "smaps_rollup":
            self.shares_read += 1
            self.on_share(int(pid))
        process = self.processes.get(int(pid))
        if process is None:
            raise FileNotFoundError(path)
        content: bytes = getattr(self, f"_{name}")(process)
        return content

    def same_memory(self, one: int, other: int) -> bool:
        return frozenset({one, other}) in self.same

    @staticmethod
    def _stat(p: Process) -> bytes:
        cpu = f"{p.ticks} 0 {p.waited_ticks} 0"
        return f"1 ({p.name}) {p.state[0]} {p.parent} 1 1 0 -1 0 0 0 0 0 {cpu} 20 0 {p.threads} 0 {p.started} 0 0 0 4096 0 {p.image}".encode()

    @staticmethod
    def _statm(p: Process) -> bytes:
        if p.state in ENDED:
            return b"0 0 0 0 0 0 0"
        shared = p.pages(10 + p.shmem)
        return f"{p.pages(900)} {p.pages(p.anonymous) + shared} {shared} 0 0 0 0".encode()

    @staticmethod
    def _status(p: Process) -> bytes:
        return f"Name:\tpython3\nRssAnon:\t{p.anonymous * 1024} kB\nRssShmem:\t{p.shmem * 1024} kB\nThreads:\t1\n".encode()

    @staticmethod
    def _smaps_rollup(p: Process) -> bytes:
        if isinstance(p.share, OSError):
            raise p.share
        if p.state in ENDED:
            raise ProcessLookupError
        share = p.anonymous if p.share is None else p.share
        rows = f"Rss: {p.anonymous * 1024} kB\nPss_Anon: {share * 1024} kB\nPss_Shmem: {p.shmem_share * 1024} kB\n"
        return b"00400000-7ff00000 ---p 00000000 00:00 0 [rollup]\n" + rows.encode()


def pool(workers: int, anonymous: int = 90, share: int | None = None) -> dict[int, Process]:
    """A kernel and workers that share all of it, below a keeper; and a process that is none of theirs."""
    each = anonymous // (workers + 1) if share is None else share
    processes = {1: Process(0), KEEPER: Process(1), 7: Process(1, anonymous=5000)}
    processes[KERNEL] = Process(KEEPER, anonymous=anonymous, share=each)
    processes |= {200 + n: Process(KERNEL, anonymous=anonymous, share=each) for n in range(workers)}
    return processes


def tree_of(files: ProcessFiles) -> ProcessTree:
    tree = ProcessTree(KEEPER, KERNEL, files=files)
    tree._fresh_seconds = 0.0
    return tree


# --- shared pages -----------------------------------------------------------------------------------------------


def test_pages_of_a_pool_count_once() -> None:
    use = tree_of(MadeUp(pool(12))).read()
    assert (use.memory // MIB, use.least // MIB, use.most // MIB, use.tasks) == (
        90,
        90,
        13 * 90,
        13,
    )
    assert not use.upper_bound and use.kernel_memory == 90 * MIB


def test_programs_that_were_executed_share_no_pages_and_add_up_at_once() -> None:
    files = MadeUp(pool(0, anonymous=60))
    files.processes[KERNEL].image = 7
    files.processes |= {
        200: Process(KERNEL, anonymous=55, image=7),  # a fork of the kernel
        201: Process(KERNEL, anonymous=128, image=8),
        202: Process(201, anonymous=100, image=8),  # a fork of that program
        203: Process(KERNEL, anonymous=50),  # may be a fork of any
    }
    assert tree_of(files).read().least == (60 + 128) * MIB
    files.processes[203].anonymous = 300
    assert tree_of(files).read().least == 300 * MIB


def test_a_real_child_has_the_image_of_its_parent_until_it_executes_a_program() -> None:
    files = ProcessFiles()
    own = files.measure(os.getpid())
    assert own is not None and own.image is not None
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reader, 1)
        os.execv(sys.executable, [sys.executable, "-c", "input()"])
    try:
        forked = files.measure(pid)
        assert forked is not None and forked.image == own.image
        os.write(writer, b"g")
        wait_until(
            lambda: (child := files.measure(pid)) is not None and child.image != own.image,
            30,
            "the child executes",
        )
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


def test_where_nothing_can_be_shared_no_page_table_is_walked() -> None:
    files = MadeUp(
        {
            KEEPER: Process(1),
            KERNEL: Process(KEEPER, anonymous=900),
            200: Process(KERNEL, anonymous=3),
        }
    )
    assert tree_of(files).read().memory == 903 * MIB
    assert files.shares_read == 0


@pytest.mark.parametrize(
    "gone", [FileNotFoundError(2, ""), ProcessLookupError(3, ""), PermissionError(13, "")], ids=str
)
@pytest.mark.parametrize("state", [None, *ENDED])
def test_a_process_that_ends_while_it_is_read_is_not_unreadable(
    gone: OSError, state: str | None
) -> None:
    files = MadeUp(pool(12))

    def ends(pid: int) -> None:
        if pid == 205 and state is None:
            del files.processes[205]
        elif pid == 205 and state is not None:
            files.processes[205].state, files.processes[205].share = state, gone

    files.on_share = ends
    use = tree_of(files).read()
    assert use.memory <= 90 * MIB and not use.upper_bound


def test_an_id_that_is_given_to_another_process_is_an_end_too() -> None:
    files = MadeUp(pool(12))
    files.on_share = lambda pid: (
        pid == 205
        and files.processes.update({205: Process(1, share=PermissionError(13, ""), started=9)})
    )
    use = tree_of(files).read()
    assert use.memory <= 90 * MIB and not use.upper_bound


def test_what_may_not_be_read_counts_whole_and_makes_it_an_upper_bound() -> None:
    processes = pool(2)
    processes[300] = Process(KERNEL, anonymous=70, share=PermissionError(13, ""))
    use = tree_of(MadeUp(processes)).read()
    assert (use.memory, use.upper_bound) == (160 * MIB, True)


def test_a_small_process_that_may_not_be_read_spoils_nothing() -> None:
    processes = pool(2)
    processes[300] = Process(KERNEL, anonymous=2, share=PermissionError(13, ""))
    use = tree_of(MadeUp(processes)).read()
    assert (use.memory, use.upper_bound) == (92 * MIB, False)


def test_workers_that_end_one_after_the_other_while_they_are_read_do_not_add_up() -> None:
    """Each that goes leaves its part to those that are read later: the sum alone would be three times the truth."""
    files = MadeUp(pool(12, anonymous=390))
    order = [KERNEL, *range(200, 212)]

    def one_more_ends(pid: int) -> None:
        left = len(order) - order.index(pid)
        for process in order[: order.index(pid)]:
            files.processes.pop(process, None)
        for process in order[order.index(pid) :]:
            files.processes[process].share = 390 // left

    files.on_share = one_more_ends
    members = [member for pid in order if (member := files.measure(pid)) is not None]
    count = count_once(files, members, 0)
    assert count.memory > 2 * 390 * MIB, "the sum misleads, so the test means something"
    assert count.at_least <= 390 * MIB


def test_a_child_between_vfork_and_exec_is_no_second_process() -> None:
    files = MadeUp(pool(0, anonymous=400))
    files.processes[200] = Process(KERNEL, anonymous=400)
    tree = tree_of(files)
    assert tree.read().most == 800 * MIB
    files.same.add(frozenset({KERNEL, 200}))
    use = tree.read()
    assert (use.memory, use.most, use.tasks) == (400 * MIB, 400 * MIB, 2)


def test_shared_memory_counts_once() -> None:
    processes = pool(4)
    for pid in range(200, 204):
        processes[pid].shmem, processes[pid].shmem_share = 300, 75
    assert tree_of(MadeUp(processes)).read().memory == (90 // 5 * 5 + 300) * MIB


def test_a_system_without_shares_gives_an_upper_bound() -> None:
    """Linux before 4.14, or a container that hides the file."""
    processes = pool(3, share=0)
    for pid in (KERNEL, 200, 201, 202):
        processes[pid].share = FileNotFoundError(2, "")
    use = tree_of(MadeUp(processes)).read()
    assert (use.memory, use.upper_bound) == (360 * MIB, True)


members_lists = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 200)), min_size=1, max_size=8
)


@settings(deadline=None)
@given(members_lists, st.integers(0, 300), st.integers(0, 4000), st.integers(0, 500))
def test_bounds_hold_every_estimate(
    sizes: list[tuple[int, int]], open_files: int, last: int, before: int
) -> None:
    members = [
        Member(pid=n, parent=1, started=1, anonymous=a * MIB, shmem=s * MIB, size=1)
        for n, (a, s) in enumerate(sizes)
    ]
    least, most = lower_bound(members, open_files * MIB), upper_bound(members, open_files * MIB)
    assert max(member.anonymous for member in members) <= least <= most
    known = {member.key: before * MIB for member in members[::2]}
    assert least <= estimate(SharedCount(memory=last * MIB), known, members, (least, most)) <= most


# --- who belongs to it ------------------------------------------------------------------------------------------


def test_what_stands_between_the_keeper_and_the_kernel_is_ours() -> None:
    """bubblewrap and our init, which an ordinary user cannot look into."""
    unreadable = PermissionError(13, "")
    processes = {
        KEEPER: Process(1),
        90: Process(KEEPER, share=unreadable),
        91: Process(90, anonymous=70, share=unreadable),
        KERNEL: Process(91, anonymous=50, share=30),
        200: Process(KERNEL, anonymous=50, share=30),
        201: Process(91, anonymous=7, share=7),  # an orphan: the init has taken it
    }
    use = tree_of(MadeUp(processes)).read()
    assert (use.tasks, use.memory, use.upper_bound) == (3, 67 * MIB, False)


def test_children_come_and_go() -> None:
    files = MadeUp(pool(1))
    tree = tree_of(files)
    assert tree.read().tasks == 2
    files.processes[300] = Process(200, threads=5)
    assert tree.read().tasks == 7
    del files.processes[200]
    files.processes[300].parent = KEEPER  # an orphan
    assert tree.read().tasks == 6
    files.processes[400] = Process(KEEPER)
    files.processes[401] = Process(400)
    assert tree.read().tasks == 8


def test_a_child_of_a_child_that_was_never_seen() -> None:
    files = MadeUp(pool(0))
    files.processes[300] = Process(299)  # its parent has ended between the two looks
    tree = tree_of(files)
    assert tree.read().tasks == 1
    files.processes[300].parent = KEEPER
    assert tree.read().tasks == 2


def test_an_id_of_another_process_that_becomes_ours_is_noticed() -> None:
    files = MadeUp(pool(0) | {pid: Process(1) for pid in range(500, 560)})
    tree = tree_of(files)
    assert tree.read().tasks == 1
    files.processes[530] = Process(KERNEL, started=8)
    for _ in range(60):
        use = tree.read()
    assert use.tasks == 2


def test_processor_time_outlives_its_process() -> None:
    files = MadeUp(pool(1))
    second = os.sysconf("SC_CLK_TCK")
    files.processes[200].ticks = 3 * second
    files.processes[KERNEL].ticks = second
    tree = tree_of(files)
    assert tree.read().cpu_seconds == 4.0
    del files.processes[200]
    assert tree.read().cpu_seconds == 4.0
    files.processes[KERNEL].waited_ticks = (
        5 * second
    )  # what the child used after it was seen last, or others that nobody saw
    assert tree.read().cpu_seconds == 6.0


# --- the watch --------------------------------------------------------------------------------------------------


def watched(files: ProcessFiles, **limits: int) -> tuple[Watchdog, list[tuple[LimitName, float]]]:
    passed: list[tuple[LimitName, float]] = []
    names = frozenset(LimitName(name) for name in limits)
    watchdog = Watchdog(
        tree_of(files), Limits(**limits), names, lambda name, used: passed.append((name, used))
    )
    return watchdog, passed


def test_nobody_is_killed_for_what_was_counted_twice() -> None:
    watchdog, passed = watched(MadeUp(pool(12)), memory=512 * MIB)
    assert [watchdog.check() for _ in range(3)] == [False] * 3
    assert passed == [] and watchdog.peaks.memory == 90 * MIB


def test_one_process_past_the_limit_is_enough() -> None:
    files = MadeUp(pool(12, anonymous=600))
    watchdog, passed = watched(files, memory=512 * MIB)
    assert watchdog.check() and watchdog.check()
    assert [name for name, _ in passed] == [LimitName.MEMORY]


def test_a_program_that_was_executed_needs_no_count_to_pass_the_limit() -> None:
    """It would have ended before a count of shared pages is done."""
    files = MadeUp(pool(0, anonymous=60))
    files.processes[KERNEL].image = 7
    files.processes[200] = Process(KERNEL, anonymous=100, image=8)
    watchdog, passed = watched(files, memory=128 * MIB)
    assert watchdog.check()
    assert passed == [(LimitName.MEMORY, 160 * MIB)] and files.shares_read == 0


@pytest.mark.parametrize(
    ("sizes", "near"),
    [([90, 90], False), ([10, 60], False), ([40, 90], True), ([40, 90, 90], True), ([90], False)],
    ids=["steady", "far away", "fast", "a pause in fast growth", "first check"],
)
def test_checks_come_closer_together_while_memory_may_pass_its_limit(
    sizes: list[int], near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(range(len(sizes) * 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(moments) * PERIOD_SECONDS)
    watchdog, _ = watched(MadeUp(pool(0)), memory=160 * MIB)
    for size in sizes:
        is_near = watchdog._grows_past(TreeUse(memory=0, cpu_seconds=0, tasks=1, most=size * MIB))
    assert is_near is near


def test_the_largest_process_is_recorded_with_its_pages_of_files() -> None:
    files = MadeUp(pool(0, anonymous=60))
    files.processes[200] = Process(KERNEL, anonymous=100)
    watchdog, _ = watched(files, memory=1000 * MIB)
    watchdog.check()
    del files.processes[200]
    watchdog.check()
    assert (watchdog.peaks.process, watchdog.peaks.kernel) == (110 * MIB, 60 * MIB)
    assert watchdog.peaks.interval > 0


def test_a_peak_that_only_another_reader_saw_counts_too() -> None:
    files = MadeUp(pool(1, anonymous=600))
    watchdog, passed = watched(files, memory=512 * MIB)
    peak = watchdog.tree.read()
    for process in files.processes.values():
        process.anonymous = 10
    assert not watchdog.check()
    watchdog.judge(peak)
    watchdog.judge(peak)
    assert passed == [(LimitName.MEMORY, peak.least)]
    assert watchdog.peaks.memory == peak.least > 512 * MIB
    assert watchdog.check()


def test_another_reader_s_upper_bound_kills_nobody() -> None:
    watchdog, passed = watched(MadeUp(pool(12)), memory=512 * MIB)
    use = watchdog.tree.read()
    assert use.most > 512 * MIB
    watchdog.judge(use)
    watchdog.stop()
    watchdog.judge(use)
    assert passed == []


def test_workers_that_no_longer_share_are_past_it_together() -> None:
    watchdog, passed = watched(MadeUp(pool(12, share=90)), memory=512 * MIB)
    assert watchdog.check()
    assert passed == [(LimitName.MEMORY, 13 * 90 * MIB)]
    assert watchdog.peaks.children == 12 * 90 * MIB


def test_the_last_look_does_not_wait_for_its_time() -> None:
    files = MadeUp(pool(12))
    watchdog, passed = watched(files, memory=512 * MIB)
    watchdog.check()
    for process in files.processes.values():
        process.share = process.anonymous
    watchdog._count_next = time.monotonic() + 1000
    assert not watchdog.check() and watchdog.check(last=True)
    assert len(passed) == 1


@pytest.mark.parametrize("refuses", [True, False])
def test_nobody_is_killed_for_tasks_where_the_system_refuses_more(refuses: bool) -> None:
    passed: list[tuple[LimitName, float]] = []
    asked: list[int] = []

    def refuse_more(tasks: int) -> bool:
        asked.append(tasks)
        return refuses

    tree = tree_of(MadeUp(pool(12)))
    tasks = tree.read().tasks
    watchdog = Watchdog(
        tree,
        Limits(processes=tasks - 1),
        frozenset({LimitName.PROCESSES}),
        lambda name, used: passed.append((name, used)),
        refuse_more=refuse_more,
    )
    assert watchdog.check() is not refuses
    assert asked == [tasks]
    assert passed == ([] if refuses else [(LimitName.PROCESSES, tasks)])


def test_processes_are_counted_with_their_threads_and_zombies() -> None:
    processes = pool(2)
    processes[201].state = "Z"
    processes[200].threads = 30
    watchdog, passed = watched(MadeUp(processes), processes=31)
    assert watchdog.check()
    assert passed == [(LimitName.PROCESSES, 32)]
    assert watchdog.peaks.tasks == 32 and watchdog.peaks.memory is None, (
        "where memory is not watched nothing is known of it"
    )


# --- real processes ---------------------------------------------------------------------------------------------

FORKS = """
import os, sys, mmap
memory = bytearray(b"x" * (64 << 20))
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        sys.stdin.read()
        os._exit(0)
    children.append(child)
print("ready", flush=True)
sys.stdin.read()
for child in children:
    os.waitpid(child, 0)
"""
FIRST_THREAD_ENDS = """
import ctypes, os, sys, threading
memory = bytearray(b"x" * (64 << 20))
threading.Thread(target=lambda: (print("ready", flush=True), os.read(0, 1), os._exit(0))).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
"""
HIDDEN = """
import ctypes, sys
memory = bytearray(b"x" * (64 << 20))
ctypes.CDLL(None).prctl(4, 0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run() -> Iterator[Callable[[str], int]]:
    processes: list[subprocess.Popen[str]] = []

    def start(program: str) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process.pid

    yield start
    for process in processes:
        process.communicate("")


def test_real_forks_count_once(run: Callable[[str], int]) -> None:
    use = ProcessTree(os.getpid(), run(FORKS)).read()
    assert use.most > 5 * 64 * MIB
    assert 64 * MIB < use.memory < 110 * MIB and not use.upper_bound


def test_a_process_whose_first_thread_has_ended_still_has_its_memory(
    run: Callable[[str], int],
) -> None:
    pid = run(FIRST_THREAD_ENDS)
    wait_until(
        lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z",
        10,
        "its first thread ended",
    )
    assert ProcessTree(os.getpid(), pid).read().memory > 64 * MIB


AS_USER = """
import json, os, subprocess, sys
from safe_exec.sandbox.usage.process_tree import ProcessTree
processes, figures = [], []
for program in sys.argv[1:]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes.append(subprocess.Popen([sys.executable, "-c", program], text=True, **pipes))
    assert processes[-1].stdout.readline() == "ready\\n"
    use = ProcessTree(os.getpid(), processes[-1].pid).read()
    figures.append([use.memory >> 20, use.most >> 20, use.upper_bound])
for process in processes:
    process.communicate("")
print(json.dumps(figures))
"""


@pytest.mark.bed("ordinary-user")
def test_an_ordinary_user_counts_its_own_processes_once_and_those_that_hide_whole() -> None:
    """Root reads everything, so this is another user's to see."""
    argv = [*ordinary_user(), sys.executable, "-c", AS_USER, FORKS, HIDDEN]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=ROOT)
    (forks, most, exact), (with_hidden, _, bound) = [
        (a, b, c) for a, b, c in json.loads(done.stdout)
    ]
    assert 64 < forks < 110 and most > 5 * 64 and not exact
    assert forks + 64 <= with_hidden < forks + 90 and bound


def test_a_zombie_has_no_memory_and_is_a_task() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        wait_until(
            lambda: Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z",
            10,
            "it has ended",
        )
        use = ProcessTree(os.getpid(), child).read()
        assert use.tasks >= 1 and use.kernel_memory == 0
    finally:
        os.waitpid(child, 0)


def test_the_same_address_space_is_known(run: Callable[[str], int]) -> None:
    files = ProcessFiles()
    assert not files.same_memory(os.getpid(), run(HIDDEN))
    borrowing = ctypes.CDLL(None)
    assert borrowing is not None
    if os.uname().machine in ("x86_64", "aarch64"):
        assert files.same_memory(os.getpid(), threading.main_thread().native_id or 0)


def test_children_that_end_while_they_are_counted_are_no_failure() -> None:
    """Real ones, as fast as they can be made, for a while: never an upper bound, never more than there is."""
    program = (
        "import os, sys, select\n"
        "memory = bytearray(b'x' * (64 << 20)); print('ready', flush=True)\n"
        "while not select.select([0], [], [], 0)[0]:\n"
        "    for child in [os.fork() or os._exit(0) for _ in range(6)]: os.waitpid(child, 0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        tree = ProcessTree(os.getpid(), process.pid)
        tree._fresh_seconds = 0.0
        for _ in range(60):
            use, count = tree.read(), tree.count()
            assert not use.upper_bound and not count.upper_bound
            assert count.at_least < 100 * MIB
        process.stdin.close()
        process.send_signal(signal.SIGTERM)


def test_small_is_small() -> None:
    assert count_once(MadeUp({}), [], 0).memory == 0 < SMALL
