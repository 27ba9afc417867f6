"""The run that goes along with the forks: where it waits, and for which cells it can be used."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from safe_exec.experiments.culprits.oracle.companion import Companion, first_to_wait

CELLS = (0, 3, 9)
# The seconds of cells, and the first cell that waits. The crash cell is cell 9.
PLACES: dict[str, tuple[Mapping[int, float], int]] = {
    "nothing takes long": ({0: 0.3, 3: 0.3, 9: 0.1}, 10),
    "the crash cell takes longest": ({0: 2.0, 3: 0.0, 9: 5.0}, 10),
    "after the long cell": ({0: 6.0, 3: 0.1, 9: 0.1}, 1),
    "after the last long cell": ({0: 6.0, 3: 2.0, 9: 0.1}, 4),
    "no time is known": ({}, 10),
}


@pytest.mark.parametrize(("seconds", "place"), PLACES.values(), ids=PLACES)
def test_it_waits_after_the_cells_that_take_long(seconds: Mapping[int, float], place: int) -> None:
    assert first_to_wait(CELLS, seconds) == place


def test_it_can_be_used_for_sets_with_the_same_cells_up_to_there() -> None:
    companion = Companion(CELLS, {0: 6.0})
    assert companion.fits(CELLS)
    assert companion.fits((0, 1, 7, 9))
    assert not companion.fits((3, 9))
    whole = Companion(CELLS, {})
    assert whole.fits(CELLS)
    assert not whole.fits((0, 9))


def test_later_cells_wait_for_the_decision() -> None:
    async def main() -> list[int]:
        companion = Companion(CELLS, {0: 6.0})
        ran: list[int] = []

        async def run() -> None:
            for index in range(10):
                ran.extend([index] if await companion.is_wanted(index) else [])

        task = asyncio.create_task(run())
        await asyncio.sleep(0)
        assert ran == [0]
        companion.decide((0, 5, 9))
        await task
        return ran

    assert asyncio.run(main()) == [0, 5, 9]
