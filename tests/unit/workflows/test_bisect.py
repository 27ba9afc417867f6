"""When a search follows a run, how long it may take, and what ``bisect`` reads before it makes one. No search is made here."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec.structs
import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec import cache
from safe_exec.errors import UsageError
from safe_exec.experiments import workspace as folders
from safe_exec.model.limits import Isolation, Limits
from safe_exec.model.verdict import CauseKind, NotebookInfo, Status, Usage, Verdict
from safe_exec.reports import verdict_json
from safe_exec.workflows import bisect as searching
from safe_exec.workflows.bisect import LEAST_BUDGET, FolderSnapshot, budget_of
from safe_exec.workflows.earlier_run import find_notebook, read_verdict
from safe_exec.workflows.job import Bisect, JobPaths
from tests.unit.builders import every_verdict, make_verdict, name_of

# --- how long it may take -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "wall", "budget"),
    [
        (None, None, LEAST_BUDGET),
        (None, 0.5, LEAST_BUDGET),
        (None, 20.0, LEAST_BUDGET),
        (None, 21.0, 63.0),
        (None, 600.0, 1800.0),
        (5.0, 600.0, 5.0),
        (0.0, 600.0, 0.0),
        (math.inf, 1.0, math.inf),
        (900.0, None, 900.0),
    ],
)
def test_budgets(asked: float | None, wall: float | None, budget: float) -> None:
    """A minute, or three times the first run; what the user asks for is that, be it nothing."""
    assert budget_of(asked, make_verdict(usage=Usage(wall_seconds=wall))) == budget


# --- why there is none ------------------------------------------------------------------------------------------------------


def node(*, reproduction: bool = False) -> Any:
    metadata = {"safe_exec": {"reproduces": {"notebook": "nb.ipynb"}}} if reproduction else {}
    return nbformat.v4.new_notebook(metadata=metadata)


def why_not(
    verdict: Verdict,
    *,
    bisect: Bisect = Bisect.AUTO,
    reproduction: bool = False,
    signals: tuple[int, ...] = (),
    kept: bool = True,
    trouble: str = "",
) -> str | None:
    prepared: Any = SimpleNamespace(
        job=SimpleNamespace(keep_going=False, bisect=bisect), node=node(reproduction=reproduction)
    )
    request: Any = SimpleNamespace(cancellation=SimpleNamespace(signals=list(signals)))
    folder_snapshot: Any = SimpleNamespace(snapshot=object() if kept else None, trouble=trouble)
    return searching._why_not(prepared, verdict, request, folder_snapshot)


TALKED = make_verdict(remote_hosts=("db.example.org",))
MANY = make_verdict(remote_hosts=("a", "b", "c", "d"))
RAISED = make_verdict(Status.CELL_ERROR, CauseKind.EXCEPTION)
TALK = (
    "the notebook talked to {}, and a search runs its cells again; start it with `safe-exec bisect`"
)

DIED = make_verdict(remote_hosts=())

REASONS: dict[str, tuple[Verdict, dict[str, Any], str | None]] = {
    "a kernel that died": (DIED, {}, None),
    "passed": (make_verdict(Status.PASSED), {}, ""),
    "passed, and asked for": (make_verdict(Status.PASSED), {"bisect": Bisect.ALWAYS}, ""),
    "an exception": (RAISED, {}, ""),
    "an exception, and asked for": (RAISED, {"bisect": Bisect.ALWAYS}, None),
    "no cell": (make_verdict(crash_cell=None), {}, "no cell was running when it happened"),
    "no cell comes before all else": (
        make_verdict(crash_cell=None, remote_hosts=("a",)),
        {"signals": (2,), "kept": False},
        "no cell was running when it happened",
    ),
    "cancelled meanwhile": (DIED, {"signals": (15,)}, ""),
    "cancelled meanwhile, though asked for": (
        DIED,
        {"signals": (15,), "bisect": Bisect.ALWAYS},
        "",
    ),
    "a reproduction": (DIED, {"reproduction": True}, ""),
    "a reproduction that talked": (TALKED, {"reproduction": True}, ""),
    "a reproduction, and asked for": (DIED, {"reproduction": True, "bisect": Bisect.ALWAYS}, None),
    "talked to one": (TALKED, {}, TALK.format("db.example.org")),
    "talked to many": (MANY, {}, TALK.format("a, b, c and others")),
    "talked, and asked for": (MANY, {"bisect": Bisect.ALWAYS}, None),
    "the folder was not kept": (
        DIED,
        {"kept": False, "trouble": "no room"},
        "the folder could not be copied: no room",
    ),
    "nobody began to keep it": (
        DIED,
        {"kept": False},
        "the folder could not be copied: the copy was not started",
    ),
    "not kept, though asked for": (
        DIED,
        {"kept": False, "trouble": "no room", "bisect": Bisect.ALWAYS},
        "the folder could not be copied: no room",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    verdict, given_options, reason = REASONS[name]
    assert why_not(verdict, **given_options) == reason


# --- keeping the folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "work").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "work" / "data").write_text("x")
    (tmp_path / "work" / "nb.out.ipynb").write_text("of an earlier run")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "TMP", tmp_path / "tmp")
    work = tmp_path / "work"
    return SimpleNamespace(
        job=SimpleNamespace(keep_going=False, bisect=Bisect.AUTO, own_paths=(), tree=None),
        run_id="abc",
        paths=JobPaths(
            notebook=work / "nb.out.ipynb",
            verdict=work / "nb.verdict.json",
            repro=work / "nb.repro.ipynb",
            cwd=work,
        ),
        limits=SimpleNamespace(isolation=Isolation(), values=Limits()),
    )


def keep(prepared: Any, *, of: str | None = None, stay: bool = False) -> FolderSnapshot:
    """One run's keeping, to its end."""

    async def through() -> FolderSnapshot:
        with FolderSnapshot(prepared, of=of) as folder_snapshot:
            folder_snapshot.begin()
            await folder_snapshot.done()
            folder_snapshot.keep = stay
        return folder_snapshot

    return asyncio.run(through())


