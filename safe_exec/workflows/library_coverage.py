"""Coverage of the library code that a notebook runs (``--coverage``), for ``coverage combine``.

The project's configuration is read here and not in the kernel, which may not be allowed to read it
and runs in another folder. The kernel reports paths and lines, and this module writes the data file
from them, so a notebook cannot supply a database of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

from safe_exec.errors import UsageError
from safe_exec.files import one_line
from safe_exec.kernel.coverage_file import CoverageFile, CoverageRecord, CoverageSettings
from safe_exec.limits.repository import is_root

if TYPE_CHECKING:
    from coverage import Coverage

# In coverage's own order.
CONFIG_FILES = (".coveragerc", ".coveragerc.toml", "setup.cfg", "tox.ini", "pyproject.toml")
_UNSAFE = re.compile(r"[^\w.-]+")
LONGEST_STEM = 60
_T = TypeVar("_T")


class CoverageRequest(Struct, frozen=True, kw_only=True):
    """A request to measure coverage.

    ``folder`` gets the data file if there is no configuration. ``config`` is the configuration;
    without one, ``searches`` tells whether to look for that of the notebook's project. ``source``
    and ``branch`` override it.
    """

    folder: Path
    config: Path | None = None
    searches: bool = True
    source: tuple[str, ...] | None = None
    branch: bool | None = None


class CoverageRun(Struct, frozen=True, kw_only=True):
    """The coverage of one run.

    ``base`` is the folder that relative paths of the configuration start at. ``context`` names the
    notebook in the data.
    """

    file: CoverageFile
    base: Path
    data_file: Path
    context: str
    relative_files: bool


def demand_coverage(option: str = "--coverage") -> None:
    """Raise UsageError if the package coverage is not installed beside safe-exec."""
    if find_spec("coverage") is None:
        raise UsageError(
            f"{option}: needs the package coverage, here and in the kernel's environment: "
            "pip install 'safe-exec[coverage]'"
        )


def open_coverage(request: CoverageRequest, notebook: Path) -> CoverageRun:
    """Read the configuration for a notebook, and open the file for its kernel.

    Raises UsageError for a configuration that coverage does not accept.
    """
    demand_coverage()
    import coverage
    from coverage.exceptions import CoverageException

    config = request.config
    if config is None and request.searches:
        config = find_config(notebook.absolute().parent)
    base = config.parent if config is not None else request.folder
    try:
        configured = coverage.Coverage(config_file=False if config is None else str(config))
        settings = _settings(configured, request, base)
    except CoverageException as error:
        raise UsageError(f"--coverage: {one_line(error)}") from None
    name = os.path.relpath(notebook.absolute(), base)
    return CoverageRun(
        file=CoverageFile(settings),
        base=base,
        data_file=base / str(configured.get_option("run:data_file")),
        context=str(configured.get_option("run:context") or name),
        relative_files=bool(configured.get_option("run:relative_files")),
    )


def find_config(folder: Path) -> Path | None:
    """Return the nearest configuration of coverage, up to the root of the folder's repository.

    Without a repository only the folder itself is searched.
    """
    parents = (folder, *folder.parents)
    root = next((number for number, directory in enumerate(parents) if is_root(directory)), 0)
    return next(filter(None, map(config_in, parents[: root + 1])), None)


def config_in(folder: Path) -> Path | None:
    """Return the configuration of coverage that lies in a folder."""
    return next((folder / name for name in CONFIG_FILES if _configures(folder / name)), None)


def _configures(path: Path) -> bool:
    """Tell whether a file configures coverage; most files of these names do not."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    if path.name.startswith(".coveragerc"):
        return True
    if path.suffix == ".toml":
        import tomllib

        try:
            return "coverage" in tomllib.loads(text).get("tool", {})
        except tomllib.TOMLDecodeError:
            return False
    import configparser

    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
    except configparser.Error:
        return False
    return any(section.startswith("coverage:") for section in parser.sections())


