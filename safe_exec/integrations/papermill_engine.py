"""The papermill engine: ``papermill --engine safe-exec`` runs the cells inside limits.

A dead kernel is recorded with its cause. papermill keeps its own parameters, progress, timings,
autosave, output path and exceptions. It imports this module at every start if safe-exec is
installed, so our other modules are imported when a notebook runs.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from papermill.engines import Engine
from papermill.log import logger

if TYPE_CHECKING:
    from safe_exec.model.events import Event
    from safe_exec.model.verdict import Verdict
    from safe_exec.workflows.job import PreparedJob

# Names the profile or limits file: papermill's command line passes no options to engines.
PROFILE_VARIABLE = "SAFE_EXEC_LIMITS"


class SafeExecEngine(Engine):  # type: ignore[misc]
    """A papermill engine that runs the notebook in a sandboxed kernel."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        *,
        input_path: str | Any | None = None,
        log_output: bool = False,
        stdout_file: TextIO | None = None,
        stderr_file: TextIO | None = None,
        start_timeout: float | None = None,
        execution_timeout: float | None = None,
        limits: str | None = None,
        options: Mapping[str, object] | None = None,
        require: str | None = None,
        walls: Mapping[str, object] | None = None,
        exit_is: str = "success",
        **unused_options: Any,
    ) -> None:
        """Run the cells of ``nb_man.nb``.

        Papermill's timeouts become the limits of cells and start-up. ``limits``, ``options``,
        ``require``, ``walls`` and ``exit_is`` are as for :func:`safe_exec.run`. Raises UsageError
        for wrong limits, PlatformError on anything but Linux, KeyboardInterrupt after a signal, and
        SafeExecError if the notebook has no cell for the error.
        """
        engine_options = dict(options or {})
        # ``timeout`` is nbclient's name, which papermill's own engine accepts as well.
        seconds = execution_timeout or unused_options.get("timeout")
        if seconds:
            engine_options["cell_timeout"] = seconds
        if start_timeout:
            engine_options["start_timeout"] = start_timeout
        chosen = limits or os.environ.get(PROFILE_VARIABLE) or None
        prepared = _prepared(
            nb_man.nb,
            input_path,
            kernel_name,
            limits=chosen,
            options=engine_options,
            require=require,
            walls=walls,
            exit_is=exit_is,
        )
        # Filled in place, so that papermill's autosave has the outputs so far.
        nb_man.nb = prepared.node
        relay = Relay(nb_man, log_output=log_output, stdout=stdout_file, stderr=stderr_file)
        logger.info(f"Executing notebook with kernel: {kernel_name}")
        verdict = _run(prepared, relay)
        relay.finish(verdict)


def _prepared(
    node: Any,
    input_path: str | Any | None,
    kernel: str,
    *,
    walls: Mapping[str, object] | None,
    exit_is: str,
    **options: Any,
) -> PreparedJob:
    """Prepare the notebook that papermill has read; the ``safe-exec.yaml`` is found by its path."""
    from safe_exec.platforms import refuse_elsewhere

    refuse_elsewhere()
    from safe_exec.limits import isolation
    from safe_exec.notebook import notebook
    from safe_exec.notebook.inputs import NotebookInputs, exit_meaning
    from safe_exec.workflows.job import Bisect, Job
    from safe_exec.workflows.prepare import prepare

    path = (
        Path(input_path)
        # The caller may have passed a notebook instead of a path.
        if isinstance(input_path, str) and os.path.isfile(input_path)
        # Any name in the working directory: only its folder matters, for safe-exec.yaml.
        else Path.cwd() / "notebook.ipynb"
    )
    source = notebook.Source.of_data(path, notebook.dumps(node))
    checked = isolation.of_mapping(walls or {}, "walls")
    job = Job(
        path=path,
        kernel=kernel,
        cwd=Path.cwd(),
        # papermill writes the documents, and one run is what its users expect.
        bisect=Bisect.NEVER,
        writes=False,
        walls=checked,
        inputs=NotebookInputs(exit_is=exit_meaning(exit_is)),
        **options,
    )
    return prepare(job, source=source)


def _run(prepared: PreparedJob, relay: Relay) -> Verdict:
    from safe_exec.workflows.run import run_undocumented

    outcome: tuple[Verdict, Any] = _finished(
        run_undocumented(prepared, (relay.event,), relay.message)
    )
    return outcome[0]


def _finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine; on another thread if this one has a running loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # asyncio.run refuses to start inside a running loop.
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(coroutine)))
    thread.start()
    thread.join()
    if not results:
        raise RuntimeError("the run ended without a verdict; its own error stands above")
    return results[0]


