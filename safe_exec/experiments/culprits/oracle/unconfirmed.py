"""The sets of cells that failed in a quicker way than in a run from scratch to the end. Pure.

Forks of a live kernel and recognised hangs decide which trial comes next. A complete run of the
same cells confirms them, or shows that they have led the search astray.
"""

from __future__ import annotations

from safe_exec.experiments.culprits.oracle.fork_answers import Cells, ForkAnswer
from safe_exec.experiments.culprits.protocol import Outcome, Reply


class UnconfirmedFailures:
    """The failures that no complete run has confirmed, and what complete runs contradicted."""

    def __init__(self) -> None:
        # How many complete runs contradicted a quicker answer; whether one led the search astray.
        self.disagreements = 0
        self.misled = False
        # Whether pictures tell a hang of this notebook.
        self.trusts_pictures = True
        self._recognised: set[Cells] = set()
        self._forked: set[Cells] = set()

    def add_recognised(self, cells: Cells) -> None:
        """Record that the hang of these cells was recognised."""
        self._recognised.add(cells)

    def add_forked(self, cells: Cells) -> None:
        """Record that these cells failed in a fork."""
        self._forked.add(cells)

    def is_recognised_only(self, cells: Cells) -> bool:
        """Tell whether the hang of these cells was recognised, and not confirmed."""
        return cells in self._recognised

    def is_forked_only(self, cells: Cells) -> bool:
        """Tell whether these cells failed in a fork, and not in a run from scratch."""
        return cells in self._forked

    def refutes_forks(
        self,
        cells: Cells,
        reply: Reply,
        forked: ForkAnswer | None,
        *,
        is_confirmation: bool,
        of_cells: bool,
    ) -> bool:
        """Compare the end of a run with earlier answers; tell whether it contradicts a fork.

        ``forked`` is the answer of a fork to the same query. ``of_cells`` is true if the run was of
        whole cells, not of parts of them.
        """
        if reply.cut:
            return False
        fails = reply.answer is Outcome.FAIL or reply.another_form
        is_refuted = forked is not None and fails != (forked.outcome is Outcome.FAIL)
        self.disagreements += is_refuted
        if not is_confirmation:
            return is_refuted
        if cells in self._recognised and not fails:
            # The cell is slow and does not hang: what looks the same here is not the same.
            self.disagreements += 1
            if of_cells:
                self.trusts_pictures, self.misled = False, True
        if cells in self._forked and not fails:
            self.disagreements += 1
            self.misled = is_refuted = True
        self._recognised.discard(cells)
        self._forked.discard(cells)
        return is_refuted