def test_what_was_kept_is_gone_in_the_end(prepared: Any) -> None:
    folder_snapshot = keep(prepared)
    assert folder_snapshot.snapshot is not None
    assert (list(folder_snapshot.snapshot.entries or ()), folder_snapshot.trouble) == (["data"], "")
    assert folder_snapshot.directories == (str(folder_snapshot.snapshot.scratch),)
    assert not folder_snapshot.snapshot.scratch.exists()


def test_a_later_search_goes_on_from_it(prepared: Any) -> None:
    first = keep(prepared, stay=True)
    assert first.snapshot is not None and first.snapshot.copy is not None
    (prepared.paths.cwd / "data").write_text("changed")
    prepared.run_id = "def"
    second = keep(prepared, of="abc")
    assert second.snapshot is not None
    assert second.snapshot.copy == first.snapshot.copy
    assert not first.snapshot.copy.exists()


def test_where_nobody_asks_nothing_is_kept(prepared: Any) -> None:
    prepared.job.bisect = Bisect.NEVER
    folder_snapshot = keep(prepared)
    assert (folder_snapshot.snapshot, folder_snapshot.directories, folder_snapshot.trouble) == (
        None,
        (),
        "",
    )


def test_trouble_is_told_and_ends_nothing(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patched:
        patched.setattr(folders, "take", full)
        folder_snapshot = keep(prepared)
    assert (folder_snapshot.snapshot, folder_snapshot.trouble) == (None, "[Errno 28] no room")
    with monkeypatch.context() as patched:
        patched.setattr(cache, "cache_root", full)
        folder_snapshot = keep(prepared)
    assert (folder_snapshot.snapshot, folder_snapshot.trouble, folder_snapshot.directories) == (
        None,
        "[Errno 28] no room",
        (),
    )


@pytest.mark.parametrize("of", ["..", "/etc", "a/b"])
def test_a_run_whose_name_is_a_path_is_not_gone_on_with(prepared: Any, of: str) -> None:
    folder_snapshot = keep(prepared, of=of)
    assert (folder_snapshot.snapshot, folder_snapshot.directories) == (None, ())
    assert folder_snapshot.trouble == f"not the name of a run: {of!r}"


# --- reading a verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", every_verdict()[::7], ids=name_of)
def test_a_verdict_is_read(tmp_path: Path, verdict: Verdict) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(verdict_json.dumps(verdict))
    found = read_verdict(path)
    assert (found.status, found.cause, found.crash_cell, found.cells) == (
        verdict.status,
        verdict.cause,
        verdict.crash_cell,
        verdict.cells,
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Input data was truncated"),
        (b"{", "Input data was truncated"),
        (b"{]", "JSON is malformed"),
        (b"null", "not a verdict of safe-exec"),
        (b"[]", "not a verdict of safe-exec"),
        (b"3", "not a verdict of safe-exec"),
        (b"\xff", "not a verdict of safe-exec"),
        (b"{}", "schema is None"),
        (b'{"schema": "other/1"}', "schema is 'other/1', expected 'safe-exec/verdict/1'"),
        (b'{"schema": "safe-exec/verdict/1"}', "verdict: "),
        (b'{"schema": "safe-exec/verdict/1", "more": 1}', "unknown field `more`"),
        (b"[" * 100_000, "not a verdict of safe-exec"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a verdict of safe-exec"),
    ],
)
def test_what_is_no_verdict_is_refused_in_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(data)
    with pytest.raises(UsageError) as refused:
        read_verdict(path)
    assert str(refused.value).startswith(f"{path}: not a verdict of safe-exec: ")
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < len(str(path)) + 300


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_verdict(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match="is a directory"):
        read_verdict(tmp_path)
    monkeypatch.setattr("safe_exec.workflows.earlier_run.MOST_BYTES", 1 << 20)
    (tmp_path / "v.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        read_verdict(tmp_path / "v.json")


DOCUMENT = json.loads(verdict_json.dumps(make_verdict()))
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        -1,
        10**400,
        1.5,
        math.inf,
        math.nan,
        "",
        "x",
        "\ud800",
        [],
        [None],
        [[]],
        {},
        {"": None},
    ]
)


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(spot for key, item in inner for spot in spots(item, (*path, key)))]


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verdicts") / "v.json"


