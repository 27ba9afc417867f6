"""How long a large batch takes on many workers, in a simulation: the order of starts decides it."""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence

import pytest

from safe_exec.batch.cluster.scheduler import SPARE
from safe_exec.batch.ordering import longest_first

# Seconds of the examples of a documentation (pycortex, as sphinx-gallery measured them).
EXAMPLES = (
    *(32.321, 20.223, 11.786, 8.047, 5.612, 4.531, 3.540, 3.393, 2.325, 1.476, 1.456, 0.945),
    *(0.894, 0.889, 0.833, 0.742, 0.715, 0.630, 0.623, 0.598, 0.581, 0.570, 0.546, 0.538),
    *(0.528, 0.527, 0.509, 0.501, 0.497, 0.446, 0.236, 0.032),
)
START_SECONDS = 1.0
"""The start of a kernel."""
NOTEBOOKS, WORKERS = 10_000, 50


def durations(chance: random.Random) -> dict[str, float]:
    """Notebooks as long as the examples, each a little different."""
    return {
        f"n{number:05}.ipynb": START_SECONDS + chance.choice(EXAMPLES) * chance.uniform(0.8, 1.25)
        for number in range(NOTEBOOKS)
    }


def makespan(order: Sequence[str], seconds: Mapping[str, float], workers: int) -> float:
    """The end of the last notebook if each worker takes the next one as soon as it is free."""
    # Requests beyond the number of workers wait at dask in the order of their submission, so the
    # lead of the scheduler changes nothing.
    submitted, waiting = list(order), list[str]()
    free = [0.0] * workers
    heapq.heapify(free)
    while submitted or waiting:
        while submitted and len(waiting) < 1 + SPARE:
            waiting.append(submitted.pop(0))
        heapq.heappush(free, heapq.heappop(free) + seconds[waiting.pop(0)])
    return max(free)


def lower_bound(seconds: Mapping[str, float], workers: int) -> float:
    return max(*seconds.values(), sum(seconds.values()) / workers)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("share_known", [1.0, 0.9, 0.0])
def test_ten_thousand_notebooks_on_fifty_workers_end_near_the_bound(
    noise: float, share_known: float
) -> None:
    chance = random.Random(f"{noise} {share_known}")
    seconds = durations(chance)
    # The last run took a little more or less, and new notebooks have no history.
    history = {
        path: duration * chance.uniform(1 - noise, 1 + noise)
        for path, duration in seconds.items()
        if chance.random() < share_known
    }
    sizes = {path: chance.randint(1_000, 1_000_000) for path in seconds}
    order = longest_first(list(seconds), history, sizes)
    assert makespan(order, seconds, WORKERS) <= 1.05 * lower_bound(seconds, WORKERS)


def test_the_order_matters() -> None:
    """The same simulation with the shortest first is worse, so the one above can fail."""
    seconds = {"long.ipynb": 100.0} | {f"{number}.ipynb": 1.0 for number in range(400)}
    bound = lower_bound(seconds, 4)
    best = longest_first(list(seconds), seconds, {})
    assert makespan(best, seconds, 4) <= 1.05 * bound < makespan(best[::-1], seconds, 4)
