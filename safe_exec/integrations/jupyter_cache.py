"""The executor ``safe-exec`` of jupyter-cache, which MyST-NB and Jupyter Book use too.

Notebooks run in their folders, with kernels inside limits. A kernel that dies is the error of one
notebook, with its cause.
"""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import Any

from jupyter_cache.executors.basic import ExecutionWorkerLocalSerial, JupyterExecutorLocalSerial
from jupyter_cache.executors.utils import ExecutionResult
from nbclient.exceptions import CellExecutionError, CellTimeoutError

from safe_exec.nbclient import NotebookClient

# Names the profile or limits file: jupyter-cache's command line passes no options to executors.
PROFILE_VARIABLE = "SAFE_EXEC_LIMITS"


class Worker(ExecutionWorkerLocalSerial):  # type: ignore[misc]
    """Runs one notebook in its folder."""

    @staticmethod
    def execute(project_nb: Any, data: Any) -> Any:
        """Run the notebook and return jupyter-cache's result."""
        # The notebook's metadata override the project's settings, as in jupyter-cache's own
        # executors.
        own = project_nb.nb.metadata.get("execution", {})
        folder = str(Path(project_nb.uri).parent)
        client = NotebookClient(
            project_nb.nb,
            resources={"metadata": {"path": folder}},
            timeout=own.get("timeout", data.timeout),
            allow_errors=own.get("allow_errors", data.allow_errors),
            limits=os.environ.get(PROFILE_VARIABLE) or "default",
        )
        started, error, text = time.monotonic(), None, None
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError) as raised:
            # A failure belongs to this notebook; the project goes on with the next one.
            error, text = raised, traceback.format_exc()
        seconds = time.monotonic() - started
        return ExecutionResult(project_nb.nb, folder, seconds, error, text)


class Executor(JupyterExecutorLocalSerial):  # type: ignore[misc]
    """The executor ``safe-exec``."""

    _EXECUTION_WORKER = Worker
