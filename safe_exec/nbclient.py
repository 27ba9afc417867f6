"""nbclient's client with kernels inside limits: the same signature, so a subclass changes one import.

    from safe_exec.nbclient import NotebookClient

A kernel that dies raises ``CellExecutionError`` with the diagnosis, at once.
"""

from __future__ import annotations

from nbclient import NotebookClient as PlainNotebookClient

from safe_exec.sandboxed_kernels import SandboxedKernels

__all__ = ["NotebookClient"]


class NotebookClient(SandboxedKernels, PlainNotebookClient):  # type: ignore[misc]
    """Runs a notebook as nbclient does; ``limits``, ``kernel_options`` and ``on_death`` are traits of its own."""
