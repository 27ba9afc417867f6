"""The facts of what isolation takes away, from a plan and the paths around a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from safe_exec.model.evidence import IsolationFacts
from safe_exec.model.limits import FolderUse, Isolation, Limits, Mechanism
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.isolation_facts import KernelPaths, facts_of
from safe_exec.sandbox.planner import build_plan

BUBBLEWRAP = HostCapabilities(uid=1000, bubblewrap="/usr/bin/bwrap", bubblewrap_why_not="")
LANDLOCK = HostCapabilities(uid=1000, landlock=7)
PATHS = KernelPaths(
    folder=Path("/home/me/project"),
    runtime=Path("/tmp/run"),
    homes=(Path("/home/me"), Path("/root")),
    readable=(Path("/home/me/venv"), Path("/usr/lib/python3")),
    kernel_home="/home/me",
)
CI = Isolation(hide_home=True, read_only_system=True)


def facts(machine: HostCapabilities, isolation: Isolation, **limits: Any) -> IsolationFacts:
    return facts_of(build_plan(Limits(**limits), machine, "id", isolation), PATHS)


def test_bubblewrap_has_a_tmp_a_shm_and_a_home_that_go_with_the_run() -> None:
    assert facts(BUBBLEWRAP, CI) == IsolationFacts(
        by=Mechanism.BUBBLEWRAP,
        home="/home/me",
        folder="/home/me/project",
        hidden_homes=("/home/me", "/root"),
        readable=("/home/me/venv",),
        writable=("/home/me/project",),
        discarded=("/tmp", "/dev/shm", "/home/me"),
        read_only=True,
    )


def test_landlock_leaves_tmp_the_machines_own() -> None:
    seen = facts(LANDLOCK, CI)
    assert seen.by is Mechanism.LANDLOCK
    assert seen.writable == ("/home/me/project", "/tmp", "/dev")
    assert seen.discarded == ("/tmp/run",)


def test_a_wall_that_nothing_holds_takes_nothing_away() -> None:
    seen = facts(HostCapabilities(uid=1000), replace(CI, network=False, hide=("/srv",)))
    assert seen == IsolationFacts(
        home="/home/me", folder="/home/me/project", writable=("/home/me/project",)
    )


@pytest.mark.parametrize(
    ("isolation", "disk", "is_kept"),
    [
        (Isolation(), None, True),
        (Isolation(), 5, True),
        (Isolation(write_back=False), 5, False),
        (Isolation(write_back=False), None, True),
        (Isolation(folder=FolderUse.COPY), None, False),
        (Isolation(folder=FolderUse.COPY), 5, False),
    ],
)
def test_files_in_the_folder_are_kept_or_discarded(
    isolation: Isolation, disk: int | None, *, is_kept: bool
) -> None:
    seen = facts(BUBBLEWRAP, isolation, disk=disk)
    assert ("/home/me/project" in seen.writable, "/home/me/project" in seen.discarded) == (
        is_kept,
        not is_kept,
    )


def test_a_folder_that_is_only_read_is_neither() -> None:
    seen = facts(BUBBLEWRAP, Isolation(folder=FolderUse.READ))
    assert "/home/me/project" not in (*seen.writable, *seen.discarded)


@pytest.mark.parametrize("machine", [BUBBLEWRAP, LANDLOCK])
def test_other_hosts(machine: HostCapabilities) -> None:
    assert facts(machine, Isolation(network=False)).network is False
    assert facts(machine, CI).network is True