def _settings(configured: Coverage, request: CoverageRequest, base: Path) -> CoverageSettings:
    def option(name: str) -> Any:
        try:
            return configured.get_option(f"run:{name}")
        # An older coverage does not have it.
        except Exception:  # noqa: BLE001
            return None

    source = request.source
    if source is None:
        source = tuple(option("source") or ())
    packages, folders = option("source_pkgs") or (), option("source_dirs") or ()
    return CoverageSettings(
        branch=bool(option("branch")) if request.branch is None else request.branch,
        source=(
            *(str(base / name) if (base / name).is_dir() else name for name in source),
            *packages,
            *(str(base / name) for name in folders),
        ),
        include=tuple(_patterns(option("include") or (), base)),
        omit=tuple(_patterns(option("omit") or (), base)),
        concurrency=tuple(
            name for name in option("concurrency") or () if name != "multiprocessing"
        ),
        cover_pylib=bool(option("cover_pylib")),
        timid=bool(option("timid")),
        core=option("core"),
    )


def _patterns(patterns: Iterable[str], base: Path) -> Iterable[str]:
    # Like coverage, which takes its own working directory instead.
    return (text if text.startswith(("*", "?")) else str(base / text) for text in patterns)


# --- the data file --------------------------------------------------------------------------------


class WrittenCoverage(Struct, frozen=True, kw_only=True):
    """The data file of a run, and warnings about missing measurements."""

    path: Path | None = None
    warnings: tuple[str, ...] = ()


def write_coverage(run: CoverageRun, stem: str, run_id: str) -> WrittenCoverage:
    """Write the kernel's record to a file of its own, beside the configured data file."""
    record = run.file.read()
    warnings = tuple(_warnings(record))
    lines = _of_files(record.lines, run)
    arcs = _of_files(record.arcs, run)
    if not lines and not arcs:
        nothing = () if warnings else ("coverage: no library code was measured",)
        return WrittenCoverage(warnings=(*warnings, *nothing))
    try:
        path = _write(run, lines, arcs, f"{_UNSAFE.sub('-', stem)[:LONGEST_STEM]}.{run_id}")
    except _write_errors() as error:
        problem = f"coverage: the data could not be written: {one_line(error)}"
        return WrittenCoverage(warnings=(*warnings, problem))
    return WrittenCoverage(path=path, warnings=warnings)


def _write_errors() -> tuple[type[Exception], ...]:
    from coverage.exceptions import CoverageException

    return OSError, CoverageException


def _write(
    run: CoverageRun,
    lines: dict[str, set[int]],
    arcs: dict[str, set[tuple[int, int]]],
    suffix: str,
) -> Path:
    import coverage

    run.data_file.parent.mkdir(parents=True, exist_ok=True)
    data = coverage.CoverageData(basename=str(run.data_file), suffix=suffix)
    data.set_context(run.context)
    if arcs:
        data.add_arcs(arcs)
    else:
        data.add_lines(lines)
    # Source files that never ran.
    data.touch_files([name for name, entries in {**lines, **arcs}.items() if not entries])
    data.write()
    data.close()
    return Path(data.data_filename())


def _of_files(entries: dict[str, set[_T]], run: CoverageRun) -> dict[str, set[_T]]:
    """Return the entries of existing files; `coverage report` fails for others."""
    return {_name(path, run): numbers for path, numbers in entries.items() if os.path.isfile(path)}


def _name(path: str, run: CoverageRun) -> str:
    if run.relative_files and Path(path).is_relative_to(run.base):
        return os.path.relpath(path, run.base)
    return path


def _warnings(record: CoverageRecord) -> Iterable[str]:
    if record.missing is not None:
        python = one_line(record.missing)
        yield (
            "coverage was not measured: the kernel's environment lacks the package coverage; "
            f"install it there: {python} -m pip install coverage"
        )
    elif record.problem is not None:
        yield f"coverage is incomplete: {one_line(record.problem)}"
    elif not record.started:
        yield "coverage was not measured: it needs a Python kernel (ipykernel) that starts"
