"""Select the notebooks of a batch from files, folders, patterns and a list.

Folders and patterns skip hidden directories (``.git``, ``.ipynb_checkpoints``), virtual
environments, ``node_modules`` and everything that git ignores. Files that safe-exec writes are
skipped even if they are named, because a shell expands ``*.ipynb`` before safe-exec sees it.
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
from safe_exec.files import nearest_file, one_line
from safe_exec.keeper.path_patterns import matches
from safe_exec.notebook.text_formats import is_text_format

SUFFIX = ".ipynb"
OURS = (".out.ipynb", ".repro.ipynb")
SKIPPED_DIRECTORIES = frozenset({"node_modules"})
GIT_SECONDS = 60


class SelectedNotebook(Struct, frozen=True, kw_only=True):
    """A notebook of the batch.

    ``source`` is the path to open, ``path`` the displayed one, relative to the root and with ``/``.
    ``documents`` is the stem of its documents, relative to the output directory.
    """

    source: Path
    path: str
    documents: str


class Selection(Struct, frozen=True, kw_only=True):
    """The notebooks in the order of their paths.

    ``ours`` counts the skipped files that safe-exec wrote; ``notes`` are messages for the user.
    """

    root: Path
    notebooks: tuple[SelectedNotebook, ...]
    ours: int = 0
    notes: tuple[str, ...] = ()


class _FileSet(Struct, kw_only=True):
    """Files by their real path: a file with two names counts once, under the first name."""

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
    """Select the notebooks that ``arguments`` and ``listed`` name, except those below ``out``.

    ``listed`` has the lines of standard input. Raises UsageError for a missing file, for a pattern
    without a match, and if no argument names a notebook.
    """
    selection = _FileSet(cwd=cwd)
    for argument in arguments:
        _add_argument(argument, selection, out)
    for line in listed:
        if (
            line.endswith(SUFFIX) or (cwd / line).is_dir()
            # `git diff --name-only` also lists files that are no notebooks.
        ):
            _add_argument(line, selection, out)
    if arguments and not selection.files:
        hint = (
            f" but {len(selection.ours)} that safe-exec wrote (`safe-exec run` runs one of them)"
            if selection.ours
            else ""
        )
        raise UsageError(f"{' '.join(map(one_line, arguments))}: no notebooks found{hint}")
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
    """Return whether safe-exec writes files of this name."""
    return name.endswith(OURS)


def excluded(pattern: str, path: str) -> bool:
    """Return whether ``--exclude pattern`` matches ``path``, as in ``safe-exec.yaml``.

    A pattern without ``/`` matches a file or folder name at any depth.
    """
    pattern = pattern.removeprefix("./")
    if "/" in pattern.rstrip("/"):
        return matches(pattern, path) or matches(f"{pattern.rstrip('/')}/", path)
    name = pattern.rstrip("/")
    return matches(f"**/{name}/**/*", path) or (
        not pattern.endswith("/") and matches(f"**/{name}", path)
    )


def document_stems(paths: Sequence[str]) -> dict[str, str]:
    """Return the stem of each notebook's documents: its path without ``.ipynb``.

    The suffix stays if two notebooks would share a stem (``a.ipynb`` and ``a.IPYNB``).
    """
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


# --- paths ----------------------------------------------------------------------------------


def _plain(path: Path, cwd: Path) -> Path:
    """Return an absolute path without ``..``."""
    # Behind a symlink `..` is the parent of its target, so dropping it from the text may name
    # another directory. The real path is used then.
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
    """Return the directory that displayed paths are relative to."""
    # The working directory, or the common parent if a notebook lies outside of it.
    every = list(paths)
    if all(path.is_relative_to(cwd) for path in every):
        return cwd
    return Path(os.path.commonpath([path.parent for path in every]))


# --- arguments ------------------------------------------------------------------------------


def _add_argument(argument: str, selection: _FileSet, out: Path) -> None:
    path = Path(argument)
    if (selection.cwd / path).is_dir():
        _add_unless_ignored(_walk(selection.cwd, path, out), selection)
    elif os.path.lexists(selection.cwd / path):
        selection.add(path)
    elif glob.has_magic(argument):
        _add_pattern(argument, selection, out)
    else:
        raise UsageError(f"{one_line(argument)}: no such file or directory{nearest_file(path)}")


def _add_pattern(pattern: str, selection: _FileSet, out: Path) -> None:
    hits = [Path(hit) for hit in sorted(glob.glob(pattern, root_dir=selection.cwd, recursive=True))]
    if not hits:
        raise UsageError(f"{one_line(pattern)}: matches nothing")
    # `docs/*.md` names notebooks kept as text; `docs/*` does not.
    suffixes = {SUFFIX, *({Path(pattern).suffix} if is_text_format(Path(pattern)) else ())}
    files = [hit for hit in hits if hit.suffix in suffixes and (selection.cwd / hit).is_file()]
    for folder in (hit for hit in hits if "**" not in pattern and (selection.cwd / hit).is_dir()):
        files += _walk(selection.cwd, folder, out)
    _add_unless_ignored([file for file in files if _is_meant(file, selection.cwd, out)], selection)


def _is_meant(file: Path, cwd: Path, out: Path) -> bool:
    """Return whether the search of a folder would also find a file that a pattern matched."""
    # If the batch runs inside its output directory, being in there says nothing about a file.
    real_out = os.path.realpath(out)
    inside = "" if Path(os.path.realpath(cwd)).is_relative_to(real_out) else real_out
    folders = [folder for folder in file.parents if folder.name not in ("", "..")]
    return all(is_walked(str(cwd / folder), folder.name, inside) for folder in folders)


def _add_unless_ignored(files: Iterable[Path], selection: _FileSet) -> None:
    every = list(files)
    # Only walks ask git: a file that the user names runs even if git ignores it.
    ignored = ignored_by_git([selection.cwd / file for file in every], selection.notes)
    for file in every:
        if selection.cwd / file not in ignored:
            selection.add(file)


def _walk(cwd: Path, folder: Path, out: Path) -> Iterator[Path]:
    """Yield the notebooks below a folder."""
    # os.walk does not follow links to directories, which may form circles.
    inside = os.path.realpath(out)
    for top, names, files in os.walk(cwd / folder):
        # Assigning to the list keeps os.walk from entering the other directories.
        names[:] = sorted(
            name for name in names if is_walked(os.path.join(top, name), name, inside)
        )
        below = folder / os.path.relpath(top, cwd / folder)
        yield from (below / name for name in sorted(files) if name.endswith(SUFFIX))


def is_walked(path: str, name: str, out: str) -> bool:
    """Return whether the search for notebooks enters a directory.

    ``out`` is the real path of the output directory.
    """
    hidden = name.startswith(".") or name in SKIPPED_DIRECTORIES
    return (
        not hidden
        # Every virtual environment has this file (PEP 405); packages ship notebooks as examples.
        and not os.path.exists(os.path.join(path, "pyvenv.cfg"))
        and os.path.realpath(path) != out
    )


# --- git ------------------------------------------------------------------------------------


# The settings of a repository can name programs that git runs with the rights of its caller, and
# the author of the repository may not be trustworthy.
WITHOUT_PROGRAMS = ("-c", "core.fsmonitor=", "-c", "core.hooksPath=/dev/null")
"""Options that keep git from running the programs which repository settings name."""
WITHOUT_HOSTS = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
"""Variables that keep git from contacting the remote of a partial clone, and from writing."""


def ignored_by_git(files: Sequence[Path], notes: list[str]) -> set[Path]:
    """Return the files that git ignores, with one call per repository."""
    # One call per repository, because git fails for a path that lies in a submodule.
    by_repository: dict[Path, list[Path]] = {}
    for file in files:
        repository = repository_of(file.parent)
        if repository is not None:
            by_repository.setdefault(repository, []).append(file)
    if not by_repository:
        return set()
    git = shutil.which("git")
    if git is None:
        notes.append("git is not installed: ignored files are not skipped")
        return set()
    ignored: set[Path] = set()
    for repository, inside in by_repository.items():
        ignored |= _run_check_ignore(git, repository, inside, notes)
    return ignored


def repository_of(folder: Path) -> Path | None:
    """Return the git repository around a folder."""
    real = Path(os.path.realpath(folder))
    return next((parent for parent in (real, *real.parents) if (parent / ".git").exists()), None)


def _run_check_ignore(
    git: str, repository: Path, files: Sequence[Path], notes: list[str]
) -> set[Path]:
    real = {os.path.join(os.path.realpath(file.parent), file.name): file for file in files}
    argv = [git, *WITHOUT_PROGRAMS, "-C", str(repository), "check-ignore", "-z", "--stdin"]
    request = b"".join(os.fsencode(path) + b"\0" for path in real)
    try:
        env = {**os.environ, **WITHOUT_HOSTS}
        process = subprocess.run(
            argv, input=request, capture_output=True, timeout=GIT_SECONDS, check=False, env=env
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        notes.append(f"{one_line(repository)}: git failed to list ignored files: {one_line(error)}")
        return set()
    # Exit status 1: none of the files is ignored.
    if process.returncode not in (0, 1):
        message = one_line(os.fsdecode(process.stderr).strip().partition("\n")[0])
        notes.append(f"{one_line(repository)}: git failed to list ignored files: {message}")
        return set()
    return {real[path] for path in map(os.fsdecode, process.stdout.split(b"\0")) if path in real}
