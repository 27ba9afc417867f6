"""Shards become one batch again: every notebook once, documents under their own names, gaps that are no success."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from safe_exec.batch import journal as journals
from safe_exec.batch.journal import Journal, JournalRecord
from safe_exec.batch.merge import merge
from safe_exec.cli.merge import command
from safe_exec.errors import UsageError
from safe_exec.model.verdict import Status
from safe_exec.reports.batch import summary_json
from safe_exec.reports.batch.results import NotebookResult
from tests.unit.batches import make_batch, make_entry, write_notebook
from tests.unit.builders import make_verdict


def make_shard(
    root: Path,
    name: str,
    statuses: dict[str, str],
    shard: tuple[int, int] | None = None,
    *,
    is_summarised: bool = True,
    **changes: Any,
) -> Path:
    """An output directory with real documents, a journal and, unless it was killed, a summary."""
    out = root / name
    entries: list[NotebookResult] = []
    out.mkdir()
    with Journal(out, resume=False) as journal:
        journal.batch_started(root=str(root), notebooks=len(statuses), shard=shard)
        for path, status in statuses.items():
            stem = path.removesuffix(".ipynb")
            if status == "not_run":
                entries.append(make_entry(root, path, None))
                continue
            entry = make_entry(root, path, make_verdict(Status(status)))
            assert entry.verdict is not None
            verdict, notebook = out / f"{stem}.verdict.json", out / f"{stem}.out.ipynb"
            verdict.parent.mkdir(parents=True, exist_ok=True)
            entry.verdict.rename(verdict)
            write_notebook(notebook)
            entries.append(replace(entry, verdict=verdict, notebook=notebook))
            journal.finished(record_of(entries[-1], out))
        if is_summarised:
            journal.batch_finished(exit_code=0)
    batch = make_batch(root, entries, out=out, shard=shard, **changes)
    if is_summarised:
        summary_json.write(batch, out / "summary.json")
        # A summary is as old as its batch; the fixture's date lies before the journal's.
        age_journal(out, batch.started.timestamp())
    return out


def age_journal(out: Path, moment: float) -> None:
    path = out / journals.NAME
    lines = [json.loads(line) | {"time": moment} for line in path.read_bytes().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def record_of(entry: NotebookResult, out: Path) -> JournalRecord:
    def below(path: Path | None) -> str | None:
        return None if path is None else str(path.relative_to(out))

    return JournalRecord(
        path=entry.path,
        status=entry.status,
        exit_code=entry.exit_code or 0,
        seconds=entry.seconds,
        attempts=1,
        flaky=False,
        key="k",
        verdict=below(entry.verdict),
        notebook=below(entry.notebook),
    )


def paths(results: Sequence[NotebookResult]) -> dict[str, str]:
    return {result.path: result.status for result in results}


def make_target(root: Path) -> Path:
    out = root / "all"
    out.mkdir()
    return out


def test_two_shards_are_one_batch(tmp_path: Path) -> None:
    one = make_shard(tmp_path, "1", {"a.ipynb": "passed", "d/c.ipynb": "kernel_died"}, (1, 2))
    two = make_shard(tmp_path, "2", {"b.ipynb": "cell_error"}, (2, 2), jobs=3)
    out = make_target(tmp_path)
    merged = merge([two, one], out, ("safe-exec", "merge"))
    assert merged.gaps == ()
    batch = merged.batch
    assert paths(batch.results) == {
        "a.ipynb": "passed",
        "b.ipynb": "cell_error",
        "d/c.ipynb": "kernel_died",
    }
    assert (batch.exit_code, batch.jobs, batch.shard, batch.seconds) == (3, 4, None, 83.1)
    for result, source in zip(batch.results, (one, two, one), strict=True):
        stem = result.path.removesuffix(".ipynb")
        assert result.verdict == out / f"{stem}.verdict.json"
        assert result.verdict.read_bytes() == (source / f"{stem}.verdict.json").read_bytes()
        assert result.notebook == out / f"{stem}.out.ipynb" and result.notebook.is_file()
        assert result.repro is None and result.source == tmp_path / result.path
    past = journals.read(out / journals.NAME)
    assert past.complete and set(past.finished) == set(paths(batch.results))
    assert past.finished["d/c.ipynb"].verdict == "d/c.verdict.json"


def test_names_of_documents_are_those_of_an_undivided_batch(tmp_path: Path) -> None:
    one = make_shard(tmp_path, "1", {"a.ipynb": "passed"})
    two = make_shard(tmp_path, "2", {"a.IPYNB": "cell_error"})
    (tmp_path / "2/a.IPYNB.verdict.json").rename(tmp_path / "2/a.verdict.json")
    summary = (two / "summary.json").read_text().replace("a.IPYNB.", "a.")
    (two / "summary.json").write_text(summary)
    merged = merge([one, two], make_target(tmp_path), ())
    names = {result.path: result.verdict.name for result in merged.batch.results if result.verdict}
    assert names == {"a.ipynb": "a.verdict.json", "a.IPYNB": "a.IPYNB.verdict.json"}


def test_a_missing_shard_is_no_success(tmp_path: Path) -> None:
    one = make_shard(tmp_path, "1", {"a.ipynb": "passed"}, (1, 3))
    out = make_target(tmp_path)
    merged = merge([one], out, ())
    assert merged.batch.exit_code == Status.INTERNAL_ERROR.exit_code
    assert merged.gaps == ("shard 2/3, 3/3 is missing: the reports lack its notebooks",)
    assert not journals.read(out / journals.NAME).complete


@pytest.mark.parametrize("is_stale", [False, True], ids=["none", "of an earlier batch"])
def test_a_shard_that_was_killed_gives_what_its_journal_has(tmp_path: Path, is_stale: bool) -> None:
    one = make_shard(tmp_path, "1", {"a.ipynb": "passed"}, (1, 2))
    two = make_shard(tmp_path, "2", {"b.ipynb": "passed"}, (2, 2), is_summarised=is_stale)
    if is_stale:
        age_journal(two, 1.9e9)
    merged = merge([one, two], make_target(tmp_path), ())
    assert paths(merged.batch.results) == {"a.ipynb": "passed", "b.ipynb": "passed"}
    assert merged.batch.exit_code == 7
    assert len(merged.gaps) == 1 and "killed after 1 notebook;" in merged.gaps[0]


def test_a_notebook_that_did_not_run_is_taken_from_where_it_ran(tmp_path: Path) -> None:
    one = make_shard(tmp_path, "1", {"a.ipynb": "passed", "b.ipynb": "not_run"})
    two = make_shard(tmp_path, "2", {"b.ipynb": "passed"})
    merged = merge([one, two], make_target(tmp_path), ())
    assert paths(merged.batch.results) == {"a.ipynb": "passed", "b.ipynb": "passed"}


def test_two_batches_with_the_same_notebook_are_refused(tmp_path: Path) -> None:
    one = make_shard(tmp_path, "1", {"a.ipynb": "passed"})
    two = make_shard(tmp_path, "2", {"a.ipynb": "cell_error"})
    with pytest.raises(UsageError, match=r"a\.ipynb: ran in .*/1 and in .*/2"):
        merge([one, two], make_target(tmp_path), ())


def test_a_directory_without_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds neither summary"):
        merge([tmp_path], make_target(tmp_path), ())


def test_a_directory_is_not_merged_into_itself(tmp_path: Path) -> None:
    one = make_shard(tmp_path, "1", {"a.ipynb": "passed"})
    with pytest.raises(UsageError, match="into itself"):
        merge([one], one, ())


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a.verdict.json"])
def test_only_files_of_the_shard_are_copied(tmp_path: Path, name: str) -> None:
    one = make_shard(tmp_path, "1", {"a.ipynb": "passed"})
    (tmp_path / "secret").write_text("secret")
    (one / "a.verdict.json").unlink()
    (one / "a.verdict.json").symlink_to(tmp_path / "secret")
    summary = json.loads((one / "summary.json").read_text())
    summary["notebooks"][0]["verdict"] = name
    (one / "summary.json").write_text(json.dumps(summary))
    merged = merge([one], make_target(tmp_path), ())
    assert merged.batch.results[0].verdict is None
    assert not (tmp_path / "all/a.verdict.json").exists()


def test_the_command_writes_all_reports(tmp_path: Path) -> None:
    one = make_shard(tmp_path, "1", {"a.ipynb": "passed"}, (1, 2))
    two = make_shard(tmp_path, "2", {"b.ipynb": "cell_error"}, (2, 2))
    out = tmp_path / "all"
    result = CliRunner().invoke(
        command, [str(one), str(two), "--out", str(out), "--gitlab"], standalone_mode=False
    )
    assert result.return_value == 1
    assert "✗ b.ipynb" in result.output
    assert result.output.splitlines()[-1].startswith("batch: 2 notebooks: 1 passed, 1 cell_error")
    for name in ("summary.json", "junit.xml", "report.html", "codequality.json", journals.NAME):
        assert (out / name).is_file(), name
