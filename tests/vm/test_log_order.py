# SPDX-License-Identifier: BSD-3-Clause
"""What a log of dm-log-writes says of flushes that were under way at the same time."""

from __future__ import annotations

from vm.log_writes import BLOCK, Entry, in_order

DISKS = {"a": 0, "b": 1 << 20}


def disk_of(offset: int) -> str:
    """Name the disk at an offset."""
    return "b" if offset >= DISKS["b"] else "a"


def write(disk: str, number: int) -> Entry:
    """Return a write of a block."""
    return Entry(DISKS[disk] + number * BLOCK, b"x" * BLOCK, False, False, "")


def flush(disk: str) -> Entry:
    """Return a flush without data."""
    return Entry(DISKS[disk], b"", True, False, "")


def test_a_flush_is_behind_what_another_disks_flush_took_with_it() -> None:
    """It was submitted second, ended first, and covered its own disk's writes."""
    both = [write("a", 1), write("b", 1)]
    logged = [flush("b"), *both, flush("a")]
    assert in_order(logged, disk_of) == [*both, flush("b"), flush("a")]


def test_all_else_stays_where_it_is() -> None:
    """A disk's own next flush, one with writes of its own, FUA and marks."""
    fua = Entry(0, b"y" * BLOCK, False, True, "")
    mark = Entry(0, b"", False, False, "here")
    for logged in (
        [flush("a"), write("a", 1), flush("a")],
        [write("a", 1), flush("a"), write("b", 1), flush("b")],
        [flush("b"), fua, write("a", 1), flush("a")],
        [flush("b"), mark, write("a", 1), flush("a")],
        [flush("b"), write("a", 1), fua, flush("a")],
        [flush("b"), write("a", 1)],
    ):
        assert in_order(logged, disk_of) == logged
