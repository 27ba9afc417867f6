"""The pytest plugin: with ``--safe-exec`` each notebook is a test.

pytest imports this module at every start, so costly imports happen inside functions.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safe_exec.integrations.pytest_options import Settings, add_options, settings_of

if TYPE_CHECKING:
    from safe_exec.model.verdict import Verdict


SUFFIX = ".ipynb"
OURS = (".out.ipynb", ".repro.ipynb")

# Copies of notebooks that Jupyter and Jupyter Book make.
NOT_WALKED = frozenset({".ipynb_checkpoints", "_build"})

# The property that marks reports of this plugin; xdist's workers transfer it.
MARK = "safe_exec_version"

# The start of the verdict's warning that names such files (``safe_exec.trial.discarded``).
NOT_KEPT = "files that were not kept"

# Parts of warnings (``safe_exec.notebook.parameters`` and ``selection``) about a likely misspelling.
UNKNOWN_PARAMETER = "unknown parameter "
NOTHING_RAN = "; no cell was run"

# ipykernel does not watch descriptors 1 and 2 of a kernel with this variable.
UNDER_TEST = "PYTEST_CURRENT_TEST"


SETTINGS = pytest.StashKey[Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options; they cost nothing without ``--safe-exec``."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Check the options before collection: a wrong limit is one error, not one per notebook."""
    if not config.getoption("safe_exec"):
        return
    from safe_exec.errors import SafeExecError

    config.addinivalue_line("markers", "safe_exec: a notebook that safe-exec runs")
    try:
        config.stash[SETTINGS] = settings_of(config)
    except SafeExecError as error:
        raise pytest.UsageError(str(error)) from None
    if not hasattr(config, "workerinput"):
        # The controller of xdist builds the reports; its workers only transfer them.
        config.pluginmanager.register(Headlines(), "safe-exec-headlines")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Return the line about limits and documents for pytest's header."""
    settings = config.stash.get(SETTINGS, None)
    if settings is None:
        return []
    own = "".join(f", {name.replace('_', '-')} {value}" for name, value in settings.options.items())
    documents = "documents" if settings.keeps else "documents of failures"
    return [f"safe-exec: limits {settings.limits or 'default'}{own}; {documents} in {settings.out}"]


# --- collection ---------------------------------------------------------------------------------


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.File | None:
    """Collect a notebook as a file with one test."""
    if parent.config.stash.get(SETTINGS, None) is None:
        return None
    if file_path.suffix != SUFFIX and not _is_named_text(file_path, parent.session):
        return None
    # A script is collected below, in place of pytest's own module.
    if file_path.suffix == ".py":
        return None
    file: NotebookFile = NotebookFile.from_parent(parent, path=file_path)
    return file


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    """Collect a script with cells, if the user named it, as a file with one test."""
    if parent.config.stash.get(SETTINGS, None) is None:
        return None
    if not _is_named_text(module_path, parent.session):
        return None
    file: NotebookFile = NotebookFile.from_parent(parent, path=module_path)
    return file


def _is_named_text(path: Path, session: pytest.Session) -> bool:
    """Return whether the user named a notebook that is kept as text."""
    # In a folder most scripts and Markdown files are no notebooks, so only named ones count.
    if not session.isinitpath(path):
        return False
    from safe_exec.notebook.text_formats import has_cells, is_text_format

    return is_text_format(path) and path.is_file() and has_cells(path, path.read_bytes())


def is_collected(path: Path) -> bool:
    """Return whether pytest collects a notebook: not one that safe-exec or Jupyter wrote."""
    return not path.name.endswith(OURS) and NOT_WALKED.isdisjoint(path.parts)


class NotebookFile(pytest.File):
    """A notebook file with a single test."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the test, or nothing for files that Jupyter or safe-exec wrote.

        Refusing such a file would be an error for ``pytest docs/*.ipynb``, where the shell names
        all of them.
        """
        if not is_collected(self.path):
            return
        item: NotebookItem = NotebookItem.from_parent(self, name=self.path.name)
        item.add_marker("safe_exec")
        yield item


class FilesNotKept(pytest.PytestWarning):
    """A notebook passed, and files that it wrote are gone with its sandbox."""


class UnusedInputs(pytest.PytestWarning):
    """A notebook passed, and a parameter or a tag that was given does not exist in it."""


class FlakyCells(pytest.PytestWarning):
    """The results of a cell differ between runs (``--safe-exec-repeat``)."""


