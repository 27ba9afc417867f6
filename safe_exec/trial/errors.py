"""Determines the error of a finished cell from its reply and its outputs. Pure.

A traceback in the outputs is an error whatever the reply says, as papermill and every reader of the
notebook see it: ``%run`` of a file that raises replies "ok".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from safe_exec.model.ending import CellError

# What ipykernel 7 answers where showing a result failed: it names the type of an error that there
# is not.
NO_ERROR = "NoneType"
# The error of input() in a kernel that was told that nobody can answer.
NOBODY_TYPES = "StdinNotImplementedError"


class FoundError(Struct, frozen=True, kw_only=True):
    """The error of a cell, and whether a debugger that asked for input started after it."""

    error: CellError
    debugger: bool = False


def error_of(reply: Mapping[str, Any], outputs: Iterable[Mapping[str, Any]]) -> FoundError | None:
    """Return the error of a cell; ``None`` if it neither replied with one nor shows one."""
    shown_error = next(
        (_error(output) for output in outputs if output.get("output_type") == "error"), None
    )
    if reply.get("status") != "error":
        return None if shown_error is None else FoundError(error=shown_error)
    reply_error = _error(reply)
    if shown_error is None or reply_error.ename == shown_error.ename:
        return FoundError(error=reply_error)
    if reply_error.ename == NO_ERROR:
        return FoundError(error=shown_error)
    if reply_error.ename == NOBODY_TYPES and reply_error.in_debugger:
        return FoundError(error=shown_error, debugger=True)
    return FoundError(error=reply_error)


def _error(content: Mapping[str, Any]) -> CellError:
    traceback = tuple(str(line) for line in content.get("traceback") or ())
    return CellError(
        ename=str(content.get("ename", "")),
        evalue=str(content.get("evalue", "")),
        traceback=traceback,
    )
