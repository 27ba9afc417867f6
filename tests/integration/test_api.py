"""``safe_exec.run`` and ``run_async`` do what their documentation says."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import fields

import safe_exec
from safe_exec import Limits, Status, Verdict
from safe_exec.errors import LimitsError, NotebookError, OutputPathError, UsageError
from safe_exec.model import events
from safe_exec.model.events import Event
from safe_exec.model.limits import LimitName, Mechanism
from safe_exec.reports.event_log import EventLog
from safe_exec.reports.text.culprits import reproduce_command
from tests.support import MARK, left_behind, make_notebook, marked_processes, wait_until
from tests.support import safe_exec as safe_exec_command

MIB = 2**20


@pytest.fixture(autouse=True)
def no_process_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every process that a test starts inherits a mark; after the test none may be left."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    yield
    wait_until(lambda: marked_processes(mark) == [], 5, "no process of the run is left")


def clean(verdict: Verdict) -> None:
    """Nothing of the run is left: no control group, no note."""
    assert left_behind(verdict.run_id) == []


def text_of(path: Path, index: int) -> str:
    cell = json.loads(path.read_text())["cells"][index]
    return "".join("".join(output["text"]) for output in cell["outputs"])


# --- one run ----------------------------------------------------------------------------------------------------


def test_a_notebook_that_passes(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "print('one')", "2 + 2")
    verdict = safe_exec.run(path)
    assert isinstance(verdict, Verdict)
    assert (verdict.status, verdict.exit_code, verdict.cause) == (Status.PASSED, 0, None)
    assert [cell.status.value for cell in verdict.cells] == ["passed", "passed"]
    written = json.loads((tmp_path / "nb.verdict.json").read_text())
    assert written["run_id"] == verdict.run_id
    assert verdict.outputs == {
        "notebook": str(tmp_path / "nb.out.ipynb"),
        "verdict": str(tmp_path / "nb.verdict.json"),
    }
    clean(verdict)


def test_a_notebook_that_dies_is_a_verdict(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", "print('one')", "import os\nos.kill(os.getpid(), 9)"
    )
    verdict = safe_exec.run(str(path))
    assert verdict.status is Status.KERNEL_DIED
    assert verdict.cause is not None
    assert verdict.cause.kind is safe_exec.CauseKind.KILLED
    assert verdict.crash_cell is not None
    assert (verdict.crash_cell.code_index, verdict.crash_cell.line) == (1, 2)
    clean(verdict)


def test_documents_may_go_elsewhere_and_the_reproduction_runs_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "signal.txt").write_text("9")
    path = make_notebook(
        tmp_path / "here" / "nb.ipynb",
        "x = 1",
        "import os\nos.kill(os.getpid(), int(open('signal.txt').read()))",
    )
    out, said, repro = (
        tmp_path / "there" / name for name in ("nb.out.ipynb", "nb.json", "nb.repro.ipynb")
    )
    verdict = safe_exec.run(path, output=out, verdict=said, repro=repro)
    assert verdict.culprits is not None and verdict.culprits.minimal
    assert verdict.culprits.repro_notebook == str(repro)
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["nb.ipynb", "signal.txt"]
    again = safe_exec_command(
        *shlex.split(reproduce_command(verdict))[1:], "--no-bisect", cwd=tmp_path
    )
    assert again.returncode == Status.KERNEL_DIED.exit_code, again.stdout
    clean(verdict)


def test_limits_of_ones_own_stand_alone(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "x = bytearray(b'x') * (400 * 2**20)")
    (tmp_path / "safe-exec.yaml").write_text("this would be an error: if it were read\n")
    limits = Limits(memory=200 * MIB, cell_timeout=30.0)
    verdict = safe_exec.run(path, limits=limits)
    assert verdict.cause is not None
    assert verdict.cause.kind is safe_exec.CauseKind.OUT_OF_MEMORY
    assert verdict.limits == limits
    clean(verdict)


def test_no_limits_at_all(tmp_path: Path) -> None:
    verdict = safe_exec.run(make_notebook(tmp_path / "nb.ipynb", "1"), limits=Limits())
    assert verdict.status is Status.PASSED
    assert all(
        getattr(verdict.limits, field.name) is None
        for field in fields(Limits)
        if field.name != "interrupt_grace"
    )


def test_a_profile_by_name_and_options_that_win(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "import time", "time.sleep(60)")
    verdict = safe_exec.run(
        path, limits="ci", options={"cell_timeout": 1, "memory": "512M", "interrupt_grace": "1s"}
    )
    assert verdict.status is Status.TIMEOUT
    assert (verdict.limits.cell_timeout, verdict.limits.memory) == (1.0, 512 * MIB)
    clean(verdict)


def test_a_limits_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("limits:\n  processes: 77\n")
    verdict = safe_exec.run(
        make_notebook(tmp_path / "nb.ipynb", "1"), limits=str(tmp_path / "mine.yaml")
    )
    assert verdict.limits.processes == 77


@pytest.mark.bed("bash")
def test_output_verdict_cwd_kernel_env(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    path = make_notebook(tmp_path / "nb.ipynb", "echo $ONLY_HERE; pwd", kernel="python3")
    verdict = safe_exec.run(
        path,
        kernel="bash",
        cwd=work,
        env={"PATH": os.environ["PATH"], "ONLY_HERE": "yes"},
        output=out / "o.ipynb",
        verdict=str(out / "v.json"),
    )
    assert verdict.status is Status.PASSED
    assert text_of(out / "o.ipynb", 0) == f"yes\n{work}\n"
    assert sorted(os.listdir(tmp_path)) == ["nb.ipynb", "out", "work"]
    assert sorted(os.listdir(out)) == ["o.ipynb", "v.json"]


def test_allow_errors(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "1 / 0", "print('goes on')")
    assert safe_exec.run(path).status is Status.CELL_ERROR
    verdict = safe_exec.run(path, allow_errors=True)
    assert verdict.status is Status.PASSED
    assert [cell.status.value for cell in verdict.cells] == ["failed", "passed"]


def test_mechanisms_and_require(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "1")
    verdict = safe_exec.run(path, mechanisms=["watchdog"], options={"memory": "1G"})
    assert verdict.enforcement[LimitName.MEMORY].by is Mechanism.WATCHDOG
    refused = safe_exec.run(
        path, mechanisms=["watchdog"], require="memory", options={"memory": "1G"}
    )
    assert refused.status is Status.INTERNAL_ERROR
    assert [cell.status.value for cell in refused.cells] == ["not_run"]


# --- events -----------------------------------------------------------------------------------------------------


def test_events_come_in_order(tmp_path: Path) -> None:
    seen: list[Event] = []
    path = make_notebook(tmp_path / "nb.ipynb", "print(1)", "2")
    verdict = safe_exec.run(path, on_event=seen.append)
    kinds = [
        type(event)
        for event in seen
        if not isinstance(event, events.UsageSampled | events.OutputReceived)
    ]
    assert kinds == [
        events.RunStarted,
        events.SandboxBuilt,
        events.KernelStarted,
        events.KernelReady,
        events.CellStarted,
        events.CellFinished,
        events.CellStarted,
        events.CellFinished,
        events.KernelEnded,
        events.RunFinished,
    ]
    assert [event.time for event in seen] == sorted(event.time for event in seen)
    assert isinstance(seen[0], events.RunStarted)
    assert seen[0].run_id == verdict.run_id
    assert isinstance(seen[-1], events.RunFinished)
    assert seen[-1].status is Status.PASSED


def test_events_of_a_death(tmp_path: Path) -> None:
    seen: list[Event] = []
    path = make_notebook(tmp_path / "nb.ipynb", "import os\nos._exit(4)", "1")
    safe_exec.run(path, on_event=seen.append)
    kinds = [
        type(event)
        for event in seen
        if not isinstance(event, events.UsageSampled | events.OutputReceived)
    ]
    assert kinds.count(events.CellStarted) == 1
    (ended,) = (event for event in seen if isinstance(event, events.KernelEnded))
    assert (ended.expected, os.waitstatus_to_exitcode(ended.status or 0)) == (False, 4)
    assert kinds[-1] is events.RunFinished


def test_events_of_a_timeout(tmp_path: Path) -> None:
    seen: list[Event] = []
    path = make_notebook(tmp_path / "nb.ipynb", "while True:\n    pass")
    safe_exec.run(path, options={"cell_timeout": 0.5}, on_event=seen.append)
    kinds: list[type[Event]] = [type(event) for event in seen]
    order: list[type[Event]] = [
        events.CellStarted,
        events.LimitReached,
        events.Interrupted,
        events.Killed,
        events.CellFinished,
    ]
    places = [kinds.index(kind) for kind in order]
    assert places == sorted(places)


def test_the_event_log_holds_the_same_events(tmp_path: Path) -> None:
    seen: list[Event] = []
    path = make_notebook(tmp_path / "nb.ipynb", "print(1)")
    with EventLog(tmp_path / "events.jsonl") as log:

        def both(event: Event) -> None:
            seen.append(event)
            log(event)

        safe_exec.run(path, on_event=both)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["time"] for line in lines] == [event.time for event in seen]
    assert (lines[0]["event"], lines[-1]["event"]) == ("run_started", "run_finished")


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"path": "missing.ipynb"}, NotebookError, "no such file"),
        ({"options": {"memory": "12Q"}}, LimitsError, "12Q"),
        ({"options": {"memry": "1G"}}, LimitsError, "memory"),
        ({"limits": "strickt"}, LimitsError, "strict"),
        ({"require": "memry"}, LimitsError, "memory"),
        ({"mechanisms": ["magic"]}, UsageError, "magic"),
        ({"output": "missing/o.ipynb"}, OutputPathError, "missing"),
        ({"verdict": "."}, OutputPathError, "directory"),
        ({"cwd": "missing"}, UsageError, "missing"),
        ({"limits": {"memory": "1G"}}, UsageError, "single limits are options="),
        ({"parameters": [1]}, UsageError, "parameters: expected names with values"),
        ({"parameters": {"a": object()}}, UsageError, "-p a: object has no literal"),
        ({"only_tags": "show"}, UsageError, "expected a list of texts"),
        ({"options": {"memory": 512}}, LimitsError, "did you mean 512M"),
    ],
)
def test_errors_before_anything_is_written(
    change: dict[str, Any],
    error: type[UsageError],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_notebook(tmp_path / "nb.ipynb", "1")
    arguments: dict[str, Any] = {"path": "nb.ipynb", **change}
    with pytest.raises(error, match=word) as caught:
        safe_exec.run(**arguments)
    assert isinstance(caught.value, safe_exec.SafeExecError)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["nb.ipynb"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("memory", r"write options=\{'memory': ...\}"),
        ("paramters", "did you mean 'parameters'"),
        ("xyz", r"run\(\) has no argument 'xyz'$"),
    ],
)
def test_an_unknown_argument_says_how_to_write_it(name: str, words: str) -> None:
    arguments: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=words):
        safe_exec.run("nb.ipynb", **arguments)


def test_run_within_a_loop_is_refused_and_run_async_is_not(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "1")

    async def within() -> Verdict:
        with pytest.raises(RuntimeError, match=r"run_async|event loop"):
            safe_exec.run(path)
        assert os.listdir(tmp_path) == ["nb.ipynb"]
        return await safe_exec.run_async(path)

    assert asyncio.run(within()).status is Status.PASSED


# --- elsewhere than alone on the main thread ----------------------------------------------------------------------


def in_a_thread(work: Callable[[], Verdict]) -> Verdict:
    found: list[Verdict | BaseException] = []

    def call() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(120)
    (result,) = found
    if isinstance(result, BaseException):
        raise result
    return result


def test_in_a_thread(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "print('from a thread')", "import os\nos._exit(2)")
    verdict = in_a_thread(lambda: safe_exec.run(path))
    assert verdict.cause is not None
    assert verdict.cause.kind is safe_exec.CauseKind.EXIT
    assert "from a thread" in (tmp_path / "nb.out.ipynb").read_text()
    clean(verdict)


def test_two_at_once_in_one_loop(tmp_path: Path) -> None:
    passes, dies = tmp_path / "passes", tmp_path / "dies"
    for folder in (passes, dies):
        folder.mkdir()
    one = make_notebook(
        passes / "nb.ipynb",
        "import time\nfor n in range(5):\n    print('alive', n)\n    time.sleep(0.05)",
        "'end'",
    )
    two = make_notebook(
        dies / "nb.ipynb", "print('soon dead')", "x = bytearray(b'x') * (500 * 2**20)"
    )

    async def both() -> list[Verdict]:
        return list(
            await asyncio.gather(
                safe_exec.run_async(one), safe_exec.run_async(two, options={"memory": "200M"})
            )
        )

    first, second = asyncio.run(both())
    assert (first.status, second.status) == (Status.PASSED, Status.KERNEL_DIED)
    assert second.cause is not None
    assert second.cause.kind is safe_exec.CauseKind.OUT_OF_MEMORY
    assert first.run_id != second.run_id
    assert text_of(passes / "nb.out.ipynb", 0).count("alive") == 5
    for verdict in (first, second):
        clean(verdict)


def test_a_cancelled_task_leaves_nothing_running(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "import time\ntime.sleep(600)")
    seen: list[Event] = []

    async def cancel() -> None:
        begun = asyncio.Event()

        def note(event: Event) -> None:
            seen.append(event)
            if isinstance(event, events.CellStarted):
                begun.set()

        task = asyncio.create_task(safe_exec.run_async(path, on_event=note))
        await asyncio.wait_for(begun.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 30)

    asyncio.run(cancel())
    started = next(event for event in seen if isinstance(event, events.RunStarted))
    kernel = next(event for event in seen if isinstance(event, events.KernelStarted))
    wait_until(lambda: not Path(f"/proc/{kernel.pid}").exists(), 5, "the kernel is gone")
    wait_until(lambda: left_behind(started.run_id) == [], 5, "all is cleaned up")


def test_many_runs_in_a_row_leave_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "1")
    safe_exec.run(path)
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(4):
        safe_exec.run(path)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    assert threading.active_count() <= threads
