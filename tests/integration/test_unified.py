"""Control groups version 2 for real: each limit as the sandbox holds it, read from the system's own counters.

Most of it needs no Jupyter kernel: a sandbox holds any program. What runs in it says with its exit code what it saw.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from safe_exec.model.limits import LimitName, Limits, Mechanism
from safe_exec.sandbox.host.capabilities import HostCapabilities, detect
from safe_exec.sandbox.host.resources import memory_and_swap
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.planner import build_plan
from safe_exec.sandbox.sandbox import KernelExit, Sandbox
from safe_exec.sandbox.usage.meter import Meter
from safe_exec.trial.evidence import elsewhere
from tests.integration.unified import DAEMON, Delegated, bare, delegated, inside
from tests.support import groups_of, wait_until

pytestmark = pytest.mark.bed("cgroup2-root")

MIB = 1 << 20
WITHOUT_SYSTEMD = frozenset(Mechanism) - {Mechanism.SYSTEMD}
SECONDS = 60
HOG = "hog = []\nwhile True: hog.append(b'x' * (4 << 20))"
WORKER = f"""
import os, signal
pid = os.fork()
if pid == 0:
    {HOG.splitlines()[0]}
    while True: hog.append(b'x' * (4 << 20))
status = os.waitpid(pid, 0)[1]
os._exit(7 if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else 1)
"""
FORKS = """
import os, time
made = 0
try:
    while made < 200:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except BlockingIOError:
    os._exit(made)
os._exit(255)
"""
SPIN = """
import os
for _ in range(3):
    if os.fork() == 0: break
