"""Values of limits from any source: parsed, located in errors, merged.

A *layer* is the set of limits from one source (a profile, a file, a notebook, the options);
:mod:`safe_exec.limits.profiles` stacks the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec.errors import LimitsError
from safe_exec.files import one_line
from safe_exec.limits.spec import SPECS, Kind
from safe_exec.limits.yaml_source import Value
from safe_exec.model.limits import Limits
from safe_exec.units import (
    UnitError,
    format_seconds,
    format_size,
    parse_count,
    parse_cpus,
    parse_duration,
    parse_grace,
    parse_percent,
    parse_size,
    shown,
)

# A limit in bytes, seconds or as a count; ``None`` is unlimited.
Figure = int | float | None

# No kernel starts with less. A smaller number has lost its unit.
_LEAST_MEMORY = 1 << 20

# The valid keys under ``limits:``; ``-`` counts as ``_``.
LIMIT_NAMES = tuple(SPECS)

_PARSERS: Mapping[Kind, Callable[[object], Figure]] = {
    Kind.SIZE: parse_size,
    Kind.COUNT: parse_count,
    Kind.PROCESSORS: parse_cpus,
    Kind.TIME: parse_duration,
    Kind.GRACE: parse_grace,
}


class Layer(Struct, frozen=True, kw_only=True):
    """The limits from one source, by name, and the place where each was set."""

    values: Mapping[str, Figure] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


def parse_overrides(
    mapping: Mapping[str, object], *, error_prefix: str, machine_memory: int | None
) -> dict[str, Figure]:
    """Parse limits to bytes, seconds and counts. Raises LimitsError.

    ``error_prefix`` begins each error: the name of the source, or ``--`` for options.
    ``machine_memory`` is the reference in bytes for a memory limit such as ``"75%"``.
    """
    entries = ((key, value, error_prefix) for key, value in mapping.items())
    return _parse(entries, machine_memory=machine_memory)


def parse_layer(
    entries: Mapping[str, Value], *, source: str = "", machine_memory: int | None
) -> Layer:
    """Parse the ``limits`` section of a file. Raises LimitsError.

    ``source`` names the section in reports. Without it, the source of a limit is its file name and
    line.
    """
    values = _parse(
        ((key, value.scalar(key), value.location) for key, value in entries.items()),
        machine_memory=machine_memory,
    )
    lines = {
        _name(key): source or value.location.rpartition("/")[2] for key, value in entries.items()
    }
    return Layer(values=values, sources=lines)


def apply(limits: Limits, overrides: Mapping[str, Figure]) -> Limits:
    """Return ``limits`` with the overrides."""
    changes: dict[str, Any] = dict(overrides)
    return replace(limits, **changes)


def tighten(limits: Limits, overrides: Mapping[str, Figure]) -> tuple[Limits, list[str]]:
    """Return the limits with the stricter overrides, and the names of the ignored, looser ones."""
    ignored = [name for name, value in overrides.items() if _looser(value, getattr(limits, name))]
    return apply(
        limits, {name: value for name, value in overrides.items() if name not in ignored}
    ), ignored


def merge_notebook_limits(
    base: Limits,
    notebook_overrides: Mapping[str, Figure],
    *,
    loosenable: bool,
    error_prefix: str = "notebook",
    reason: str = "the profile does not let a notebook loosen limits",
) -> tuple[Limits, tuple[str, ...]]:
    """Merge the limits of a notebook or cell into ``base``.

    Return a warning for each ignored one.
    """
    if loosenable:
        return apply(base, notebook_overrides), ()
    limits, ignored = tighten(base, notebook_overrides)
    return limits, tuple(
        ignored_warning(error_prefix, name, notebook_overrides[name], getattr(base, name), reason)
        for name in ignored
    )


def ignored_warning(
    error_prefix: str, name: str, new_value: Figure, old_value: Figure, reason: str
) -> str:
    """Return the warning about a value that would have loosened a limit."""
    return f"{error_prefix}: {name} {format_limit(name, new_value)} ignored, {format_limit(name, old_value)} holds: {reason}"


def format_limit(name: str, value: Figure) -> str:
    """Format a limit for people: ``"2.0 GiB"``, ``"5m"``, ``"128"`` or ``"unlimited"``."""
    if value is None:
        return "unlimited"
    kind = SPECS[name].kind
    if kind is Kind.SIZE:
        return format_size(value)
    return format_seconds(value) if kind in (Kind.TIME, Kind.GRACE) else f"{value:g}"


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return the end of an error about an unknown word: the nearest valid word, and all of them."""
    # Imported only for this error: a run that is in order saves three milliseconds.
    from difflib import get_close_matches

    names = sorted(candidates)
    # The candidates are spelled with underscores.
    close = get_close_matches(word.replace("-", "_"), names, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}expected one of {', '.join(names)}"


def _parse(
    entries: Iterable[tuple[str, object, str]], *, machine_memory: int | None
) -> dict[str, Figure]:
    values: dict[str, Figure] = {}
    for key, value, error_prefix in entries:
        name = _name(key)
        if name not in SPECS:
            place = "options" if error_prefix.startswith("--") else one_line(error_prefix)
            raise LimitsError(
                f"{place}: unknown limit {shown(key)}; {nearest(str(key), LIMIT_NAMES)}"
            )
        # Both spellings of one key: the order of a mapping must not decide which one applies.
        if name in values:
            raise LimitsError(
                f"{one_line(error_prefix)}: {name} is given twice (- and _ are the same); keep one"
            )
        values[name] = _figure(name, value, _place(error_prefix, name), machine_memory)
    return values


def _figure(name: str, value: object, place: str, machine_memory: int | None) -> Figure:
    try:
        # Only memory has a total that a percentage can refer to.
        share = parse_percent(value) if name == "memory" else None
        figure = _PARSERS[SPECS[name].kind](value) if share is None else None
    except UnitError as problem:
        raise LimitsError(f"{place}: {problem}") from None
    if share is None:
        # Files and metadata are not typed in haste, and may have been written by a program.
        is_typed = place.startswith("--")
        if is_typed and name == "memory" and figure is not None and figure < _LEAST_MEMORY:
            raise LimitsError(f"{place}: {_too_little(value)}")
        return figure
    # A cell cannot set memory, and some systems do not report theirs.
    if machine_memory is None:
        raise LimitsError(f"{place}: {shown(value)} of an unknown memory; give a size such as 2G")
    # A tiny share must not become 0, which is no valid limit.
    return max(1, int(share * machine_memory))


def _too_little(value: object) -> str:
    text = str(value).strip()
    guess = f"did you mean {text}M?" if text.isdigit() else "give a size such as 512M"
    return f"{shown(value)} is too little for any kernel: a number alone is bytes; {guess}"


def _name(key: object) -> str:
    return str(key).replace("-", "_")


def _place(error_prefix: str, name: str) -> str:
    return (
        f"{error_prefix}{name.replace('_', '-')}"
        if error_prefix.startswith("--")
        else f"{one_line(error_prefix)}: {name}"
    )


def _looser(new: Figure, old: Figure) -> bool:
    # None is unlimited.
    return old is not None and (new is None or new > old)
