# SPDX-License-Identifier: BSD-3-Clause
"""Sizes and times: what is read, what is refused, and that both ways agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_mirror.base.units import (
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (65536, 65536),
        ("512", 512),
        ("512B", 512),
        ("64KiB", 65536),
        ("64 kib", 65536),
        ("1.5GiB", 3 << 29),
        ("1PiB", 1 << 50),
    ],
)
def test_size_with_unit_is_read_as_bytes(text: object, size: int) -> None:
    """Bytes and binary units are understood."""
    assert size == parse_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "64KB",
        "64k",
        "KiB",
        "-1",
        -1,
        "1.0001KiB",
        True,
        None,
        1.5,
        "1e3",
        "\u0661KiB",
    ],
)
def test_size_that_is_ambiguous_or_none_is_refused(text: object) -> None:
    """Decimal and short units, fractions of a byte and non-sizes are refused."""
    with pytest.raises(ValueError, match="must"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_size_written_exactly_is_read_back(size: int) -> None:
    """An exactly written size reads back as the same bytes."""
    assert size == parse_size(format_size(size, exact=True))


@given(st.integers(min_value=1, max_value=1 << 60))
def test_size_written_for_people_is_near(size: int) -> None:
    """A rounded size is within a twentieth of a unit of the truth."""
    written = format_size(size)
    number = float(written.rstrip("BKMGTPi"))
    assert size == pytest.approx(
        parse_size("1" + written.lstrip("0123456789.")) * number, rel=0.06
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5s", 5.0),
        ("500ms", 0.5),
        ("1.5min", 90.0),
        ("2h", 7200.0),
        (3, 3.0),
        ("7", 7.0),
    ],
)
def test_duration_with_unit_is_read_as_seconds(text: object, seconds: float) -> None:
    """Numbers and common units are understood."""
    assert seconds == parse_duration(text)


@pytest.mark.parametrize(
    "text", ["", "5 sec", "-5s", -1, "m", None, True, float("nan")]
)
def test_duration_that_is_none_is_refused(text: object) -> None:
    """Negative times, unknown units and non-times are refused."""
    with pytest.raises(ValueError, match="must"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (2.5, "2.5s"),
        (60, "1min"),
        (80, "1min 20s"),
        (3600 * 3 + 300, "3h 05min"),
        (86400 * 3, "3d 00h"),
    ],
)
def test_duration_is_written_for_people(seconds: float, text: str) -> None:
    """A time span takes the unit a person would use."""
    assert text == format_duration(seconds)
