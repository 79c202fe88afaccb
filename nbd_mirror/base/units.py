# SPDX-License-Identifier: BSD-3-Clause
"""
Sizes and times as users write them, and back.

Only binary units are accepted ("64KiB", not "64KB" or "64k"): a region that is a power
of two must not depend on what a reader thinks a kilobyte is. All arithmetic is exact; a
fraction that is no whole number of bytes is refused.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal

__all__ = ["format_duration", "format_size", "iso_time", "parse_duration", "parse_size"]

_SIZES = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "PiB": 1 << 50,
}
_TIMES = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}

_NUMBER = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(value: object) -> int:
    """
    Read a size.

    Args:
        value: bytes as an int, or text such as "512", "64KiB" or "1.5GiB".
    Returns:
        Bytes, 0 or more.
    Raises:
        ValueError: it is no size; the text says what is allowed.
    """
    allowed = 'bytes, or a number with B, KiB, MiB, GiB, TiB or PiB, as in "64KiB"'
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"must not be negative; {allowed}")
        return value
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"must be {allowed}")
    number, unit = match.groups()
    scale = {name.lower(): scale for name, scale in _SIZES.items()}.get(
        unit.lower() or "b"
    )
    if scale is None:
        raise ValueError(f"must be {allowed}")
    size = Decimal(number) * scale
    if size != int(size):
        raise ValueError("must be a whole number of bytes")
    return int(size)


def format_size(size: int, *, exact: bool = False) -> str:
    """
    Write a size.

    Args:
        size: bytes.
        exact: use the largest unit that leaves a whole number, so that
            parse_size gives the same back; else round to one decimal.
    """
    if exact:
        name, scale = next(
            (name, scale)
            for name, scale in reversed(_SIZES.items())
            if (size and size % scale == 0) or scale == 1
        )
        return f"{size // scale}{name}"
    for name, scale in reversed(_SIZES.items()):
        if abs(size) >= scale:
            text = f"{size / scale:.1f}".removesuffix(".0")
            return f"{text}{name}"
    return "0B"


def parse_duration(value: object) -> float:
    """
    Read a time span.

    Args:
        value: seconds as a number, or text such as "500ms", "5s" or "1.5min".
    Returns:
        Seconds, 0 or more.
    Raises:
        ValueError: it is no time span; the text says what is allowed.
    """
    allowed = 'seconds, or a number with ms, s, min, h or d, as in "5s"'
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value < 1e12:
            raise ValueError(f"must not be negative, and finite; {allowed}")
        return float(value)
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"must be {allowed}")
    number, unit = match.groups()
    scale = _TIMES.get(unit or "s")
    if scale is None:
        raise ValueError(f"must be {allowed}")
    return float(Decimal(number) * scale)


def format_duration(seconds: float) -> str:
    """Write a time span for users: "500ms", "2.5s", "1min 20s", "3h 05min"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms" if seconds else "0s"
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}min {rest:02d}s" if rest else f"{minutes}min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h {minutes:02d}min" if minutes else f"{hours}h"
    return f"{hours // 24}d {hours % 24:02d}h"


def iso_time(seconds: int) -> str:
    """
    Write a moment in UTC as ISO 8601; "" for 0, and for a year that no calendar has.

    Args:
        seconds: since 1970.
    """
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat() if seconds else ""
    except (ValueError, OverflowError, OSError):
        return ""  # from a garbled log
