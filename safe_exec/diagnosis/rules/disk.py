"""A full disk: measurements of the system come first, then the error text of each library.

``Evidence.volumes`` are the file systems that the kernel writes to. They were measured from outside
while the cell ran and when it failed.
"""

from __future__ import annotations

import re
import signal

from msgspec import Struct

from safe_exec.diagnosis.context import (
    Context,
    exit_facts,
    inside,
    leaves_reason_to_output,
    make,
    outside,
)
from safe_exec.model.ending import CellError, CellFailed, Died
from safe_exec.model.evidence import Volume
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact
from safe_exec.units import format_size

SCARCE_BYTES = 4 << 20
FULL_BYTES = 64 << 10
# A volume with less than this, and no more than SCARCE_BYTES, is full: writes are refused before
# the last byte is used.
FULL_SHARE = 0.01
# A cell that used less than this of a volume did not fill it.
FILLED_BYTES = 64 << 10
MOST_WORDS = 200

FULL = lazy_pattern(
    r"No space left on device|Disk quota exceeded|\bENOSPC\b|\[Errno (?:28|122)\]|os error "
    r"28\b|errno ?= ?28\b"  # strerror(3); Rust; HDF5
    r"|database or disk is full"  # SQLite, SQLITE_FULL (result codes)
    r"|(?P<asked>\d+) requested and (?P<written>\d+) written"  # numpy, ndarray.tofile (convert.c)
    # numpy, if it can ask beforehand (npy_fallocate)
    r"|Not enough free space to write (?P<needed>\d+) bytes"
    r"|[Nn]ot enough (?:free )?(?:disk )?space|[Ii]nsufficient (?:disk )?space|[Dd]isk (?:is "
    r")?full"  # conda, pip, Arrow, GDAL, R
)
# Texts of HDF5, netCDF, GDAL, R and programs about a write that failed for whatever reason.
FAILED_WRITE = lazy_pattern(
    r"(?:write|flush|close|extend|save|dump)\w* (?:failed|error)|failed to (?:write|flush"
    r"|close|save|extend|finalize)"
    r"|[Cc](?:an't|annot) (?:\w+ly )?(?:write|extend|flush|close|save)|error writing|[Ss]hort "
    r"write|[Ii]ncomplete write|write incomplete"
    r"|[Uu]nable to (?:\w+ly )?(?:write|flush|close|extend|create)|[Ii]nput/output error"
)
# Texts of pandas, numpy, json and others about a file of which only the beginning was written.
UNFINISHED = lazy_pattern(
    r"truncated|Ran out of input|not a zip file|[Bb]ad magic number|unexpected end of"
    r"|[Uu]nexpected EOF"  # pickle, zipfile, tarfile
    r"|ended before the end-of-stream marker|[Mm]agic bytes not found|[Ff]ile size is 0 bytes"
    r"|malformed"  # gzip, Parquet, SQLite
    r"|No columns to parse|[Ff]ailed to read all data|No data left in file|mmap length is "
    r"greater|end of file|Expecting value"
    # PyTorch and others, about a worker that got no page of shared memory (SIGBUS): which cell
    # filled it does not matter.
    r"|out of shared memory|[Ii]nsufficient shared memory|killed by signal: Bus error"
)

OS_ERRORS = ("OSError", "IOError", "error")
# Errors of polars, DuckDB, SQLite, Arrow and PyTables that quote the system.
LIBRARY_ERRORS = (
    "ComputeError",
    "IOException",
    "OperationalError",
    "ArrowInvalid",
    "HDF5ExtError",
    "PanicException",
)
# Errors of Python's own that no full disk raises.
LOGIC_ERRORS = frozenset(
    {
        "NameError",
        "TypeError",
        "AttributeError",
        "ZeroDivisionError",
        "AssertionError",
        "SyntaxError",
        "IndentationError",
        "ImportError",
        "ModuleNotFoundError",
        "IndexError",
        "KeyError",
        "StopIteration",
        "RecursionError",
        "NotImplementedError",
        "UnboundLocalError",
        "ValueError",
        "KeyboardInterrupt",
        "StdinNotImplementedError",
        "FileNotFoundError",
        "FileExistsError",
        "PermissionError",
        "IsADirectoryError",
        "NotADirectoryError",
        "UnicodeDecodeError",
        "UnicodeEncodeError",
        "OverflowError",
        "SystemExit",
    }
)


