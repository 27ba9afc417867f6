"""Compares the outputs of a run with those stored in the notebook, by nbval's rules.

Outputs are compared by kind: each MIME type and each stream has a list of texts, whose order
counts. Metadata, execution counts, tracebacks and the ids of widgets are left out.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from safe_exec.errors import UsageError
from safe_exec.files import one_line, read_regular
from safe_exec.model.ending import OutputDifference

# Lines of a difference that are kept; the outputs themselves are in both notebooks.
SHOWN_LINES = 40

_MOST_BYTES = 1 << 20
_IMAGES = ("image/png", "image/jpeg")
_SKIPPED_KEYS = frozenset(
    {"metadata", "traceback", "output_type", "execution_count", "prompt_number", "name"}
)
# The ids of widgets' models are random.
_SKIPPED_TYPES = frozenset({"application/vnd.jupyter.widget-view+json"})
_OPTIONS: Mapping[str, tuple[str, bool]] = {
    "NBVAL_IGNORE_OUTPUT": ("check", False),
    "PYTEST_VALIDATE_IGNORE_OUTPUT": ("check", False),
    "NBVAL_CHECK_OUTPUT": ("check", True),
    "NBVAL_RAISES_EXCEPTION": ("raises", True),
    "NBVAL_SKIP": ("skip", True),
}
_BY_TAG = {name.lower().replace("_", "-"): option for name, option in _OPTIONS.items()}
_OVERWRITTEN = re.compile(r"^.*\r(?=[^\n])", re.MULTILINE)
_ERASED = re.compile(r"[^\n]\x08")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\b(?:nan|inf)\b", re.IGNORECASE)
_HASH_WIDTH, _HASH_HEIGHT = 9, 8


class ComparisonRules(Struct, frozen=True, kw_only=True):
    """The rules by which outputs are compared.

    With ``lax`` only cells marked NBVAL_CHECK_OUTPUT are compared. ``sanitizers`` are patterns with
    replacements, applied to both sides in order. Numbers count as equal up to a relative or
    absolute difference of ``tolerance``. ``image_distance`` is the number of bits, of 64, in which
    the perceptual hashes of two images may differ; ``None``: images are not compared.
    """

    lax: bool = False
    sanitizers: tuple[tuple[re.Pattern[str], str], ...] = ()
    tolerance: float | None = None
    image_distance: int | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the rules as JSON values."""
        return {
            "lax": self.lax,
            "sanitizers": [[pattern.pattern, text] for pattern, text in self.sanitizers],
            "tolerance": self.tolerance,
            "image_distance": self.image_distance,
        }


class Markers(Struct, frozen=True, kw_only=True):
    """The options that a cell's comments and tags set.

    ``check`` is ``None`` if none of them sets it.
    """

    check: bool | None = None
    raises: bool = False
    skip: bool = False


class Difference(Struct, frozen=True, kw_only=True):
    """One kind of output that differs.

    ``lines`` are a diff: stored lines with ``-``, new ones with ``+``.
    """

    kind: str
    summary: str
    lines: tuple[str, ...] = ()


# --- options --------------------------------------------------------------------------------------


def markers(cell: Any) -> Markers:
    """Return the options of a cell.

    A comment overrides a tag, and a later comment or tag overrides an earlier one.
    """
    options: dict[str, bool] = {}
    tags = cell.metadata.get("tags", ())
    for tag in tags if isinstance(tags, Sequence) else ():
        if tag in _BY_TAG:
            name, value = _BY_TAG[tag]
            options[name] = value
    for line in cell.source.splitlines():
        stripped = line.strip()
        if stripped.startswith("#") and (option := _OPTIONS.get(stripped.lstrip("#").strip())):
            options[option[0]] = option[1]
    return Markers(**options)


