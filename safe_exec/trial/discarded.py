"""Warns about files that were lost with the sandbox. May import sandbox, files, units and model."""

from __future__ import annotations

from safe_exec.files import one_line
from safe_exec.keeper.protocol import Discarded, DiscardedGroup
from safe_exec.model.evidence import IsolationFacts
from safe_exec.units import format_size

NOT_KEPT = "files that were not kept"
# The warning stays on one line.
MOST_NAMED = 5
LONGEST_NAME = 120


def discarded_warning(
    discarded: Discarded, facts: IsolationFacts | None, *, writable_helps: bool
) -> str | None:
    """Return a line that names the largest lost files and how to keep them.

    Returns ``None`` if no file was lost. ``writable_helps`` is true if the kernel's user could
    write to a directory that ``--writable`` opens.
    """
    if not discarded.groups:
        return None
    listing = ", ".join(map(_in_words, discarded.groups[:MOST_NAMED]))
    others = discarded.files - sum(group.files for group in discarded.groups[:MOST_NAMED])
    more = f" and {others} more" if others > 0 else "" if discarded.is_complete else " and more"
    return (
        f"{NOT_KEPT}: {listing}{more}. "
        f"{_why(discarded)}{_advice(discarded, facts, writable_helps=writable_helps)}"
    )


def _in_words(group: DiscardedGroup) -> str:
    path = group.name if group.place == "." else f"{group.place}/{group.name}"
    label = one_line(path)
    if len(label) > LONGEST_NAME:
        label = f"{label[: LONGEST_NAME // 2]}…{label[-LONGEST_NAME // 2 :]}"
    size = format_size(group.bytes)
    return f"{label} ({size})" if group.files == 1 else f"{label}/ ({group.files} files, {size})"


def _why(discarded: Discarded) -> str:
    places = sorted({group.place for group in discarded.groups}, reverse=True)
    names = [_PLACES.get(place, one_line(place)) for place in places if place != "."]
    verb = "were its own and are" if len(names) > 1 else "was its own and is"
    own = f"{_listed(names)} of this run {verb} gone" if names else ""
    folder = (
        "the notebook worked in a copy of its folder, of which nothing comes back"
        if "." in places
        else ""
    )
    text = "; ".join(part for part in (own, folder) if part)
    return text[:1].upper() + text[1:] if not text.startswith(("$", "/")) else text


_PLACES = {"~": "the home"}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def _advice(discarded: Discarded, facts: IsolationFacts | None, *, writable_helps: bool) -> str:
    """Return how to keep the lost files under this run's isolation."""
    ways: list[str] = []
    if any(group.place == "." for group in discarded.groups):
        ways.append("name them with --keep-files PATTERN")
    if facts is None or facts.folder in facts.writable:
        repository = (
            " or repository" if facts is not None and facts.repository in facts.writable else ""
        )
        ways.append(f"write into the notebook's folder{repository}")
    if facts is not None and writable_helps:
        ways.append("let it write to a directory of yours with --writable PATH")
    return (
        f". To keep files, {', or '.join(ways)}"
        if ways
        else ". Under this isolation no file is kept"
    )
