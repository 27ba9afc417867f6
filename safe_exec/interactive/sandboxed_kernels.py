"""Kernels inside limits for all classes based on nbclient's client, such as nbconvert's.

The client starts the command `safe-exec kernel`, so its hooks, timeouts and errors stay, and the
death of a kernel is the error of its cell.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from traitlets import Enum, HasTraits, List, Unicode


class SandboxedKernels(HasTraits):  # type: ignore[misc]
    """A mix-in; it comes before a subclass of ``nbclient.NotebookClient``."""

    limits = Unicode(
        "default", help="A profile (default, ci, strict, untrusted) or a YAML file of limits."
    ).tag(config=True)
    kernel_options = List(
        Unicode(), help="Further options of `safe-exec kernel`, such as --memory=2G."
    ).tag(config=True)
    on_death = Enum(
        ("exit", "restart"),
        default_value="exit",
        help="After a kernel died: end, or go on with a fresh one where the client goes on after errors.",
    ).tag(config=True)

    def create_kernel_manager(self) -> Any:
        """Create the client's own manager for a kernel inside limits."""
        manager = super().create_kernel_manager()
        # A copy: KernelSpecManager may give the same spec to other clients.
        spec = copy.copy(manager.kernel_spec)
        spec.argv = self.kernel_command(manager.kernel_name)
        # `safe-exec kernel` is a plain process, and does not support CurveZMQ.
        spec.metadata = {
            key: value
            for key, value in (spec.metadata or {}).items()
            if key not in ("kernel_provisioner", "supported_encryption")
        }
        # The manager's property kernel_spec reads this attribute, and has no setter.
        manager._kernel_spec = spec  # noqa: SLF001
        return manager

    def kernel_command(self, kernel_name: str) -> list[str]:
        """Return the command that replaces the kernel's own."""
        # -P: modules in the notebook's folder must not replace ours.
        argv = [sys.executable, "-P", "-m", "safe_exec", "kernel", "-f", "{connection_file}"]
        # Sessions are recorded for people; a program has its notebook.
        argv += ["--kernel", kernel_name, "--limits", self.limits, "--no-history"]
        return [*argv, "--on-death", self.on_death, *self.kernel_options]
