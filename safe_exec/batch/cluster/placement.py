"""Decide which workers a notebook may run on, by its request and their resources. Pure.

dask places the tasks: a task states the resources it needs, and a worker those it has. A request
that no worker can satisfy would stay pending for ever in dask, so it is refused here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct

from safe_exec.batch.cluster.messages import WorkerFacts
from safe_exec.units import format_size

MEMORY = "safe_exec_memory"
CPUS = "safe_exec_cpus"
ENFORCES = "safe_exec_enforces_"
# Any number of notebooks may rely on a mechanism at the same time.
UNLIMITED = 1e12
MOST_LOSSES = 5
"""The losses on a single machine after which a notebook is given up."""
MOST_MACHINES = 2
"""The machines that may be lost before a notebook is given up."""
MOST_SIZES = 8


class NotebookNeeds(Struct, frozen=True, kw_only=True):
    """The resources and the enforcement that a notebook requires of a worker.

    ``memory`` is its limit in bytes, ``None`` if it has none; ``enforced`` are the limits and walls
    that Linux has to enforce.
    """

    memory: int | None
    cpus: float
    enforced: frozenset[str] = frozenset()


def fits(worker: WorkerFacts, needs: NotebookNeeds) -> bool:
    """Return whether a notebook can run on a worker that is otherwise idle."""
    return (
        (needs.memory or 0) <= worker.memory
        and needs.cpus <= worker.cpus
        and needs.enforced <= worker.enforced
    )


def resources(needs: NotebookNeeds, workers: Iterable[WorkerFacts]) -> dict[str, float]:
    """Return the dask resources that the task of a notebook requests."""
    # Without a limit it may use all memory, so it takes all of the largest worker and runs alone.
    memory = needs.memory
    if memory is None:
        memory = max((worker.memory for worker in workers if fits(worker, needs)), default=0)
    return {
        MEMORY: float(memory),
        CPUS: needs.cpus,
        **{f"{ENFORCES}{name}": 1.0 for name in sorted(needs.enforced)},
    }


def offers(worker: WorkerFacts) -> dict[str, float]:
    """Return the dask resources of a worker."""
    return {
        MEMORY: float(worker.memory),
        CPUS: worker.cpus,
        **{f"{ENFORCES}{name}": UNLIMITED for name in sorted(worker.enforced)},
    }


def refusal(needs: NotebookNeeds, workers: Sequence[WorkerFacts]) -> str | None:
    """Return the reason why no worker fits a notebook; ``None`` if one fits.

    The reason names the sizes of the workers.
    """
    if not workers or any(fits(worker, needs) for worker in workers):
        return None
    able = [worker for worker in workers if needs.enforced <= worker.enforced]
    if not able:
        missing = sorted(needs.enforced - frozenset.union(*(w.enforced for w in workers)))
        names = ", ".join(missing or sorted(needs.enforced))
        return (
            f"--require: no worker enforces {names}: {_names(workers)}; "
            "`safe-exec doctor --cluster` says how to fix it"
        )
    request = [f"{format_size(needs.memory)} of memory"] if needs.memory else []
    request.append(f"{needs.cpus:g} CPU{'' if needs.cpus == 1 else 's'}")
    return (
        f"it requests {' and '.join(request)}, more than any worker has: {sizes(able)}; "
        "lower its limits or start a larger worker"
    )


def sizes(workers: Iterable[WorkerFacts]) -> str:
    """Describe the sizes of workers: ``node-a 8.0 GiB, 4 CPUs (2 workers)``."""
    groups = Counter((worker.machine, worker.memory, worker.cpus) for worker in workers)
    texts = [
        f"{machine} {format_size(memory)}, {cpus:g} CPU{'' if cpus == 1 else 's'}"
        + (f" ({count} workers)" if count > 1 else "")
        for (machine, memory, cpus), count in sorted(groups.items(), key=lambda row: -row[0][1])
    ]
    more = [f"and {len(texts) - MOST_SIZES} more"] if len(texts) > MOST_SIZES else []
    return "; ".join([*texts[:MOST_SIZES], *more])


def _names(workers: Iterable[WorkerFacts]) -> str:
    names = sorted({worker.machine for worker in workers})
    more = f" and {len(names) - MOST_SIZES} more" if len(names) > MOST_SIZES else ""
    return ", ".join(names[:MOST_SIZES]) + more


def is_given_up(losses: Sequence[str]) -> bool:
    """Tell whether a notebook has lost too many workers to try again.

    ``losses`` are their machines.
    """
    return len(set(losses)) >= MOST_MACHINES or len(losses) >= MOST_LOSSES


def elsewhere(
    losses: Sequence[str], needs: NotebookNeeds, workers: Iterable[WorkerFacts]
) -> list[str]:
    """Return the addresses of fitting workers on machines where no worker was lost."""
    return [
        worker.address for worker in workers if worker.machine not in losses and fits(worker, needs)
    ]
