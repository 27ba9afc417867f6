"""The code cells that a run leaves out, chosen by tag or by the last cell to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from safe_exec.errors import UsageError
from safe_exec.files import one_line
from safe_exec.notebook.inputs import INJECTED_TAG, CellSelection


class Skipped(NamedTuple):
    """Indexes (among all cells, from 0) of the code cells that are left out, and warnings.

    ``last`` is the index of the last cell to run, ``None`` if the selection names none.
    """

    indexes: frozenset[int]
    warnings: tuple[str, ...]
    last: int | None = None


def skipped_cells(node: Any, selection: CellSelection) -> Skipped:
    """Return the code cells that the selection leaves out.

    A misspelt tag would make everything or nothing run, and the run would pass. So a tag to skip
    that no cell has causes a warning. Raises UsageError if no cell has any of ``only_tags``, and
    for a last cell that does not exist.
    """
    code = [(index, cell) for index, cell in enumerate(node.cells) if cell.cell_type == "code"]
    tags = sorted({tag for _, cell in code for tag in _tags(cell)})
    warnings = [
        f"--skip-tag {one_line(tag)}: no code cell has this tag{_hint(tag, tags)}"
        for tag in selection.skip_tags
        if tag not in tags
    ]
    if selection.only_tags and not set(selection.only_tags) & set(tags):
        name = ", ".join(map(one_line, selection.only_tags))
        message = (
            f"--only-tag {name}: no code cell has this tag{_hint(selection.only_tags[0], tags)}"
        )
        if not selection.lenient:
            raise UsageError(message)
        warnings.append(f"{message}; no cell was run")
    # A number, an id or a tag may name the last cell.
    last = _last(code, selection.until, tags)
    indexes = frozenset(
        index
        for index, cell in code
        if (last is not None and index > last) or _left_out(cell, selection)
    )
    return Skipped(indexes, tuple(warnings), last)


def _left_out(cell: Any, selection: CellSelection) -> bool:
    tags = _tags(cell)
    if tags & set(selection.skip_tags):
        return True
    # The values of a run are set whichever cells run: without them the notebook's defaults would
    # apply.
    return bool(selection.only_tags) and not tags & {*selection.only_tags, INJECTED_TAG}


def _last(code: Sequence[tuple[int, Any]], until: str | None, tags: Sequence[str]) -> int | None:
    if until is None:
        return None
    if until.isascii() and until.isdigit():
        number = int(until)
        if not 1 <= number <= len(code):
            raise UsageError(
                f"--until {until}: the notebook has {len(code)} code cell{'s' * (len(code) != 1)}, numbered from 1"
            )
        return code[number - 1][0]
    by_id = [index for index, cell in code if cell.get("id") == until]
    by_tag = [index for index, cell in code if until in _tags(cell)]
    # Ids are unique, so an id is the more exact name.
    matches = by_id or by_tag
    if not matches:
        raise UsageError(
            f"--until {one_line(until)}: no code cell has this number, id or "
            f"tag{_hint(until, tags)}"
        )
    # A tag may mark several cells, and all of them run.
    return matches[-1]


def _hint(name: str, tags: Sequence[str]) -> str:
    # Imported only for this error: a run that is in order saves three milliseconds.
    import difflib

    near = difflib.get_close_matches(name, tags, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(map(one_line, tags))}" if tags else "; the notebook has no tags"


def _tags(cell: Any) -> set[str]:
    tags = cell.metadata.get("tags", ())
    return {tag for tag in tags if isinstance(tag, str)} if isinstance(tags, Sequence) else set()
