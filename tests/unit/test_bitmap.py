# SPDX-License-Identifier: BSD-3-Clause
"""
The bitmap against a Python set: after any operation both hold the same bits.

Sizes are *not* multiples of 8, 64 or a page's bits, and go past one page, for
that is where a word-wise bitmap goes wrong.  After every step the bytes and
all counters are compared with the set, not only what a call returned.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from unit import cmodules

ffi, lib = cmodules.load("bitmap")

PAGE = 4096
PAGE_BITS = PAGE * 8


def bytes_of(bits: set[int], size: int) -> bytes:
    """Return *size* bytes with *bits* set as the format on disk has it."""
    content = bytearray(size)
    for bit in bits:
        content[bit // 8] |= 1 << bit % 8
    return bytes(content)


class Pair:
    """A C bitmap over memory of its own, and the set that says what it holds."""

    def __init__(self, nr_bits: int, content: bytes | None = None) -> None:
        self.nr_bits = nr_bits
        self.size = lib.bitmap_bytes(nr_bits)
        self.memory = bytearray(content or self.size)
        self.bits: set[int] = set()
        # Held as long as the map: it owns the buffer's export.
        self.words = ffi.from_buffer("uint8_t[]", self.memory, require_writable=True)
        self.map: Any = ffi.new("struct bitmap *")
        assert lib.bitmap_init(self.map, self.words, nr_bits) == 0
        if content is not None:
            for page in 2 * list(range(self.size // PAGE)):  # no bit counts twice
                lib.bitmap_count(self.map, page, self.words + page * PAGE)
            lib.bitmap_clear_padding(self.map)

    def check(self) -> None:
        """Compare the memory and every counter with the set."""
        assert bytes_of(self.bits, self.size) == bytes(self.memory)
        assert len(self.bits) == self.map.nr_set
        pages = [0] * (self.size // PAGE)
        for bit in self.bits:
            pages[bit // PAGE_BITS] += 1
        assert len(pages) == self.map.nr_pages
        assert pages == list(self.map.page_set[0 : len(pages)])

    def free(self) -> None:
        """Free the map, not the memory."""
        lib.bitmap_free(self.map)


def nr_bits() -> st.SearchStrategy[int]:
    """Return sizes of up to three pages, most of them off every boundary."""
    return st.one_of(
        st.integers(1, 200),
        st.integers(PAGE_BITS - 70, PAGE_BITS + 70),
        st.integers(2 * PAGE_BITS + 1, 3 * PAGE_BITS - 1),
    )


class BitmapMachine(RuleBasedStateMachine):
    """Two maps of one size, so that merges have a source."""

    pairs: tuple[Pair, ...] = ()

    @initialize(size=nr_bits())
    def make(self, size: int) -> None:
        """Begin with both maps empty."""
        self.size = size
        self.pairs = (Pair(size), Pair(size))

    def teardown(self) -> None:
        """Free both maps."""
        for pair in self.pairs:
            pair.free()

    def draw_range(self, data: st.DataObject) -> range:
        """Draw a range, often short or at a page's edge, sometimes empty."""
        near = [edge for edge in (0, PAGE_BITS, 2 * PAGE_BITS) if edge <= self.size]
        first = data.draw(
            st.one_of(
                st.integers(0, self.size),
                st.sampled_from(near).flatmap(
                    lambda edge: st.integers(
                        max(0, edge - 70), min(self.size, edge + 70)
                    )
                ),
            )
        )
        left = self.size - first
        count = data.draw(
            st.one_of(st.integers(0, min(left, 130)), st.integers(0, left))
        )
        return range(first, first + count)

    @rule(data=st.data(), which=st.integers(0, 1))
    def set(self, data: st.DataObject, which: int) -> None:
        """Set a range."""
        pair, bits = self.pairs[which], self.draw_range(data)
        expected = len(bits) - len(pair.bits.intersection(bits))
        assert expected == lib.bitmap_set(pair.map, bits.start, len(bits))
        pair.bits.update(bits)

    @rule(data=st.data(), which=st.integers(0, 1))
    def clear(self, data: st.DataObject, which: int) -> None:
        """Clear a range."""
        pair, bits = self.pairs[which], self.draw_range(data)
        expected = len(pair.bits.intersection(bits))
        assert expected == lib.bitmap_clear(pair.map, bits.start, len(bits))
        pair.bits.difference_update(bits)

    @rule(which=st.integers(0, 1))
    def set_all(self, which: int) -> None:
        """Set every bit."""
        lib.bitmap_set(self.pairs[which].map, 0, self.size)
        self.pairs[which].bits = set(range(self.size))

    @rule(which=st.integers(0, 1))
    def clear_all(self, which: int) -> None:
        """Clear every bit."""
        lib.bitmap_clear_all(self.pairs[which].map)
        self.pairs[which].bits = set()

    @rule(which=st.integers(0, 1))
    def merge(self, which: int) -> None:
        """Add the other map's bits."""
        into, other = self.pairs[which], self.pairs[1 - which]
        expected = len(other.bits - into.bits)
        assert expected == lib.bitmap_merge(into.map, other.map)
        into.bits |= other.bits

    @rule(data=st.data(), which=st.integers(0, 1))
    def search(self, data: st.DataObject, which: int) -> None:
        """Look for the next set and the next clear bit of a range."""
        pair, bits = self.pairs[which], self.draw_range(data)
        found = next((bit for bit in bits if bit in pair.bits), bits.stop)
        assert found == lib.bitmap_next_set(pair.map, bits.start, bits.stop)
        found = next((bit for bit in bits if bit not in pair.bits), bits.stop)
        assert found == lib.bitmap_next_clear(pair.map, bits.start, bits.stop)

    @rule(data=st.data(), which=st.integers(0, 1))
    def test_bit(self, data: st.DataObject, which: int) -> None:
        """Look at one bit."""
        pair = self.pairs[which]
        bit = data.draw(st.integers(0, self.size - 1))
        assert (bit in pair.bits) == lib.bitmap_test(pair.map, bit)

    @invariant()
    def same(self) -> None:
        """Hold the same bits in C and in Python."""
        for pair in self.pairs:
            pair.check()


# set_all of three pages makes a set of 98,000 members: slow, but the point.
BitmapMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow],
)
TestBitmapModel = BitmapMachine.TestCase


@pytest.mark.parametrize("size", [1, 63, 65, 4095, PAGE_BITS - 1, PAGE_BITS + 9])
@given(data=st.data())
@settings(max_examples=10)
def test_any_memory_is_counted(size: int, data: st.DataObject) -> None:
    """All bits in the memory are counted, and bits past the end are cleared."""
    nr_bytes = lib.bitmap_bytes(size)
    # The ends and edges matter, not 4096 bytes of entropy.
    pattern = data.draw(st.binary(min_size=1, max_size=40))
    content = (pattern * (nr_bytes // len(pattern) + 1))[:nr_bytes]
    pair = Pair(size, content)
    pair.bits = {bit for bit in range(size) if content[bit // 8] >> bit % 8 & 1}
    pair.check()
    pair.free()
