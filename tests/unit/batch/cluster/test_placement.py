"""Placement: which workers a notebook fits, the refusal that names their sizes, and when a notebook is given up."""

from __future__ import annotations

import heapq
import random
from typing import Any

import pytest
from msgspec.structs import replace

from safe_exec.batch.cluster.messages import WorkerFacts
from safe_exec.batch.cluster.placement import (
    CPUS,
    MEMORY,
    MOST_LOSSES,
    NotebookNeeds,
    elsewhere,
    fits,
    is_given_up,
    offers,
    refusal,
    resources,
)
from safe_exec.batch.ordering import longest_first

GIB = 1 << 30
SMALL = WorkerFacts(
    address="tcp://a:1",
    name="1",
    machine="node-a",
    threads=2,
    memory=4 * GIB,
    cpus=2,
    enforced=frozenset({"memory", "cpus"}),
    version="0.1.0",
    python="3.11.2",
)
LARGE = replace(
    SMALL, address="tcp://b:1", machine="node-b", memory=8 * GIB, cpus=4, enforced=frozenset()
)


def needs(memory: int | None = GIB, cpus: float = 1.0, *enforced: str) -> NotebookNeeds:
    return NotebookNeeds(memory=memory, cpus=cpus, enforced=frozenset(enforced))


@pytest.mark.parametrize(
    ("request_", "on_small", "on_large"),
    [
        (needs(), True, True),
        (needs(5 * GIB), False, True),
        (needs(9 * GIB), False, False),
        (needs(GIB, 3), False, True),
        (needs(GIB, 1, "memory"), True, False),
        (needs(None), True, True),
    ],
)
def test_fits(request_: NotebookNeeds, on_small: bool, on_large: bool) -> None:
    assert (fits(SMALL, request_), fits(LARGE, request_)) == (on_small, on_large)


def test_a_notebook_without_a_limit_takes_the_largest_worker_alone() -> None:
    assert resources(needs(None), [SMALL, LARGE])[MEMORY] == 8 * GIB
    # Where it must be enforced, the largest of those that enforce it.
    assert resources(needs(None, 1, "memory"), [SMALL, LARGE])[MEMORY] == 4 * GIB


@pytest.mark.parametrize("enforced", [(), ("memory",), ("memory", "cpus")])
def test_what_fits_is_what_dask_lets_run(enforced: tuple[str, ...]) -> None:
    """dask compares each resource of a task with that of a worker."""
    for worker in (SMALL, LARGE):
        supplied = offers(worker)
        for request_ in (needs(GIB, 1, *enforced), needs(5 * GIB, 4, *enforced)):
            wanted = resources(request_, [SMALL, LARGE])
            admitted = all(supplied.get(name, 0) >= size for name, size in wanted.items())
            assert admitted == fits(worker, request_)


def test_a_request_larger_than_any_worker_names_their_sizes() -> None:
    text = refusal(needs(16 * GIB), [SMALL, LARGE, replace(SMALL, address="tcp://a:2")])
    assert text == (
        "it requests 16.0 GiB of memory and 1 CPU, more than any worker has: "
        "node-b 8.0 GiB, 4 CPUs; node-a 4.0 GiB, 2 CPUs (2 workers); "
        "lower its limits or start a larger worker"
    )


def test_a_requirement_that_nobody_meets_names_the_machines() -> None:
    text = refusal(needs(GIB, 1, "memory", "disk"), [SMALL, LARGE])
    assert text is not None and text.startswith(
        "--require: no worker enforces disk: node-a, node-b"
    )


@pytest.mark.parametrize("workers", [[], [SMALL], [SMALL, LARGE]])
def test_nothing_is_refused_that_fits_or_has_no_worker_yet(workers: list[WorkerFacts]) -> None:
    assert refusal(needs(), workers) is None


@pytest.mark.parametrize(
    ("losses", "is_over"),
    [
        ([], False),
        (["node-a"], False),
        (["node-a", "node-b"], True),
        (["node-a"] * (MOST_LOSSES - 1), False),
        (["node-a"] * MOST_LOSSES, True),
    ],
)
def test_two_machines_or_many_losses_are_enough(losses: list[str], is_over: bool) -> None:
    assert is_given_up(losses) is is_over


def test_the_next_try_is_on_another_machine() -> None:
    assert elsewhere(["node-a"], needs(), [SMALL, LARGE]) == [LARGE.address]
    assert elsewhere(["node-a"], needs(GIB, 1, "memory"), [SMALL, LARGE]) == []


def test_cpus_are_requested() -> None:
    assert resources(needs(GIB, 2), [SMALL])[CPUS] == 2


def durations(count: int, seed: int) -> list[float]:
    """Durations of notebooks as in the field: most take seconds, a few many minutes."""
    chance = random.Random(seed)
    return [min(chance.lognormvariate(2.5, 1.3), 3600.0) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["as last time", "thirty per cent off"])
def test_ten_thousand_notebooks_on_fifty_workers_end_near_the_lower_bound(
    seed: int, noise: float
) -> None:
    """A worker takes the next notebook in our order when it is free; real durations differ from the known ones."""
    slots = 50
    known = {f"{number:05}.ipynb": length for number, length in enumerate(durations(10_000, seed))}
    chance = random.Random(seed)
    real = {path: length * (1 + chance.uniform(-noise, noise)) for path, length in known.items()}
    free = [0.0] * slots
    for path in longest_first(list(known), known, dict.fromkeys(known, 1)):
        heapq.heappush(free, heapq.heappop(free) + real[path])
    bound = max(sum(real.values()) / slots, *real.values())
    assert max(free) <= 1.05 * bound


def test_sizes_are_cut_short() -> None:
    workers: list[Any] = [
        replace(SMALL, address=f"tcp://{n}:1", machine=f"node-{n:02}") for n in range(20)
    ]
    text = refusal(needs(16 * GIB), workers)
    assert text is not None and "and 12 more" in text
