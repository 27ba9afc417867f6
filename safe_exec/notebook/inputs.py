"""The changes that a run makes to its notebook before it starts: parameters and selected cells."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct, field

from safe_exec.errors import UsageError
from safe_exec.files import read_regular

if TYPE_CHECKING:
    from safe_exec.notebook.literals import Value

INJECTED_TAG = "injected-parameters"
# Nobody has typed this much.
_MOST_STDIN_BYTES = 1 << 20


class ExitMeaning(StrEnum):
    """The result of a notebook that calls ``sys.exit()`` or ``sys.exit(0)``."""

    SUCCESS = "success"
    ERROR = "error"


def exit_meaning(text: str) -> ExitMeaning:
    """Parse ``success`` or ``error``. Raises UsageError."""
    try:
        return ExitMeaning(text)
    except ValueError:
        raise UsageError(f"exit_is: {text!r} is neither 'success' nor 'error'") from None


class StdinFile(Struct, frozen=True, kw_only=True):
    """The lines that answer ``input()``, and the file that holds them."""

    path: str
    lines: tuple[str, ...]


def read_stdin(path: Path) -> StdinFile:
    """Read the answers to ``input()``, one per line. Raises UsageError."""
    data = read_regular(path, most=_MOST_STDIN_BYTES, error=UsageError)
    text = data.decode(errors="replace")
    return StdinFile(path=str(path.absolute()), lines=tuple(text.splitlines()))


class CellSelection(Struct, frozen=True, kw_only=True):
    """A selection of the code cells of a notebook."""

    # Skip cells with any of these tags.
    skip_tags: tuple[str, ...] = ()
    # Skip cells with none of these tags.
    only_tags: tuple[str, ...] = ()
    # The last cell to run: its number among the code cells (from 1), its id, or its tag.
    until: str | None = None
    # A notebook without any of ``only_tags`` runs nothing, with a warning, and is not refused:
    # among many notebooks some have no such cell.
    lenient: bool = False

    def __bool__(self) -> bool:
        return bool(self.skip_tags or self.only_tags or self.until is not None)


class NotebookInputs(Struct, frozen=True, kw_only=True):
    """Parameters by name, the cells to run, and the treatment of exit, shell commands and input.

    With ``strict_shell`` a failing ``!command`` raises. ``stdin`` holds the answers to ``input()``.
    """

    parameters: Mapping[str, Value] = field(default_factory=dict)
    selection: CellSelection = field(default_factory=CellSelection)
    exit_is: ExitMeaning = ExitMeaning.SUCCESS
    strict_shell: bool = False
    stdin: StdinFile | None = None

    def __bool__(self) -> bool:
        return bool(self.parameters or self.selection)


class Applied(NamedTuple):
    """The changed notebook, the indexes of the code cells that do not run, and warnings."""

    node: Any
    skipped: frozenset[int]
    warnings: tuple[str, ...]


def apply(node: Any, inputs: NotebookInputs, language: str | None) -> Applied:
    """Set the parameters and select the cells of a notebook. Raises UsageError.

    Cell numbers in ``inputs`` are those of the notebook's file. Cell numbers of the run count the
    cell that sets the parameters, as the output notebook shows it.
    """
    if not inputs:
        return Applied(node, frozenset(), ())
    # Most runs set nothing: they do not pay for these (ast, tokenize, yaml; 4 ms).
    from safe_exec.notebook.parameters import inject
    from safe_exec.notebook.selection import skipped_cells

    injected = inject(node, inputs.parameters, language)
    skipped = skipped_cells(node, inputs.selection)
    indexes = skipped.indexes
    if injected.inserted_at is not None:
        # The new cell shifts the indexes of all later cells.
        at = injected.inserted_at
        indexes = frozenset(index + (index >= at) for index in indexes)
        # The new cell does not run either if it lies behind the last cell to run.
        if skipped.last is not None and at > skipped.last + 1:
            indexes |= {at}
    return Applied(injected.node, indexes, (*injected.warnings, *skipped.warnings))
