"""safe-exec: run notebooks inside hard limits, and explain why their kernels die.

Names are imported on first access, because the keeper imports this package too and has to start
within milliseconds.
"""

from __future__ import annotations

# Importing typing takes a third of the start-up time of the first process in a sandbox.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from safe_exec._version import __version__
    from safe_exec.api import run, run_async
    from safe_exec.errors import SafeExecError
    from safe_exec.model.limits import Limits
    from safe_exec.model.verdict import Cause, CauseKind, Status, Verdict

__all__ = [
    "Cause",
    "CauseKind",
    "Limits",
    "SafeExecError",
    "Status",
    "Verdict",
    "__version__",
    "run",
    "run_async",
]

# The module of each name.
_HOMES = {
    "run": "api",
    "run_async": "api",
    "SafeExecError": "errors",
    "Limits": "model.limits",
    "Cause": "model.verdict",
    "CauseKind": "model.verdict",
    "Status": "model.verdict",
    "Verdict": "model.verdict",
    "__version__": "_version",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'safe_exec' has no attribute {name!r}")
    from importlib import import_module

    if name in ("run", "run_async"):
        # The modules of these two import fcntl and others, which only Unix has.
        from safe_exec.platforms import refuse_elsewhere

        refuse_elsewhere()
    return getattr(import_module(f"safe_exec.{_HOMES[name]}"), name)
