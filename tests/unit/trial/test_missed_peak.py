"""A peak between two checks is told if it may have passed the limit, and nobody is suspected for pages of forks and files alone."""

from __future__ import annotations

import pytest

from safe_exec.diagnosis.missed_peak import is_lower_bound, missed_peak_warning
from safe_exec.model.evidence import Evidence, MissedPeak
from safe_exec.model.verdict import Cause, CauseKind, Confidence
from safe_exec.sandbox.mechanisms.watchdog import Peaks
from safe_exec.trial.missed_peak import missed_peak

MIB = 1 << 20
LIMIT = 128 * MIB
MISSED = MissedPeak(process=130 * MIB, highest_check=95 * MIB, possible=156 * MIB, interval=0.025)


def peaks(memory: int | None, process: int, kernel: int = 26) -> Peaks:
    return Peaks(
        memory=None if memory is None else memory * MIB,
        process=process * MIB,
        kernel=kernel * MIB,
        interval=0.025,
    )


@pytest.mark.parametrize(
    ("seen", "waited", "kernel", "possible"),
    [
        (peaks(118, 95), 106, 60, 129),
        (peaks(118, 95), 104, 60, None),
        (peaks(26, 50), 130, 50, 156),
        (peaks(26, 50), 100, 50, None),
        (peaks(80, 90), 140, 140, 130),
        (peaks(80, 90), 120, 120, None),
        (peaks(100, 110, kernel=100), 118, 110, None),
        (peaks(126, 130), 130, 60, None),
        (peaks(None, 0), 900, 60, None),
        (peaks(26, 50), None, 50, None),
        (peaks(26, 50), 200, None, 176),
    ],
    ids=[
        "seen shortly before its peak",
        "seen, and the rest fits",
        "never seen",
        "never seen, and fits",
        "the kernel's own peak",
        "the kernel's own peak, and it fits",
        "a fork with a little of its own",
        "seen at its peak",
        "no watchdog for memory",
        "nothing known of ended processes",
        "the kernel's own part is unknown",
    ],
)
def test_only_what_may_have_passed_the_limit_counts(
    seen: Peaks, waited: int | None, kernel: int | None, possible: int | None
) -> None:
    missed = missed_peak(
        seen,
        LIMIT,
        None if waited is None else waited * MIB,
        None if kernel is None else kernel * MIB,
    )
    assert (missed and missed.possible) == (possible and possible * MIB)


def test_without_a_limit_nothing_is_passed() -> None:
    assert missed_peak(peaks(26, 50), None, 900 * MIB, None) is None


def test_the_warning_has_all_figures_and_the_way_out() -> None:
    evidence = Evidence(memory_missed=MISSED)
    (text,) = missed_peak_warning(evidence, LIMIT, None)
    for part in ("128 MiB", "130 MiB", "95.0 MiB", "156 MiB", "25 ms", "safe-exec doctor"):
        assert part in text
    assert is_lower_bound(evidence, None)
    assert missed_peak_warning(Evidence(), LIMIT, None) == ()


def test_a_cause_that_is_memory_needs_no_doubt() -> None:
    evidence = Evidence(memory_missed=MISSED)
    for kind, doubtful in ((CauseKind.OUT_OF_MEMORY, False), (CauseKind.EXCEPTION, True)):
        cause = Cause(kind=kind, summary="", confidence=Confidence.CERTAIN)
        assert is_lower_bound(evidence, cause) is doubtful
        assert bool(missed_peak_warning(evidence, LIMIT, cause)) is doubtful