class NotebookFailed(Exception):  # noqa: N818 - what pytest is told; the verdict says what it was
    """A notebook did not pass; ``verdict`` has the details."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.status)
        self.verdict = verdict


# --- running ------------------------------------------------------------------------------------


class NotebookItem(pytest.Item):
    """The run of one notebook."""

    _line = 0

    def runtest(self) -> None:
        """Run the notebook.

        Raises NotebookFailed, UsageError, and KeyboardInterrupt after a signal.
        """
        from safe_exec._version import __version__
        from safe_exec.model.verdict import Status

        self.user_properties.append((MARK, __version__))
        verdict = self._verdict()
        self.user_properties += properties(verdict)
        if verdict.status is Status.CANCELLED:
            # The signal arrived here, so pytest has not seen it.
            raise KeyboardInterrupt
        if verdict.status is not Status.PASSED:
            self._point_at(verdict)
            raise NotebookFailed(verdict)
        file_warnings = [warning for warning in verdict.warnings if warning.startswith(NOT_KEPT)]
        for warning in file_warnings:
            self.warn(FilesNotKept(f"{self.nodeid}: {warning}"))
        for warning in verdict.warnings:
            if warning.startswith(UNKNOWN_PARAMETER) or warning.endswith(NOTHING_RAN):
                self.warn(UnusedInputs(f"{self.nodeid}: {warning}"))
        for cell in verdict.flaky_cells:
            self.warn(FlakyCells(f"{self.nodeid}: code cell {cell.code_index + 1}: {cell.summary}"))
        if not self._settings.keeps:
            for name, path in verdict.outputs.items():
                # Only failures are worth keeping in the cache.
                if name != "coverage":
                    Path(path).unlink(missing_ok=True)

    @property
    def _settings(self) -> Settings:
        return self.config.stash[SETTINGS]

    def _verdict(self) -> Verdict:
        import asyncio

        from safe_exec.notebook.kernel_choice import KernelFallback
        from safe_exec.reports.follow import OutputFollower
        from safe_exec.workflows.job import Bisect, Job
        from safe_exec.workflows.retry import run_with_retries

        settings, stem = self._settings, self._stem()
        # Documents keep the notebook's relative path, so equal names do not collide.
        stem.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # Warnings of our dependencies do not concern the user: `-W error` is meant for their
            # own code.
            warnings.simplefilter("ignore")
            job = Job(
                path=self.path,
                limits=settings.limits,
                options=settings.options,
                walls=settings.walls,
                cwd=settings.cwd,
                inputs=settings.inputs,
                comparison=settings.comparison,
                form=settings.form,
                keep_files=settings.keep_files,
                coverage=settings.coverage,
                repeat=settings.repeat,
                output=Path(f"{stem}.out.ipynb"),
                verdict=Path(f"{stem}.verdict.json"),
                repro=Path(f"{stem}.repro.ipynb"),
                kernel=settings.kernel,
                kernel_of_language=True,
                kernel_fallback=KernelFallback(settings.kernel_fallback),
                require=settings.require,
                keep_going=settings.keep_going,
                with_locals=settings.with_locals,
                bisect=Bisect(settings.bisect),
                bisect_budget=settings.bisect_budget,
                env=self._environment(),
            )
            follower = OutputFollower(_print_line) if settings.follow else None
            sinks = () if follower is None else (follower,)
            on_output = None if follower is None else follower.take
            running = run_with_retries(job, settings.retry, sinks, on_output=on_output)
            return asyncio.run(running)

    def _environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if name != UNDER_TEST}
        return ours | self._settings.variables

    def _stem(self) -> Path:
        """Return the stem of the documents: the notebook's path below the root directory."""
        # A notebook outside of the root directory keeps its whole path, which is unique.
        root, path = self.config.rootpath, self.path
        relative = (
            path.relative_to(root) if path.is_relative_to(root) else path.relative_to(path.anchor)
        )
        return self._settings.out / relative.with_name(relative.name.removesuffix(SUFFIX))

    # --- reporting
    # ----------------------------------------------------------------------------------

    def _point_at(self, verdict: Verdict) -> None:
        """Make reports point at the failing line."""
        # pytest has asked for the location before the run and caches the answer.
        from safe_exec.reports.batch.source_map import crash_line

        line = crash_line(self.path, verdict)
        if line is not None:
            self._line = line - 1
        # Node.location is a cached_property.
        self.__dict__.pop("location", None)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Return path, line (from 0, of the failure if there is one) and name of the test."""
        return self.path, self._line, self.name

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the diagnosis as plain text, which tools that annotate pull requests can read."""
        from safe_exec.errors import SafeExecError

        if isinstance(excinfo.value, NotebookFailed):
            from safe_exec.reports.terminal import Style, diagnosis

            return "\n".join(diagnosis(excinfo.value.verdict, Style()))
        if isinstance(excinfo.value, SafeExecError):
            return f"safe-exec: {excinfo.value}"
        return super().repr_failure(excinfo, style)


def _print_line(line: str, _stream: str) -> None:
    # pytest captures standard output, and shows it below a failure.
    print(line)  # noqa: T201


def properties(verdict: Verdict) -> Iterable[tuple[str, str | int | float]]:
    """Yield figures by name, in bytes and seconds, without those that were not measured."""
    cause, crash, culprits = verdict.cause, verdict.crash_cell, verdict.culprits
    figures: dict[str, str | int | float | None] = {
        "status": verdict.status.value,
        "exit_code": verdict.exit_code,
        "cause": cause.kind.value if cause else None,
        "confidence": cause.confidence.value if cause else None,
        "crash_cell": crash.code_index if crash else None,
        "crash_line": crash.line if crash else None,
        "culprits": " ".join(str(culprit.code_index) for culprit in culprits.cells)
        if culprits
        else None,
        "failures": len(verdict.failures) or None,
        "cells": verdict.notebook.cells,
        "code_cells": verdict.notebook.code_cells,
        "wall_seconds": verdict.usage.wall_seconds,
        "cpu_seconds": verdict.usage.cpu_seconds,
        "memory_peak": verdict.usage.memory_peak,
        "memory_limit": verdict.limits.memory,
    }
    # A missing property means not measured; JUnit XML has no null.
    return [(name, value) for name, value in figures.items() if value is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Crash:
    """The data of pytest's short summary and of JUnit's message."""

    path: str
    lineno: int
    message: str


class Diagnosis(str):  # noqa: SLOT000 - a text that carries one thing more
    """The text of a failure, with its headline."""

    reprcrash: Crash


class Headlines:
    """Adds headlines to failures; xdist's workers can only transfer plain text."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a headline to the plain text, for pytest's summary and JUnit's message."""
        if not isinstance(report.longrepr, str) or not any(
            name == MARK for name, _ in report.user_properties
        ):
            return
        path, line, _ = report.location
        text = Diagnosis(report.longrepr)
        headline = text.partition("\n")[0].removeprefix("✗ ")
        text.reprcrash = Crash(path=path, lineno=(line or 0) + 1, message=headline)
        report.longrepr = text