while True: pass
"""
STAYING = f"{DAEMON}while True: time.sleep(60)\n"
"""And stays itself."""


def machine() -> HostCapabilities:
    """What is found from here without systemd."""
    return detect(WITHOUT_SYSTEMD)


@pytest.fixture
def place() -> Iterator[Delegated]:
    with delegated() as made, inside(made):
        yield made


@contextlib.contextmanager
def started(plan: SpawnPlan, run_id: str, program: str) -> Iterator[Sandbox]:
    """A program in a sandbox, which leaves nothing behind."""
    sandbox = Sandbox(run_id, delegation=plan.cgroup.delegation)
    try:
        argv = [sys.executable, "-I", "-S", "-c", program]
        sandbox.spawn(plan, argv=argv, env={"PATH": os.defpath}, cwd="/", pass_fds={})
        sandbox.await_kernel()
        yield sandbox
    finally:
        cleanup = sandbox.shutdown()
    assert (cleanup.surviving_pids, cleanup.remaining_paths, groups_of(run_id)) == ((), (), [])


def ended(sandbox: Sandbox) -> KernelExit:
    """How the program ended."""

    def has_ended() -> bool:
        if sandbox.exit is None and select.select([sandbox.fileno()], [], [], 0)[0]:
            sandbox.process_messages()
        return sandbox.exit is not None

    wait_until(has_ended, SECONDS, "the program ended")
    assert sandbox.exit is not None
    return sandbox.exit


def run(limits: Limits, program: str) -> tuple[SpawnPlan, KernelExit]:
    """Run a program under limits from its start to its end."""
    run_id = secrets.token_hex(6)
    plan = build_plan(limits, machine(), run_id)
    with started(plan, run_id, program) as sandbox:
        return plan, ended(sandbox)


def signal_of(exit_: KernelExit) -> int | None:
    assert exit_.status is not None
    return exit_.status.signal


def test_memory_is_held_and_counted_and_swap_extends_nothing(place: Delegated) -> None:
    assert memory_and_swap()[1], "this says nothing on a machine without swap"
    plan, exit_ = run(Limits(memory=64 * MIB), HOG)
    assert plan.enforcement[LimitName.MEMORY].by is Mechanism.CGROUP_V2
    assert str(place.group) in plan.cgroup.dirs[0]
    assert signal_of(exit_) == signal.SIGKILL
    counters = exit_.counters
    assert counters.oom_kills == 1 and counters.limit_hits
    assert counters.memory_peak_raw is not None and 60 * MIB <= counters.memory_peak_raw <= 64 * MIB
    assert elsewhere(counters, 64 * MIB) is False


def test_with_swap_the_same_program_would_get_further(place: Delegated) -> None:
    """The control: without memory.swap.max what does not fit is swapped out, and the counter of swap says so."""
    run_id = secrets.token_hex(6)
    plan = build_plan(Limits(memory=64 * MIB), machine(), run_id)
    work = replace(
        plan.cgroup,
        writes_where_present=(),
        counter_files=(*plan.cgroup.counter_files, plan.cgroup.dirs[0] + "/memory.swap.current"),
    )
    held = "held = b'x' * (96 << 20)\nimport os\nos._exit(9)"
    with started(replace(plan, cgroup=work), run_id, held) as sandbox:
        exit_ = ended(sandbox)
    assert exit_.status is not None and exit_.status.exit_code == 9
    assert exit_.counters.oom_kills == 0


def test_without_memory_peak_the_kill_is_still_ours(place: Delegated) -> None:
    """``memory.peak`` came with Linux 5.19."""
    run_id = secrets.token_hex(6)
    plan = build_plan(Limits(memory=64 * MIB), machine(), run_id)
    files = tuple(path for path in plan.cgroup.counter_files if not path.endswith("memory.peak"))
    with started(
        replace(plan, cgroup=replace(plan.cgroup, counter_files=files)), run_id, HOG
    ) as sandbox:
        exit_ = ended(sandbox)
    assert exit_.counters.memory_peak_raw is None and exit_.counters.oom_kills == 1
    assert elsewhere(exit_.counters, 64 * MIB) is False


def test_a_killed_worker_does_not_take_the_rest_with_it(place: Delegated) -> None:
    run_id = secrets.token_hex(6)
    plan = build_plan(Limits(memory=64 * MIB), machine(), run_id)
    with started(plan, run_id, WORKER) as sandbox:
        group = Path(plan.cgroup.dirs[0])
        assert (group / "memory.oom.group").read_text().strip() == "0"
        exit_ = ended(sandbox)
    assert exit_.status is not None and exit_.status.exit_code == 7
    assert exit_.counters.oom_kills == 1


def test_processes_are_held_and_refusals_counted(place: Delegated) -> None:
    plan, exit_ = run(Limits(processes=20), FORKS)
    assert plan.enforcement[LimitName.PROCESSES].by is Mechanism.CGROUP_V2
    assert exit_.status is not None and exit_.status.exit_code == 19
    assert exit_.counters.fork_refusals == 1


def test_processors_are_held(place: Delegated) -> None:
    """Four that spin at half a processor: each period of 0.1 s they are throttled."""
    run_id = secrets.token_hex(6)
    plan = build_plan(Limits(cpus=0.5), machine(), run_id)
    assert plan.enforcement[LimitName.CPUS].by is Mechanism.CGROUP_V2
    with started(plan, run_id, SPIN):
        group = Path(plan.cgroup.dirs[0])
        assert (group / "cpu.max").read_text().split() == ["50000", "100000"]

        def figures() -> dict[str, int]:
            return {
                key: int(value)
                for key, value in (
                    line.split() for line in (group / "cpu.stat").read_text().splitlines()
                )
            }

        wait_until(lambda: figures()["nr_throttled"] >= 5, SECONDS, "it is throttled")
        before = figures()
        wait_until(
            lambda: figures()["nr_periods"] >= before["nr_periods"] + 10,
            SECONDS,
            "ten periods are over",
        )
        after = figures()
    periods = after["nr_periods"] - before["nr_periods"]
    # A period's end and the reading of it may be one period apart, on each of the processors.
    assert after["usage_usec"] - before["usage_usec"] <= 50_000 * (
        periods + 1 + (os.cpu_count() or 1)
    )


def test_one_write_kills_daemons_too(place: Delegated) -> None:
    """``cgroup.kill`` alone, without the keeper's own search for descendants."""
    run_id = secrets.token_hex(6)
    plan = build_plan(Limits(memory=64 * MIB), machine(), run_id)
    with started(plan, run_id, STAYING) as sandbox:
        group = Path(plan.cgroup.dirs[0])
        assert plan.cgroup.kill_files == (str(group / "cgroup.kill"),)
        wait_until(lambda: len(_sessions(group)) == 2, SECONDS, "the daemon has its own session")
        (group / "cgroup.kill").write_text("1")
        wait_until(
            lambda: "populated 0" in (group / "cgroup.events").read_text(),
            SECONDS,
            "nobody is left",
        )
        assert signal_of(ended(sandbox)) == signal.SIGKILL


def _sessions(group: Path) -> set[int]:
    found = set()
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(OSError):
            found.add(os.getsid(int(pid)))
    return found


