"""Parse sizes, durations and counts, and format them for reports.

K, M, G and T are powers of 1024, with or without "iB" or "B", as in systemd and Docker. Every
``parse_*`` function accepts any value from a YAML file, a notebook's metadata or an option, and
raises UnitError with the value and the expected syntax.
"""

# ruff: noqa: PLR2004 - names would not explain the thresholds of rounding any better

from __future__ import annotations

import math
import re
from decimal import Decimal

# Words that lift a limit, like a real null.
UNLIMITED = frozenset({"none", "null", "unlimited"})

# Characters: no real value is longer, and short texts keep the regular expressions fast.
_LONGEST = 40
# The range of off_t, rlim_t and the cgroup files.
_MOST_BYTES = 2**63 - 1
# About 30 years; event loops and timers overflow not far above.
_MOST_SECONDS = 1e9
# pid_t and RLIMIT_NOFILE are no larger.
_MOST_COUNT = 2**31 - 1
_MOST_CPUS = 65536.0
# Linux rejects a quota below 1 ms per period of 100 ms (sched-bwc.rst).
_LEAST_CPUS = 0.01

_SIZE = "a size: bytes, or a number with K, M, G or T, such as 512M or 1.5GiB"
_DURATION = "a duration: seconds, or a number with ms, s, m, h or d, such as 90s or 1h30m"
_COUNT = "a whole number"
_CPUS = "a number of processors, such as 2 or 0.5"

_NUMBER = r"((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?)"
# Compiled when they are used (re keeps them): a start may need none.
_SIZE_FORM = _NUMBER + r"\s*([kmgt]?)(?:i?b)?"
_PERCENT_FORM = _NUMBER + r"\s*%"
_DURATION_FORM = (
    rf"(?:{_NUMBER}\s*d\s*)?(?:{_NUMBER}\s*h\s*)?(?:{_NUMBER}\s*m(?:in)?\s*)?"
    rf"(?:{_NUMBER}\s*s(?:ec)?\s*)?(?:{_NUMBER}\s*ms)?"
)
_DURATION_UNITS = (Decimal(86400), Decimal(3600), Decimal(60), Decimal(1), Decimal("0.001"))


class UnitError(ValueError):
    """A value is not a size, duration or count; ``str(error)`` shows it and the expected syntax."""


def shown(value: object) -> str:
    """Return ``value`` for an error message: quoted, on one line, shortened."""
    try:
        text = repr(value)
    # An integer of more than 4300 digits has no repr (CVE-2020-10735).
    except ValueError:
        text = f"a giant {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_size(value: object) -> int | None:
    """Parse a size to bytes: ``"512M"``, ``"1.5 GiB"``, ``1048576``; ``None`` for unlimited.

    Fractions of a byte are dropped. Raises UnitError.
    """
    text = _text(value, _SIZE)
    if text is None:
        return None
    match = re.fullmatch(_SIZE_FORM, text, re.IGNORECASE)
    if match is None:
        raise _wrong(value, _SIZE)
    # Decimal, because a float cannot hold every number of bytes above 2**53.
    number = Decimal(match[1])
    size = number * 1024 ** " kmgt".index(match[2].lower() or " ")
    if not match[2] and number != number.to_integral_value():
        # 1.5 without a unit is most likely a forgotten G.
        raise _wrong(value, f"{_SIZE} (bytes are whole)")
    return int(_within(value, size, least=Decimal(1), most=Decimal(_MOST_BYTES)))


def parse_percent(value: object) -> float | None:
    """Parse ``"75%"`` to 0.75; ``None`` if ``value`` is not a percentage. Raises UnitError."""
    match = (
        re.fullmatch(_PERCENT_FORM, value.strip(), re.IGNORECASE)
        if isinstance(value, str) and len(value) <= _LONGEST
        else None
    )
    if match is None:
        return None
    percent = Decimal(match[1])
    if not 0 < percent <= 100:
        raise UnitError(
            f"{shown(value)} is not a share of the machine's memory; expected more than 0% and up to 100%"
        )
    return float(percent / 100)


def parse_duration(value: object) -> float | None:
    """Parse a duration to seconds: ``"90s"``, ``"1h30m"``, ``90``; ``None`` for unlimited.

    Raises UnitError.
    """
    text = _text(value, _DURATION)
    if text is None:
        return None
    return float(
        _within(value, _seconds(value, text), least=Decimal("1e-6"), most=Decimal(_MOST_SECONDS))
    )


def parse_grace(value: object) -> float:
    """Parse a duration that may be 0 but not unlimited. Raises UnitError."""
    text = _text(value, _DURATION)
    if text is None:
        raise UnitError(f"{shown(value)} is not allowed here; expected {_DURATION}")
    return float(
        _within(value, _seconds(value, text), least=Decimal(0), most=Decimal(_MOST_SECONDS))
    )