def read_sanitizers(path: Path) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Read pairs of lines ``regex: ...`` and ``replace: ...``, as in nbval's files.

    Raises UsageError.
    """
    text = read_regular(path, most=_MOST_BYTES, error=UsageError).decode(errors="replace")
    # A later rule for the same text replaces the earlier one, in its place.
    sanitizers: dict[re.Pattern[str], str] = {}
    pattern: re.Pattern[str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{one_line(path)}:{number}"
        key, colon, value = line.partition(":")
        if colon and key == "regex":
            if pattern is not None:
                raise UsageError(f"{place}: expected 'replace:' for the 'regex:' above")
            pattern = _compiled(value.removeprefix(" "), place)
        elif colon and key == "replace":
            if pattern is None:
                raise UsageError(f"{place}: expected 'regex:' above this 'replace:'")
            sanitizers[pattern] = value.removeprefix(" ")
            pattern = None
    if pattern is not None:
        raise UsageError(f"{one_line(path)}: the last 'regex:' has no 'replace:'")
    if not sanitizers:
        raise UsageError(
            f"{one_line(path)}: no rules in it; expected pairs of lines: regex: ... and replace: ..."
        )
    return tuple(sanitizers.items())


def _compiled(text: str, place: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"{place}: not a regular expression: {error}") from None


# --- comparison -----------------------------------------------------------------------------------


def differences(
    stored: Any, outputs: Sequence[Any], rules: ComparisonRules
) -> tuple[Difference, ...]:
    """Return the kinds of output in which a cell's new outputs differ from the stored ones.

    A cell that was stored without an execution count was never run. It differs if it has outputs
    now; otherwise it is not compared.
    """
    check = markers(stored).check
    if not (not rules.lax if check is None else check):
        return ()
    if stored.get("execution_count") is None:
        if stored.outputs:
            return (
                Difference(kind="outputs", summary="the stored cell has outputs but was not run"),
            )
        return ()
    old, new = _by_kind(stored.outputs, rules), _by_kind(outputs, rules)
    missing = [_gone(kind, old[kind], "-", "is missing") for kind in old if kind not in new]
    unexpected = [_gone(kind, new[kind], "+", "is new") for kind in new if kind not in old]
    changed = [_changed(kind, old[kind], new[kind], rules) for kind in old if kind in new]
    return tuple(filter(None, [*missing, *unexpected, *changed]))


def compare_notebooks(
    stored: Any, new: Any, indexes: Iterable[int], rules: ComparisonRules
) -> tuple[OutputDifference, ...]:
    """Return all differences between the outputs of two notebooks, in the cells at ``indexes``."""
    code_indexes = {index: number for number, (index, _) in enumerate(_code(stored))}
    return tuple(
        OutputDifference(
            index=index,
            code_index=code_indexes[index],
            kind=difference.kind,
            summary=difference.summary,
            lines=difference.lines,
        )
        for index in indexes
        for difference in differences(stored.cells[index], new.cells[index].outputs, rules)
    )


def _by_kind(outputs: Iterable[Any], rules: ComparisonRules) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    streams: dict[str, str] = {}
    for output in outputs:
        if output["output_type"] == "stream":
            name = output["name"]
            kinds.setdefault(name, [])
            streams[name] = streams.get(name, "") + _text(output["text"])
            continue
        for key, value in output.items():
            if key == "data":
                for mime, content in value.items():
                    if mime not in _SKIPPED_TYPES and (
                        rules.image_distance is not None or mime not in _IMAGES
                    ):
                        kinds.setdefault(mime, []).append(_sanitized(content, rules))
            elif key not in _SKIPPED_KEYS:
                kinds.setdefault(key, []).append(_sanitized(value, rules))
    for name, text in streams.items():
        kinds[name] = [_sanitized(_as_shown(text), rules)]
    return kinds


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(part, str) for part in value):
        return "".join(value)
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str)


def _as_shown(text: str) -> str:
    """Return the text as a terminal shows it, after backspaces and carriage returns."""
    previous_text = None
    while previous_text != text:
        previous_text, text = text, _ERASED.sub("", text)
    return _OVERWRITTEN.sub("", text)


def _sanitized(value: Any, rules: ComparisonRules) -> str:
    text = _text(value)
    for pattern, replacement in rules.sanitizers:
        text = pattern.sub(replacement, text)
    return text


def _gone(kind: str, values: Sequence[str], sign: str, verb: str) -> Difference:
    lines = [f"{sign}{line}" for value in values for line in _shown(kind, value)]
    return Difference(kind=kind, summary=f"{kind} {verb}", lines=_clipped(lines))


def _changed(
    kind: str, old: Sequence[str], new: Sequence[str], rules: ComparisonRules
) -> Difference | None:
    if len(old) == len(new) and all(
        _equal(kind, one, other, rules) for one, other in zip(old, new, strict=True)
    ):
        return None
    stored_lines = [line for value in old for line in _shown(kind, value)]
    new_lines = [line for value in new for line in _shown(kind, value)]
    lines = list(difflib.unified_diff(stored_lines, new_lines, lineterm="", n=2))[2:]
    counts = "" if len(old) == len(new) else f" ({len(old)} stored, {len(new)} new)"
    return Difference(kind=kind, summary=f"{kind} differs{counts}", lines=_clipped(lines))


def _equal(kind: str, old: str, new: str, rules: ComparisonRules) -> bool:
    if old == new:
        return True
    if kind in _IMAGES and rules.image_distance is not None:
        distance = image_distance(old, new)
        return distance is not None and distance <= rules.image_distance
    return rules.tolerance is not None and _close(old, new, rules.tolerance)


def _close(old: str, new: str, tolerance: float) -> bool:
    """Whether texts differ only in column widths, and in numbers within the tolerance."""
    if " ".join(_NUMBER.sub("#", old).split()) != " ".join(_NUMBER.sub("#", new).split()):
        return False
    pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
    return all(_near(float(one), float(other), tolerance) for one, other in pairs)


def _near(one: float, other: float, tolerance: float) -> bool:
    both_nan = math.isnan(one) and math.isnan(other)
    return both_nan or math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


def _shown(kind: str, value: str) -> list[str]:
    return [f"({len(value):,} characters of {kind})"] if kind in _IMAGES else value.splitlines()


def _clipped(lines: list[str]) -> tuple[str, ...]:
    more = len(lines) - SHOWN_LINES
    return (*lines[:SHOWN_LINES], f"... {more} more lines") if more > 0 else tuple(lines)


# --- images ---------------------------------------------------------------------------------------


def image_distance(one: str, other: str) -> int | None:
    """Return how many of 64 bits of two images' hashes differ; ``None`` if one is no image.

    Both images are base64. Each bit of the difference hash says whether a pixel of the image,
    shrunk to 9 x 8 grey pixels, is brighter than its neighbour. Raises UsageError if Pillow is not
    installed.
    """
    hashes = [_difference_hash(text) for text in (one, other)]
    if hashes[0] is None or hashes[1] is None:
        return None
    return (hashes[0] ^ hashes[1]).bit_count()


def cells_to_skip(node: Any) -> frozenset[int]:
    """Return the indexes of the code cells that the notebook marks NBVAL_SKIP."""
    return frozenset(index for index, cell in _code(node) if markers(cell).skip)


def cells_that_may_raise(node: Any) -> frozenset[int]:
    """Return the indexes of the code cells that the notebook marks NBVAL_RAISES_EXCEPTION."""
    return frozenset(index for index, cell in _code(node) if markers(cell).raises)


def _code(node: Any) -> list[tuple[int, Any]]:
    return [(index, cell) for index, cell in enumerate(node.cells) if cell.cell_type == "code"]


def demand_pillow() -> None:
    """Raise UsageError if images cannot be compared here."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UsageError(
            "--compare-images: Pillow is not installed; pip install 'safe-exec[compare]'"
        ) from None


def _difference_hash(text: str) -> int | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            pixels = image.convert("L").resize((_HASH_WIDTH, _HASH_HEIGHT)).tobytes()
    except (OSError, ValueError, binascii.Error, Image.DecompressionBombError):
        return None
    bits = 0
    for row in range(_HASH_HEIGHT):
        line = pixels[row * _HASH_WIDTH : (row + 1) * _HASH_WIDTH]
        for pixel, right in itertools.pairwise(line):
            bits = bits << 1 | (pixel < right)
    return bits