class _Claim(Struct, frozen=True, kw_only=True):
    """An error text about a full disk, its source, and the bytes to write if it names them."""

    text: str
    source: str
    required_bytes: int | None = None


def full(context: Context) -> Cause | None:
    """Recognise a cell error caused by a full disk, whatever its wording."""
    # The kernel is alive, so the volumes could be measured right after the error.
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    # An explicit error text is the strongest hint; a measurement can confirm it.
    claim = _claim(context, error)
    if claim is not None:
        return _of_words(context, error, claim)
    volume = _full_volume(context)
    if volume is None:
        return None
    text = f"{error.ename}: {error.evalue}"
    # A volume that was already full before the cell is a weaker hint than one that the cell filled.
    filled = _was_filled(volume)
    if FAILED_WRITE.search(text):
        return _cause(
            context,
            volume,
            Confidence.CERTAIN if filled else Confidence.LIKELY,
            _raised_fact(error),
        )
    if UNFINISHED.search(text) or (
        filled
        and error.ename.rpartition(".")[2] not in LOGIC_ERRORS
        and not _has_other_number(context)
    ):
        return _cause(context, volume, Confidence.LIKELY, _raised_fact(error))
    return None


def bus_error(context: Context) -> Cause | None:
    """Recognise SIGBUS while a file system in memory is full.

    A mapped file had no space for the accessed page.
    """
    status = context.evidence.exit
    if not isinstance(context.ending, Died) or status is None or status.signal != signal.SIGBUS:
        return None
    volume = _full_volume(context)
    # A full disk of the machine does not raise SIGBUS for a file that has its blocks.
    if volume is None or not volume.own:
        return None
    facts = (*exit_facts(context.evidence), *_facts(context, volume))
    summary = (
        f"bus error: {_name(context, volume)} is full, and native code touched a mapped "
        "file there that has no more room"
    )
    return make(
        context, CauseKind.BUS_ERROR, summary, Confidence.CERTAIN, facts, _advice(context, volume)
    )


def _claim(context: Context, error: CellError) -> _Claim | None:
    """Return the text that reports a full disk, with its source."""
    match = FULL.search(error.evalue) or (
        FULL.search(error.ename) if context.language not in (None, "python") else None
    )
    if match is not None:
        return _Claim(
            text=f"{error.ename}: {error.evalue}"[:300],
            source="the cell's error",
            required_bytes=_required_bytes(match),
        )
    if any(row.number in (28, 122) for row in context.evidence.raised):
        return _Claim(
            text=f"{error.ename}: {error.evalue}"[:300],
            source="the cell's error, and the one that it came from",
        )
    lines = context.evidence.last_words.splitlines() if leaves_reason_to_output(context) else []
    line = next((line for line in reversed(lines) if FULL.search(line)), None)
    return (
        _Claim(text=line.strip()[:300], source="output of the cell") if line is not None else None
    )


def _required_bytes(match: re.Match[str]) -> int | None:
    text = match["needed"]
    return int(text[:18]) if text else None


def _of_words(context: Context, error: CellError, claim: _Claim) -> Cause | None:
    # After a failed write, libraries remove the partial file, so some space may be free again.
    volume = _full_volume(context, claim.required_bytes, scarce=True)
    kind = error.ename.rpartition(".")[2]
    by_system = (
        kind in OS_ERRORS
        or kind in LIBRARY_ERRORS
        or any(row.number in (28, 122) for row in context.evidence.raised)
    )
    if (
        volume is None
        and context.is_python
        and not (by_system or claim.source == "output of the cell")
    ):
        # There is only a text that some code has raised, and no observation confirms it.
        return None
    fact = inside(
        "raised" if claim.source.startswith("the cell") else "printed", claim.text, claim.source
    )
    return _cause(
        context, volume, Confidence.CERTAIN if volume is not None else Confidence.LIKELY, fact
    )