def parse_count(value: object) -> int | None:
    """Parse a whole number above 0; ``None`` for unlimited. Raises UnitError."""
    text = _text(value, _COUNT)
    if text is None:
        return None
    number = _number(value, text, _COUNT)
    if number != number.to_integral_value():
        raise _wrong(value, _COUNT)
    return int(_within(value, number, least=Decimal(1), most=Decimal(_MOST_COUNT)))


def parse_cpus(value: object) -> float | None:
    """Parse a number of processors, at least 0.01; ``None`` for unlimited. Raises UnitError."""
    text = _text(value, _CPUS)
    if text is None:
        return None
    number = _number(value, text, _CPUS)
    return float(_within(value, number, least=Decimal(str(_LEAST_CPUS)), most=Decimal(_MOST_CPUS)))


def format_size(size: float) -> str:
    """Format bytes: ``"812 B"``, ``"12.5 MiB"``, ``"1.0 GiB"``; a decrease has a minus sign."""
    sign, amount = ("-" if size < 0 else ""), abs(size)
    if amount < 1023.5:
        return f"{sign}{amount:.0f} B"
    units = iter(("KiB", "MiB", "GiB", "TiB"))
    unit = "B"
    # From 1023.5 on, since 1023.9 MiB would be printed as 1024 MiB.
    while amount >= 1023.5 and (larger := next(units, None)):
        amount, unit = amount / 1024, larger
    return f"{sign}{amount:.1f} {unit}" if amount < 99.95 else f"{sign}{amount:.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """Format seconds: ``"0.4 ms"``, ``"14.2 s"``, ``"3m 20s"``, ``"1h 30m"``, ``"2d 3h"``."""
    sign, amount = ("-" if seconds < 0 else ""), abs(seconds)
    # 59.96 s would be shown as 60.0 s.
    if amount >= 59.95:
        return sign + _long(round(amount))
    if amount >= 0.9995 or amount == 0:
        return f"{sign}{amount:.1f} s"
    return f"{sign}{amount * 1000:.{1 if amount < 0.00995 else 0}f} ms"


def _long(seconds: int) -> str:
    """Format a minute or more in its two largest units; a second unit of zero is left out."""
    if seconds < 3600:
        (first, second), units = divmod(seconds, 60), "ms"
    elif seconds < 86400 - 30:
        (first, second), units = divmod(round(seconds / 60), 60), "hm"
    else:
        (first, second), units = divmod(round(seconds / 3600), 24), "dh"
    return f"{first}{units[0]} {second}{units[1]}" if second else f"{first}{units[0]}"


def _text(value: object, expected: str) -> str | None:
    """Return the value as text; ``None`` if it means unlimited."""
    if value is None or (isinstance(value, str) and value.strip().lower() in UNLIMITED):
        return None
    # bool is a subclass of int; `memory: true` is a mistake.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong(value, expected)
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(value, expected)
    # str() of a giant integer is slow, then refused.
    if isinstance(value, int) and abs(value) >= 10**_LONGEST:
        raise UnitError(
            f"a number of {value.bit_length()} bits is out of range; expected {expected}"
        )
    text = str(value).strip()
    if len(text) > _LONGEST:
        raise _wrong(value, expected)
    # The general error would not tell how to write an unlimited value.
    if re.match(r"-\s*[0-9.]", text):
        raise UnitError(f"{shown(value)} is negative; expected {expected}; none means unlimited")
    return text.removeprefix("+")


def _number(value: object, text: str, expected: str) -> Decimal:
    if re.fullmatch(_NUMBER, text, re.IGNORECASE) is None:
        raise _wrong(value, expected)
    return Decimal(text)


def _seconds(value: object, text: str) -> Decimal:
    if re.fullmatch(_NUMBER, text, re.IGNORECASE):
        return Decimal(text)
    match = re.fullmatch(_DURATION_FORM, text, re.IGNORECASE)
    if match is None or not text:
        raise _wrong(value, _DURATION)
    return sum(
        (
            Decimal(part) * unit
            for part, unit in zip(match.groups(), _DURATION_UNITS, strict=True)
            if part
        ),
        Decimal(0),
    )


def _within(value: object, number: Decimal, *, least: Decimal, most: Decimal) -> Decimal:
    if number > most:
        raise UnitError(
            f"{shown(value)} is too large; expected at most {most:.0f}; none means unlimited"
        )
    if number < least:
        raise UnitError(
            f"{shown(value)} is too small; expected at least {_plain(least)}; none means unlimited"
        )
    return number


def _plain(number: Decimal) -> str:
    return f"{number:f}"


def _wrong(value: object, expected: str) -> UnitError:
    return UnitError(f"{shown(value)} is not {expected}")
