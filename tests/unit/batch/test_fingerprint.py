"""What a batch remembers and goes by: earlier runs, the key of a run, declared inputs, kernels; what a machine has left."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from safe_exec.batch import worker
from safe_exec.batch.fingerprint import Kernels, declared_inputs, inputs_of, key_of_pass, key_of_run
from safe_exec.batch.history import KEPT_DAYS, History, RunHistory
from safe_exec.errors import NotebookError
from safe_exec.model.limits import Limits
from safe_exec.sandbox.host import capabilities, resources
from safe_exec.trial.request import Cancellation
from safe_exec.workflows.job import Job, PreparedJob
from safe_exec.workflows.prepare import prepare
from tests.support import make_notebook

# --- history ----------------------------------------------------------------------------------------------------


def test_what_is_put_is_got(tmp_path: Path) -> None:
    history = History(tmp_path)
    assert history.get(tmp_path / "a.ipynb") == RunHistory()
    memory = RunHistory(seconds=1.5, passed="key")
    history.put(tmp_path / "a.ipynb", memory)
    assert history.get(tmp_path / "x" / ".." / "a.ipynb") == memory
    assert history.get(tmp_path / "b.ipynb") == RunHistory()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"seconds": true, "passed": 1}', '{"seconds": "1"}', "{" * 100_000]
)
def test_what_is_spoilt_is_forgotten(tmp_path: Path, text: str) -> None:
    history = History(tmp_path)
    history.put(tmp_path / "a.ipynb", RunHistory(seconds=1.0, passed="k"))
    next(tmp_path.glob("*.json")).write_text(text)
    assert history.get(tmp_path / "a.ipynb") == RunHistory()


def test_without_a_cache_nothing_is_remembered(tmp_path: Path) -> None:
    history = History(None)
    history.put(tmp_path / "a.ipynb", RunHistory(seconds=1.0))
    history.tidy()
    assert history.get(tmp_path / "a.ipynb") == RunHistory()


def test_what_is_old_is_forgotten(tmp_path: Path) -> None:
    history = History(tmp_path)
    for name in ("old", "new"):
        history.put(tmp_path / name, RunHistory(seconds=1.0))
    old = tmp_path / history._file(tmp_path / "old").name
    past = time.time() - (KEPT_DAYS + 1) * 86400
    os.utime(old, (past, past))
    history.tidy()
    assert history.get(tmp_path / "old") == RunHistory() and history.get(
        tmp_path / "new"
    ) == RunHistory(seconds=1.0)


# --- keys -------------------------------------------------------------------------------------------------------


def prepared(folder: Path, **job: Any) -> PreparedJob:
    return prepare(Job(path=folder / "n.ipynb", **job))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_notebook(tmp_path / "n.ipynb", "1")
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"memory": "123M"}},
        {"limits": "strict"},
        {"walls": {"network": False}},
        {"allow_errors": True},
        {"kernel": "other"},
        {"mechanisms": ("rlimit",)},
        {"require": "open_files"},
    ],
)
def test_the_key_of_a_run_changes_with_what_was_asked(folder: Path, change: dict[str, Any]) -> None:
    assert key_of_run(prepared(folder)) == key_of_run(prepared(folder))
    assert key_of_run(prepared(folder)) != key_of_run(prepared(folder, **change))


def test_the_key_of_a_run_changes_with_the_content_and_not_with_the_file(folder: Path) -> None:
    before = key_of_run(prepared(folder))
    (folder / "n.ipynb").touch()
    assert key_of_run(prepared(folder)) == before
    make_notebook(folder / "n.ipynb", "2")
    assert key_of_run(prepared(folder)) != before


def test_the_key_of_a_pass_changes_with_inputs_and_kernel(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, kernels = prepared(folder), Kernels()
    before = key_of_pass(found, kernels, {})
    assert before == key_of_pass(found, kernels, {})
    assert before != key_of_pass(found, kernels, {"a": "hash"})
    elsewhere = replace(found, paths=replace(found.paths, cwd=folder / "x"))
    assert before != key_of_pass(elsewhere, kernels, {})
    monkeypatch.setattr(Kernels, "environment", lambda _self, _name: "another")
    assert before != key_of_pass(found, kernels, {})


def test_the_environment_of_a_kernel_names_its_packages() -> None:
    found = Kernels().environment("python3")
    assert sys.version.split()[0] in found and "ipykernel" in found
    assert Kernels().environment("bash") != found and "[" in Kernels().environment("bash")
    assert Kernels().environment("no-such-kernel") == "none"


def test_nothing_of_the_folder_that_we_are_in_is_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "platform"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'trapped')!r}, 'w')")
    monkeypatch.chdir(folder)
    assert "ipykernel" in Kernels().environment("python3")
    assert not (folder / "trapped").exists()


def test_inputs_are_hashed_below_the_notebooks_folder(folder: Path) -> None:
    (folder / "data" / "deep").mkdir(parents=True)
    (folder / "data" / "a.csv").write_text("1")
    (folder / "data" / "deep" / "b.csv").write_text("2")
    os.mkfifo(folder / "data" / "pipe.csv")

    def inputs(*patterns: str) -> dict[str, str | None]:
        make_notebook(folder / "n.ipynb", "1", safe_exec={"inputs": list(patterns)})
        return inputs_of(prepared(folder))

    assert set(inputs("data/*.csv")) == {"data/a.csv", "data/pipe.csv"}
    assert inputs("data/*.csv")["data/pipe.csv"] is None, "a pipe is not read"
    assert set(inputs("data/**/b.csv")) == {"data/deep/b.csv"}
    assert set(inputs("data")) == {"data/a.csv", "data/pipe.csv", "data/deep/b.csv"}
    assert inputs("none-*.csv") == {"none-*.csv": None}
    before = inputs("data/a.csv")
    (folder / "data" / "a.csv").write_text("3")
    assert inputs("data/a.csv") != before


@pytest.mark.parametrize("value", ["data.csv", [1], [""], {"a": 1}, True])
def test_inputs_that_are_no_list_of_patterns_are_refused(value: object) -> None:
    with pytest.raises(NotebookError, match=r"n.ipynb: metadata.safe_exec.inputs: expected a list"):
        declared_inputs({"safe_exec": {"inputs": value}}, "n.ipynb")


@pytest.mark.parametrize(
    "metadata",
    [{}, {"safe_exec": None}, {"safe_exec": {"limits": {}}}, {"safe_exec": {"inputs": None}}],
)
def test_no_inputs(metadata: dict[str, Any]) -> None:
    assert declared_inputs(metadata, "n.ipynb") == ()


# --- signals ----------------------------------------------------------------------------------------------------


def test_a_run_hears_of_signals_that_came_before_and_while_it_runs() -> None:
    broadcast = worker.SignalBroadcast()

    async def run() -> list[int]:
        cancellation = Cancellation()
        with broadcast.subscribed(cancellation):
            assert cancellation.signals == [2]
            broadcast.receive(15)
            await asyncio.sleep(0)
        broadcast.receive(1)
        await asyncio.sleep(0)
        return cancellation.signals

    broadcast.receive(2)
    assert asyncio.run(run()) == [2, 15], "and of none once it is over"
    assert broadcast.signals == [2, 15, 1]


def test_the_tasks_of_the_other_notebooks_are_none_of_ones_own() -> None:
    limits, job = (
        Limits(processes=100),
        Job(path=Path("n.ipynb"), machine=capabilities.HostCapabilities(user_tasks=7)),
    )
    assert worker.reserve_for_others(job, limits, 1) is job
    changed = worker.reserve_for_others(job, limits, 3).machine
    assert changed is not None and changed.user_tasks == 7 + 2 * (100 + worker.OWN_TASKS)
    unlimited = Job(path=Path("n.ipynb"), machine=capabilities.HostCapabilities(user_tasks=None))
    assert worker.reserve_for_others(unlimited, limits, 3) is unlimited


# --- what the machine has left ----------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of version 2 as a container has them: ours is ``a/b``."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(resources, "cgroup_mounts", lambda: {"": (tmp_path, "/")})
    monkeypatch.setattr(resources, "own_cgroups", lambda: {"": "/a/b"})
    monkeypatch.setattr(resources, "_meminfo", lambda: {"MemAvailable": 1 << 40})
    return tmp_path


def test_memory_that_a_group_above_leaves(groups: Path) -> None:
    assert resources.memory_available() == 1 << 40
    for name, most, used, cached in (("a", "1000", 700, 100), ("a/b", "max", 5, 5)):
        (groups / name / "memory.max").write_text(f"{most}\n")
        (groups / name / "memory.current").write_text(f"{used}\n")
        (groups / name / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    assert resources.memory_available() == 400


def test_processors_that_a_quota_amounts_to(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert resources.cpus_available() == 8
    (groups / "a/b/cpu.max").write_text("max 100000\n")
    assert resources.cpus_available() == 8
    (groups / "a/cpu.max").write_text("250000 100000\n")
    assert resources.cpus_available() == 3
    (groups / "a/cpu.max").write_text("10000 100000\n")
    assert resources.cpus_available() == 1


def test_memory_of_this_machine_is_known() -> None:
    available, (total, _) = resources.memory_available(), resources.memory_and_swap()
    assert available is not None and total is not None and 0 < available <= total
    assert json.dumps(resources.cpus_available()).isdigit()
