"""nbgrader's Execute with kernels inside limits: a death costs the points of its cell only.

In nbgrader_config.py, keep the other preprocessors of ``Autograde``:

    c.Autograde.autograde_preprocessors = [
        "nbgrader.preprocessors.ClearOutput", ..., "safe_exec.integrations.nbgrader.Execute",
    ]
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from queue import Empty
from typing import Any

from jupyter_core.utils import run_sync
from nbgrader.preprocessors import Execute as PlainExecute
from traitlets import Enum

from safe_exec.interactive.sandboxed_kernels import SandboxedKernels
from safe_exec.notebook.notebook import OUR_ERROR_PREFIX

# The timeout of each repeated cell, if nbgrader has none.
REPLAY_SECONDS = 60.0


class Execute(SandboxedKernels, PlainExecute):  # type: ignore[misc]
    """Executes a submission; after a death a fresh kernel repeats the earlier cells."""

    on_death = Enum(("exit", "restart"), default_value="restart").tag(config=True)

    def preprocess_cell(self, cell: Any, resources: Any, index: int) -> tuple[Any, Any]:
        """Run a cell; after a death, restore the variables that the next cell expects."""
        result: tuple[Any, Any] = super().preprocess_cell(cell, resources, index)
        if lost_kernel(cell.get("outputs", ())):
            run_sync(self._replay)(self.nb.cells[:index])
        return result

    async def _replay(self, cells: Iterable[Any]) -> None:
        for cell in cells:
            # A failed cell would fail again, or die again.
            if cell.cell_type != "code" or not cell.source.strip() or _failed(cell):
                continue
            # After a second failure the state is incomplete anyway; the remaining cells would only
            # cost time.
            if not await self._run_silently(cell.source):
                return

    async def _run_silently(self, source: str) -> bool:
        """Run a cell again and tell whether it succeeded."""
        # nbclient ignores messages that answer none of its own requests, so no output is
        # duplicated.
        msg_id = self.kc.execute(source, silent=True, store_history=False, allow_stdin=False)
        deadline = time.monotonic() + (self.timeout or REPLAY_SECONDS)
        while time.monotonic() < deadline:
            try:
                # Short waits, so that the deadline holds even if no message arrives.
                reply = await self.kc.shell_channel.get_msg(timeout=1)
            except Empty:
                continue
            if reply["parent_header"].get("msg_id") == msg_id:
                return bool(reply["content"].get("status") == "ok")
        self.log.warning("safe-exec: a cell did not run again in time after a kernel died")
        return False


def lost_kernel(outputs: Iterable[Any]) -> bool:
    """Tell whether a cell's outputs report the death of its kernel."""
    return any(
        output.get("output_type") == "error"
        and str(output.get("ename", "")).startswith(OUR_ERROR_PREFIX)
        # A cell that ended at the interrupt after its time has the same error, but its kernel
        # lives.
        and "ended at the interrupt: yes" not in "\n".join(output.get("traceback", ()))
        for output in outputs
    )


def _failed(cell: Any) -> bool:
    return any(output.get("output_type") == "error" for output in cell.get("outputs", ()))
