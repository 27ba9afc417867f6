"""An ExecutionManager of jupyter-scheduler: jobs run inside limits, and their status says why.

    jupyter lab --Scheduler.execution_manager_class=safe_exec.integrations.jupyter_scheduler.ExecutionManager

The outputs of a job are made from the annotated notebook. A job that fails is tried again as often
as it asks for.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from jupyter_scheduler.executors import DefaultExecutionManager
from jupyter_scheduler.models import JobFeature
from jupyter_scheduler.orm import Job as JobRow
from jupyter_scheduler.parameterize import add_parameters

from safe_exec.errors import SafeExecError
from safe_exec.integrations.scheduled_jobs import (
    MOST_CHARACTERS,
    JobFailedError,
    JobOptions,
    message_of,
    options_of,
)

if TYPE_CHECKING:
    from safe_exec.model.verdict import Verdict

# Names the profile or limits file of all jobs: the scheduler passes no options to its managers.
PROFILE_VARIABLE = "SAFE_EXEC_LIMITS"


class ExecutionManager(DefaultExecutionManager):  # type: ignore[misc]
    """Runs a job's notebook inside limits."""

    def execute(self) -> None:
        """Run the notebook, again if the job asks for it. Raises JobFailedError."""
        options, tries = self._options(), 0
        while True:
            tries += 1
            # The culprits of a failure that is tried again interest nobody.
            verdict, node = self._run_once(options, is_last=tries > options.max_retries)
            if not options.tries_again(verdict, tries):
                break
            time.sleep(options.min_retry_interval_millis / 1000)
        self.add_side_effects_files(os.path.dirname(self.staging_paths["input"]))
        self.create_output_files(self.model, node)
        if verdict.exit_code:
            raise JobFailedError(message_of(verdict, tries))

    def _options(self) -> JobOptions:
        with self.db_session() as session:
            row = session.query(JobRow).filter(JobRow.job_id == self.job_id).one()
            columns = {name: getattr(row, name, None) for name in JobOptions.__struct_fields__}
        return options_of(columns, self.model.runtime_environment_parameters)

    def _run_once(self, options: JobOptions, *, is_last: bool) -> tuple[Verdict, Any]:
        """Run the notebook once; return the verdict and the annotated notebook."""
        from safe_exec.notebook import notebook
        from safe_exec.workflows.job import Bisect, Job
        from safe_exec.workflows.prepare import prepare
        from safe_exec.workflows.run import run_job

        path = Path(self.staging_paths["input"])
        # The job's folder holds files for its owner: the verdict and the reproduction go there, and
        # the notebook as each of the formats that the job asks for.
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "annotated.ipynb"
            job = Job(
                path=path,
                limits=os.environ.get(PROFILE_VARIABLE) or None,
                options={"timeout": options.timeout_seconds} if options.timeout_seconds else {},
                output=output,
                bisect=Bisect.AUTO if is_last else Bisect.NEVER,
                command=("jupyter-scheduler", self.job_id),
            )
            try:
                prepared = prepare(job, source=notebook.Source.of_data(path, self._document(path)))
                verdict = asyncio.run(run_job(prepared))
                return verdict, nbformat.read(output, as_version=4)
            except SafeExecError as error:
                raise JobFailedError(str(error)[:MOST_CHARACTERS]) from None

    def _document(self, path: Path) -> bytes:
        """Return the notebook with the job's parameters."""
        parameters = self.model.parameters
        if not parameters:
            return path.read_bytes()
        # The scheduler's own function: its parameters are source text, not values.
        node = add_parameters(nbformat.read(path, as_version=4), parameters)
        return str(nbformat.writes(node)).encode()

    @staticmethod
    def supported_features(cls: Any) -> dict[JobFeature, bool]:  # noqa: PLW0211
        """Return the features of the scheduler's own manager, plus timeout and retries."""
        # The scheduler calls this with the class as its argument, as its own manager needs it.
        ours = (
            JobFeature.timeout_seconds,
            JobFeature.retry_on_timeout,
            JobFeature.max_retries,
            JobFeature.min_retry_interval_millis,
        )
        features: dict[JobFeature, bool] = DefaultExecutionManager.supported_features(cls)
        return features | dict.fromkeys(ours, True)
