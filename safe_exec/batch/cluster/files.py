"""Give a worker the files of a notebook: by path on a shared file system, else by content.

The runner packs the git repository around a notebook, or its folder if the repository is too large,
and sends the archive once to each machine, which stores it under its digest. Each notebook runs in
a fresh copy of its own. Its documents return by content; other files that it writes do not.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.batch.cluster.messages import NotebookRequest, SourceFiles
from safe_exec.batch.selection import is_walked, repository_of
from safe_exec.cache import cache_root
from safe_exec.errors import UsageError
from safe_exec.files import one_line
from safe_exec.units import format_size
from safe_exec.workflows.job import Job

MOST_BYTES = 512 << 20
"""The most bytes of a folder that are sent to a worker."""
PIECE_BYTES = 8 << 20
KEPT_DAYS = 7
_DAY = 86400.0


class Workspace(Struct, frozen=True, kw_only=True):
    """The directories in which a worker runs a notebook.

    ``job`` has the paths of this machine. ``documents`` is the output directory here. ``originals``
    maps directories of this machine to those of the runner.
    """

    job: Job
    documents: Path
    originals: tuple[tuple[str, str], ...]


# --- on the runner ------------------------------------------------------------------------------


def describe(source: Path, sha256: str) -> SourceFiles:
    """Identify the notebook's file. Raises OSError."""
    path = Path(os.path.abspath(source))
    return SourceFiles(
        path=str(path),
        sha256=sha256,
        modified=path.stat().st_mtime_ns,
        base=str(path.parent),
    )


def with_base(source: SourceFiles, out: Path, most: int = MOST_BYTES) -> SourceFiles:
    """Choose the folder to send: the repository around the notebook, or the notebook's folder.

    Raises UsageError if both are too large.
    """
    folder = Path(source.path).parent
    repository = repository_of(folder)
    for base in (repository, folder):
        if base is not None and _size(base, out, most) <= most:
            return replace(source, base=str(base), is_repository=base == repository)
    raise UsageError(
        f"{one_line(folder)}: its files are larger than {format_size(most)}, the most that is sent "
        "to a worker; use a shared file system"
    )


def _size(base: Path, out: Path, most: int) -> int:
    total = 0
    for path in _walk(base, out):
        total += path.lstat().st_size
        if total > most:
            break
    return total


