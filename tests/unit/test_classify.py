# SPDX-License-Identifier: BSD-3-Clause
"""
Classification against a model that asks for every byte by itself.

The pieces of a request must hold every byte that goes to the remote and no
other, in order, none longer than the cap and none shorter than it need be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from unit import cmodules

ffi, lib = cmodules.load("classify")

MAP_DIRTY, MAP_LATE = 0, 3
DIRTY, COPIED, LATE = 1, 2, 4
NO_CAP = 2**64 - 1
UNTOUCHED = 7
MORE_THAN_A_PAGE = 40_000  # bits: the next clean region is in another page of the map


class Maps:
    """A struct dirty_map with what classification reads of it."""

    def __init__(self, regions: list[int]) -> None:
        self.dm: Any = ffi.new("struct dirty_map *")
        self.words: list[Any] = []
        for bit, c_map in (
            (DIRTY, ffi.addressof(self.dm.map[MAP_DIRTY])),
            (COPIED, ffi.addressof(self.dm.copied)),
            (LATE, ffi.addressof(self.dm.map[MAP_LATE])),
        ):
            words = ffi.new("uint8_t[]", lib.bitmap_bytes(len(regions)))
            self.words.append(words)
            assert lib.bitmap_init(c_map, words, len(regions)) == 0
            for region, bits in enumerate(regions):
                if bits & bit:
                    lib.bitmap_set(c_map, region, 1)

    def free(self) -> None:
        """Free the bitmaps."""
        lib.bitmap_free(ffi.addressof(self.dm.map[MAP_DIRTY]))
        lib.bitmap_free(ffi.addressof(self.dm.map[MAP_LATE]))
        lib.bitmap_free(ffi.addressof(self.dm.copied))


def goes(bits: int, always: bool) -> bool:
    """Say where a region's write goes: the table, as a condition."""
    return always or not bits & DIRTY or bool(bits & (COPIED | LATE))


@dataclass(frozen=True)
class Case:
    """A request on a volume whose regions are in these maps."""

    regions: tuple[int, ...]
    region_size: int
    start: int
    end: int
    max: int
    always: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw runs of regions, often dirty ones, and a request across them."""
    kinds = st.one_of(st.sampled_from([0, DIRTY]), st.integers(0, 7))
    runs = draw(st.lists(st.tuples(kinds, st.integers(1, 90)), min_size=1, max_size=8))
    regions = tuple(bits for bits, length in runs for _ in range(length))
    region_size = 1 << draw(st.integers(0, 5))
    # The volume's size need not be a multiple of the region's.
    size = len(regions) * region_size - draw(st.integers(0, region_size - 1))
    start = draw(st.integers(0, size))
    end = draw(st.integers(start, size))
    cap = draw(st.one_of(st.just(NO_CAP), st.integers(1, 4 * region_size)))
    return Case(regions, region_size, start, end, cap, draw(st.booleans()))


def pieces(maps: Maps, case: Case) -> list[range]:
    """Return the pieces of the request, as the engine walks them."""
    found, position = [], case.start
    piece = ffi.new("struct piece *", (UNTOUCHED, UNTOUCHED))
    while lib.classify_next(
        maps.dm, case.region_size, position, case.end, case.max, case.always, piece
    ):
        assert piece.length > 0
        found.append(range(piece.offset, piece.offset + piece.length))
        position = piece.offset + piece.length
        piece.offset = piece.length = UNTOUCHED
    assert (piece.offset, piece.length) == (UNTOUCHED, UNTOUCHED)
    return found


@given(case=cases())
@example(case=Case((DIRTY,) * 300, 32, 1, 9599, NO_CAP, False))
@example(case=Case((DIRTY,) * MORE_THAN_A_PAGE + (0,), 1, 0, 40_001, NO_CAP, False))
@example(case=Case((DIRTY,) * 299 + (0,), 32, 0, 9599, NO_CAP, False))
@settings(max_examples=400)
def test_classify_any_maps_sends_every_byte_that_goes_once(case: Case) -> None:
    """The pieces are the bytes that go, in order, in runs as long as allowed."""
    maps = Maps(list(case.regions))
    found = pieces(maps, case)
    maps.free()

    def byte_goes(byte: int) -> bool:
        return goes(case.regions[byte // case.region_size], case.always)

    expected = [byte for byte in range(case.start, case.end) if byte_goes(byte)]
    assert expected == [byte for piece in found for byte in piece]
    for piece in found:
        assert len(piece) <= case.max
        at_end = piece.stop == case.end or not byte_goes(piece.stop)
        assert at_end or len(piece) == case.max


@given(regions=st.lists(st.integers(0, 7), min_size=1, max_size=200))
@settings(max_examples=50)
def test_classify_region_alone_goes_as_the_table_says(regions: list[int]) -> None:
    """Every region by itself goes or stays as the table says."""
    maps = Maps(regions)
    for always in (False, True):
        expected = [goes(bits, always) for bits in regions]
        got = [
            lib.classify_goes_remote(maps.dm, region, always)
            for region in range(len(regions))
        ]
        assert expected == got
    maps.free()
