"""The permission to read a dying kernel under Yama, whose calls are faked: few machines have it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from safe_exec.keeper import keeper


class FakeYama:
    """The relations of Yama's ptrace_scope 1: a tracee names the root of those who may trace it."""

    def __init__(self) -> None:
        self.tracers: dict[int, int] = {}

    def prctl(self, option: int, pid: int) -> int:
        """Take PR_SET_PTRACER as prctl(2) does, and nothing else."""
        assert option == int.from_bytes(b"Yama", "big")
        self.tracers[os.getpid()] = pid
        return 0

    def allows(self, ancestors: list[int], tracee: int) -> bool:
        """Whether a process with these ancestors may trace."""
        return self.tracers.get(tracee) in ancestors


def test_a_descendant_of_the_runner_may_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    yama, runner, inspector = FakeYama(), 4242, 4300
    assert not yama.allows([inspector, runner, 1], os.getpid())
    libraries: Any = SimpleNamespace(CDLL=lambda _name: yama)
    monkeypatch.setattr(keeper, "ctypes", libraries)
    keeper._allow_tracer(runner)
    assert yama.allows([inspector, runner, 1], os.getpid())
    assert not yama.allows([5000, 1], os.getpid())
