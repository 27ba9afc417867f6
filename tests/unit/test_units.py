"""Sizes, durations and counts: what is taken, what is refused and in which words, and the way back for reports."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
)

K, M, G, T = (1024**n for n in (1, 2, 3, 4))
UNLIMITED = [None, "none", "null", "unlimited", " None ", "UNLIMITED"]
NEVER = [
    True,
    False,
    "",
    " ",
    "x",
    "-",
    "nan",
    "inf",
    math.nan,
    math.inf,
    -math.inf,
    [],
    {},
    b"1",
    "1" * 50,
    10**50,
]
NEVER += ["1_000", "0x10", "1:30", "1,5", "1 000", "\u0661", "1e", "--1"]
NEGATIVE = [-1, -0.5, "-1", "- 1", "-5M", "-1s"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1048576, M),
        ("1048576", M),
        ("512M", 512 * M),
        ("512m", 512 * M),
        ("512MB", 512 * M),
        ("512MiB", 512 * M),
        ("512 mib", 512 * M),
        ("1.5GiB", 3 * G // 2),
        ("1.0 GiB", G),
        ("64k", 64 * K),
        ("+64K", 64 * K),
        ("2T", 2 * T),
        (" 12 B ", 12),
        ("12b", 12),
        (".5K", 512),
        ("1.K", K),
        ("0.1K", 102),
        ("1e9", 10**9),
        (2.0, 2),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_sizes(value: object, expected: int) -> None:
    assert parse_size(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (90, 90),
        (1.5, 1.5),
        ("90", 90),
        ("90s", 90),
        ("90 sec", 90),
        ("5m", 300),
        ("5min", 300),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1H30M", 5400),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("1s250ms", 1.25),
        ("2d 3h", 183600),
        ("3m 20s", 200),
        ("1e2s", 100),
    ],
)
def test_durations(value: object, expected: float) -> None:
    assert parse_duration(value) == expected
    assert parse_grace(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(1, 1), ("4096", 4096), (12.0, 12), ("1e3", 1000)])
def test_counts(value: object, expected: int) -> None:
    assert parse_count(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 1.0), ("0.5", 0.5), (2.25, 2.25), ("0.01", 0.01)]
)
def test_cpus(value: object, expected: float) -> None:
    assert parse_cpus(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("75%", 0.75), ("12.5 %", 0.125), ("100%", 1.0), ("75", None), (75, None)],
)
def test_percentages(value: object, expected: float | None) -> None:
    assert parse_percent(value) == expected


@pytest.mark.parametrize("value", ["0%", "101%", "1e3%"])
def test_percentages_out_of_range(value: str) -> None:
    with pytest.raises(UnitError, match="up to 100%"):
        parse_percent(value)


@pytest.mark.parametrize("value", UNLIMITED)
def test_unlimited(value: object) -> None:
    assert [parse(value) for parse in (parse_size, parse_duration, parse_count, parse_cpus)] == [
        None
    ] * 4
    with pytest.raises(UnitError):
        parse_grace(value)


@pytest.mark.parametrize(
    "parse", [parse_size, parse_duration, parse_count, parse_cpus, parse_grace]
)
@pytest.mark.parametrize("value", NEVER, ids=lambda value: repr(value)[:20])
def test_never(parse: object, value: object) -> None:
    assert callable(parse)
    with pytest.raises(UnitError) as caught:
        parse(value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "parse", [parse_size, parse_duration, parse_count, parse_cpus, parse_grace]
)
def test_giant_integers(parse: object) -> None:
    """Python refuses to print them (int_max_str_digits); that must not be what the user gets to see."""
    assert callable(parse)
    for giant in (10**5000, -(10**5000), [10**5000]):
        with pytest.raises(UnitError):
            parse(giant)


@pytest.mark.parametrize(
    "parse", [parse_size, parse_duration, parse_count, parse_cpus, parse_grace]
)
@pytest.mark.parametrize("value", NEGATIVE)
def test_negative(parse: object, value: object) -> None:
    assert callable(parse)
    with pytest.raises(UnitError, match="negative"):
        parse(value)


@pytest.mark.parametrize("value", ["12Q", "5 megs", "1Gi B", "M", "1P", "5%", "3s", "1.5", 1.5])
def test_bad_sizes(value: object) -> None:
    with pytest.raises(UnitError, match="is not a size: bytes, or a number with K, M, G or T"):
        parse_size(value)


@pytest.mark.parametrize("value", ["5x", "1m1h", "1h30", "s", "1h1h", "5 M B", "1w"])
def test_bad_durations(value: object) -> None:
    with pytest.raises(
        UnitError, match="is not a duration: seconds, or a number with ms, s, m, h or d"
    ):
        parse_duration(value)


@pytest.mark.parametrize("value", [1.5, "1.5", "4K"])
def test_bad_counts(value: object) -> None:
    with pytest.raises(UnitError, match="is not a whole number"):
        parse_count(value)


@pytest.mark.parametrize("parse", [parse_size, parse_duration, parse_count, parse_cpus])
def test_zero_is_refused(parse: object) -> None:
    assert callable(parse)
    with pytest.raises(UnitError, match=r"too small.*none means unlimited"):
        parse(0)


def test_no_grace_is_allowed() -> None:
    assert parse_grace(0) == 0


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        (parse_size, 2**63),
        (parse_size, "9e99T"),
        (parse_duration, "9e99"),
        (parse_count, 2**31),
        (parse_cpus, 1e9),
    ],
)
def test_overflow(parse: object, value: object) -> None:
    assert callable(parse)
    with pytest.raises(UnitError, match="too large"):
        parse(value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (1023, "1023 B"),
        (K, "1.0 KiB"),
        (1023.9 * K, "1.0 MiB"),
        (12.5 * M, "12.5 MiB"),
        (99.96 * M, "100 MiB"),
        (612 * M, "612 MiB"),
        (G, "1.0 GiB"),
        (4096 * T, "4096 TiB"),
        (-5 * M, "-5.0 MiB"),
    ],
)
def test_format_size(size: float, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.0004, "0.4 ms"),
        (0.00996, "10 ms"),
        (0.25, "250 ms"),
        (0.9996, "1.0 s"),
        (14.2, "14.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1m"),
        (200, "3m 20s"),
        (600, "10m"),
        (3599.6, "1h"),
        (5400, "1h 30m"),
        (86399, "1d"),
        (97200, "1d 3h"),
        (-3, "-3.0 s"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.integers(1, 2**62))
def test_sizes_come_back(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == size
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.05)


@given(st.floats(0.001, 1e8))
def test_durations_come_back(seconds: float) -> None:
    assert parse_duration(seconds) == parse_duration(repr(seconds)) == seconds
    assert parse_duration(format_seconds(seconds)) == pytest.approx(seconds, rel=0.06)


@given(
    st.one_of(
        st.text(max_size=60),
        st.from_regex(r"[0-9.]{0,4} ?[a-zA-Z%]{0,3}"),
        st.floats(),
        st.integers(),
    )
)
def test_nothing_but_unit_errors(value: object) -> None:
    for parse in (parse_size, parse_duration, parse_count, parse_cpus, parse_grace, parse_percent):
        try:
            figure = parse(value)
        except UnitError:
            continue
        assert figure is None or (figure >= 0 and math.isfinite(figure))
