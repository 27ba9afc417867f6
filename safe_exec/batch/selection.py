"""Which notebooks a batch runs: files, folders, patterns, a list; each once, none that is not meant. Imports errors, files, project_file.

In folders, and in what a pattern matches, hidden directories (``.git``, ``.ipynb_checkpoints``), virtual environments, ``node_modules`` and
what git ignores are left out. What safe-exec itself writes is left out wherever it is named: a shell expands ``*.ipynb`` before we see it.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from msgspec import Struct, field

from safe_exec.errors import UsageError
from safe_exec.files import one_line
from safe_exec.limits.project_file import matches

SUFFIX = ".ipynb"
OURS = (".out.ipynb", ".repro.ipynb")
SKIPPED_DIRECTORIES = frozenset({"node_modules"})
GIT_SECONDS = 60


class SelectedNotebook(Struct, frozen=True, kw_only=True):
    """A notebook of the batch. ``source`` is where it is opened, ``path`` how it is shown: relative to the root, with ``/``.

    ``documents`` is where its documents go below the output directory, without their endings.
    """

    source: Path
    path: str
    documents: str


class Selection(Struct, frozen=True, kw_only=True):
    """The notebooks in the order of their paths. ``ours`` counts those left out because safe-exec wrote them; ``notes`` are for the user."""

    root: Path
    notebooks: tuple[SelectedNotebook, ...]
    ours: int = 0
    notes: tuple[str, ...] = ()


class _FileSet(Struct, kw_only=True):
    """Files by their real path, so that two names of one file count once; the first name stays."""

    cwd: Path
    files: dict[str, Path] = field(default_factory=dict)
    ours: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def add(self, path: Path) -> None:
        real = os.path.realpath(self.cwd / path)
        if is_ours(path.name):
            self.ours.add(real)
        else:
            self.files.setdefault(real, path)


def select(
    arguments: Sequence[str],
    *,
    listed: Iterable[str] = (),
    exclude: Sequence[str] = (),
    cwd: Path,
    out: Path,
) -> Selection:
    """The notebooks that ``arguments`` name, and those of a list (``listed``, from stdin). ``out`` itself is never walked.

    Raises UsageError for what is not there, a pattern that matches nothing, and arguments that name no notebook at all.
    """
    selection = _FileSet(cwd=cwd)
    for argument in arguments:
        _take(argument, selection, out)
    for line in listed:
        if (
            line.endswith(SUFFIX) or (cwd / line).is_dir()
        ):  # `git diff --name-only` names other files, too
            _take(line, selection, out)
    if arguments and not selection.files:
        hint = (
            f" but {len(selection.ours)} that safe-exec wrote (`safe-exec run` runs one of them)"
            if selection.ours
            else ""
        )
        raise UsageError(f"{' '.join(map(one_line, arguments))}: no notebook there{hint}")
    paths = {real: _plain(path, cwd) for real, path in selection.files.items()}
    root = _root(paths.values(), cwd)
    names = {real: PurePosixPath(path.relative_to(root)).as_posix() for real, path in paths.items()}
    included = sorted(
        (path, real)
        for real, path in names.items()
        if not any(excluded(pattern, path) for pattern in exclude)
    )
    documents = document_stems([path for path, _ in included])
    return Selection(
        root=root,
        notebooks=tuple(
            SelectedNotebook(source=selection.files[real], path=path, documents=documents[path])
            for path, real in included
        ),
        ours=len(selection.ours),
        notes=tuple(selection.notes),
    )


def is_ours(name: str) -> bool:
    """Whether a file of this name is one that safe-exec writes."""
    return name.endswith(OURS)


def excluded(pattern: str, path: str) -> bool:
    """Whether ``--exclude pattern`` leaves ``path`` out: as in ``safe-exec.yaml``; a pattern without ``/`` fits a name at any depth."""
    pattern = pattern.removeprefix("./")
    if "/" in pattern.rstrip("/"):
        return matches(pattern, path) or matches(f"{pattern.rstrip('/')}/", path)
    name = pattern.rstrip("/")
    return matches(f"**/{name}/**/*", path) or (
        not pattern.endswith("/") and matches(f"**/{name}", path)
    )


def document_stems(paths: Sequence[str]) -> dict[str, str]:
    """Where each notebook's documents go: its path without ``.ipynb``, or with it where two would meet (``a.ipynb``, ``a.IPYNB``)."""
    stems: dict[str, str] = {}
    used: set[str] = set()
    for path in sorted(paths, key=lambda path: (not path.endswith(SUFFIX), path)):
        stem = (
            path[: -len(SUFFIX)]
            if path.lower().endswith(SUFFIX) and PurePosixPath(path).name.lower() != SUFFIX
            else path
        )
        names = (stem, path, *(f"{path}-{number}" for number in range(2, len(paths) + 2)))
        stems[path] = next(name for name in names if name not in used)
        used.add(stems[path])
    return stems


# --- paths ------------------------------------------------------------------------------------------------------


def _plain(path: Path, cwd: Path) -> Path:
    """An absolute path without ``..``; through a symbolic link, ``..`` leads elsewhere than it looks."""
    absolute = cwd / path
    plain = Path(os.path.normpath(absolute))
    return (
        plain
        if ".." not in absolute.parts or _same(plain, absolute)
        else Path(os.path.realpath(absolute))
    )


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _root(paths: Iterable[Path], cwd: Path) -> Path:
    """Where shown paths begin: here, or what all have in common where one lies elsewhere."""
    every = list(paths)
    if all(path.is_relative_to(cwd) for path in every):
        return cwd
    return Path(os.path.commonpath([path.parent for path in every]))


