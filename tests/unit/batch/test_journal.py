"""The journal of a batch: what is on record stays, a line that was cut short is none, and one batch at a time writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from safe_exec.batch.journal import Journal, JournalRecord, read
from safe_exec.errors import UsageError


def record(path: str, key: str = "k", status: str = "passed") -> JournalRecord:
    return JournalRecord(
        path=path,
        status=status,
        exit_code=0,
        seconds=1.5,
        attempts=1,
        flaky=False,
        key=key,
        verdict=f"{path}.json",
    )


def written(folder: Path, *paths: str) -> bytes:
    with Journal(folder, resume=False) as journal:
        journal.batch_started(notebooks=len(paths))
        for path in paths:
            journal.started(path, attempt=1, run_id="r")
            journal.finished(record(path))
        journal.batch_finished(exit_code=0)
    return (folder / "journal.jsonl").read_bytes()


def untimed(entry: JournalRecord) -> JournalRecord:
    return replace(entry, time=0.0)


@pytest.mark.parametrize(
    "change", [{"mood": "bad"}, {"seconds": "long"}, {"attempts": None}, {"path": 3}, {"key": ...}]
)
def test_a_record_of_another_version_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    """Its notebook runs again."""
    written(tmp_path, "a.ipynb", "b.ipynb")
    path = tmp_path / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    changed = [
        line | change if (line["event"], line.get("path")) == ("finished", "a.ipynb") else line
        for line in lines
    ]
    kept = [{key: item for key, item in line.items() if item is not ...} for line in changed]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    past = read(path)
    assert set(past.finished) == {"b.ipynb"} and past.complete


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written(tmp_path, "a.ipynb", "b\udcff.ipynb", "c\n.ipynb")
    past = read(tmp_path / "journal.jsonl")
    assert past.complete and not past.empty
    assert untimed(past.finished["a.ipynb"]) == record("a.ipynb")
    assert past.finished["a.ipynb"].time > 0
    assert len(past.finished) == 3


def test_no_journal_is_an_empty_past(tmp_path: Path) -> None:
    past = read(tmp_path / "journal.jsonl")
    assert past.empty and not past.complete and not past.finished


def test_a_journal_cut_at_any_byte_holds_what_was_whole_before(tmp_path: Path) -> None:
    data = written(tmp_path, "a", "b", "c")
    path = tmp_path / "journal.jsonl"
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = [json.loads(line) for line in data[:size].split(b"\n")[:-1]]
        last = data[:size].split(b"\n")[-1]
        with_last = [*whole, json.loads(last)] if last and is_json(last) else whole
        wanted = {event["path"] for event in with_last if event["event"] == "finished"}
        assert set(read(path).finished) == wanted, size


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1))
def test_going_on_after_a_cut_line_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    whole = written(folder, "a", "b")
    size = round(share * len(whole))
    path = folder / "journal.jsonl"
    path.write_bytes(whole[:size])
    before = read(path).finished
    with Journal(folder, resume=True) as journal:
        assert journal.past.finished == before
        journal.batch_started()
        journal.finished(record("z"))
    after = read(path).finished
    assert untimed(after["z"]) == record("z")
    assert after == {**before, "z": after["z"]}


def test_a_new_batch_empties_it_and_knows_what_was_there(tmp_path: Path) -> None:
    written(tmp_path, "a")
    with Journal(tmp_path, resume=False) as journal:
        assert set(journal.past.finished) == {"a"}
    assert read(tmp_path / "journal.jsonl").empty


def test_what_was_begun_once_more_is_not_finished(tmp_path: Path) -> None:
    written(tmp_path, "a")
    with Journal(tmp_path, resume=True) as journal:
        journal.started("a", attempt=1, run_id="s")
    past = read(tmp_path / "journal.jsonl")
    assert not past.finished and not past.complete


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "1",
        '{"event": "finished"}',
        '{"event": "finished", "path": "x", "odd": 1}',
        "{" * 9,
        "\x00",
    ],
)
def test_lines_of_others_are_left_out(tmp_path: Path, line: str) -> None:
    written(tmp_path, "a")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    assert set(read(tmp_path / "journal.jsonl").finished) == {"a"}


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path, resume=False),
        pytest.raises(UsageError, match="another batch writes there"),
        Journal(tmp_path, resume=True),
    ):
        pass
    with Journal(tmp_path, resume=True):  # it is free again
        pass


def test_a_second_batch_leaves_the_journal_of_the_first_alone(tmp_path: Path) -> None:
    with Journal(tmp_path, resume=False) as journal:
        journal.finished(record("a"))
        with pytest.raises(UsageError), Journal(tmp_path, resume=False):
            pass
    assert set(read(tmp_path / "journal.jsonl").finished) == {"a"}


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "journal.jsonl").symlink_to("other")
    with pytest.raises(UsageError, match="cannot be written"), Journal(tmp_path, resume=False):
        pass
    assert (tmp_path / "other").read_text() == "mine"


def test_each_finished_notebook_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync = os.fsync

    def note(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)
    with Journal(tmp_path, resume=False) as journal:
        for name in "abc":
            journal.finished(record(name))
            assert synced[-1] == (tmp_path / "journal.jsonl").stat().st_size
        assert len(synced) == 3


def test_a_full_disk_is_noted_and_does_not_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with Journal(tmp_path, resume=False) as journal:
        monkeypatch.setattr(os, "write", full)
        journal.finished(record("a"))
        assert journal.trouble is not None and journal.trouble.errno == 28
