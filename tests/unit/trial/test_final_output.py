"""The last output of a kernel that died: bursts at the keeper, and what the runner makes of them."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from safe_exec.keeper.crash_output import BURST_BYTES, BURSTS, CrashOutput
from safe_exec.model.evidence import Channel, OutputBurst
from safe_exec.trial.final_output import final_output


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("safe_exec.keeper.crash_output.time.monotonic", clock.monotonic)
    return clock


def test_the_keeper_notes_when_each_burst_came(clock: Clock) -> None:
    output = CrashOutput(lambda _text: None, lambda _thread: None)
    stderr, fault = output.open(None)
    fault.close()
    for moment, data in ((100.0, b"one "), (100.05, b"burst\n"), (103.0, b"another\n")):
        clock.now = moment
        os.write(stderr, data)
        assert output.read_stderr()
    assert output.bursts == [(100.05, b"one burst\n"), (103.0, b"another\n")]
    for moment in range(200, 230):
        clock.now = float(moment)
        os.write(stderr, b"x" * 20_000)
        assert output.read_stderr()
    os.close(stderr)
    output.read_rest()
    assert output.sources() == ()
    assert len(output.bursts) == BURSTS
    assert {len(data) for _, data in output.bursts} == {BURST_BYTES}


def session(**facts: Any) -> Any:
    ended = SimpleNamespace(
        at=10.5, fault_at=facts.get("fault_at", 10.0), bursts=facts.get("bursts", ())
    )
    accounts = SimpleNamespace(texts=facts.get("texts", ()))
    client = SimpleNamespace(residue=facts.get("residue", {}), accounts=accounts)
    return SimpleNamespace(ended=ended if facts.get("dead", True) else None, client=client)


def burst(channel: Channel, text: str, age: float) -> OutputBurst:
    return OutputBurst(channel=channel, text=text, age=age)


D = Channel.DESCRIPTOR
CASES = {
    "alive": ({"dead": False, "bursts": [(9.0, "x")]}, ()),
    "from-the-report-on": ({"bursts": [(9.0, "x")]}, (burst(D, "x", 1.0),)),
    "without-a-report": ({"bursts": [(9.5, "x")], "fault_at": None}, (burst(D, "x", 1.0),)),
    "the-rest-was-in-the-pipe": (
        {"bursts": [(5.0, "old"), (9.9, "why ")], "residue": {"stderr": "not"}},
        (burst(D, "old", 5.0), burst(D, "why not", 0.0)),
    ),
    "all-was-in-the-pipe": (
        {"bursts": [(5.0, "old")], "residue": {"stdout": "new"}},
        (burst(D, "old", 5.0), burst(D, "new", 0.0)),
    ),
    "the-cells-text": (
        {"texts": [(8.0, "stderr", "a"), (11.0, "stdout", "b"), (9.0, "other", "c")]},
        (burst(Channel.STDERR, "a", 2.0), burst(Channel.STDOUT, "b", 0.0)),
    ),
}


@pytest.mark.parametrize(("facts", "expected"), CASES.values(), ids=CASES)
def test_bursts_with_their_age(facts: dict[str, Any], expected: tuple[OutputBurst, ...]) -> None:
    assert final_output(session(**facts)) == expected
