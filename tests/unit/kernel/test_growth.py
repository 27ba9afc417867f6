"""The work for a message does not grow with the number of messages. Counts calls, not seconds."""

from __future__ import annotations

import cProfile
import os
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safe_exec.kernel.agent_facts import AgentFacts
from safe_exec.kernel.zmtp import MessageReader, encode
from safe_exec.sandbox.usage.meter import CounterFile

FEW, MANY = 200, 2000
# Of the calls for ten times the input, beyond ten times the calls.
SLACK = 1.05


def _calls(work: Callable[[int], object], count: int) -> int:
    profile = cProfile.Profile()
    profile.runcall(work, count)
    stats: Any = pstats.Stats(profile)
    return int(stats.total_calls)


def _receive(count: int) -> None:
    reader = MessageReader(largest=None)
    reader.add(encode([b"topic", b"<IDS|MSG>", b"s" * 64, b"h" * 300, b"{}"]) * count)
    while reader.parse():
        while reader.take() is not None:
            pass


class _Requests(dict[str, int]):
    """Stands in for a client that has sent every request."""

    def __contains__(self, key: object) -> bool:
        return True

    cells_by_request = property(lambda self: self)


class _Request(str):
    """A request's id that counts how often it is compared."""

    __slots__ = ()
    comparisons = 0

    def __eq__(self, other: object) -> bool:
        _Request.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_calls_for_messages_grow_with_their_number_only() -> None:
    assert _calls(_receive, MANY) <= SLACK * MANY / FEW * _calls(_receive, FEW)


def test_a_cell_is_found_without_a_look_at_all_others() -> None:
    facts = AgentFacts()
    facts.client = _Requests()  # type: ignore[assignment]
    _Request.comparisons = 0
    for number in range(1, MANY + 1):
        facts._note_cell(number, _Request(f"request-{number}"))
    assert facts.number_of(_Request(f"request-{MANY}")) == MANY
    assert _Request.comparisons <= MANY


def test_a_counter_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.stat"
    file = CounterFile(path)
    assert file.read() is None
    path.write_text("anon 1")
    opened: list[object] = []
    usual = os.open

    def note(*arguments: Any) -> int:
        opened.append(arguments)
        return usual(*arguments)

    monkeypatch.setattr(os, "open", note)
    assert [file.read() for _ in range(3)] == [b"anon 1"] * 3
    path.write_text("anon 2")
    assert file.read() == b"anon 2"
    assert len(opened) == 1
    file.close()
