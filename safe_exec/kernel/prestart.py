"""Opens a run's sandbox early, so that its kernel starts while other modules are imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from safe_exec.errors import SafeExecError
from safe_exec.kernel.launch import Launch, LaunchedKernel, await_kernel, begin_launch, find_spec
from safe_exec.model.limits import Limits
from safe_exec.sandbox import keeper_process
from safe_exec.sandbox.plan import SpawnPlan

if TYPE_CHECKING:
    from safe_exec.kernel.coverage_file import CoverageFile
from safe_exec.sandbox.sandbox import Sandbox

# Starting a kernel takes longer than all our own work until its first cell, so work that is done
# meanwhile costs no time. Imports only kernel.launch and the sandbox.


class PrestartedKernel:
    """A sandbox whose run has not begun. As a context manager it removes everything at the end."""

    def __init__(self) -> None:
        """Claim the prestarted keeper, or start one."""
        keeper = keeper_process.claim()
        self.run_id = keeper.run_id if keeper is not None else keeper_process.new_run_id()
        self._directory = Path(
            keeper.directory
            if keeper is not None
            else keeper_process.runtime_directory(self.run_id)
        )
        self._sandbox: Sandbox | None = None
        # With systemd the keeper may have to start in a scope, which only the plan decides.
        if keeper is not None or not keeper_process.systemd_is_booted():
            self._sandbox = Sandbox(self.run_id, directory=self._directory, keeper=keeper)
        self.plan: SpawnPlan | None = None
        self._launched: LaunchedKernel | None = None
        self._failure: SafeExecError | None = None
        # Whether the kernel expects somebody to receive copies of it.
        self.snapshots = False

    def sandbox_for(self, plan: SpawnPlan) -> Sandbox:
        """Return the sandbox; start its keeper first if necessary."""
        if self._sandbox is None:
            self._sandbox = Sandbox(
                self.run_id, directory=self._directory, delegation=plan.cgroup.delegation
            )
        return self._sandbox

    def launch(
        self,
        kernel_name: str,
        *,
        plan: SpawnPlan,
        limits: Limits,
        cwd: Path,
        env: Mapping[str, str],
        strict_shell: bool = False,
        coverage: CoverageFile | None = None,
        snapshots: bool = False,
    ) -> None:
        """Start the kernel without waiting for it; do nothing if ``find_spec`` does not support it.

        If the start fails, ``outcome`` raises the error, and this method does not.
        """
        # An error belongs in the verdict of the run, which does not exist yet.
        spec = find_spec(kernel_name)
        if spec is None:
            return
        self.plan, self.snapshots = plan, snapshots
        try:
            request = Launch(
                spec=spec,
                kernel_name=kernel_name,
                plan=plan,
                limits=limits,
                cwd=str(cwd),
                env=env,
                strict_shell=strict_shell,
                coverage=coverage,
                snapshots=snapshots,
            )
            self._launched = begin_launch(self.sandbox_for(plan), request)
        except SafeExecError as error:
            self._failure = error

    @property
    def is_launched(self) -> bool:
        """Whether a kernel was started."""
        return self._launched is not None

    def outcome(self) -> LaunchedKernel | None:
        """Return the started kernel, ``None`` if there is none. Raises the error of the start."""
        if self._failure is not None:
            raise self._failure
        if self._launched is not None and self._sandbox is not None:
            # The kernel has usually started by now, so this seldom waits.
            await_kernel(self._sandbox, self._launched.channels)
        return self._launched

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sandbox is not None:
            self._sandbox.shutdown()
        if self._launched is not None:
            self._launched.channels.close()
