"""Tells whether memory may have passed its limit between two checks of the watchdog. Pure.

Linux keeps the largest resident memory of each process that has been waited for (getrusage(2)), and
passes it on to the parent that waited. So it is known of processes that lived between two checks.
"""

from __future__ import annotations

from safe_exec.model.evidence import MissedPeak
from safe_exec.sandbox.mechanisms.watchdog import Peaks

# Linux counts resident pages per processor and adds them up now and then.
COUNTER_BYTES = 1 << 20
# A process that was seen with all but this was seen near its peak.
SEEN_BYTES = 16 << 20


def missed_peak(
    peaks: Peaks, limit: int | None, waited_peak: int | None, kernel_peak: int | None
) -> MissedPeak | None:
    """Return the peak that the checks may have missed, if it may have passed the limit.

    ``waited_peak`` is the largest resident memory of the kernel and of all processes that were
    waited for, ``kernel_peak`` that of the kernel process alone, as far as it is known.
    """
    if limit is None or peaks.memory is None or waited_peak is None:
        return None
    unseen = waited_peak - peaks.process
    if unseen <= COUNTER_BYTES:
        return None
    possible = peaks.memory + unseen
    # A process that was hardly seen, or not at all, had its memory beside the kernel. Its resident
    # memory includes pages of files, and after a fork those of the kernel: this bounds it from above.
    is_child = kernel_peak is not None and waited_peak > kernel_peak + COUNTER_BYTES
    if is_child and unseen > SEEN_BYTES:
        possible = max(possible, (peaks.kernel or 0) + waited_peak)
    if possible <= limit:
        return None
    return MissedPeak(
        process=waited_peak, highest_check=peaks.process, possible=possible, interval=peaks.interval
    )
