"""Counters from the texts of control groups, of either version, as real ones read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.sandbox.plan import CgroupPlan, SpawnPlan
from safe_exec.sandbox.usage.meter import Bound, Counters, Meter, Reading, parse_counters

V1 = {
    "/sys/fs/cgroup/memory/s/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "/sys/fs/cgroup/memory/s/memory.max_usage_in_bytes": "104857600\n",
    "/sys/fs/cgroup/pids/s/pids.events": "max 3\n",
    "/sys/fs/cgroup/pids/s/pids.peak": "17\n",
    "/sys/fs/cgroup/cpuacct/s/cpuacct.usage": "2500000000\n",
}
V2 = {
    "/sys/fs/cgroup/s/memory.events": "low 0\nhigh 0\nmax 31\noom 2\noom_kill 2\noom_group_kill 0\n",
    "/sys/fs/cgroup/s/memory.peak": "104857600\n",
    "/sys/fs/cgroup/s/pids.events": "max 3\n",
    "/sys/fs/cgroup/s/pids.peak": "17\n",
    "/sys/fs/cgroup/s/cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\nnr_periods 0\n",
}
ALL = Counters(
    oom_kills=2, fork_refusals=3, memory_peak_raw=104857600, tasks_peak=17, cpu_seconds=2.5
)
NONE = Counters()


def test_counters_of_a_kernel_in_the_groups_of_an_earlier_one() -> None:
    earlier = Counters(
        oom_kills=1, fork_refusals=1, memory_peak_raw=100, tasks_peak=17, cpu_seconds=2.0
    )
    assert ALL.since(earlier) == Counters(
        oom_kills=1, fork_refusals=2, memory_peak_raw=104857600, cpu_seconds=0.5
    )
    assert ALL.since(NONE) == ALL
    # Nothing tells whether the kernel reached that peak too.
    assert ALL.since(ALL) == Counters(oom_kills=0, fork_refusals=0, cpu_seconds=0.0)
    # A kill for memory tells that it reached the limit again.
    again = Counters(oom_kills=3, memory_peak_raw=104857600)
    assert again.since(ALL).memory_peak_raw == 104857600


@pytest.mark.parametrize(
    ("texts", "counters"),
    [
        (V1, ALL),
        (V2, ALL),
        ({}, NONE),
        (dict.fromkeys(V1), NONE),
        (dict.fromkeys(V2), NONE),
        (dict.fromkeys(V2, ""), NONE),
        (dict.fromkeys(V1, "\n"), NONE),
        (dict.fromkeys(V2, "max\n"), NONE),
        ({"/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, NONE),  # before Linux 4.13
        ({"/a/memory.events": "oom_kill 0\n"}, Counters(oom_kills=0)),
        (
            {"/a/cpu.stat": "nr_periods 0\nnr_throttled 0\n"},
            NONE,
        ),  # the cpu controller of version 1
        ({"/a/cpuacct.usage": "0\n"}, Counters(cpu_seconds=0.0)),
        ({"/a/memory.peak": "0\n"}, Counters(memory_peak_raw=0)),
        (
            {"/a/memory.events": "oom_kill 1\n", "/a/memory.events.local": "oom 0\noom_kill 1\n"},
            Counters(oom_kills=1, limit_hits=0),
        ),
    ],
)
def test_counters(texts: Mapping[str, str | None], counters: Counters) -> None:
    assert parse_counters(texts) == counters


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*V1, *V2]), st.none() | st.text(max_size=30)))
def test_any_text_is_a_counter_or_none(texts: dict[str, str | None]) -> None:
    found = parse_counters(texts)
    assert found.cpu_seconds is None or isinstance(found.cpu_seconds, float)


def plan(*counter_files: Path) -> SpawnPlan:
    work = CgroupPlan(counter_files=tuple(map(str, counter_files)))
    return SpawnPlan(
        cgroup=work, rlimits=(), open_files_soft=None, watch=frozenset(), enforcement={}
    )


@pytest.mark.parametrize(
    ("files", "stat", "memory"),
    [
        (("memory.events", "cpu.stat"), "anon 100\nfile 900\nkernel 7\nshmem 20\n", 120),
        (
            ("memory.oom_control", "cpuacct.usage"),
            "cache 900\nrss 1\nshmem 2\ntotal_rss 100\ntotal_shmem 20\n",
            120,
        ),
    ],
    ids=["v2", "v1"],
)
def test_memory_is_what_cannot_be_reclaimed(
    tmp_path: Path, files: tuple[str, str], stat: str, memory: int
) -> None:
    (tmp_path / "memory.stat").write_text(stat)
    (tmp_path / "pids.current").write_text("4\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 1500000\n")
    (tmp_path / "cpuacct.usage").write_text("1500000000\n")
    meter = Meter(plan(*(tmp_path / name for name in (*files, "pids.events"))), keeper_pid=1)
    assert meter.read() == Reading(memory=memory, cpu_seconds=1.5, tasks=4)


def test_a_group_that_is_gone_reads_as_not_measured(tmp_path: Path) -> None:
    meter = Meter(
        plan(tmp_path / "memory.events", tmp_path / "cpu.stat", tmp_path / "pids.events"),
        keeper_pid=1,
    )
    assert (meter.read(), meter.counters()) == (Reading(), Counters())


def test_the_bound_above_that_was_hit_is_the_nearest_whose_count_rose(tmp_path: Path) -> None:
    """As in the unified tree: the groups above have limits or ``max``, and its root has no such file."""
    group = tmp_path / "container" / "session" / "leaf"
    group.mkdir(parents=True)

    def count(where: Path, limit: str, hits: int) -> None:
        (where / "memory.max").write_text(f"{limit}\n")
        (where / "memory.events.local").write_text(f"max 9\noom {hits}\noom_kill 0\n")

    for where, limit in ((group, "4096"), (group.parent, "max"), (group.parent.parent, "1024")):
        count(where, limit, 3)
    for name in ("memory.events", "cpu.stat", "pids.events"):
        (group / name).write_text("")
    meter = Meter(
        plan(*(group / name for name in ("memory.events", "cpu.stat", "pids.events"))), keeper_pid=1
    )
    assert meter.bound_hit() is None
    count(group, "4096", 4)
    assert meter.bound_hit() is None, "its own limit is no bound above"
    count(group.parent.parent, "1024", 4)
    assert meter.bound_hit() == Bound(group=group.parent.parent, limit=1024, hits=4)


def test_the_group_above_that_allows_fewer_tasks(tmp_path: Path) -> None:
    group = tmp_path / "container" / "session" / "leaf"
    group.mkdir(parents=True)
    for where, most in ((group, "60"), (group.parent, "max"), (group.parent.parent, "40")):
        (where / "pids.max").write_text(f"{most}\n")
    meter = Meter(plan(group / "pids.events"), keeper_pid=1)
    assert meter.tasks_bound(60) == meter.tasks_bound(None) == (group.parent.parent, 40)
    assert meter.tasks_bound(40) is None, "which of the two is full first is open"
    assert Meter(plan(group / "cpu.stat"), keeper_pid=1).tasks_bound(60) is None