def _full_volume(
    context: Context, required_bytes: int | None = None, *, scarce: bool = False
) -> Volume | None:
    """Return the volume with the least free space, if it has too little.

    With ``scarce`` the volume may have some space left, as after a write that was rolled back.
    """
    evidence = context.evidence
    volumes = list(evidence.volumes)
    if evidence.disk_free is not None and scarce and not volumes:
        volumes.append(
            Volume(places=("the folder",), size=context.limits.disk or 0, free=evidence.disk_free)
        )
    # Several file systems may be full; the one with the least space is the likeliest reason.
    candidates = [
        volume for volume in volumes if volume.free < _least(volume, required_bytes, scarce=scarce)
    ]
    return min(candidates, key=lambda volume: volume.free, default=None)


def _least(volume: Volume, required_bytes: int | None, *, scarce: bool) -> int:
    """Return the free bytes below which a volume counts as full."""
    # The text names the size, so the exact comparison is possible.
    if required_bytes is not None:
        return required_bytes
    return (
        SCARCE_BYTES
        if scarce
        else min(SCARCE_BYTES, max(FULL_BYTES, int(volume.size * FULL_SHARE)))
    )


def _was_filled(volume: Volume) -> bool:
    """Tell whether the cell itself used up the space."""
    return volume.free_at_start is not None and volume.free_at_start - volume.free >= FILLED_BYTES


def _has_other_number(context: Context) -> bool:
    """Tell whether the error has an ``errno`` of the operating system."""
    return any(row.number is not None for row in context.evidence.raised if not row.remote)


def _cause(
    context: Context, volume: Volume | None, confidence: Confidence, claim_fact: Fact
) -> Cause:
    name = _name(context, volume)
    summary = f"the disk is full: {name} had no space for the data"
    return make(
        context,
        CauseKind.DISK_FULL,
        summary,
        confidence,
        (claim_fact, *_facts(context, volume)),
        _advice(context, volume),
    )


def _raised_fact(error: CellError) -> Fact:
    return inside("raised", f"{error.ename}: {error.evalue}"[:MOST_WORDS], "the cell's error")


def _facts(context: Context, volume: Volume | None) -> tuple[Fact, ...]:
    allowed = context.limits.disk
    facts = [] if allowed is None else [outside("disk allowed", allowed, "limits of this run")]
    if volume is None:
        return (
            outside(
                "free where the notebook writes", context.evidence.disk_free, "statvfs at the end"
            ),
            *facts,
        )
    place = ", ".join(volume.places)
    return (
        outside(
            "free at the least",
            volume.free,
            f"statvfs of {place}, while the cell ran and as it failed",
        ),
        outside("size", volume.size, f"statvfs of {place}"),
        *facts,
    )


def _name(context: Context, volume: Volume | None) -> str:
    """Describe the disk by its limit or its owner."""
    # Name the disk by the option that limits it, so that the reader knows what to raise.
    allowed, shm = context.limits.disk, context.limits.shm
    if volume is not None and volume.own and _is_shared_memory(volume):
        return f"{volume.places[0]} ({format_size(shm if shm is not None else volume.size)})"
    if allowed is not None and (volume is None or volume.own):
        return f"the space for folder, /tmp and home together ({format_size(allowed)})"
    if volume is not None and volume.own:
        return f"the sandbox's own {' and '.join(volume.places)} ({format_size(volume.size)})"
    return (
        "a disk of this machine"
        if volume is None
        else f"the machine's disk with {' and '.join(volume.places)}"
    )


def _advice(context: Context, volume: Volume | None) -> str:
    if volume is not None and volume.own and _is_shared_memory(volume):
        return (
            "Put less into /dev/shm (shared memory of worker processes is there), or raise --shm."
        )
    if context.limits.disk is not None and (volume is None or volume.own):
        return (
            "Write less, or remove files that are no longer needed; look at what earlier cells "
            "wrote. Or raise --disk."
        )
    if volume is not None and volume.own:
        return (
            "Write to the notebook's folder instead, or set a limit of your own for all that "
            "it writes with --disk."
        )
    return "Free space on the machine, or write elsewhere; look at the files of earlier cells."


def _is_shared_memory(volume: Volume) -> bool:
    return volume.places == ("/dev/shm",)  # noqa: S108 - named, not used
