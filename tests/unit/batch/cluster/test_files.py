"""Files of a notebook on another machine: what is packed, by which name, and what becomes of paths."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from safe_exec.batch.cluster import files
from safe_exec.batch.cluster.messages import NotebookRequest, SourceFiles
from safe_exec.errors import UsageError
from safe_exec.workflows.job import Job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "project"
    (base / "docs/data").mkdir(parents=True)
    (base / "docs/a.ipynb").write_text("{}")
    (base / "docs/data/x.csv").write_text("1,2")
    (base / "helpers.py").write_text("y = 1")
    (base / "run.sh").write_text("true")
    (base / "run.sh").chmod(0o755)
    (base / "link.py").symlink_to("helpers.py")
    (base / "outer.py").symlink_to("/etc/hostname")
    (base / ".venv").mkdir()
    (base / ".venv/pyvenv.cfg").write_text("")
    (base / "out").mkdir()
    (base / "out/a.verdict.json").write_text("{}")
    return base


def source_of(path: Path) -> SourceFiles:
    return files.describe(path, hashlib.sha256(path.read_bytes()).hexdigest())


def pack(base: Path, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    digest, archive = files.pack(base, base / "out")
    with archive:
        archive.seek(0)
        (directory / digest).write_bytes(archive.read())
    return directory / digest


def test_an_archive_holds_what_the_notebook_may_read(folder: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "s"))
        place = tmp_path / "place"
        files.unpack(pack(folder, tmp_path / "archives"), place)
    names = {str(path.relative_to(place)) for path in place.rglob("*")}
    # Neither the output directory, nor environments, nor links to the outside, nor sockets.
    assert names == {
        "docs",
        "docs/a.ipynb",
        "docs/data",
        "docs/data/x.csv",
        "helpers.py",
        "link.py",
        "run.sh",
    }
    assert os.access(place / "run.sh", os.X_OK)
    assert (place / "link.py").read_text() == "y = 1"
    assert int((place / "helpers.py").stat().st_mtime) == int(
        (folder / "helpers.py").stat().st_mtime
    )


def test_the_same_content_has_one_name(folder: Path, tmp_path: Path) -> None:
    first = pack(folder, tmp_path / "1")
    assert pack(folder, tmp_path / "2").name == first.name == files.digest_of(first)
    (folder / "helpers.py").write_text("y = 2")
    assert pack(folder, tmp_path / "3").name != first.name


def test_the_repository_is_sent_if_it_is_small_enough(folder: Path) -> None:
    source = source_of(folder / "docs/a.ipynb")
    assert files.with_base(source, folder / "out").base == str(folder / "docs")
    (folder / ".git").mkdir()
    chosen = files.with_base(source, folder / "out")
    assert (chosen.base, chosen.is_repository) == (str(folder), True)
    (folder / "large").write_bytes(b"x" * 5000)
    chosen = files.with_base(source, folder / "out", most=4500)
    assert (chosen.base, chosen.is_repository) == (str(folder / "docs"), False)
    with pytest.raises(UsageError, match="use a shared file system"):
        files.with_base(source, folder / "out", most=2)


@pytest.mark.parametrize("name", ["../evil", "/evil"])
def test_no_archive_writes_elsewhere(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "a", "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(tarfile.TarError, match="outside"):
        files.unpack(tmp_path / "a", tmp_path / "place")


def test_a_file_is_shared_by_content_and_time(folder: Path) -> None:
    path = folder / "docs/a.ipynb"
    source = source_of(path)
    assert files.is_shared(source)
    os.utime(path, (1, 1))
    assert not files.is_shared(source)
    path.unlink()
    assert not files.is_shared(source)


def test_an_archive_arrives_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = os.urandom(100)
    digest = hashlib.sha256(data).hexdigest()
    files.put_piece(digest, "t", data[:60], last=False)
    assert not files.has_archive(digest)
    files.put_piece(digest, "t", data[60:], last=True)
    assert files.has_archive(digest)
    with pytest.raises(ValueError, match="damaged"):
        files.put_piece("0" * 64, "u", data, last=True)


def test_paths_of_another_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive is unpacked; paths are those of the user, in the documents again those of the runner."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / ".git").mkdir()
    source = files.with_base(source_of(folder / "docs/a.ipynb"), folder / "out")
    archive = pack(folder, tmp_path / "archives")
    files.put_piece(archive.name, "t", archive.read_bytes(), last=True)
    request = NotebookRequest(
        flight="f",
        batch="b",
        job=Job(path=Path("docs/a.ipynb")),
        variables={},
        cwd=str(folder),
        out=str(folder / "out"),
        documents="docs/a",
        path="docs/a.ipynb",
        source=SourceFiles(
            path=source.path,
            sha256=source.sha256,
            # The file is not there on the other machine.
            modified=0,
            base=source.base,
            archive=archive.name,
            is_repository=True,
        ),
        key="k",
    )
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "scratch/files"
    workspace = files.enter(request, place)
    assert Path.cwd() == place and workspace.job.path == Path("docs/a.ipynb")
    assert (place / ".git").is_dir()
    document = f'{{"cwd": "{place}/docs", "out": "{workspace.documents}/docs/a.out.ipynb"}}'
    assert files.with_original_paths(document.encode(), workspace).decode() == (
        f'{{"cwd": "{folder}/docs", "out": "{folder}/out/docs/a.out.ipynb"}}'
    )
