"""Batches of real notebooks: killed at random moments and resumed, one and two at a time, signals, retries, what is left out, what stays."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jsonschema import Draft202012Validator

from safe_exec.reports.batch.summary_json import load_schema as load_summary_schema
from safe_exec.reports.verdict_json import load_schema
from tests.cases.catalogue import read_all
from tests.cases.test_cases import agrees
from tests.support import (
    EXECUTABLE,
    MARK,
    make_notebook,
    marked_processes,
    private_directory,
    wait_until,
)

NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Done:
    """A batch that came to its end."""

    code: int
    stdout: str
    stderr: str
    summary: dict[str, Any]

    def row(self, path: str) -> dict[str, Any]:
        return next(row for row in self.summary["notebooks"] if row["path"] == path)

    def statuses(self) -> dict[str, str]:
        return {row["path"]: row["status"] for row in self.summary["notebooks"]}


class Place:
    """A folder to run batches in, with a cache and a runtime directory of its own."""

    def __init__(self, folder: Path, own: Path) -> None:
        self.folder, self.own = folder, own
        self.out = folder / "out"
        self.mark = secrets.token_hex(8)
        (own / "runtime").mkdir(mode=0o700)
        given = {
            "XDG_CACHE_HOME": str(own / "cache"),
            "XDG_RUNTIME_DIR": str(own / "runtime"),
            MARK: self.mark,
        }
        # ipykernel does not watch descriptors 1 and 2 where it believes to be under test itself.
        self.env = {
            key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"
        } | given

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        argv = [str(EXECUTABLE), "batch", "--out", "out", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(argv, cwd=self.folder, env=self.env, text=True, **pipes, **more)  # type: ignore[call-overload,no-any-return]

    def run(self, *arguments: str, listed: str | None = None) -> Done:
        process = self.start(*arguments, stdin=subprocess.PIPE)
        stdout, stderr = process.communicate(listed, timeout=280)
        return self.done(process.returncode, stdout, stderr)

    def done(self, code: int, stdout: str, stderr: str) -> Done:
        assert (self.out / "summary.json").exists(), f"{stdout}\n{stderr}"
        summary = json.loads((self.out / "summary.json").read_text())
        Draft202012Validator(load_summary_schema()).validate(summary)
        for row in summary["notebooks"]:
            self.check_documents(row)
        assert summary["exit_code"] == code, stderr
        last = stdout.splitlines()[-1]
        assert re.fullmatch(rf"batch: \d+ notebooks?: .* in \d+\.\d s; exit code {code}", last), (
            stdout
        )
        assert self.left() == []
        return Done(code=code, stdout=stdout, stderr=stderr, summary=summary)

    def check_documents(self, row: dict[str, Any]) -> None:
        if row["status"] in ("refused", "unchanged", "not_run"):
            assert row["verdict"] is row["notebook"] is row["repro"] is None, row
            return
        verdict = json.loads((self.out / row["verdict"]).read_text())
        Draft202012Validator(load_schema()).validate(verdict)
        nbformat.validate(nbformat.read(self.out / row["notebook"], as_version=4))
        assert (verdict["status"], verdict["exit_code"]) == (row["status"], row["exit_code"])
        if row["repro"] is not None:
            nbformat.validate(nbformat.read(self.out / row["repro"], as_version=4))

    def left(self) -> list[str]:
        """Processes that live on, and what stands in the runtime directory."""
        runtime = self.own / "runtime"
        files = [str(path) for path in runtime.rglob("*") if path != runtime / "safe-exec"]
        return [*map(str, marked_processes(self.mark)), *files]

    def journal(self) -> list[dict[str, Any]]:
        """The whole lines of the journal; the last one may have been cut short."""
        path = self.out / "journal.jsonl"
        found = []
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def finished(self) -> set[str]:
        return {event["path"] for event in self.journal() if event["event"] == "finished"}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with private_directory() as own:
        yield Place(tmp_path, own)


def counting(place: Path | str, *sources: str) -> tuple[str, ...]:
    """Cells that put on record, outside, that they ran to their end."""
    record = f"import os\nfd = os.open({str(place)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\nos.write(fd, b'x')\nos.close(fd)"
    return (*sources, record)


# --- killed and resumed -----------------------------------------------------------------------------------------


@pytest.mark.kills
@pytest.mark.timeout(600)
def test_a_batch_that_is_killed_again_and_again_loses_nothing_and_runs_nothing_twice(
    place: Place,
) -> None:
    seed = int(os.environ.get("SAFE_EXEC_SEED", secrets.randbelow(10**6)))
    print(f"SAFE_EXEC_SEED={seed}")  # noqa: T201 - to repeat a failure
    chance = random.Random(seed)
    counts = place.own / "counts"
    counts.mkdir()
    names = [f"{'abcd'[n % 4]}/n{n:02}.ipynb" for n in range(80)]
    for n, name in enumerate(names):
        (place.folder / name).parent.mkdir(exist_ok=True)
        last = ("raise ValueError('meant')",) if n % 10 == 0 else ()
        make_notebook(place.folder / name, *counting(counts / f"{n}", "print('begun')"), *last)
    runs: dict[str, int] = {}
    kills = 0
    while True:
        process = place.start(".", "-j", "2", "--resume", "--no-bisect")
        before = place.finished()
        wanted = 0 if kills % 4 == 0 else len(before) + chance.randint(2, 12)
        try:
            # Now in the start of the batch, now between two notebooks, now within one; however fast it runs.
            wait_until(
                lambda: process.poll() is not None or len(place.finished()) >= wanted,  # noqa: B023
                300,
                "some notebooks more",
            )
            stdout, stderr = process.communicate(
                timeout=chance.uniform(0, 0.3) if wanted else chance.uniform(0.2, 1.0)
            )
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            wait_until(
                lambda: place.left() == [], 10, f"everything gone: {place.left()} (seed {seed})"
            )
        else:
            break
        finally:
            for name in place.finished() - before:
                runs[name] = size_of(counts / str(names.index(name)))
        # What was finished before this call began was not run again in it.
        again = {name for name in before if size_of(counts / str(names.index(name))) != runs[name]}
        assert not again, f"seed {seed}"
    done = place.done(process.returncode, stdout, stderr)
    assert done.code == 1
    assert done.statuses() == {
        name: "cell_error" if n % 10 == 0 else "passed" for n, name in enumerate(names)
    }
    assert {name: size_of(counts / str(n)) for n, name in enumerate(names)} == runs, f"seed {seed}"
    assert kills >= 5, f"{kills} kills: too few to say anything (seed {seed})"
    finishes = Counter(event["path"] for event in place.journal() if event["event"] == "finished")
    assert set(finishes.values()) == {1} and len(finishes) == 80, f"seed {seed}"
    assert done.summary["resumed"]


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_second_batch_on_the_same_directory_is_refused_while_the_first_runs(place: Place) -> None:
    make_notebook(
        place.folder / "slow.ipynb", "print('begun', flush=True)", "import time; time.sleep(600)"
    )
    process = place.start("slow.ipynb")
    try:
        wait_until(
            lambda: any(event["event"] == "started" for event in place.journal()),
            60,
            "the first runs",
        )
        second = place.start("slow.ipynb", "--resume")
        _, stderr = second.communicate(timeout=60)
        assert second.returncode == 2 and "another batch writes there now" in stderr
    finally:
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert place.done(process.returncode, stdout, stderr).statuses() == {"slow.ipynb": "cancelled"}


def test_resume_runs_again_what_has_changed_and_what_lost_its_documents(place: Place) -> None:
    for name in ("same", "edited", "limits", "lost"):
        make_notebook(place.folder / f"{name}.ipynb", *counting(place.own / name))
    place.run(".", "--no-bisect")
    make_notebook(place.folder / "edited.ipynb", *counting(place.own / "edited", "1"))
    (place.folder / "safe-exec.yaml").write_text(
        "limits:\n  - path: limits.ipynb\n    cell_timeout: 99s\n"
    )
    (place.out / "lost.verdict.json").unlink()
    done = place.run(".", "--no-bisect", "--resume")
    assert done.code == 0 and done.summary["resumed"]
    assert {name: size_of(place.own / name) for name in ("same", "edited", "limits", "lost")} == {
        "same": 1,
        "edited": 2,
        "limits": 2,
        "lost": 2,
    }
    verdict = json.loads((place.out / "limits.verdict.json").read_text())
    assert verdict["limits"]["cell_timeout"] == 99


# --- one and two at a time --------------------------------------------------------------------------------------

MIXED = (
    "a4-bytes-join",
    "g5-abort",
    "l7-timer-signal",
    "m6-subprocess-oom",
    "d6-foreign-exit",
    "w3-bash-wait",
    "ctl4-sys-exit",
    "ctl14-top-level-await",
    "q4-getpass",
    "u1-no-such-kernel",
)
"""Cases of many kinds that take little time; their limits go into a project file."""


@pytest.mark.kills
@pytest.mark.timeout(600)
@pytest.mark.bed("bash")
def test_mixed_cases_get_the_same_verdicts_one_and_two_at_a_time(place: Place) -> None:
    cases = {case.id: case for case in read_all() if case.id in MIXED}
    assert set(cases) == set(MIXED)
    lines = ["limits:"]
    for name, case in cases.items():
        assert not case.files and not case.env
        (place.folder / name).mkdir()
        shutil.copy(case.notebook, place.folder / name / "case.ipynb")
        lines.append(f"  - path: {name}/case.ipynb")
        for option, value in zip(case.options[::2], case.options[1::2], strict=True):
            if option != "--kernel-fallback":  # no limit: given to the whole batch below
                lines.append(f"    {option.removeprefix('--').replace('-', '_')}: {value}")
    (place.folder / "safe-exec.yaml").write_text("\n".join(lines))
    found = {}
    for jobs in ("1", "2"):
        shutil.rmtree(
            place.own / "cache", ignore_errors=True
        )  # trials of the first search would answer the second
        # A machine that is busy must not end a search for want of time: what is compared is what it finds.
        done = place.run(".", "-j", jobs, "--bisect-budget", "5m", "--kernel-fallback", "never")
        found[jobs] = {row["path"]: answer(row, place.out) for row in done.summary["notebooks"]}
    assert found["1"] == found["2"]
    for name, case in cases.items():
        status, kind, crash, culprits = found["2"][f"{name}/case.ipynb"]
        expected = case.expected
        assert (
            agrees(expected["status"], status)
            and agrees(expected["cause"], kind)
            and agrees(expected["cell"], crash)
        ), name
        assert not expected["culprits"] or culprits in expected["culprits"], name


def answer(row: dict[str, Any], out: Path) -> tuple[str, str | None, int | None, list[int] | None]:
    """What must not depend on how many run at a time; in the summary as in the verdict."""
    verdict = json.loads((out / row["verdict"]).read_text())
    assert row["cause"] == (verdict["cause"] or {}).get("kind")
    return row["status"], row["cause"], row["crash_cell"], row["culprits"]


# --- signals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_in_order_and_everything_is_written(
    place: Place, number: signal.Signals
) -> None:
    for n in range(2):
        make_notebook(
            place.folder / f"slow{n}.ipynb",
            "print('kept')",
            f"open({str(place.own / f'at-{n}')!r}, 'w')\nwhile True: pass",
        )
    make_notebook(place.folder / "z.ipynb", "1")
    process = place.start("slow0.ipynb", "slow1.ipynb", "z.ipynb", "-j", "2")
    wait_until(
        lambda: (
            sum((place.own / f"at-{n}").exists() for n in range(2)) == 2
            or process.poll() is not None
        ),
        120,
        "both run",
    )
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    done = place.done(process.returncode, stdout, stderr)
    assert done.code == 130 and done.summary["cancelled"]
    assert [done.statuses()[f"slow{n}.ipynb"] for n in range(2)] == ["cancelled", "cancelled"]
    for n in range(2):
        node = nbformat.read(place.out / f"slow{n}.out.ipynb", as_version=4)
        assert "kept" in json.dumps(node)
    assert "continue with --resume" in stdout
    for n in range(2):
        make_notebook(place.folder / f"slow{n}.ipynb", "2")
    assert set(place.run(".", "--resume").statuses().values()) == {"passed"}


# --- what else there is -----------------------------------------------------------------------------------------


def test_a_batch_of_many_kinds(place: Place) -> None:
    make_notebook(place.folder / "good.ipynb", "1")
    make_notebook(place.folder / "error.ipynb", "1/0")
    make_notebook(place.folder / "dies.ipynb", "import os", "os._exit(3)")
    (place.folder / "torn.ipynb").write_text('{"cells": [')
    make_notebook(place.folder / "wrong.ipynb", "1", safe_exec={"inputs": "data.csv"})
    done = place.run("*.ipynb", "--no-bisect")
    assert done.code == 2
    assert done.statuses() == {
        "dies.ipynb": "kernel_died",
        "error.ipynb": "cell_error",
        "good.ipynb": "passed",
        "torn.ipynb": "refused",
        "wrong.ipynb": "refused",
    }
    assert (
        "torn.ipynb: torn.ipynb" not in done.stdout
        and "cut off in the middle" in done.row("torn.ipynb")["error"]
    )
    assert "safe_exec.inputs: expected a list" in done.row("wrong.ipynb")["error"]
    assert done.row("dies.ipynb")["cause"] == "exit" and done.row("dies.ipynb")["crash_cell"] == 1
    assert "kernel died in code cell 2" in done.stdout


def test_the_folder_of_a_notebook_stays_its_own_and_nothing_is_written_there(place: Place) -> None:
    (place.folder / "deep").mkdir()
    (place.folder / "deep" / "data.txt").write_text("there")
    make_notebook(
        place.folder / "deep" / "n.ipynb",
        "assert open('data.txt').read() == 'there'",
        "import os; os.abort()",
    )
    done = place.run("deep")
    assert sorted(path.name for path in (place.folder / "deep").iterdir()) == [
        "data.txt",
        "n.ipynb",
    ]
    row = done.row("deep/n.ipynb")
    assert row["cause"] == "abort" and row["repro"] == "deep/n.repro.ipynb"
    node = json.loads((place.out / "deep/n.out.ipynb").read_text())
    assert f"--cwd {place.folder / 'deep'}" in json.dumps(node), (
        "the reproduction is elsewhere than the notebook's files"
    )


def test_only_changed(place: Place) -> None:
    (place.folder / "data").mkdir()
    (place.folder / "data" / "a.csv").write_text("1")
    inputs: dict[str, Any] = {"safe_exec": {"inputs": ["data/*.csv"]}}
    make_notebook(place.folder / "plain.ipynb", *counting(place.own / "plain"))
    make_notebook(place.folder / "reads.ipynb", *counting(place.own / "reads"), **inputs)
    make_notebook(place.folder / "fails.ipynb", *counting(place.own / "fails"), "1/0")

    def ran(*options: str) -> dict[str, int]:
        before = {name: size_of(place.own / name) for name in ("plain", "reads", "fails")}
        place.run(".", "--only-changed", "--no-bisect", *options)
        return {name: size_of(place.own / name) - before[name] for name in before}

    assert ran() == {"plain": 1, "reads": 1, "fails": 1}
    assert ran() == {"plain": 0, "reads": 0, "fails": 1}, "what failed is run again"
    (place.folder / "data" / "b.csv").write_text("new")
    assert ran() == {"plain": 0, "reads": 1, "fails": 1}
    assert ran("--open-files", "500") == {"plain": 1, "reads": 1, "fails": 1}, "limits have changed"
    make_notebook(place.folder / "plain.ipynb", *counting(place.own / "plain", "1"))
    done_before = ran("--open-files", "500")
    assert done_before == {"plain": 1, "reads": 0, "fails": 1}
    done = place.run("reads.ipynb", "--only-changed", "--open-files", "500")
    assert done.statuses() == {"reads.ipynb": "unchanged"} and done.code == 0


def test_retries_are_for_what_can_be_transient_and_flaky_is_said(place: Place) -> None:
    once = place.own / "once"
    make_notebook(
        place.folder / "flaky.ipynb",
        f"import os, signal\nif not os.path.exists({str(once)!r}):\n    open({str(once)!r}, 'w')\n    os.kill(os.getpid(), signal.SIGKILL)",
    )
    make_notebook(place.folder / "error.ipynb", *counting(place.own / "error"), "1/0")
    make_notebook(
        place.folder / "killed.ipynb",
        *counting(place.own / "killed"),
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    )
    done = place.run(".", "--retries", "2", "--no-bisect")
    assert done.code == 3
    flaky = done.row("flaky.ipynb")
    assert (flaky["status"], flaky["attempts"], flaky["flaky"]) == ("passed", 2, True)
    assert size_of(place.own / "error") == 1 and done.row("error.ipynb")["attempts"] == 1
    assert size_of(place.own / "killed") == 3 and done.row("killed.ipynb")["attempts"] == 3
    assert (
        "1 passed (1 flaky)" in done.stdout.splitlines()[-1] and "flaky: attempt 2" in done.stdout
    )


STARTED = """
import os
open(os.path.join(os.environ["TRACES"], f"{os.getpid()}-{os.getppid()}-{os.urandom(4).hex()}"), "w").close()
"""
"""A start-up file of IPython: a kernel leaves a trace when it starts."""


def traced(place: Place) -> Path:
    """Where each kernel of this batch leaves a trace."""
    startup = place.own / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-trace.py").write_text(STARTED)
    traces = place.own / "traces"
    traces.mkdir()
    place.env |= {"IPYTHONDIR": str(place.own / "ipython"), "TRACES": str(traces)}
    return traces


LONGEST = "# so that it is the first\n" * 20
WAITS = """
import os, time
begun = time.monotonic()
while len(os.listdir(os.environ["TRACES"])) < 2:
    assert time.monotonic() < begun + 60, "no other kernel was started"
    time.sleep(0.01)