@settings(max_examples=150, deadline=None)
@given(spot=st.sampled_from(spots(DOCUMENT)), value=ODD, drop=st.booleans())
def test_whatever_a_verdict_holds_it_is_read_or_refused(
    anywhere: Path, spot: tuple[Any, ...], value: Any, drop: bool
) -> None:
    document = json.loads(json.dumps(DOCUMENT))
    holder = document
    for key in spot[:-1]:
        holder = holder[key]
    if not spot:
        document = value
    elif drop:
        del holder[spot[-1]]
    else:
        holder[spot[-1]] = value
    anywhere.write_text(json.dumps(document))
    try:
        said = [read_verdict(anywhere).run_id]
    except UsageError as refused:
        said = str(refused).splitlines()
    assert len(said) == 1


def test_a_number_too_large_for_any_is_refused(tmp_path: Path) -> None:
    document = json.loads(json.dumps(DOCUMENT))
    document["usage"]["wall_seconds"] = 10**400
    (tmp_path / "v.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="not a verdict of safe-exec"):
        read_verdict(tmp_path / "v.json")


# --- finding its notebook ---------------------------------------------------------------------------------------------------


def verdict_of(path: Path | str, cwd: Path | str) -> Verdict:
    info = NotebookInfo(
        path=str(path), sha256=None, kernel="python3", language="python", cells=1, code_cells=1
    )
    return msgspec.structs.replace(make_verdict(), notebook=info, cwd=str(cwd))


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (("here/sub/nb.ipynb", "run/nb.ipynb", "verdicts/nb.ipynb"), "here/sub/nb.ipynb"),
        (("run/nb.ipynb", "verdicts/nb.ipynb"), "run/nb.ipynb"),
        (("verdicts/nb.ipynb",), "verdicts/nb.ipynb"),
        ((), None),
        (("run/sub/nb.ipynb", "nb.ipynb"), None),
    ],
)
def test_where_a_notebook_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], found: str | None
) -> None:
    """As it was named, seen from here; in the folder of its run; beside the verdict."""
    for name in ("here/sub", "run/sub", "verdicts"):
        (tmp_path / name).mkdir(parents=True)
    for name in there:
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    verdict, path = (
        verdict_of("sub/nb.ipynb", tmp_path / "run"),
        tmp_path / "verdicts" / "nb.verdict.json",
    )
    if found is not None:
        assert (tmp_path / "here" / find_notebook(verdict, path)).resolve() == tmp_path / found
        return
    with pytest.raises(UsageError) as refused:
        find_notebook(verdict, path)
    assert str(refused.value) == (
        f"{path}: its notebook sub/nb.ipynb does not exist; "
        "run in the original folder, or put both files into one folder"
    )


def test_a_notebook_beside_a_verdict_that_is_named_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nb.ipynb").touch()
    assert (
        find_notebook(verdict_of("/gone/nb.ipynb", "/gone"), Path("nb.verdict.json"))
        == tmp_path / "nb.ipynb"
    )


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "", ".", "/", "nb.ipynb/"])
def test_a_name_that_is_none_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nb.ipynb").mkdir()
    with pytest.raises(UsageError):
        find_notebook(verdict_of(name, tmp_path), tmp_path / "v.json")


def test_the_reproduction_goes_where_the_folder_was_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook moves its folder away and puts a link in its place: nothing is written where the link leads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, outside = tmp_path / "nb", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    job: Any = SimpleNamespace(keep_going=False, bisect=Bisect.AUTO, tree=None)
    paths = SimpleNamespace(repro=folder / "nb.repro.ipynb")
    prepared: Any = SimpleNamespace(job=job, run_id="0123456789ab", paths=paths)
    with FolderSnapshot(prepared) as folder_snapshot:
        folder.rename(tmp_path / "moved")
        folder.symlink_to(outside)
        assert folder_snapshot.write_reproduction(b"it") == tmp_path / "moved" / "nb.repro.ipynb"
    assert (tmp_path / "moved" / "nb.repro.ipynb").read_bytes() == b"it" and os.listdir(
        outside
    ) == []
