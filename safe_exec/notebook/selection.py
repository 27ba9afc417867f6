"""The code cells that a run leaves out, chosen by tag or by the last cell to run."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from safe_exec.errors import UsageError
from safe_exec.files import one_line
from safe_exec.notebook.parameters import INJECTED_TAG


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CellSelection:
    """A choice among the code cells of a notebook.

    ``skip_tags`` leaves out cells with any of these tags, ``only_tags`` cells with none of them.
    ``until`` is the last cell to run: its number among the code cells (from 1), its id, or its tag.
    """

    skip_tags: tuple[str, ...] = ()
    only_tags: tuple[str, ...] = ()
    until: str | None = None

    def __bool__(self) -> bool:
        return bool(self.skip_tags or self.only_tags or self.until is not None)


def skipped_cells(node: Any, selection: CellSelection) -> frozenset[int]:
    """Indexes (among all cells, from 0) of the code cells that the selection leaves out.

    Raises UsageError for a tag that no code cell has and for a last cell that is not there: a
    misspelt tag would otherwise run everything, or nothing, and pass.
    """
    code = [(index, cell) for index, cell in enumerate(node.cells) if cell.cell_type == "code"]
    tags = sorted({tag for _, cell in code for tag in _tags(cell)})
    for option, names in (("--skip-tag", selection.skip_tags), ("--only-tag", selection.only_tags)):
        for name in names:
            if name not in tags:
                raise UsageError(
                    f"{option} {one_line(name)}: no code cell has this tag{_hint(name, tags)}"
                )
    last = _last(code, selection.until, tags)
    return frozenset(
        index
        for index, cell in code
        if (last is not None and index > last) or _left_out(cell, selection)
    )


def _left_out(cell: Any, selection: CellSelection) -> bool:
    tags = _tags(cell)
    if tags & set(selection.skip_tags):
        return True
    # The values of a run count whatever runs of the notebook: without them its defaults would.
    return bool(selection.only_tags) and not tags & {*selection.only_tags, INJECTED_TAG}


def _last(code: Sequence[tuple[int, Any]], until: str | None, tags: Sequence[str]) -> int | None:
    if until is None:
        return None
    if until.isascii() and until.isdigit():
        number = int(until)
        if not 1 <= number <= len(code):
            raise UsageError(
                f"--until {until}: the notebook has {len(code)} code cells, numbered from 1"
            )
        return code[number - 1][0]
    by_id = [index for index, cell in code if cell.get("id") == until]
    by_tag = [index for index, cell in code if until in _tags(cell)]
    matches = by_id or by_tag
    if not matches:
        raise UsageError(
            f"--until {one_line(until)}: no code cell has this number, id or tag{_hint(until, tags)}"
        )
    return matches[-1]


def _hint(name: str, tags: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, tags, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(map(one_line, tags))}" if tags else "; the notebook has no tags"


def _tags(cell: Any) -> set[str]:
    tags = cell.metadata.get("tags", ())
    return {tag for tag in tags if isinstance(tag, str)} if isinstance(tags, Sequence) else set()
