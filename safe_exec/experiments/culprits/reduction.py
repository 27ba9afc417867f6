"""Makes the culprit cells of a reproduction smaller: states the search over their statements. Pure.

The search for cells also searches for statements, once for each depth of blocks, the outermost
first. The statements at this depth take the place of the cells. Everything that must stay (the
lines of the crash and of its stack, and the blocks around the statements) takes the place of the
crash cell.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.experiments.culprits.minimizer import search
from safe_exec.experiments.culprits.protocol import Outcome, Problem, Query, Reply, Result
from safe_exec.experiments.culprits.statements import (
    Span,
    is_valid,
    remaining_lines,
    spans_of,
    text_of,
)
from safe_exec.experiments.static_analysis.dependencies import Dependencies, read_cell
from safe_exec.experiments.static_analysis.names import USUAL
from safe_exec.experiments.static_analysis.side_effects import writes_file

# A failure must have been seen this often to count as certain, and at least once in a run from
# scratch.
CONFIRMATIONS = 2


class Piece(Struct, frozen=True, kw_only=True):
    """A span of one cell; ``cell`` is the index of the cell in the notebook."""

    cell: int
    span: Span


class Reduction:
    """The pieces that remain of some cells.

    ``sources`` are the cells in order, ``crash`` is the last of them, ``lines`` are those that must
    stay, by cell. Without ``confirms`` no depth is confirmed; the caller confirms the whole.
    """

    def __init__(
        self,
        sources: Mapping[int, str],
        *,
        crash: int,
        crash_line: int,
        lines: Mapping[int, Collection[int]],
        language: str | None,
        confirms: bool = True,
    ) -> None:
        self.sources, self.crash, self.language = sources, crash, language
        self.confirms = confirms
        self.crash_line = crash_line
        self.depth = 0
        self._spans = {cell: spans_of(source) for cell, source in sources.items()}
        self.pieces = [
            Piece(cell=cell, span=span) for cell in sources for span in self._spans[cell]
        ]
        self._pinned = {
            number
            for number, piece in enumerate(self.pieces)
            if any(piece.span.has(line) for line in lines.get(piece.cell, ()))
            or self._writes_file(piece)
        }
        self.selection = frozenset(range(len(self.pieces)))

    def _writes_file(self, piece: Piece) -> bool:
        """Whether a piece writes a file."""
        # A file outside the notebook's folder is still there in the next trial, which then seems to
        # need no statement that writes it.
        numbers = range(piece.span.first, piece.span.last + 1)
        try:
            tree = ast.parse(textwrap.dedent(text_of(self.sources[piece.cell], numbers)))
        except SyntaxError:
            return False
        return any(writes_file(node, USUAL) for node in ast.walk(tree))

    @property
    def depths(self) -> range:
        """The depths of all pieces, the outermost first."""
        return range(1 + max((piece.span.depth for piece in self.pieces), default=-1))

    @property
    def is_smaller(self) -> bool:
        """Whether anything was removed."""
        return len(self.selection) < len(self.pieces)

    @property
    def remainder(self) -> int:
        """The number by which the search at a depth refers to everything that must stay."""
        return len(self.pieces)

    def _with_blocks(self, pieces: Collection[int]) -> frozenset[int]:
        """Return the pieces whose enclosing blocks were not removed."""
        removed = [self.pieces[n] for n in range(len(self.pieces)) if n not in pieces]
        return frozenset(
            n
            for n in pieces
            if not any(
                other.cell == self.pieces[n].cell and other.span.holds(self.pieces[n].span)
                for other in removed
            )
        )

    def steps(
        self, *, start_seconds: float, remaining: Callable[[], float]
    ) -> Generator[Query, Reply, None]:
        """Search at each depth; ``selection`` is then the result.

        ``remaining`` returns the seconds that are left, ``start_seconds`` is the time of a trial.
        """
        outer: frozenset[int] = frozenset()
        # What a block used may be needed no longer, so the outermost ones are tried once more.
        for number, depth in enumerate((*self.depths, 0)):
            self.depth = depth
            if not self.candidates(depth) or (number and not depth and self.selection == outer):
                continue
            problem = self.problem(depth, start_seconds=start_seconds, budget=remaining())
            result = yield from search(problem)
            # After a search that the budget ended its best result counts too, if it is certain.
            if not self.apply(depth, result) or result.stopped is not None:
                return
            outer = self.selection if number == 0 else outer

    def selected(self, query: Query) -> frozenset[int]:
        """Return the pieces that a query keeps."""
        return self.with_chosen(self.depth, query.cells)

    def judge(self, selection: Collection[int], reply: Reply) -> Reply:
        """Mark a trial's failure as unresolved unless it occurred at the crash line."""
        if reply.answer is Outcome.PASS or (
            reply.answer is Outcome.FAIL
            and self.is_same_line(selection, reply.line, exact=reply.exact_line)
        ):
            return reply
        # Another failure, or the same one elsewhere. An undefined name shows what is missing.
        return replace(
            reply,
            answer=Outcome.UNRESOLVED,
            another_form=False,
            stopped_at=self.remainder if reply.names else None,
        )

    # --- one depth --------------------------------------------------------------------------------

    def candidates(self, depth: int) -> tuple[int, ...]:
        """Return the pieces at a depth that may be removed, in the order of the notebook."""
        return tuple(
            n for n in sorted(self.selection - self._pinned) if self.pieces[n].span.depth == depth
        )

    def with_chosen(self, depth: int, chosen: Collection[int]) -> frozenset[int]:
        """Return the remaining pieces if only the chosen candidates of a depth stay."""
        removed = set(self.candidates(depth)) - set(chosen)
        return self._with_blocks(self.selection - removed)

    def problem(self, depth: int, *, start_seconds: float, budget: float) -> Problem:
        """State the search over the candidates of a depth."""
        candidates, remainder = self.candidates(depth), self.remainder

        def predicted_stop(cells: frozenset[int]) -> int | None:
            selection = self.with_chosen(depth, cells)
            return None if self.is_valid(selection) else remainder

        definitions = {n: self._definitions(n) for n in candidates}
        slice_, needs = self._dependencies(depth, candidates)
        return Problem(
            cells=(*candidates, remainder),
            slice=slice_,
            needs=needs,
            definers=lambda name, _cell: tuple(
                n for n in reversed(candidates) if name in definitions[n]
            ),
            predicted_stop=predicted_stop,
            start_seconds=start_seconds,
            budget=budget,
            confirms=self.confirms,
        )

    def _definitions(self, number: int) -> frozenset[str]:
        return read_cell(textwrap.dedent(self._text(number))).defines

    def _text(self, number: int) -> str:
        """Return the text of the piece ``number`` without its removed parts."""
        piece = self.pieces[number]
        numbers = [n for n in self.numbers(self.selection, piece.cell) if piece.span.has(n)]
        return text_of(self.sources[piece.cell], numbers)

    def _dependencies(
        self, depth: int, candidates: Sequence[int]
    ) -> tuple[frozenset[int], dict[int, frozenset[int]]]:
        """Return the candidates on which needed lines depend, and the needs of each candidate."""
        # The names of local variables say little about the order in which functions run.
        if depth:
            return frozenset(self._last_of_blocks(depth, candidates)), {}
        outer = [n for n in sorted(self.selection) if self.pieces[n].span.depth == 0]
        dependencies = Dependencies.of_sources(
            [self._text(n) for n in outer], language=self.language
        )
        staying = [at for at, n in enumerate(outer) if n not in candidates]
        sliced = {outer[m] for at in staying for m in dependencies.slice_of(at)}
        needs = {
            n: frozenset(outer[m] for m in dependencies.needs(at)) & set(candidates)
            for at, n in enumerate(outer)
            if n in candidates
        }
        return frozenset(sliced & set(candidates)), needs

    def _last_of_blocks(self, depth: int, candidates: Sequence[int]) -> Iterator[int]:
        """Yield the last candidate of each block that cannot be empty, often its `return`."""
        blocks: dict[int, list[int]] = {}
        for number in candidates:
            piece = self.pieces[number]
            enclosing = max(
                other
                for other in self.selection
                if self.pieces[other].cell == piece.cell
                and self.pieces[other].span.holds(piece.span)
            )
            blocks.setdefault(enclosing, []).append(number)
        for members in blocks.values():
            selection = self.with_chosen(depth, set(candidates) - set(members))
            if not self.is_valid(selection):
                yield members[-1]

    def is_valid(self, selection: Collection[int]) -> bool:
        """Whether each cell is Python with at least one statement."""
        return all(map(is_valid, self.texts(selection).values()))

    def apply(self, depth: int, result: Result) -> bool:
        """Keep the pieces that a search shows to be needed; return false if that is uncertain."""
        failures, runs = result.reproduced
        certain = failures == runs and (
            runs > 0 and runs + result.quick >= CONFIRMATIONS
            if self.confirms
            else runs + result.quick > 0
        )
        if not result.cells or not certain:
            return False
        self.selection = self.with_chosen(depth, result.cells)
        return True

    # --- texts ------------------------------------------------------------------------------------

    def numbers(self, selection: Collection[int], cell: int) -> list[int]:
        """Return the numbers of the lines that remain of a cell."""
        removed = [
            piece.span
            for n, piece in enumerate(self.pieces)
            if piece.cell == cell and n not in selection
        ]
        return remaining_lines(self.sources[cell], self._spans[cell], removed)

    def texts(self, selection: Collection[int]) -> dict[int, str]:
        """Return the sources of the cells with a selection of their pieces."""
        return {
            cell: text_of(source, self.numbers(selection, cell)) if self._spans[cell] else source
            for cell, source in self.sources.items()
        }

    def is_same_line(self, selection: Collection[int], line: int | None, *, exact: bool) -> bool:
        """Whether a line of the reduced crash cell is the crash line.

        A line that is not ``exact`` was sampled: any line of the same top-level statement will do.
        """
        numbers = self.numbers(selection, self.crash)
        if line is None or not 1 <= line <= len(numbers):
            return False
        original = numbers[line - 1]
        if exact or original == self.crash_line:
            return original == self.crash_line
        outer = [span for span in self._spans[self.crash] if span.depth == 0]
        return any(span.has(original) and span.has(self.crash_line) for span in outer)
