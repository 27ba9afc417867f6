"""The event log: whole lines at once, a checkpoint at the end of each cell, and never in the way of the run."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safe_exec.errors import OutputPathError
from safe_exec.model import events
from safe_exec.model.events import (
    CellFinished,
    CellStarted,
    Event,
    KernelReady,
    RunFinished,
    SandboxBuilt,
    SearchFinished,
    SearchStarted,
    SearchTrialFinished,
    SearchTrialStarted,
    UsageSampled,
)
from safe_exec.model.limits import Enforcement, LimitName, Mechanism
from safe_exec.model.verdict import CellStatus, Status
from safe_exec.reports.event_log import EventLog, line_of

FINISHED = CellFinished(
    time=2.0,
    index=3,
    code_index=1,
    status=CellStatus.KILLED,
    seconds=1.5,
    cpu_seconds=None,
    memory_peak=1 << 30,
    memory_kept=None,
)
TRIAL = SearchTrialFinished(time=4.6, number=1, answer="fail", seconds=1.5, left=2, best=(1, 2))


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_event_is_a_line_as_soon_as_it_happens(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log(KernelReady(time=0.25))
        assert lines_of(path) == [{"event": "kernel_ready", "time": 0.25}]
        log(CellStarted(time=0.5, index=3, code_index=1, source="a = 1\nb = 'ü'"))
    assert lines_of(path)[1] == {
        "event": "cell_started",
        "time": 0.5,
        "index": 3,
        "code_index": 1,
        "source": "a = 1\nb = 'ü'",
    }


def test_words_and_nested_types_are_plain() -> None:
    held = {LimitName.MEMORY: Enforcement(by=Mechanism.CGROUP_V2, hard=True)}
    assert json.loads(line_of(SandboxBuilt(time=0.1, enforcement=held)))["enforcement"] == {
        "memory": {"by": "cgroup-v2", "hard": True, "note": ""}
    }
    assert json.loads(line_of(FINISHED))["status"] == "killed"


def test_a_search_is_four_kinds_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log(SearchStarted(time=3.0, cells=7, budget=60.0))
        log(SearchTrialStarted(time=3.1, number=1, cells=(1, 2)))
        log(TRIAL)
        log(SearchFinished(time=5.0, cells=(1, 2), minimal=True))
    assert lines_of(path) == [
        {"event": "search_started", "time": 3.0, "cells": 7, "budget": 60.0},
        {"event": "search_trial_started", "time": 3.1, "number": 1, "cells": [1, 2]},
        {
            "event": "search_trial_finished",
            "time": 4.6,
            "number": 1,
            "answer": "fail",
            "seconds": 1.5,
            "left": 2,
            "best": [1, 2],
        },
        {"event": "search_finished", "time": 5.0, "cells": [1, 2], "minimal": True},
    ]


def test_a_budget_without_an_end_is_null() -> None:
    assert json.loads(line_of(SearchStarted(time=3.0, cells=7, budget=math.inf)))["budget"] is None


def test_a_line_is_one_line_of_utf8_whatever_is_in_it() -> None:
    line = line_of(CellStarted(time=math.nan, index=0, code_index=0, source="\n\u2028\ud800\x1b\r"))
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert json.loads(line)["time"] is None
    assert b"NaN" not in line


def test_every_event_has_a_name_of_its_own() -> None:
    kinds = [
        kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)
    ]
    found = {kind.__struct_config__.tag for kind in kinds}
    assert len(found) == len(kinds)
    assert {"kernel_ended", "usage_sampled", "limit_near"} <= found
    assert all("event" not in set(kind.__struct_fields__) for kind in kinds)


def test_a_checkpoint_at_the_end_of_each_cell_and_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with EventLog(tmp_path / "events.jsonl") as log:
        log(UsageSampled(time=1.0, index=3, memory=1, cpu_seconds=None, processes=None))
        assert len(synced) == 0
        log(FINISHED)
        log(TRIAL)
        log(RunFinished(time=5.0, status=Status.KERNEL_DIED, cause="out_of_memory"))
    assert len(synced) == 3


def test_an_older_log_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("old\n" * 100)
    with EventLog(path) as log:
        log(KernelReady(time=0.25))
    assert len(lines_of(path)) == 1


def test_never_through_a_symbolic_link(tmp_path: Path) -> None:
    target, link = tmp_path / "precious", tmp_path / "link"
    target.write_text("precious")
    link.symlink_to(target)
    with pytest.raises(OutputPathError, match="is a symbolic link"), EventLog(link):
        pass
    assert target.read_text() == "precious"


@pytest.mark.parametrize("name", ["missing/events.jsonl", ".", "a\0b", "missing/new\nline"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(OutputPathError, match="cannot be written") as refused,
        EventLog(tmp_path / name),
    ):
        pass
    assert len(str(refused.value).splitlines()) == 1


def test_a_full_disk_ends_the_log_and_not_the_run() -> None:
    with EventLog("/dev/full") as log:
        log(KernelReady(time=0.25))
        log(FINISHED)
    assert log.error is not None and log.error.errno == errno.ENOSPC


def test_outside_of_its_context_it_does_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log(FINISHED)
    assert not log.path.exists()


def test_a_pipe_will_do(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with EventLog(path) as log:
            log(FINISHED)
        assert log.error is None
        assert json.loads(os.read(reader, 4096))["event"] == "cell_finished"
    finally:
        os.close(reader)


ENDLESS = """
import sys
from safe_exec.model.events import CellStarted
from safe_exec.reports.event_log import EventLog
with EventLog(sys.argv[1]) as log:
    while True:
        log(CellStarted(time=0.5, index=1, code_index=1, source="x" * 9000))
"""


def test_a_killed_runner_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(path)]) as runner:
        deadline = time.monotonic() + 10
        while not (path.exists() and path.stat().st_size > 500_000) and time.monotonic() < deadline:
            time.sleep(0.002)
        runner.send_signal(signal.SIGKILL)
    *whole, _ = path.read_bytes().split(b"\n")
    assert len(whole) > 50
    assert all(json.loads(line)["event"] == "cell_started" for line in whole)


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputPathError, match="cannot be written"), EventLog(tmp_path / "pipe"):
        pass
