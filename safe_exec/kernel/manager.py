"""The part of jupyter_client that a session uses: the spec and the connection of a kernel."""

from __future__ import annotations

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from safe_exec.kernel.launch import (
    LaunchedKernel,
)


class Manager(AsyncKernelManager):  # type: ignore[misc]
    """jupyter_client's manager without its control socket."""

    # The manager connects before the kernel listens, so libzmq retries at some later moment. If the
    # kernel has no descriptor left at that moment, its libzmq aborts it (``ipc_listener.cpp``). The
    # client's own control channel suffices, and it connects before the first cell.
    def _connect_control_socket(self) -> None:
        """Do nothing: ``KernelSession`` connects the control channel."""

    def take_on(self, launched: LaunchedKernel) -> None:
        """Load the spec and connection of a kernel that was started without this manager."""
        self._kernel_spec = KernelSpec(
            resource_dir=launched.spec.directory, **launched.spec.document
        )
        self.load_connection_info(dict(launched.connection))