def pack(base: Path, out: Path) -> tuple[str, IO[bytes]]:
    """Pack a folder into a file without a name; return the digest of its content, and the file.

    Raises OSError.
    """
    # A runner that is killed leaves no file without a name behind.
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    # The same content has the same digest: sorted, without owners and without a time of packing.
    with (
        gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1, mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in _walk(base, out):
            archive.add(path, str(path.relative_to(base)), recursive=False, filter=_without_owner)
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest(), file


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = int(member.mtime)
    return member


def _walk(base: Path, out: Path) -> Iterator[Path]:
    """Yield the files and folders to send, as a batch selects them, without sockets and devices."""
    real_out = os.path.realpath(out)
    for top, names, files in os.walk(base):
        names[:] = sorted(
            name for name in names if is_walked(os.path.join(top, name), name, real_out)
        )
        for name in sorted([*names, *files]):
            path = Path(top) / name
            with contextlib.suppress(OSError):
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or _is_inner_link(path, base):
                    yield path


def _is_inner_link(path: Path, base: Path) -> bool:
    if not path.is_symlink():
        return False
    target = os.readlink(path)
    return not os.path.isabs(target) and Path(
        os.path.normpath(path.parent / target)
    ).is_relative_to(base)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- on the worker ------------------------------------------------------------------------------


def is_shared(source: SourceFiles) -> bool:
    """Return whether the notebook's file is the same on this machine, by time and content."""
    path = Path(source.path)
    try:
        return path.stat().st_mtime_ns == source.modified and digest_of(path) == source.sha256
    except OSError:
        return False


def store() -> Path:
    """Return the directory of archives, without old ones. Raises OSError."""
    directory = cache_root() / "archives"
    directory.mkdir(mode=0o700, exist_ok=True)
    for entry in os.scandir(directory):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > KEPT_DAYS * _DAY:
                os.unlink(entry.path)
    return directory


def has_archive(digest: str) -> bool:
    """Return whether this machine has an archive; if so, postpone its deletion."""
    try:
        os.utime(store() / digest)
    except OSError:
        return False
    return True


def put_piece(digest: str, transfer: str, data: bytes, *, last: bool) -> None:
    """Append a piece to an archive in transfer; check the archive after the last piece.

    ``transfer`` is unique, so that two runners do not mix their pieces. Raises OSError, and
    ValueError if the content is not that of the digest.
    """
    path = store() / f"arriving-{transfer}"
    with path.open("ab") as file:
        file.write(data)
    if last:
        if digest_of(path) != digest:
            path.unlink()
            raise ValueError(f"an archive arrived damaged: {digest}")
        path.rename(path.with_name(digest))


def enter(request: NotebookRequest, place: Path) -> Workspace:
    """Change to the directory of the request's relative paths; unpack its archive if necessary.

    ``place`` is the directory to unpack into. Raises UsageError and OSError.
    """
    documents = place.with_name("documents")
    originals = [(str(documents), request.out)]
    if is_shared(request.source):
        job = request.job
        with contextlib.suppress(OSError):
            os.chdir(request.cwd)
            return Workspace(job=job, documents=documents, originals=tuple(originals))
        # The runner's working directory is not shared: absolute paths do not need it.
        job = replace(job, path=Path(request.source.path))
        return Workspace(job=job, documents=documents, originals=tuple(originals))
    assert request.source.archive is not None
    unpack(store() / request.source.archive, place)
    if request.source.is_repository:
        # git's own files are not sent, but isolation opens the repository that it recognises.
        (place / ".git").mkdir()
    originals.append((str(place), request.source.base))
    return Workspace(
        job=_moved_job(request, place), documents=documents, originals=tuple(originals)
    )


def _moved_job(request: NotebookRequest, place: Path) -> Job:
    """Return the job with the paths of the unpacked archive."""
    base, job = Path(request.source.base), request.job
    path = place / Path(request.source.path).relative_to(base)
    cwd = Path(request.cwd)
    # A path relative to the runner's working directory stays the path that the user gave.
    if not job.path.is_absolute() and cwd.is_relative_to(base):
        with contextlib.suppress(FileNotFoundError):
            os.chdir(place / cwd.relative_to(base))
            path = job.path
    if job.cwd is not None and not job.cwd.is_relative_to(base):
        raise UsageError(
            f"--cwd {one_line(job.cwd)}: lies outside of {one_line(base)}, which was sent to the "
            "worker; use a shared file system"
        )
    inner = None if job.cwd is None else place / job.cwd.relative_to(base)
    return replace(job, path=path, cwd=inner)


def unpack(archive: Path, place: Path) -> None:
    """Unpack an archive into a new directory. Raises OSError and tarfile.TarError."""
    place.mkdir(parents=True)
    with tarfile.open(archive, mode="r:gz") as pack_file:
        for member in pack_file:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise tarfile.TarError(f"{member.name}: lies outside of the archive")
            path = place / name
            if member.isdir():
                path.mkdir(exist_ok=True)
            elif member.issym():
                path.symlink_to(member.linkname)
            elif member.isreg():
                _write(pack_file, member, path)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    data = archive.extractfile(member)
    assert data is not None
    with path.open("xb") as file:
        while piece := data.read(1 << 20):
            file.write(piece)
    path.chmod(member.mode & 0o777)
    os.utime(path, (member.mtime, member.mtime))


def with_original_paths(document: bytes, workspace: Workspace) -> bytes:
    """Return a document with the runner's paths instead of those of this machine."""
    # The directories of this machine have random names, so nothing else can be replaced.
    for local, original in workspace.originals:
        document = document.replace(_json_text(local), _json_text(original))
    return document


def _json_text(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "backslashreplace")
