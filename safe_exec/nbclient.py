"""nbclient's client with kernels inside limits.

The signature is the same, so users change one import:

    from safe_exec.nbclient import NotebookClient

A kernel that dies raises ``CellExecutionError`` with the diagnosis, at once.
"""

from __future__ import annotations

from nbclient import NotebookClient as PlainNotebookClient

from safe_exec.interactive.sandboxed_kernels import SandboxedKernels

__all__ = ["NotebookClient"]


class NotebookClient(SandboxedKernels, PlainNotebookClient):  # type: ignore[misc]
    """nbclient's client with the traits ``limits``, ``kernel_options`` and ``on_death``."""
