"""Plain ddmin (Zeller and Hildebrandt, TSE 2002), to compare with: it knows nothing but the cells and what trials of them show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise


def ddmin(
    cells: Sequence[int],
    fails: Callable[[frozenset[int]], bool],
    *,
    always: frozenset[int] = frozenset(),
) -> tuple[frozenset[int], int]:
    """A 1-minimal subset of ``cells`` that fails together with ``always``, and how many different sets were tried for it.

    Asked again for a set it takes the answer it had, which plain ddmin does not: so the count is no larger than ddmin's own.
    """
    known: dict[frozenset[int], bool] = {}

    def test(some: Sequence[int]) -> bool:
        chosen = frozenset(some) | always
        if chosen not in known:
            known[chosen] = fails(chosen)
        return known[chosen]

    left, parts = list(cells), 2
    if not test(left):
        return frozenset(), len(known)
    if test([]):
        return always, len(known)
    while len(left) > 1:
        ends = [len(left) * part // parts for part in range(parts + 1)]
        chunks = [left[start:end] for start, end in pairwise(ends)]
        others = [left[:start] + left[end:] for start, end in pairwise(ends)]
        if (chunk := next(filter(test, chunks), None)) is not None:
            left, parts = chunk, 2
        elif (rest := next(filter(test, others), None)) is not None:
            left, parts = rest, max(parts - 1, 2)
        elif parts < len(left):
            parts = min(len(left), 2 * parts)
        else:
            break
    return frozenset(left) | always, len(known)
