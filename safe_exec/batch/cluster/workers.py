"""The workers of a cluster: which have joined, which are usable, and their kernels."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from safe_exec._version import __version__
from safe_exec.batch.cluster.connection import LOCAL, ClusterAddress
from safe_exec.batch.cluster.messages import WorkerFacts
from safe_exec.batch.fingerprint import describe_differences
from safe_exec.errors import ClusterError
from safe_exec.files import one_line

if TYPE_CHECKING:
    from distributed import Client


class WorkerChange(Struct, frozen=True, kw_only=True):
    """The addresses of workers that left or joined since the last update."""

    departed: AbstractSet[str]
    fresh: AbstractSet[str]


class ClusterWorkers:
    """The usable workers, by their address.

    ``mechanisms`` are those that the user allows. ``memory`` is the memory in bytes that local
    workers share, ``None`` if others started the workers. ``note`` shows a message to the user.
    """

    def __init__(
        self,
        client: Client,
        address: ClusterAddress,
        *,
        mechanisms: tuple[str, ...] | None,
        memory: int | None,
        note: Callable[[str], None],
    ) -> None:
        self.client, self.address = client, address
        self.mechanisms, self.memory, self.note = mechanisms, memory, note
        self.usable: dict[str, WorkerFacts] = {}
        # Addresses that cannot be used, so that each is reported once.
        self.unusable: set[str] = set()
        self.environments: dict[str, asyncio.Task[str]] = {}

    @property
    def threads(self) -> int:
        """The number of notebooks that all workers together can run at a time."""
        return sum(worker.threads for worker in self.usable.values())

    @property
    def smallest_memory(self) -> int:
        """The memory of the smallest worker, in bytes. There must be at least one worker."""
        return min(worker.memory for worker in self.usable.values())

    def threads_of(self, machine: str) -> int:
        """Return how many notebooks the workers of a machine can run at a time."""
        return self.threads_by_machine()[machine]

    def threads_by_machine(self) -> Mapping[str, int]:
        """Return, for each machine, how many notebooks its workers can run at a time."""
        threads: Counter[str] = Counter()
        for worker in self.usable.values():
            threads[worker.machine] += worker.threads
        return threads

    async def update(self) -> WorkerChange:
        """Ask the scheduler for its workers, and each new worker for its facts.

        Raises ClusterError if the connection is lost, and the errors of dask's transport.
        """
        if self.client.status != "running":
            raise ClusterError("connection lost")
        # The client's own list may be cut short, and a second old.
        scheduler: Any = self.client.scheduler
        current = (await scheduler.identity(n_workers=-1))["workers"]
        departed = self.usable.keys() - current.keys()
        for address in departed:
            del self.usable[address]
        fresh = current.keys() - self.usable.keys() - self.unusable
        if fresh:
            await self._prepare(sorted(fresh))
        return WorkerChange(departed=departed, fresh=fresh)

    async def _prepare(self, addresses: list[str]) -> None:
        from safe_exec.batch.cluster.task import prepare_worker

        answers = await self.client.run(
            prepare_worker,
            self.mechanisms,
            self.memory,
            # Local workers have one thread each and share all processors.
            float(os.cpu_count() or 1) if self.address.kind == LOCAL else None,
            workers=addresses,
            on_error="return",
        )
        for address, facts in answers.items():
            if not isinstance(facts, WorkerFacts):
                self._reject(address, f"safe-exec cannot run there: {one_line(facts)}")
            elif facts.version != __version__:
                self._reject(address, f"it has safe-exec {facts.version}, this is {__version__}")
            else:
                self.usable[address] = facts

    def _reject(self, address: str, reason: str) -> None:
        # A worker that leaves while it is asked is reported by its absence.
        self.unusable.add(address)
        self.note(f"worker {address} gets no notebooks: {reason}")

    async def environment(self, kernel: str) -> str | None:
        """Describe the packages of a kernel on all machines; warn once if they differ.

        ``None`` if the scheduler cannot be asked.
        """
        if kernel not in self.environments:
            self.environments[kernel] = asyncio.create_task(self._collect_environment(kernel))
        try:
            return await asyncio.shield(self.environments[kernel])
        # The notebook has finished: its result must not be lost with the scheduler, whose end the
        # watch over the workers reports.
        except (TimeoutError, OSError):
            self.environments.pop(kernel, None)
            return None

    async def _collect_environment(self, kernel: str) -> str:
        from safe_exec.batch.cluster.task import kernel_environment

        addresses = {worker.machine: address for address, worker in self.usable.items()}
        answers = await self.client.run(
            kernel_environment, kernel, workers=list(addresses.values()), on_error="ignore"
        )
        texts = {machine: answers[a] for machine, a in addresses.items() if a in answers}
        difference = describe_differences(texts)
        if difference:
            self.note(f"kernel {kernel} differs between workers: {difference}")
        # If there is only one text, it is the one that `--only-changed` uses on this machine: a
        # notebook that passed here with the same packages need not run there.
        distinct_texts = sorted(set(texts.values()))
        return distinct_texts[0] if len(distinct_texts) == 1 else json.dumps(distinct_texts)
