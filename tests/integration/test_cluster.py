"""Batches on a dask cluster of real processes: the same results as on one machine, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.integration.dask_cluster import DaskCluster
from tests.integration.test_batch import Place, counting
from tests.support import make_notebook, marked_processes, private_directory, wait_until

LEFT_SECONDS = 20
"""Fork servers without notebooks end after five seconds."""


class ClusterPlace(Place):
    """A folder for batches, and a cluster whose processes carry the mark of this test."""

    def __init__(self, folder: Path, own: Path) -> None:
        super().__init__(folder, own)
        self.scratch = own / "tmp"
        self.scratch.mkdir()
        (own / "dask").mkdir()
        self.env |= {"TMPDIR": str(self.scratch)}
        self.cluster = DaskCluster(own / "dask", self.env)

    def own_processes(self) -> list[int]:
        """The processes of the cluster itself."""
        return [
            process.pid
            for process in (self.cluster.scheduler, *self.cluster.workers.values())
            if process is not None
        ]

    def left(self) -> list[str]:
        """What a batch left behind, the cluster itself apart."""
        own = [str(pid) for pid in self.own_processes()]
        rest = [line for line in super().left() if line not in own]
        return rest + [str(path) for path in self.scratch.glob("safe-exec-worker-*")]

    def done_on_cluster(self, process: subprocess.Popen[str], seconds: float = 200) -> Any:
        """Wait for a batch, and for everything of it to be gone."""
        stdout, stderr = process.communicate(timeout=seconds)
        wait_until(lambda: self.left() == [], LEFT_SECONDS, f"everything gone: {self.left()}")
        return self.done(process.returncode, stdout, stderr)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[ClusterPlace]:
    with private_directory() as own:
        folder = tmp_path / "project"
        folder.mkdir()
        place = ClusterPlace(folder, own)
        with place.cluster:
            yield place
        wait_until(lambda: marked_processes(place.mark) == [], LEFT_SECONDS, "all processes gone")


def wait_for_start(place: Place, path: str, attempts: int = 1) -> str:
    """Wait until a notebook was let start this often; return the machine of the last start."""

    def machines() -> list[str]:
        return [
            event["machine"]
            for event in place.journal()
            if event["event"] == "started" and event["path"] == path
        ]

    wait_until(lambda: len(machines()) >= attempts, 60, f"the start of {path}")
    return machines()[-1]


# --- the same as on one machine -------------------------------------------------------------------------------


@pytest.mark.kills
def test_a_cluster_gives_the_same_results_as_one_machine(tmp_path: Path) -> None:
    with private_directory() as own:
        place = Place(tmp_path, own)
        kinds: dict[str, tuple[str, ...]] = {
            "passes": ("x = 1", "print(x)"),
            "raises": ("a = 1", "b = 2\nraise ValueError('meant')"),
            "crashes": ("x = 1", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"),
            "grows": (
                "big = [bytearray(1 << 20) for _ in range(60)]",
                "more = bytearray(900 << 20)",
            ),
            "exits": ("import os", "os._exit(3)"),
            "hangs": ("import time", "time.sleep(60)"),
        }
        for name, sources in kinds.items():
            make_notebook(tmp_path / f"{name}.ipynb", *sources)
        (tmp_path / "broken.ipynb").write_text("{")
        options = (".", "--memory", "400M", "--cell-timeout", "2")
        one = place.run(*options, "-j", "3")
        several = place.run(*options, "--cluster", "local:3")
        assert one.code == several.code
        varying = {"seconds": None}
        for row in one.summary["notebooks"]:
            assert several.row(row["path"]) | varying == row | varying


# --- faults ---------------------------------------------------------------------------------------------------


class CountedNotebooks:
    """Notebooks of mixed outcomes that put each of their runs on record."""

    ENDINGS: ClassVar[dict[str, tuple[str, ...]]] = {
        "passed": (),
        "cell_error": ("raise ValueError('meant')",),
        "kernel_died": ("import os\nos._exit(3)",),
    }

    def __init__(self, place: Place, count: int) -> None:
        self.place, self.counts = place, place.own / "counts"
        self.counts.mkdir()
        kinds = ["cell_error", *["passed"] * 4, "kernel_died", *["passed"] * 4]
        self.statuses = {f"{'abc'[n % 3]}/n{n:03}.ipynb": kinds[n % 10] for n in range(count)}
        # The number of runs of each notebook when its record was first seen.
        self.runs: dict[str, int] = {}
        for name, status in self.statuses.items():
            path = place.folder / name
            path.parent.mkdir(exist_ok=True)
            make_notebook(path, *counting(self.record(name), "x = 1"), *self.ENDINGS[status])

    def record(self, name: str) -> Path:
        return self.counts / Path(name).stem

    def size(self, name: str) -> int:
        return self.record(name).stat().st_size if self.record(name).exists() else 0

    def note_finished(self) -> None:
        for name in self.place.finished() - self.runs.keys():
            self.runs[name] = self.size(name)


class Killer:
    """Kills workers, the runner and the scheduler of a batch, and starts them again."""

    def __init__(self, place: ClusterPlace, chance: random.Random) -> None:
        self.place, self.chance = place, chance
        self.victims = Counter[str]()
        self.workers = iter(range(1000))
        self.start_workers(3)
        self.batch = self.start_batch()

    def start_workers(self, count: int) -> None:
        for _ in range(count):
            self.place.cluster.start_worker(f"w{next(self.workers)}")

    def start_batch(self) -> subprocess.Popen[str]:
        address = self.place.cluster.address
        return self.place.start(".", "--cluster", address, "--resume", "--no-bisect")

    def kill_one(self) -> None:
        victim = self.chance.choices(["worker", "runner", "scheduler"], [6, 2, 1])[0]
        self.victims[victim] += 1
        getattr(self, f"kill_{victim}")()

    def kill_worker(self) -> None:
        cluster = self.place.cluster
        cluster.kill_worker(self.chance.choice(list(cluster.workers)))
        self.start_workers(1)

    def kill_runner(self) -> None:
        self.batch.kill()
        self.batch.communicate(timeout=60)
        self.batch = self.start_batch()

    def kill_scheduler(self) -> None:
        cluster = self.place.cluster
        cluster.kill_scheduler()
        _, stderr = self.batch.communicate(timeout=60)
        # 3: it had just come to its end.
        assert self.batch.returncode in (3, 7), stderr
        # Workers end with their scheduler, and their notebooks with them.
        wait_until(lambda: self.place.left() == [], LEFT_SECONDS, "nothing left")
        for name in tuple(cluster.workers):
            # One that had not registered yet would wait for its scheduler for ever.
            cluster.kill_worker(name)
        cluster.start_scheduler()
        self.start_workers(3)
        self.batch = self.start_batch()


@pytest.mark.kills
@pytest.mark.timeout(900)
def test_whatever_is_killed_each_notebook_finishes_once(place: ClusterPlace) -> None:
    """SIGKILL at random moments; SAFE_EXEC_CLUSTER_ROUNDS=50 for more of them than CI has time for."""
    seed = int(os.environ.get("SAFE_EXEC_SEED", secrets.randbelow(10**6)))
    rounds = int(os.environ.get("SAFE_EXEC_CLUSTER_ROUNDS", "6"))
    print(f"SAFE_EXEC_SEED={seed}")  # noqa: T201 - to repeat a failure
    chance = random.Random(seed)
    notebooks = CountedNotebooks(place, 120)
    killer = Killer(place, chance)
    for _ in range(rounds):
        goal = min(len(notebooks.runs) + chance.randint(0, 2 * (120 // rounds)), 119)
        deadline = time.monotonic() + chance.uniform(5, 15)
        # Now in the start of a worker or of the batch, now between notebooks, now within one.
        while len(notebooks.runs) < goal and time.monotonic() < deadline:
            notebooks.note_finished()
            time.sleep(chance.uniform(0, 0.05))
        if killer.batch.poll() is None:
            killer.kill_one()
    done = place.done_on_cluster(killer.batch, 600)
    notebooks.note_finished()
    assert done.code == 3 and done.statuses() == notebooks.statuses, f"seed {seed}"
    # Nothing ran again after it had finished, and each notebook has one record.
    runs = {name: notebooks.size(name) for name in notebooks.statuses}
    assert runs == notebooks.runs, f"seed {seed}"
    finishes = Counter(event["path"] for event in place.journal() if event["event"] == "finished")
    assert set(finishes.values()) == {1} and len(finishes) == 120, f"seed {seed}"
    assert killer.victims["worker"], f"no worker was killed (seed {seed})"


@pytest.mark.kills
@pytest.mark.bed("root")
def test_a_notebook_that_loses_two_machines_is_given_up_and_not_blamed(place: ClusterPlace) -> None:
    make_notebook(place.folder / "long.ipynb", "import time", "time.sleep(300)")
    for machine in ("node-a", "node-b"):
        place.cluster.start_worker(machine, machine=machine)
    process = place.start(".", "--cluster", place.cluster.address, "--no-bisect")
    for attempt in (1, 2):
        place.cluster.kill_worker(wait_for_start(place, "long.ipynb", attempt))
    done = place.done_on_cluster(process)
    row = done.row("long.ipynb")
    assert (done.code, row["status"], sorted(row["losses"])) == (
        7,
        "internal_error",
        ["node-a", "node-b"],
    )
    assert row["summary"].startswith("worker lost 2 times, on node-")
    verdict = json.loads((place.out / row["verdict"]).read_text())
    assert verdict["crash_cell"] is None and verdict["environment"]["machine"] is None


@pytest.mark.kills
@pytest.mark.bed("root")
def test_a_notebook_runs_again_on_another_machine(place: ClusterPlace) -> None:
    flag = place.own / "flag"
    source = f"import os, time\nif not os.path.exists({str(flag)!r}): time.sleep(300)"
    make_notebook(place.folder / "a.ipynb", source)
    place.cluster.start_worker("node-a", machine="node-a")
    process = place.start(".", "--cluster", place.cluster.address)
    wait_for_start(place, "a.ipynb")
    flag.touch()
    for machine in ("node-b", "node-a"):
        place.cluster.start_worker(f"{machine}-2", machine=machine)
    wait_until(lambda: place.cluster.log("node-b-2").count("Registered"), 60, "the worker")
    place.cluster.kill_worker("node-a")
    done = place.done_on_cluster(process)
    row = done.row("a.ipynb")
    assert (row["status"], row["machine"], row["losses"]) == ("passed", "node-b", ["node-a"])
    verdict = json.loads((place.out / row["verdict"]).read_text())
    assert verdict["warnings"][0].startswith("worker lost: node-a stopped")


@pytest.mark.kills
def test_a_signal_ends_the_notebooks_on_all_workers_in_order(place: ClusterPlace) -> None:
    for n in range(6):
        make_notebook(place.folder / f"{n}.ipynb", "print('begun')", "import time\ntime.sleep(300)")
    for name in "ab":
        place.cluster.start_worker(name)
    process = place.start(".", "--cluster", place.cluster.address)
    wait_until(
        lambda: sum(event["event"] == "started" for event in place.journal()) == 2,
        60,
        "two notebooks",
    )
    process.send_signal(signal.SIGINT)
    done = place.done_on_cluster(process)
    assert done.code == 130
    assert Counter(done.statuses().values()) == {"cancelled": 2, "not_run": 4}
    assert place.finished() == set()


# --- placement and files ----------------------------------------------------------------------------------------


@pytest.mark.kills
def test_a_request_larger_than_any_worker_is_refused_at_once(place: ClusterPlace) -> None:
    make_notebook(place.folder / "small.ipynb", "1")
    limits = {"limits": {"memory": "600M"}}
    make_notebook(place.folder / "large.ipynb", "1", safe_exec=limits)
    place.cluster.start_worker("a", "--resources", "safe_exec_memory=500e6 safe_exec_cpus=1")
    process = place.start(".", "--cluster", str(place.cluster.file))
    done = place.done_on_cluster(process)
    assert done.statuses() == {"large.ipynb": "refused", "small.ipynb": "passed"}
    error = done.row("large.ipynb")["error"]
    assert error.startswith("it requests 600 MiB of memory and 1 CPU, more than any worker has: ")
    assert "477 MiB, 1 CPU" in error


@pytest.mark.kills
@pytest.mark.bed("root", "mount")
def test_files_reach_a_machine_without_a_shared_file_system(place: ClusterPlace) -> None:
    (place.folder / ".git").mkdir()
    (place.folder / "docs").mkdir()
    (place.folder / "shared").mkdir()
    (place.folder / "shared/helper.py").write_text("value = 42")
    (place.folder / "docs/data.txt").write_text("content")
    cells = (
        "import sys\nsys.path.insert(0, '../shared')\nimport helper\nprint(helper.value)",
        "print(open('data.txt').read())\nopen('written.txt', 'w').write('x')",
        "raise ValueError('meant')",
    )
    for name in ("a", "b", "c"):
        make_notebook(place.folder / f"docs/{name}.ipynb", *cells)
    # The worker sees an empty directory in place of the project.
    hidden = f'mount -t tmpfs none {place.folder} && exec "$@"'
    place.cluster.start_worker("a", prefix=("unshare", "--mount", "sh", "-c", hidden, "sh"))
    process = place.start("docs", "--cluster", place.cluster.address, "--no-bisect")
    done = place.done_on_cluster(process)
    assert set(done.statuses().values()) == {"cell_error"}, done.stderr
    row = done.row("docs/a.ipynb")
    document = (place.out / row["notebook"]).read_text()
    assert "42" in document and "content" in document
    verdict = json.loads((place.out / row["verdict"]).read_text())
    # Paths are the user's own, and nothing of the worker's copy is left.
    assert verdict["cwd"] == str(place.folder / "docs")
    assert verdict["notebook"]["path"] == "docs/a.ipynb"
    assert "safe-exec-worker" not in document + json.dumps(verdict)
    assert not (place.folder / "docs/written.txt").exists()
    # One archive for all notebooks of the repository.
    assert len(list((place.own / "cache/safe-exec/archives").iterdir())) == 1


# --- options that a cluster has to keep -------------------------------------------------------------------------


@pytest.mark.kills
def test_changed_notebooks_run_again_on_a_cluster_and_others_do_not(place: ClusterPlace) -> None:
    for name in ("same", "changes", "fails"):
        last = "1 / 0" if name == "fails" else "x"
        make_notebook(place.folder / f"{name}.ipynb", *counting(place.own / name, "x = 1"), last)
    place.cluster.start_worker("a")
    # A limit in per cent would refer to the worker there, and to this machine here.
    own = (".", "--memory", "400M", "--only-changed", "--no-bisect")
    options = (*own, "--cluster", place.cluster.address)
    first = place.done_on_cluster(place.start(*options))
    assert Counter(first.statuses().values()) == {"passed": 2, "cell_error": 1}
    changed = (*counting(place.own / "changes", "x = 1"), "print(x)")
    make_notebook(place.folder / "changes.ipynb", *changed)
    second = place.done_on_cluster(place.start(*options))
    assert second.statuses() == {
        "same.ipynb": "unchanged",
        "changes.ipynb": "passed",
        "fails.ipynb": "cell_error",
    }
    runs = {name: (place.own / name).stat().st_size for name in ("same", "changes", "fails")}
    assert runs == {"same": 1, "changes": 2, "fails": 2}
    # The packages are the same on this machine, so its own batch skips the notebook too.
    here = place.done_on_cluster(place.start(*own))
    assert here.statuses()["same.ipynb"] == "unchanged"


@pytest.mark.kills
def test_a_notebook_is_retried_on_a_cluster_and_is_flaky(place: ClusterPlace) -> None:
    # A kill that nobody explains may pass; an exception is the notebook's own.
    flag = place.own / "flag"
    dies_once = f"import os\nif not os.path.exists({str(flag)!r}):\n    open({str(flag)!r}, 'w')"
    killed = (
        f"{dies_once}\n    import subprocess\n    subprocess.run(['sh', '-c', 'kill -9 $PPID'])"
    )
    make_notebook(place.folder / "dies-once.ipynb", killed)
    make_notebook(place.folder / "raises.ipynb", *counting(place.own / "raises", "1 / 0"))
    place.cluster.start_worker("a")
    process = place.start(".", "--cluster", place.cluster.address, "--retries", "2", "--no-bisect")
    done = place.done_on_cluster(process)
    row = done.row("dies-once.ipynb")
    assert (row["status"], row["attempts"], row["flaky"]) == ("passed", 2, True), row
    row = done.row("raises.ipynb")
    assert (row["status"], row["attempts"], row["flaky"]) == ("cell_error", 1, False), row
    attempts = [
        event["attempt"]
        for event in place.journal()
        if event["event"] == "started" and event["path"] == "dies-once.ipynb"
    ]
    assert attempts == [1, 2]


@pytest.mark.kills
@pytest.mark.bed("root", "bubblewrap")
def test_a_requirement_is_checked_where_a_notebook_runs(place: ClusterPlace) -> None:
    make_notebook(place.folder / "a.ipynb", "1")
    # Without bubblewrap in its PATH this worker cannot hide a home as this machine can.
    lacks = ("env", f"PATH={place.own}")
    place.cluster.start_worker("lacks", machine="lacks", prefix=lacks)
    wait_until(lambda: place.cluster.log("lacks").count("Registered"), 60, "the worker")
    own = (".", "--limits", "ci", "--memory", "400M", "--require", "own-processes")
    options = (*own, "--cluster", place.cluster.address)
    refused = place.done_on_cluster(place.start(*options))
    error = refused.row("a.ipynb")["error"]
    assert error.startswith("--require: no worker enforces own_processes: lacks"), error
    place.cluster.start_worker("able", machine="able")
    wait_until(lambda: place.cluster.log("able").count("Registered"), 60, "the worker")
    done = place.done_on_cluster(place.start(*options))
    row = done.row("a.ipynb")
    assert (row["status"], row["machine"]) == ("passed", "able"), row["error"]