# --- arguments --------------------------------------------------------------------------------------------------


def _take(argument: str, selection: _FileSet, out: Path) -> None:
    path = Path(argument)
    if (selection.cwd / path).is_dir():
        _take_walked(_walk(selection.cwd, path, out), selection)
    elif os.path.lexists(selection.cwd / path):
        selection.add(path)
    elif glob.has_magic(argument):
        _take_pattern(argument, selection, out)
    else:
        raise UsageError(f"{one_line(argument)}: no such file or directory")


def _take_pattern(pattern: str, selection: _FileSet, out: Path) -> None:
    hits = [Path(hit) for hit in sorted(glob.glob(pattern, root_dir=selection.cwd, recursive=True))]
    if not hits:
        raise UsageError(f"{one_line(pattern)}: matches nothing")
    files = [hit for hit in hits if hit.suffix == SUFFIX and (selection.cwd / hit).is_file()]
    for folder in (hit for hit in hits if "**" not in pattern and (selection.cwd / hit).is_dir()):
        files += _walk(selection.cwd, folder, out)
    _take_walked([file for file in files if _is_meant(file, selection.cwd, out)], selection)


def _is_meant(file: Path, cwd: Path, out: Path) -> bool:
    """Whether a walk would have come to a file that a pattern matches; where we are in the output directory, that says nothing."""
    real_out = os.path.realpath(out)
    inside = "" if Path(os.path.realpath(cwd)).is_relative_to(real_out) else real_out
    folders = [folder for folder in file.parents if folder.name not in ("", "..")]
    return all(_is_walked(str(cwd / folder), folder.name, inside) for folder in folders)


def _take_walked(files: Iterable[Path], selection: _FileSet) -> None:
    every = list(files)
    ignored = ignored_by_git([selection.cwd / file for file in every], selection.notes)
    for file in every:
        if selection.cwd / file not in ignored:
            selection.add(file)


def _walk(cwd: Path, folder: Path, out: Path) -> Iterator[Path]:
    """The notebooks below a folder. Links to directories are not followed: they may lead round in circles."""
    inside = os.path.realpath(out)
    for top, names, files in os.walk(cwd / folder):
        names[:] = sorted(
            name for name in names if _is_walked(os.path.join(top, name), name, inside)
        )
        below = folder / os.path.relpath(top, cwd / folder)
        yield from (below / name for name in sorted(files) if name.endswith(SUFFIX))


def _is_walked(path: str, name: str, out: str) -> bool:
    hidden = name.startswith(".") or name in SKIPPED_DIRECTORIES
    return (
        not hidden
        and not os.path.exists(os.path.join(path, "pyvenv.cfg"))
        and os.path.realpath(path) != out
    )


# --- git --------------------------------------------------------------------------------------------------------


# A repository's own settings name programs, which git runs as whoever calls it; and who wrote the repository may be nobody to be trusted.
WITHOUT_PROGRAMS = ("-c", "core.fsmonitor=", "-c", "core.hooksPath=/dev/null")
"""What git runs to read its index, but not for us."""
WITHOUT_HOSTS = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
"""What it lacks of a partial clone stays away: to fetch it is to run what the settings of its remote say. Nothing is written."""


def ignored_by_git(files: Sequence[Path], notes: list[str]) -> set[Path]:
    """Those of ``files`` that git ignores. One call for each repository: a path in a submodule is an error to the one around it."""
    by_repository: dict[Path, list[Path]] = {}
    for file in files:
        repository = _repository_of(file.parent)
        if repository is not None:
            by_repository.setdefault(repository, []).append(file)
    if not by_repository:
        return set()
    git = shutil.which("git")
    if git is None:
        notes.append("git is not installed: files that it would ignore are not left out")
        return set()
    ignored: set[Path] = set()
    for repository, inside in by_repository.items():
        ignored |= _ask_git(git, repository, inside, notes)
    return ignored


def _repository_of(folder: Path) -> Path | None:
    real = Path(os.path.realpath(folder))
    return next((parent for parent in (real, *real.parents) if (parent / ".git").exists()), None)


def _ask_git(git: str, repository: Path, files: Sequence[Path], notes: list[str]) -> set[Path]:
    real = {os.path.join(os.path.realpath(file.parent), file.name): file for file in files}
    argv = [git, *WITHOUT_PROGRAMS, "-C", str(repository), "check-ignore", "-z", "--stdin"]
    request = b"".join(os.fsencode(path) + b"\0" for path in real)
    try:
        env = {**os.environ, **WITHOUT_HOSTS}
        process = subprocess.run(
            argv, input=request, capture_output=True, timeout=GIT_SECONDS, check=False, env=env
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        notes.append(
            f"{one_line(repository)}: git could not say what it ignores: {one_line(error)}"
        )
        return set()
    if process.returncode not in (0, 1):  # 1: it ignores none of them
        message = one_line(os.fsdecode(process.stderr).strip().partition("\n")[0])
        notes.append(f"{one_line(repository)}: git could not say what it ignores: {message}")
        return set()
    return {real[path] for path in map(os.fsdecode, process.stdout.split(b"\0")) if path in real}