time.sleep(1)
open("done", "w").close()
"""


def test_the_next_kernel_starts_while_one_runs_and_waits_for_its_turn(place: Place) -> None:
    traces = traced(place)
    make_notebook(place.folder / "a.ipynb", LONGEST + WAITS)
    make_notebook(place.folder / "b.ipynb", "import os\nassert os.path.exists('done')")
    done = place.run("a.ipynb", "b.ipynb", "-j", "1", "--timeout", "40")
    assert done.code == 0, done.stdout
    assert len(list(traces.iterdir())) == 2
    seconds = {name: done.row(f"{name}.ipynb")["seconds"] for name in "ab"}
    assert seconds["b"] < seconds["a"], "what it waited is not its own"


def test_a_kernel_that_was_started_for_nothing_runs_nothing(place: Place) -> None:
    traces = traced(place)
    make_notebook(place.folder / "a.ipynb", LONGEST + WAITS + "1/0")
    make_notebook(place.folder / "b.ipynb", "open('ran', 'w')")
    done = place.run("a.ipynb", "b.ipynb", "-j", "1", "--fail-fast")
    assert done.statuses() == {"a.ipynb": "cell_error", "b.ipynb": "not_run"}
    assert len(list(traces.iterdir())) == 2
    assert not (place.folder / "ran").exists() and not (place.out / "b.verdict.json").exists()
    assert [event["path"] for event in place.journal() if event["event"] == "started"] == [
        "a.ipynb"
    ]


def test_no_kernel_starts_ahead_where_the_sandbox_copies_the_folder(place: Place) -> None:
    """A copy that was made before its turn would not have what the one before wrote."""
    make_notebook(
        place.folder / "a.ipynb",
        LONGEST + "import time\ntime.sleep(3)\nopen('given', 'w').write('yes')",
    )
    make_notebook(place.folder / "b.ipynb", "assert open('given').read() == 'yes'")
    (place.folder / "safe-exec.yaml").write_text("limits:\n  - path: b.ipynb\n    disk: 50M\n")
    process = place.start("a.ipynb", "b.ipynb", "-j", "1")
    most = 0
    while not (place.folder / "given").exists() and process.poll() is None:
        most = max(
            most,
            sum(b"ipykernel_launcher" in command_of(pid) for pid in marked_processes(place.mark)),
        )
    done = place.done(process.wait(60), *process.communicate())
    assert done.code == 0, done.stdout
    assert most == 1


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_fail_fast_starts_no_more(place: Place) -> None:
    for n in range(4):
        make_notebook(
            place.folder / f"{n}.ipynb", "1/0", "# so that it is the largest\n" * (10 - n)
        )
    done = place.run(".", "--fail-fast", "-j", "1")
    assert done.code == 1
    assert done.statuses() == {
        "0.ipynb": "cell_error",
        "1.ipynb": "not_run",
        "2.ipynb": "not_run",
        "3.ipynb": "not_run",
    }
    assert "continue with --resume" in done.stdout
    make_notebook(place.folder / "0.ipynb", "1")
    again = place.run("0.ipynb")
    assert "the previous batch in" in again.stderr and "did not finish" in again.stderr
    assert "did not finish" not in place.run("0.ipynb").stderr


def test_shards_share_all_and_a_list_comes_on_stdin(place: Place) -> None:
    names = [f"{n}.ipynb" for n in range(5)]
    for name in names:
        make_notebook(place.folder / name, "1")
    listed = "\n".join([*names, "README.md", ""])
    found: list[str] = []
    for number in (1, 2):
        done = place.run("-", "--shard", f"{number}/2", listed=listed)
        assert done.code == 0 and done.summary["shard"] == [number, 2]
        found += done.statuses()
    assert sorted(found) == names


def test_memory_limits_decide_how_many_run_at_a_time(place: Place) -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) >> 10
    for n in range(3):
        make_notebook(place.folder / f"{n}.ipynb", "1")
    done = place.run(".", "-j", "3", "--memory", f"{total}M")
    assert done.code == 0
    running = most = 0
    for event in place.journal():
        running += {"started": 1, "finished": -1}.get(event["event"], 0)
        most = max(most, running)
    assert most == 1


def test_two_notebooks_that_would_write_one_document_do_not_meet(place: Place) -> None:
    make_notebook(place.folder / "a.ipynb", "print('lower')")
    make_notebook(place.folder / "a.IPYNB", "print('upper')")
    done = place.run("a.ipynb", "a.IPYNB")
    texts = {
        row["path"]: (place.out / row["notebook"]).read_text() for row in done.summary["notebooks"]
    }
    assert "lower" in texts["a.ipynb"] and "upper" in texts["a.IPYNB"]


# --- the memory of the runner -----------------------------------------------------------------------------------

MOST_GROWTH = 80 << 10
"""Bytes a notebook, from the twentieth on; 150 MB for 500 leave some 150 KiB each."""


@pytest.mark.timeout(600)
def test_the_runner_does_not_grow_with_the_number_of_notebooks(place: Place) -> None:
    for n in range(60):
        make_notebook(place.folder / f"{n:02}.ipynb", "1")
    process = place.start(".", "-j", "2", "--no-bisect")
    seen: dict[int, int] = {}
    while process.poll() is None:
        count = len(place.finished())
        rss = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        if rss:
            seen[count] = int(rss[1]) << 10
        with_pause(process)
    stdout, stderr = process.communicate()
    done = place.done(process.returncode, stdout, stderr)
    assert set(done.statuses().values()) == {"passed"}
    early = max(size for count, size in seen.items() if 15 <= count <= 20)
    late = max(size for count, size in seen.items() if count >= 50)
    print(f"runner: {early >> 20} MiB after 20, {late >> 20} MiB after 50")  # noqa: T201 - for the record
    assert late < 150 << 20
    assert late - early < 35 * MOST_GROWTH, f"{early} after 20, {late} after 50"


def with_pause(process: subprocess.Popen[str]) -> None:
    """Wait a moment, or until it is over."""
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        return