def test_a_smaller_limit_above_is_named() -> None:
    with delegated(memory=96 * MIB) as outer, inside(outer):
        run_id = secrets.token_hex(6)
        plan = build_plan(Limits(memory=400 * MIB), machine(), run_id)
        with started(plan, run_id, HOG) as sandbox:
            assert sandbox.keeper_pid is not None
            meter = Meter(plan, sandbox.keeper_pid)
            exit_ = ended(sandbox)
            bound = meter.bound_hit()
    assert signal_of(exit_) == signal.SIGKILL
    assert exit_.counters.oom_kills == 1 and exit_.counters.limit_hits == 0
    assert elsewhere(exit_.counters, 400 * MIB) is True
    assert bound is not None and (bound.group, bound.limit) == (outer.group, 96 * MIB)


@contextlib.contextmanager
def company_of(size: int) -> Iterator[int]:
    """A child of ours that holds so much memory, in whatever group we are."""
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(done[1])
        held = os.urandom(1 << 20) * (size >> 20)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(len(held) == 0)
    try:
        os.close(ready[1])
        assert os.read(ready[0], 1), "it holds its memory"
        yield pid
    finally:
        for fd in (ready[0], *done):
            os.close(fd)


def test_where_a_limit_above_runs_out_the_kernel_goes_and_not_who_tells_of_it() -> None:
    """What uses most would be killed: a runner of many notebooks rather than one of them."""
    with delegated(memory=300 * MIB) as outer, inside(outer), company_of(160 * MIB) as large:
        run_id = secrets.token_hex(6)
        plan = build_plan(Limits(memory=400 * MIB), machine(), run_id)
        with started(plan, run_id, HOG) as sandbox:
            exit_ = ended(sandbox)
            assert os.waitpid(large, os.WNOHANG) == (0, 0)
    assert os.waitpid(large, 0)[1] == 0
    assert signal_of(exit_) == signal.SIGKILL
    assert exit_.counters.oom_kills == 1 and elsewhere(exit_.counters, 400 * MIB) is True


# --- delegation -------------------------------------------------------------------------------------------------


def test_a_group_with_processes_cannot_hand_on() -> None:
    """The rule that all of this is built around, and what we make of it: our own processes step down."""
    with bare() as group, inside(Delegated(group=group, leaf=group)):
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            (group / "cgroup.subtree_control").write_text("+memory")
        found = machine()
        assert (found.v2, found.v2_needs_leaf) == (group, True)
        assert found.v2_controllers == {"memory", "pids", "cpu"}
        run_id = secrets.token_hex(6)
        plan = build_plan(Limits(memory=64 * MIB, cpus=0.5), found, run_id)
        with started(plan, run_id, HOG) as sandbox:
            assert signal_of(ended(sandbox)) == signal.SIGKILL
        assert (group / "cgroup.procs").read_text() == ""
        assert str(os.getpid()) in (group / "safe-exec" / "cgroup.procs").read_text().split()
        # From there on it is a group above that hands on, as any other.
        again = machine()
        assert (again.v2, again.v2_needs_leaf) == (group, False)


@contextlib.contextmanager
def company() -> Iterator[None]:
    """A process beside us, in whatever group we are, that is no child of ours: its parent has ended."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)


def test_a_group_with_others_in_it_is_not_divided() -> None:
    """There is a process in it that is not ours: nothing of it is moved, and what is found lies above."""
    with bare() as group, inside(Delegated(group=group, leaf=group)), company():
        found = machine()
        assert not found.v2_needs_leaf and found.v2 != group


def test_only_what_is_handed_on_is_promised() -> None:
    with delegated(controllers="+memory +pids") as place, inside(place):
        plan = build_plan(Limits(memory=MIB, cpus=1.0, processes=9), machine(), "id")
    assert plan.enforcement[LimitName.MEMORY].by is Mechanism.CGROUP_V2
    assert plan.enforcement[LimitName.CPUS].by is Mechanism.NONE


def test_no_bound_is_left() -> None:
    """Our own group has a limit and other processes, and only the one above hands on: that would be out of the limit."""
    with delegated() as place, inside(place):
        (place.leaf / "memory.max").write_text(str(500 * MIB))
        with company():
            found = machine()
    assert found.v2 is None
    assert str(place.leaf) in found.v2_why_not and "memory.max" in found.v2_why_not
