"""Whatever ends the run, the tree is dead and everything removed: SIGKILL to the runner at random moments, to runner and keeper, Ctrl-C,
SIGTERM alone and together with the kernel's, a failure of safe-exec itself."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import safe_exec
from safe_exec.sandbox import keeper_process
from safe_exec.sandbox.host.capabilities import detect
from safe_exec.trial.cell_loop import CellLoop
from tests.support import (
    EXECUTABLE,
    MARK,
    groups_of,
    make_notebook,
    marked_processes,
    run_notebook,
    wait_until,
)

BUSY = (
    "print('first')",
    # Children, a daemon that forks twice into a session of its own, threads: what has to die with the kernel.
    """
import os, subprocess, sys, threading, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("started")
""".strip(),
    "print('running', flush=True)\nwhile True:\n    time.sleep(0.01)",
    "print('never')",
)


class Run:
    """A run in the background, with a runtime directory of its own so that what it leaves can be seen."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        cells: tuple[str, ...] = BUSY,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.mark = secrets.token_hex(8)
        self.runtime = folder / f"rt-{self.mark[:6]}"
        self.runtime.mkdir(mode=0o700)
        self.path = make_notebook(folder / f"nb-{self.mark[:6]}.ipynb", *cells)
        self.events = folder / f"ev-{self.mark[:6]}.jsonl"
        env = {**os.environ, MARK: self.mark, "XDG_RUNTIME_DIR": str(self.runtime)}
        argv = [
            *prefix,
            str(EXECUTABLE),
            "run",
            str(self.path),
            "--events",
            str(self.events),
            *options,
        ]
        self.process = subprocess.Popen(
            argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def log(self) -> list[dict[str, Any]]:
        """The whole lines of the event log so far."""
        text = self.events.read_text() if self.events.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def seen(self, event: str, **fields: object) -> bool:
        """Whether an event is in the log."""
        return any(
            e["event"] == event and all(e.get(k) == v for k, v in fields.items())
            for e in self.log()
        )

    def run_id(self) -> str | None:
        """The run's name, once it has one."""
        return next((e["run_id"] for e in self.log() if e["event"] == "run_started"), None)

    def groups(self) -> list[Path]:
        """Control groups of this run that stand."""
        run_id = self.run_id()
        return groups_of(run_id) if run_id else []

    def left(self) -> list[str]:
        """Everything of this run that still stands."""
        files = [str(p) for p in self.runtime.rglob("*") if p != self.runtime / "safe-exec"]
        return [*map(str, marked_processes(self.mark)), *map(str, self.groups()), *files]

    def documents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Verdict and annotated notebook."""
        verdict = json.loads(self.path.with_suffix(".verdict.json").read_text())
        notebook = json.loads(self.path.with_suffix(".out.ipynb").read_text())
        return verdict, notebook


def texts(notebook: dict[str, Any]) -> str:
    """All stream text of a notebook."""
    return "".join(
        "".join(o.get("text", "")) for c in notebook["cells"] for o in c.get("outputs", [])
    )


@pytest.mark.kills
def test_sigkill_to_the_runner_at_random_moments(tmp_path: Path) -> None:
    seed = int(os.environ.get("SAFE_EXEC_SEED", secrets.randbelow(10**6)))
    print(f"SAFE_EXEC_SEED={seed}")  # noqa: T201 - to repeat a failure
    chance = random.Random(seed)
    for _ in range(24):
        run = Run(tmp_path)
        # Half of the moments lie within the start, where the sandbox is half built.
        moment = chance.choice([chance.uniform(0, 0.8), chance.uniform(0.8, 2.0)])
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(moment)
        run.process.kill()
        run.process.wait()
        wait_until(
            lambda run=run: run.left() == [],  # type: ignore[misc]
            1.0,
            f"everything gone after {moment:.3f} s: {run.left()} (seed {seed})",
        )
        run.process.communicate()


@pytest.mark.kills
def test_the_event_log_holds_the_last_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    wait_until(lambda: run.seen("cell_started", index=2), 30, "third cell started")
    run.process.kill()
    run.process.communicate()
    assert run.seen("cell_finished", index=1)
    wait_until(lambda: run.left() == [], 1.0, "everything gone")


@pytest.mark.kills
def test_runner_and_keeper_killed_together_are_cleaned_up_by_the_next_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    wait_until(lambda: run.seen("cell_started", index=2), 30, "third cell started")
    keeper = keeper_of(run)
    os.kill(keeper, signal.SIGKILL)
    run.process.kill()
    run.process.communicate()
    env = {"XDG_RUNTIME_DIR": str(run.runtime)}
    run_notebook(make_notebook(tmp_path / "next.ipynb", "1"), env=env)
    wait_until(lambda: run.left() == [], 2.0, f"the next run cleaned up: {run.left()}")


def keeper_of(run: Run) -> int:
    """The process id of a run's keeper, from its note."""
    (note,) = run.runtime.glob("safe-exec/*.json")
    return int(json.loads(note.read_text())["keeper"])


@pytest.mark.kills
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_runner_alone(tmp_path: Path, number: signal.Signals) -> None:
    run = Run(tmp_path)
    wait_until(lambda: run.seen("output_received", index=2), 30, "third cell at work")
    run.process.send_signal(number)
    run.process.communicate(timeout=30)
    assert run.process.returncode == 130
    check_cancelled(run, number)


@pytest.mark.kills
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_caller_ignores_is_ignored(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As under nohup, and in the background of a script."""
    go_on = tmp_path / "go-on"
    waits = f"import os, time\nprint('running', flush=True)\nwhile not os.path.exists({str(go_on)!r}):\n    time.sleep(0.01)"
    name = number.name.removeprefix("SIG")
    run = Run(tmp_path, cells=(waits,), prefix=("sh", "-c", f'trap "" {name}; exec "$@"', "sh"))
    wait_until(lambda: run.seen("output_received", index=0), 30, "the cell is at work")
    run.process.send_signal(number)
    go_on.touch()
    run.process.communicate(timeout=30)
    assert (run.process.returncode, run.documents()[0]["status"]) == (0, "passed")


@pytest.mark.kills
def test_sigterm_to_runner_and_kernel_together(tmp_path: Path) -> None:
    run = Run(tmp_path)
    wait_until(lambda: run.seen("output_received", index=2), 30, "third cell at work")
    kernel = next(e["pid"] for e in run.log() if e["event"] == "kernel_started")
    os.kill(kernel, signal.SIGTERM)
    os.kill(keeper_of(run), signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)
    run.process.communicate(timeout=30)
    assert run.process.returncode == 130
    check_cancelled(run, signal.SIGTERM)


def check_cancelled(run: Run, number: signal.Signals) -> None:
    verdict, notebook = run.documents()
    assert verdict["status"] == "cancelled"
    assert any(number.name in warning for warning in verdict["warnings"])
    assert [cell["status"] for cell in verdict["cells"]] == [
        "passed",
        "passed",
        "killed",
        "not_run",
    ]
    assert "started" in texts(notebook)
    assert "running" in texts(notebook)
    assert run.left() == []


@pytest.mark.kills
def test_a_signal_while_the_kernel_starts(tmp_path: Path) -> None:
    run = Run(tmp_path)
    wait_until(lambda: run.seen("sandbox_built"), 30, "the sandbox was built")
    run.process.send_signal(signal.SIGTERM)
    run.process.communicate(timeout=30)
    assert run.process.returncode == 130
    verdict, _ = run.documents()
    assert verdict["status"] == "cancelled"
    assert run.left() == []


@pytest.mark.kills
def test_ctrl_c_on_a_terminal_reaches_the_runner_only_and_all_is_written(tmp_path: Path) -> None:
    """The terminal sends SIGINT to the whole foreground group; keeper and kernel are in sessions of their own."""
    run = Run(tmp_path)
    wait_until(lambda: run.seen("cell_started", index=2), 30, "third cell started")
    kernel = next(e["pid"] for e in run.log() if e["event"] == "kernel_started")
    assert os.getsid(kernel) != os.getsid(run.process.pid)
    assert os.getsid(keeper_of(run)) != os.getsid(run.process.pid)
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGINT)
    run.process.communicate(timeout=30)
    assert run.process.returncode == 130
    assert run.documents()[0]["status"] == "cancelled"


@pytest.mark.kills
def test_a_sandbox_that_cannot_be_built_is_told_and_touches_nothing_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = secrets.token_hex(6)
    foreign = detect().v1["pids"] / f"safe-exec-{run_id}"
    foreign.mkdir()
    try:
        monkeypatch.setattr(keeper_process, "new_run_id", lambda: run_id)
        verdict = safe_exec.run(make_notebook(tmp_path / "nb.ipynb", "1"))
        assert verdict.status == "internal_error"
        assert verdict.cause is not None
        assert str(foreign) in verdict.cause.summary
        assert groups_of(run_id) == [foreign]
    finally:
        foreign.rmdir()


@pytest.mark.kills
def test_a_failure_of_our_own_half_way_is_written_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", "print('first')", "print('second')", "print('third')"
    )

    reading = CellLoop._reading_at_end

    def fail(loop: CellLoop, index: int) -> dict[str, Any]:
        if index == 1:
            raise OSError(5, "made up for this test")
        return reading(loop, index)

    # A fault in the middle of our own bookkeeping, after the second cell has run.
    monkeypatch.setattr(CellLoop, "_reading_at_end", fail)
    verdict = safe_exec.run(path)
    assert verdict.status == "internal_error"
    assert verdict.exit_code == 7
    assert verdict.cause is not None
    assert "made up for this test" in verdict.cause.summary
    written = json.loads((tmp_path / "nb.out.ipynb").read_text())
    assert "second" in texts(written)
    assert "third" not in texts(written)
    assert groups_of(verdict.run_id) == []
