"""The documents of a run: the annotated notebook and the verdict, on disk whatever happens."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, Self

from msgspec.structs import replace

from safe_exec.errors import OutputPathError, SafeExecError
from safe_exec.files import OutputDirectory, one_line, read_regular
from safe_exec.model.verdict import Status, Verdict
from safe_exec.notebook import notebook
from safe_exec.notebook.output_form import OnFailure, OutputForm, arrange
from safe_exec.reports.masking import Mask, mask_for
from safe_exec.workflows.job import PreparedJob

log = logging.getLogger("safe_exec")


class Documents:
    """The output files of a run, in folders that are open from the start; a context manager.

    ``mask`` hides the secrets in their texts.
    """

    def __init__(self, prepared: PreparedJob) -> None:
        # The caller prints the verdict itself, so it is masked here as well.
        self.mask = mask_of(prepared)
        self.warnings: list[str] = []
        self._run_id = prepared.run_id
        # The target of a link: the link stays.
        self._source_path = prepared.job.path.resolve()
        self._source_hash = prepared.notebook.sha256
        self._has_output = prepared.job.output is not None
        self._replaced_source: Path | None = None
        self._coverage_data: Path | None = None
        self._stack = contextlib.ExitStack()
        self._folders: dict[str, OutputDirectory] = {}
        for name, path in (
            ("notebook", prepared.paths.notebook),
            ("verdict", prepared.paths.verdict),
        ):
            # A folder that cannot be opened is reported when its document is written.
            with contextlib.suppress(OSError):
                folder = self._folders[name] = OutputDirectory(path, prepared.job.tree)
                self._stack.callback(folder.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def paths(self) -> dict[str, str]:
        """Return the current path of each document, whether it is written yet or not."""
        paths = {name: str(folder.path) for name, folder in self._folders.items()}
        if self._coverage_data is not None:
            paths["coverage"] = str(self._coverage_data)
        if self._replaced_source is not None:
            paths["notebook"] = str(self._replaced_source)
        return paths

    def replace_source(self, data: notebook.Encoded) -> None:
        """Write the executed notebook over the notebook itself.

        If that is impossible, a warning says so, and the notebook is written as usual.
        """
        path = self._source_path
        try:
            # An editor may have saved the notebook during the run: nobody's work is lost.
            current = read_regular(path, most=notebook.MOST_BYTES, error=OutputPathError)
            if hashlib.sha256(current).hexdigest() != self._source_hash:
                problem = "it was changed during the run"
            else:
                with contextlib.closing(OutputDirectory(path)) as folder:
                    folder.write(data, keeps_owner=True)
                self._source_hash = hashlib.sha256(b"".join(data)).hexdigest()
                if not self._has_output:
                    self._replaced_source = path
                return
        except (OSError, OutputPathError) as error:
            problem = one_line(error)
        self.warnings.append(f"{path.name} was not written in place: {problem}")

    def write_coverage(self, prepared: PreparedJob) -> None:
        """Write the lines of library code that the run recorded, if that was requested."""
        if prepared.coverage is not None:
            from safe_exec.workflows.library_coverage import write_coverage

            stem = prepared.job.path.stem
            written = write_coverage(prepared.coverage, stem, prepared.run_id)
            self._coverage_data = written.path
            self.warnings += written.warnings

    def put(self, name: str, data: bytes | notebook.Encoded) -> None:
        """Write a document, unless the notebook was written in place. Raises OSError.

        If the existing file cannot be replaced, the document gets a similar name and a warning.
        """
        if name == "notebook" and self._replaced_source is not None:
            return
        if name not in self._folders:
            raise FileNotFoundError(errno.ENOENT, "the folder is gone")
        folder = self._folders[name]
        try:
            folder.write(data)
        # Nobody is asked for a new path an hour into a run: the document goes beside the old one.
        except (IsADirectoryError, PermissionError) as error:
            other = folder.sibling(self._run_id)
            other.write(data)
            self._folders[name] = other
            self.warnings.append(
                f"{folder.path.name} could not be replaced ({error.strerror}): "
                f"see {other.path.name}"
            )


def mask_of(prepared: PreparedJob) -> Mask:
    """Return the mask for the secrets in the environments of the runner and of the kernel."""
    return mask_for({**os.environ, **(prepared.job.env or {})})


def write(prepared: PreparedJob, verdict: Verdict, node: Any, documents: Documents) -> Verdict:
    """Write the annotated notebook, then the verdict, and return the final verdict.

    The verdict comes second because it names the documents that were written. Secrets are masked
    here, so no other code writes a verdict.
    """
    from safe_exec.reports import annotated_notebook, verdict_json

    verdict = _with_output_paths(documents.mask.everywhere(verdict), documents)
    form = prepared.job.form
    arranged_node = arrange(node, prepared.fresh_node(), form) if form != OutputForm() else node
    encoded = notebook.Encoded(
        annotated_notebook.annotate(
            arranged_node, verdict, documents.mask, figures=not form.clean_metadata
        )
    )
    in_place = verdict.status is Status.PASSED or form.on_failure is OnFailure.WRITE
    if form.in_place and in_place:
        documents.replace_source(encoded)
    try:
        documents.put("notebook", encoded)
    except (OSError, SafeExecError) as error:
        verdict = _without_output(
            verdict, "notebook", f"the annotated notebook could not be written: {error}"
        )
    try:
        # Written twice if the first attempt changed its name: the verdict states its own path.
        for _ in range(2):
            warning_count = len(documents.warnings)
            verdict = _with_output_paths(verdict, documents)
            documents.put("verdict", verdict_json.dumps(verdict))
            if len(documents.warnings) == warning_count:
                break
    except OSError as error:
        verdict = _without_output(verdict, "verdict", f"the verdict could not be written: {error}")
        # Programs read the verdict, so its absence is an error even with --quiet.
        log.error(  # noqa: TRY400
            "%s: the verdict could not be written: %s",
            one_line(prepared.paths.verdict),
            one_line(error),
        )
    return verdict


def _with_output_paths(verdict: Verdict, documents: Documents) -> Verdict:
    """Add the paths of all documents to the verdict, and warnings about changed names."""
    missing = {"notebook"} - verdict.outputs.keys() if verdict.outputs else set()
    # A document that could not be written before is not listed again.
    outputs = {name: path for name, path in documents.paths().items() if name not in missing}
    if verdict.culprits is not None and verdict.culprits.repro_notebook is not None:
        outputs["repro"] = verdict.culprits.repro_notebook
    fresh = [warning for warning in documents.warnings if warning not in verdict.warnings]
    return replace(verdict, outputs=outputs, warnings=(*verdict.warnings, *fresh))


def _without_output(verdict: Verdict, name: str, warning: str) -> Verdict:
    outputs = {key: path for key, path in verdict.outputs.items() if key != name}
    return replace(verdict, outputs=outputs, warnings=(*verdict.warnings, warning))
