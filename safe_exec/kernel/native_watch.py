"""Holds a kernel at a fatal fault until its native stack has been read."""

from __future__ import annotations

import asyncio

from safe_exec.keeper.protocol import Dying
from safe_exec.kernel import native_stack
from safe_exec.kernel.launch import has_pystack
from safe_exec.kernel.native_stack import NativeReading
from safe_exec.sandbox.sandbox import Sandbox


class NativeStackWatch:
    """Waits for a fatal fault of one kernel. ``reading`` is ``None`` until there is something."""

    def __init__(self, sandbox: Sandbox, pid: int, *, with_locals: bool) -> None:
        self._sandbox, self._pid, self._with_locals = sandbox, pid, with_locals
        self._task: asyncio.Task[None] | None = None
        self.reading: NativeReading | None = None

    def start(self) -> None:
        """Let the keeper hold the kernel at a fatal fault, if its native stack can be read."""
        if has_pystack():
            self._sandbox.hold_at_fault(native_stack.BUDGET_SECONDS, self._on_dying)
        else:
            self.reading = NativeReading(error=native_stack.MISSING)

    @property
    def is_held(self) -> bool:
        """Whether a fatal fault was reported, at which the process may be held."""
        return self._task is not None

    def cancel(self) -> None:
        """End the reading."""
        if self._task is not None:
            self._task.cancel()

    def _on_dying(self, dying: Dying) -> None:
        # Replaced by the result; if the keeper lets the process die first, that is the result.
        self.reading = NativeReading(error=native_stack.TOO_SLOW)
        self._task = asyncio.get_running_loop().create_task(self._read(dying))

    async def _read(self, dying: Dying) -> None:
        try:
            self.reading = await native_stack.read(self._pid, dying, with_locals=self._with_locals)
        finally:
            self._sandbox.read_on()