class Relay:
    """Reports the progress of a trial to papermill's execution manager as it happens."""

    def __init__(
        self, nb_man: Any, *, log_output: bool, stdout: TextIO | None, stderr: TextIO | None
    ) -> None:
        self.nb_man = nb_man
        self.log_output = log_output
        self.files = {"stdout": stdout, "stderr": stderr}
        # papermill counts all cells, including Markdown and skipped ones. A trial reports only the
        # cells that it runs.
        self.next = 0
        self.running: int | None = None

    # --- during the run
    # -----------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        """Report the start or the end of a cell."""
        from safe_exec.model.events import CellFinished, CellStarted
        from safe_exec.model.verdict import CellStatus

        if isinstance(event, CellStarted):
            self._catch_up(event.index)
            self._begin(event.index)
        elif isinstance(event, CellFinished) and event.index == self.running:
            # papermill marks failed cells, and an allowed error is no failure.
            failed = event.status is CellStatus.KILLED or (
                event.status is CellStatus.FAILED and not self._is_allowed(event.index)
            )
            self._end(event.index, failed=failed)

    def _is_allowed(self, index: int) -> bool:
        """Return whether the cell may raise, by nbclient's rules."""
        node = self.nb_man.nb
        execution = node.metadata.get("execution")
        everywhere = isinstance(execution, Mapping) and execution.get("allow_errors") is True
        return everywhere or "raises-exception" in node.cells[index].metadata.get("tags", [])

    def _catch_up(self, index: int) -> None:
        """Report cells that do not run as started and finished."""
        # papermill's progress bar expects every cell.
        while self.next < index:
            self._begin(self.next)
            self._end(self.next - 1, failed=False)

    def _begin(self, index: int) -> None:
        self.nb_man.cell_start(self.nb_man.nb.cells[index], index)
        self.running, self.next = index, index + 1

    def _end(self, index: int, *, failed: bool) -> None:
        cell = self.nb_man.nb.cells[index]
        if failed:
            self.nb_man.cell_exception(cell, cell_index=index)
        self.nb_man.cell_complete(cell, cell_index=index)
        self.running = None

    def message(self, _index: int, message: dict[str, Any]) -> None:
        """Save the notebook from time to time, and log new outputs, like papermill's own engine."""
        try:
            self.nb_man.autosave_cell()
        # papermill supports many storages, each with its own exceptions.
        except Exception:  # noqa: BLE001
            # The final save reports its errors; a failed intermediate save must not end the run.
            logger.exception("the notebook could not be saved on the way")
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            self._log_stream(str(content["name"]), content["text"])
        elif (
            kind in ("display_data", "execute_result")
            and self.log_output
            and "text/plain" in content["data"]
        ):
            logger.info("".join(content["data"]["text/plain"]))

    def _log_stream(self, name: str, text: str) -> None:
        if self.log_output:
            (logger.warning if name == "stderr" else logger.info)(text)
        file = self.files.get(name)
        if file is not None:
            file.write(text)
            # Readers such as `tail -f` follow this file during the run.
            file.flush()

    # --- the end of the run
    # -------------------------------------------------------------------------

    def finish(self, verdict: Verdict) -> None:
        """Report the outcome; papermill raises its own exception for a cell with an error."""
        from safe_exec.model.verdict import Status

        for warning in verdict.warnings:
            logger.warning(warning)
        if verdict.status is Status.PASSED:
            self._catch_up(len(self.nb_man.nb.cells))
            return
        index = self._place(verdict)
        if index is not None:
            self._mark(index, verdict)
        if verdict.status is Status.CANCELLED:
            # Our handler took the signal, so papermill has not seen it.
            raise KeyboardInterrupt
        if index is None:
            from safe_exec.errors import SafeExecError
            from safe_exec.reports.text.common import headline

            raise SafeExecError(headline(verdict))

    def _place(self, verdict: Verdict) -> int | None:
        """Return the cell for the error: the crash cell, the first not run, or the last one."""
        if verdict.crash_cell is not None:
            return verdict.crash_cell.index
        code = [
            index for index, cell in enumerate(self.nb_man.nb.cells) if cell.cell_type == "code"
        ]
        # A failure before the first cell (the kernel did not start) still needs a place.
        return next((index for index in code if index >= self.next), code[-1] if code else None)

    def _mark(self, index: int, verdict: Verdict) -> None:
        from safe_exec.model.verdict import CauseKind
        from safe_exec.reports.annotated_notebook import error_output

        cell = self.nb_man.nb.cells[index]
        # papermill takes the error of sys.exit(0) for none; with exit_is="error" it is one.
        left_early = any(
            output.get("ename") == "SystemExit" and output.get("evalue") in ("", "0")
            for output in cell.outputs
        )
        if left_early or verdict.cause is None or verdict.cause.kind is not CauseKind.EXCEPTION:
            # Inserted before other errors of the cell, because papermill raises the first one.
            errors = (at for at, output in enumerate(cell.outputs) if output.output_type == "error")
            cell.outputs.insert(next(errors, len(cell.outputs)), error_output(cell.source, verdict))
        self.nb_man.cell_exception(cell, cell_index=index)
