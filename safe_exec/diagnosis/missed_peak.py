"""Words for memory that may have passed its limit between two checks of the watchdog. Pure."""

from __future__ import annotations

from safe_exec.diagnosis.memory_use import MEMORY_CAUSES
from safe_exec.model.evidence import Evidence
from safe_exec.model.verdict import Cause
from safe_exec.units import format_seconds, format_size


def is_lower_bound(evidence: Evidence, cause: Cause | None) -> bool:
    """Whether memory may have passed its limit, and the cause does not say so anyway."""
    is_known = cause is not None and cause.kind in MEMORY_CAUSES
    return evidence.memory_missed is not None and not is_known


def missed_peak_warning(
    evidence: Evidence, limit: int | None, cause: Cause | None
) -> tuple[str, ...]:
    """Return a warning about a peak that the checks may have missed; empty without one."""
    missed = evidence.memory_missed
    if missed is None or limit is None or not is_lower_bound(evidence, cause):
        return ()
    text = (
        f"memory may have passed its limit of {format_size(limit)} for a moment: one process had "
        f"up to {format_size(missed.process)}, pages of files included, and the watchdog saw "
        f"{format_size(missed.highest_check)} of them; all processes together may have had "
        f"{format_size(missed.possible)}. Its checks were up to {format_seconds(missed.interval)} "
        "apart; only control groups count every moment (`safe-exec doctor`)"
    )
    return (text,)
