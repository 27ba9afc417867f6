"""The search for culprits with real kernels: what it finds, what it leaves alone, and that nothing is left of it however it ends."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import pytest
from jsonschema import Draft202012Validator

from safe_exec.reports.verdict_json import load_schema
from tests.support import (
    EXECUTABLE,
    MARK,
    NOBODY,
    Outcome,
    kept_folders,
    make_notebook,
    marked_processes,
    ordinary_user_with_namespaces,
    orphaned_groups,
    private_directory,
    run_notebook,
    safe_exec,
    wait_until,
    without_namespaces,
)

CRASH = "import ctypes\nctypes.string_at(0)"
SLOW = "import time\ntime.sleep(0.3)"
GONE_SECONDS = 5.0
"""Within this everything of a search that was killed is gone."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a test runs: a folder for the notebook, beside it cache and runtime directory of its own. ``outside`` is any other place."""

    base: Path
    prefix: Sequence[str] = ()
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        for path in (self.folder, self.cache, self.runtime, self.outside):
            path.mkdir(exist_ok=True)
            path.chmod(0o777)

    @property
    def folder(self) -> Path:
        return self.base / "folder"

    @property
    def cache(self) -> Path:
        return self.base / "cache"

    @property
    def runtime(self) -> Path:
        return self.base / "run"

    @property
    def outside(self) -> Path:
        return self.base / "outside"

    @property
    def env(self) -> dict[str, str]:
        own = {
            "XDG_CACHE_HOME": str(self.cache),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "HOME": str(self.base),
            MARK: self.mark,
        }
        return {
            name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"
        } | own

    def notebook(self, *sources: str, kernel: str = "python3", language: str = "python") -> Path:
        return make_notebook(self.folder / "nb.ipynb", *sources, kernel=kernel, language=language)

    def run(self, path: Path, *options: str) -> Outcome:
        outcome = run_notebook(path, *options, env=self.env, prefix=self.prefix, cwd=self.folder)
        assert self.left() == []
        return outcome

    def bisect(self, path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
        """``safe-exec bisect``: exit code, verdict, what it said."""
        done = safe_exec(
            "bisect", path, *options, env=self.env, prefix=self.prefix, cwd=self.folder
        )
        assert self.left() == []
        return done.returncode, verdict_of(path), f"{done.stdout}\n{done.stderr}"

    def left(self, *, trials: bool = True) -> list[str]:
        """What there should not be any more: notes, sockets, processes, control groups, folders of trials, mounts."""
        files = [
            str(path) for path in self.runtime.rglob("*") if path != self.runtime / "safe-exec"
        ]
        if trials:
            files += [str(path) for path in self.cache.glob("safe-exec/folders/*/trial-*")]
        mounts = [
            line
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if str(self.base) in line
        ]
        return [
            *map(str, marked_processes(self.mark)),
            *map(str, orphaned_groups()),
            *files,
            *mounts,
        ]


@pytest.fixture
def place() -> Iterator[Place]:
    with private_directory() as base:
        yield Place(base=base)


class Background:
    """A run that goes on beside the test, with its event log."""

    def __init__(self, place: Place, path: Path, *options: str) -> None:
        self.location, self.path, self.events = place, path, place.outside / "events.jsonl"
        argv = [
            *place.prefix,
            str(EXECUTABLE),
            "run",
            str(path),
            "--events",
            str(self.events),
            *options,
        ]
        self.process = subprocess.Popen(
            argv,
            cwd=place.folder,
            env=place.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def log(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind so far."""
        text = self.events.read_text() if self.events.exists() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in found if line["event"] == event]

    def wait_for(self, event: str, count: int = 1) -> None:
        def there() -> bool:
            assert self.process.poll() is None or len(self.log(event)) >= count, (
                self.process.communicate()[0]
            )
            return len(self.log(event)) >= count

        wait_until(there, 60, f"{count} events {event}")

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Send a signal, wait for the end; exit code and what it said."""
        if number is not None:
            self.process.send_signal(number)
        said = self.process.communicate(timeout=120)[0]
        return self.process.returncode, said


def verdict_of(path: Path) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads(path.with_suffix(".verdict.json").read_text())
    Draft202012Validator(load_schema()).validate(verdict)
    return verdict


def code_cells(verdict: Mapping[str, Any]) -> list[int]:
    assert verdict["culprits"] is not None, verdict["warnings"]
    return [culprit["code_index"] for culprit in verdict["culprits"]["cells"]]


def warned(verdict: Mapping[str, Any], words: str) -> bool:
    return any(words in warning for warning in verdict["warnings"])


def repro_cells(path: Path) -> list[str]:
    node = nbformat.read(path.with_suffix(".repro.ipynb"), as_version=4)
    nbformat.validate(node)
    return [cell.source for cell in node.cells]


# --- what it finds ----------------------------------------------------------------------------------------------


@pytest.mark.kills
def test_of_three_cells_that_fill_the_memory_the_two_that_it_takes(place: Place) -> None:
    path = place.notebook(
        "print('start')",
        "first = bytearray(b'x') * (100 << 20)",
        "names = ['a', 'b']",
        "second = bytearray(b'x') * (30 << 20)",
        "third = bytearray(b'x') * (100 << 20)",
        "print(names)",
        "last = bytearray(b'x') * (90 << 20)",
    )
    verdict = place.run(path, "--memory", "300M").verdict
    found = verdict["culprits"]
    assert verdict["cause"]["kind"] == "out_of_memory"
    assert code_cells(verdict) == [1, 4, 6]
    assert (found["minimal"], found["stopped"]) == (True, None)
    assert [culprit["role"] for culprit in found["cells"]] == [
        "accumulator",
        "accumulator",
        "crash",
    ]
    assert found["look_first"] in (1, 4)
    assert found["reproduced"][0] == found["reproduced"][1] >= 1


@pytest.mark.kills
def test_a_large_crash_cell_is_made_smaller_in_the_reproduction(place: Place) -> None:
    lines = [f"value_{n} = {n} * factor" for n in range(10)]
    crash = "\n".join(
        [
            *lines,
            "import ctypes",
            "print(value_3)",
            "ctypes.string_at(factor - 2)",
            "print('never')",
        ]
    )
    path = place.notebook("factor = 2", "print('between')", crash)
    before = path.read_bytes()
    outcome = place.run(path)
    assert code_cells(outcome.verdict) == [0, 2]
    *others, last = repro_cells(path)
    assert others == ["factor = 2"]
    assert last == "import ctypes\nctypes.string_at(factor - 2)"
    assert path.read_bytes() == before
    again = place.run(path.with_suffix(".repro.ipynb"))
    assert again.verdict["cause"]["kind"] == outcome.verdict["cause"]["kind"] == "segfault"
    assert again.verdict["culprits"] is None


@pytest.mark.kills
def test_a_hang_is_recognised_before_its_time_is_up(place: Place) -> None:
    path = place.notebook("import time", "a = 1", "forever = 1000", "time.sleep(forever)")
    verdict = place.run(path, "--cell-timeout", "8").verdict
    search = verdict["culprits"]
    assert code_cells(verdict) == [0, 2, 3]
    assert search["minimal"]
    # The trial whose hang was recognised went on and confirmed it: there is no other one of these
    # cells.
    assert search["reproduced"] == [1, 1]
    assert search["endings"] == {"cell_timeout": 1}
    assert search["recognised"] >= 1
    assert search["disagreements"] == 0


@pytest.mark.kills
def test_the_statements_of_a_hang_are_reduced_while_it_is_confirmed(place: Place) -> None:
    path = place.notebook("import time\na = 1\nprint(a)", "b = 2\ntime.sleep(1000)\nprint(b)")
    # Long enough for a busy machine: a later trial would not end in time.
    verdict = place.run(path, "--cell-timeout", "25").verdict
    assert code_cells(verdict) == [0, 1]
    assert verdict["culprits"]["reproduced"] == [1, 1]
    assert repro_cells(path) == ["import time", "time.sleep(1000)"]


@pytest.mark.kills
def test_the_budget_may_leave_out_the_run_up_to_the_timeout(place: Place) -> None:
    path = place.notebook("import time", "a = 1", "time.sleep(1000)")
    verdict = place.run(path, "--cell-timeout", "16", "--bisect-budget", "10").verdict
    assert code_cells(verdict) == [0, 2]
    assert verdict["culprits"]["reproduced"] == [0, 0]
    assert verdict["culprits"]["recognised"] == 1
    assert warned(verdict, "no run up to the timeout confirmed it")


@pytest.mark.kills
def test_a_run_to_the_end_contradicts_a_slow_cell_that_looks_like_the_hang(place: Place) -> None:
    crash = "import builtins, time\ntime.sleep(getattr(builtins, 'pause', 3.5))"
    path = place.notebook("import builtins\nbuiltins.pause = 1000", "a = 1", crash)
    verdict = place.run(path, "--cell-timeout", "5").verdict
    assert code_cells(verdict) == [0, 2]
    assert verdict["culprits"]["disagreements"] == 1
    assert verdict["culprits"]["minimal"]


@pytest.mark.kills
@pytest.mark.bed("bash")
def test_a_notebook_in_another_language(place: Place) -> None:
    path = place.notebook(
        "ANSWER=42",
        "echo $ANSWER",
        '[ "$ANSWER" = 42 ] && kill -9 $PPID',
        kernel="bash",
        language="bash",
    )
    verdict = place.run(path, "--cell-timeout", "10").verdict
    assert verdict["cause"]["kind"] == "killed"
    assert code_cells(verdict) == [0, 2]
    assert verdict["culprits"]["minimal"]


@pytest.mark.kills
@pytest.mark.bed("bash")
def test_no_kernel_is_killed_while_it_reads_its_start_up_files(place: Place) -> None:
    """The kernel that is kept ready for the next question is discarded at the end; what a start-up file holds by then, it gives back."""
    crash = 'sleep 1; [ "$ANSWER" = 42 ] && kill -9 $PPID'
    path = place.notebook("ANSWER=42", "true", crash, kernel="bash", language="bash")
    with TemporaryDirectory(dir="/var/tmp") as name:  # trials have a /tmp of their own
        home = Path(name)
        (home / ".bashrc").write_text(
            "bash -c 'trap \"rm -f ~/lock\" EXIT; echo >> ~/begun; touch ~/lock; sleep 1; echo >> ~/done'\n"
        )
        outcome = run_notebook(path, env=place.env | {"HOME": name}, cwd=place.folder)
        begun, done = ((home / name).read_text().count("\n") for name in ("begun", "done"))
        assert not (home / "lock").exists()
    assert code_cells(outcome.verdict) == [0, 2]
    assert begun == done > 1


@pytest.mark.kills
def test_an_exception_is_searched_for_when_asked(place: Place) -> None:
    path = place.notebook("import math", "numbers = [4, 0]", "print(numbers)", "1 / numbers[1]")
    assert place.run(path).verdict["culprits"] is None
    assert kept_folders(place.cache) == []
    verdict = place.run(path, "--bisect", "always").verdict
    assert verdict["exit_code"] == 1
    assert code_cells(verdict) == [1, 3]
    assert repro_cells(path) == ["numbers = [4, 0]", "1 / numbers[1]"]


@pytest.mark.kills
def test_no_search_where_none_is_wanted(place: Place) -> None:
    path = place.notebook("x = 1", CRASH)
    for options in (("--no-bisect",), ("--bisect", "never")):
        verdict = place.run(path, *options).verdict
        assert verdict["status"] == "kernel_died"
        assert verdict["culprits"] is None
        assert not warned(verdict, "search")
        assert not path.with_suffix(".repro.ipynb").exists()
    assert list(place.cache.iterdir()) == []


@pytest.mark.kills
def test_no_search_by_itself_after_talking_to_another_host(place: Place) -> None:
    talk = "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 9), timeout=0.2)\nexcept OSError as error:\n    print(error)"
    path = place.notebook(talk, "x = 1", CRASH)
    verdict = place.run(path).verdict
    assert verdict["culprits"] is None
    assert warned(verdict, "192.0.2.1") and warned(verdict, "safe-exec bisect")
    code, verdict, said = place.bisect(path)
    assert code == 0, said
    assert code_cells(verdict) == [2]
    assert not warned(verdict, "192.0.2.1")
    assert kept_folders(place.cache) == []


# --- failures that come and go ----------------------------------------------------------------------------------


@pytest.mark.kills
def test_of_a_death_that_comes_and_goes_it_says_how_often_it_came(place: Place) -> None:
    """Every run of the crash cell writes down which cells it had, and whether it is to die: outside of what a trial gets anew."""
    log = place.outside / "log"
    record = f"with open({str(log)!r}, 'a') as file:\n    print(*[n for n in range(4) if f'cell_{{n}}' in globals()], dies, file=file)"
    path = place.notebook(
        "cell_0 = 1",
        "cell_1 = limit = 128",
        "cell_2 = 1",
        "import ctypes, os",
        f"dies = os.urandom(1)[0] < limit\n{record}\nif dies: ctypes.string_at(0)",
    )
    for _ in range(30):
        log.unlink(missing_ok=True)
        outcome = place.run(path, "--bisect-budget", "60s")
        if outcome.verdict["status"] == "kernel_died":
            break
    assert outcome.verdict["status"] == "kernel_died"
    found = outcome.verdict["culprits"]
    assert found is not None, outcome.stdout
    trials = [line.split() for line in log.read_text().splitlines()][1:]
    cells = code_cells(outcome.verdict)
    wanted = [str(cell) for cell in cells if cell < 3] if cells else ["0", "1", "2"]
    mine = [dies for *names, dies in trials if names == wanted]
    if cells:
        assert {1, 3, 4} <= set(cells)
    # The reduction of the reproduction runs the same cells again, afterwards.
    died, total = found["reproduced"]
    assert len(mine) == total or (cells and len(mine) > total), (cells, found, trials)
    assert died == mine[:total].count("True"), (cells, found, trials)
    assert f"reproduced {died}/{total}" in outcome.stdout or not cells


@pytest.mark.kills
def test_a_death_that_never_comes_back(place: Place) -> None:
    fuse = f"try:\n    open({str(place.outside / 'fuse')!r}, 'x')\nexcept FileExistsError:\n    burnt = True\nelse:\n    burnt = False"
    path = place.notebook("x = 1", fuse, "import ctypes\nif not burnt:\n    ctypes.string_at(0)")
    outcome = place.run(path)
    found = outcome.verdict["culprits"]
    assert outcome.code == 3
    assert (found["cells"], found["minimal"], found["stopped"]) == ([], False, "not_reproduced")
    assert found["reproduced"][0] == 0 < found["reproduced"][1]
    assert found["repro_notebook"] is None
    assert not path.with_suffix(".repro.ipynb").exists()
    assert (
        f"0/{found['reproduced'][1]}" in outcome.stdout or "did not happen again" in outcome.stdout
    ), outcome.stdout


# --- a search that is cut short ---------------------------------------------------------------------------------

PARTS = [f"import sys, time\ntime.sleep(0.1)\nsys.part_{n} = {n}" for n in range(8)]
NAMELESS = (
    "import sys",
    *PARTS,
    f"if getattr(sys, 'part_2', 0) + getattr(sys, 'part_5', 0) == 7:\n    {CRASH.replace(chr(10), '; ')}",
)
"""No name tells of the two that it takes, and all look the same: to find them takes a dozen trials."""
FOUND = [3, 6, 9]


@pytest.mark.kills
def test_ctrl_c_keeps_the_best_so_far(place: Place) -> None:
    run = Background(place, place.notebook(*NAMELESS))
    wait_until(
        lambda: any(event["best"] for event in run.log("search_trial_finished")),
        60,
        "something that fails",
    )
    code, said = run.end(signal.SIGINT)
    verdict = verdict_of(run.path)
    found = verdict["culprits"]
    assert code == verdict["exit_code"] == 3, said
    assert verdict["status"] == "kernel_died"
    assert (found["stopped"], found["minimal"]) == ("cancelled", False)
    assert [cell["index"] for cell in found["cells"]] == run.log("search_trial_finished")[-1][
        "best"
    ]
    assert set(FOUND) <= set(code_cells(verdict))
    assert place.left() == []
    assert kept_folders(place.cache) == [verdict["run_id"]]


@pytest.mark.kills
def test_sigkill_leaves_nothing_but_what_is_known(place: Place) -> None:
    run = Background(place, place.notebook(*NAMELESS))
    run.wait_for("search_trial_finished", 2)
    assert run.end(signal.SIGKILL)[0] == -signal.SIGKILL
    # A folder that was on its way to a trial is left with the run's: both go when the search comes to its end.
    wait_until(
        lambda: place.left(trials=False) == [], GONE_SECONDS, f"nothing left: {place.left()}"
    )
    verdict = verdict_of(run.path)
    assert (verdict["status"], verdict["culprits"]) == ("kernel_died", None)
    assert kept_folders(place.cache) == [verdict["run_id"]]

    code, verdict, said = place.bisect(run.path)
    assert code == 0, said
    assert code_cells(verdict) == FOUND
    assert verdict["culprits"]["minimal"]
    assert verdict["culprits"]["cached"] >= 1
    assert kept_folders(place.cache) == []


@pytest.mark.kills
def test_a_budget_that_is_too_small_and_then_a_larger_one(place: Place) -> None:
    path = place.notebook(*NAMELESS)
    budget = (
        2.5 * place.run(path, "--no-bisect").verdict["usage"]["wall_seconds"]
    )  # for a trial or two, on any machine
    outcome = place.run(path, "--bisect-budget", f"{budget:.1f}s")
    found = outcome.verdict["culprits"]
    assert (found["stopped"], found["minimal"]) == ("budget", False), outcome.stdout
    assert found["seconds"] < budget + GONE_SECONDS
    code, verdict, said = place.bisect(path, "--budget", "2m")
    assert code == 0, said
    assert code_cells(verdict) == FOUND
    assert verdict["culprits"]["minimal"]
    assert verdict["culprits"]["cached"] >= 1
    assert kept_folders(place.cache) == []


# --- trials know nothing of each other --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Way:
    """How trials get their folder: as whom, with how large a folder, with or without namespaces."""

    id: str
    user: bool = False
    large: bool = False
    namespaces: bool = True

    @property
    def beds(self) -> tuple[str, ...]:
        """What it needs."""
        return ("ordinary-user", "user-namespaces") if self.user else ("user-namespaces",)


WAYS = (
    Way(id="root"),
    Way(id="user", user=True),
    Way(id="root-large", large=True),
    Way(id="user-large", user=True, large=True),
    Way(id="no-namespaces", namespaces=False),
)


def leaving(place: Place, way: Way, name: str) -> str:
    """A cell that fails otherwise if anything is there that an earlier run of it has left."""
    lines = [
        "assert open('there.txt').read() == 'before'",
        "assert sorted(os.listdir('inner')) == ['deep.txt']",
        "open('made.txt', 'x').write('made')",
        "os.mkdir('directory')",
        "open('inner/more.txt', 'x').close()",
    ]
    if way.namespaces:
        lines += [f"open('/dev/shm/{name}', 'x').close()", f"open('/tmp/{name}', 'x').close()"]
        lines += [f"open({str(place.folder / 'by-path.txt')!r}, 'x').close()"]
    if not way.large:
        lines += ["open('there.txt', 'a').write(' and after')", "os.unlink('inner/deep.txt')"]
    return "\n".join(lines)


def tree(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """All of a folder but our documents: modes, times, contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".ipynb"):
            status = path.lstat()
            text = path.read_bytes() if path.is_file() and status.st_size < 1 << 20 else b""
            found[str(path.relative_to(folder))] = (
                status.st_mode,
                status.st_mtime_ns,
                status.st_ctime_ns,
                text,
            )
    return found


@pytest.mark.kills
@pytest.mark.parametrize(
    "way", [pytest.param(way, id=way.id, marks=pytest.mark.bed(*way.beds)) for way in WAYS]
)
def test_trials_start_from_the_folder_as_it_was(way: Way, place: Place) -> None:
    prefix = (
        ordinary_user_with_namespaces()
        if way.user
        else ()
        if way.namespaces
        else without_namespaces()
    )
    place = Place(base=place.base, prefix=prefix)
    name = f"safe-exec-test-{secrets.token_hex(8)}"
    (place.folder / "there.txt").write_text("before")
    (place.folder / "inner").mkdir()
    (place.folder / "inner" / "deep.txt").write_text("deep")
    if way.large:
        with (place.folder / "large.bin").open("wb") as file:
            file.truncate(64 << 20)
    path = place.notebook(
        "import os",
        leaving(place, way, name),
        "x = 1",
        f"assert open('made.txt').read() == 'made'\n{CRASH}",
    )
    if way.user:
        for entry in (place.folder, *place.folder.rglob("*")):
            os.chown(entry, NOBODY, NOBODY)
    with ExitStack() as stack:
        outer = [Path("/dev/shm", name), Path("/tmp", name)] if way.namespaces else []
        for path_outside in outer:
            stack.callback(path_outside.unlink, missing_ok=True)
        run = Background(place, path)
        run.wait_for("search_started")
        after, times = tree(place.folder), [found.stat().st_ctime_ns for found in outer]
        code, said = run.end()
        assert tree(place.folder) == after
        assert [found.stat().st_ctime_ns for found in outer] == times
    verdict = verdict_of(path)
    assert code == 3, said
    assert code_cells(verdict) == [0, 1, 3], said
    assert verdict["culprits"]["minimal"], said
    assert warned(verdict, "could not rule out") == (not way.namespaces), said
    assert place.left() == []
    assert kept_folders(place.cache) == []


@pytest.mark.kills
def test_a_large_folder_that_the_first_run_changed_cannot_be_had_again(place: Place) -> None:
    with (place.folder / "large.bin").open("wb") as file:
        file.truncate(64 << 20)
    path = place.notebook("open('large.bin', 'r+b').write(b'changed')", CRASH)
    verdict = place.run(path).verdict
    assert verdict["culprits"] is None
    assert warned(verdict, "the first run changed large.bin")
