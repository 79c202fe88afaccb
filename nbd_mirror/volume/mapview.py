# SPDX-License-Identifier: BSD-3-Clause
"""
Read a dirty map: counts and runs.

The maps can be read beside a running server: nothing is locked or changed, and bits may
change while they are counted. They are read in pieces and not mapped. The file may
belong to another user, who may truncate it during the read, and with a mapping SIGBUS
would end the command. The tests use this module as their oracle, so it shares no code
with the engine.
"""

from __future__ import annotations

import errno
import heapq
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from bitarray import bitarray, frozenbitarray
from bitarray.util import count_or

from ..base.errors import (
    AccessError,
    FormatError,
    MirrorError,
    MissingError,
    from_errno,
)
from ..base.files import open_plain
from ..base.units import format_size

if TYPE_CHECKING:
    pass

__all__ = ["DirtyMaps", "Run", "open_map"]

# csrc/logs/layout.h, struct disk_log_header.
_HEADER = struct.Struct("<8sII16s64sQQQII")
_MAGIC = b"NBDMDRTY"
_VERSION = 1
_PAGE = 4096
_LOG_CLEAN = 1
_LOG_DOUBTS = 4
_MAX_SIZE = 1 << 50  # of a volume, bytes
_MIN_REGION, _MAX_REGION = 4 << 10, 4 << 20
_PIECE = 1 << 20  # read from a map at a time
_DIRTY, _UNFLUSHED0, _UNFLUSHED1, _LATE, _DOUBTS = range(5)

# A map with more runs is read in part: Python visits a run in about 0.3 us.
MAX_RUNS = 2_000_000


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring dirty regions: *offset* and *length* in bytes."""

    offset: int
    length: int

    def __str__(self) -> str:
        return (
            f"{format_size(self.length, exact=True)} at "
            f"{format_size(self.offset, exact=True)}"
        )


class DirtyMaps:
    """
    The maps of one remote, read-only, in the file itself: four, of a node five.

    Use it as a context manager. Counts, runs and shares read the file each time and
    keep one piece in memory, so maps of any size can be read. Each of them raises
    FormatError if the file was truncated in the meantime.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            fd = open_plain(self.path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingError(
                f"there is no dirty map {self.path}",
                "nbd-mirror serve CONFIG (makes a new one, all dirty)",
            ) from None
        except PermissionError:
            raise AccessError(f"{self.path} may not be read by this user") from None
        except OSError as error:
            raise FormatError(
                f"{self.path} is no dirty map: {error.strerror}"
            ) from None
        self._file = open(fd, "rb", buffering=0)  # noqa: SIM115  `close` closes it
        try:
            self._check_header(self._pread(_HEADER.size, 0))
            self._step = self._check_size(os.fstat(self._file.fileno()).st_size)
        except MirrorError:
            self._file.close()
            raise

    def _check_header(self, page: bytes) -> None:
        if len(page) < _HEADER.size:
            raise FormatError(f"{self.path} is truncated: it has no whole header")
        magic, version, _, self.uuid, name, _, regions, region_size, flags, _ = (
            _HEADER.unpack(page)
        )
        if magic != _MAGIC:
            raise FormatError(f"{self.path} is no dirty map: its first bytes are wrong")
        if version != _VERSION:
            raise FormatError(f"{self.path} has version {version}, known is {_VERSION}")
        if not regions or not region_size:
            raise FormatError(f"{self.path} is garbled: it holds no regions")
        fits = _MIN_REGION <= region_size <= _MAX_REGION
        if not fits or (regions - 1) * region_size >= _MAX_SIZE:
            raise FormatError(
                f"{self.path} is garbled: {regions} regions of {region_size} bytes "
                "are of no volume"
            )
        self.remote: str = name.rstrip(b"\0").decode(errors="replace")
        self.nr_regions: int = regions
        self.region_size: int = region_size
        self.clean_stop = bool(flags & _LOG_CLEAN)
        self._nr_maps = 5 if flags & _LOG_DOUBTS else 4

    def _check_size(self, size: int) -> int:
        """Return the bytes from one map to the next."""
        step = -(-self.nr_regions // (8 * _PAGE)) * _PAGE
        if size < _PAGE + self._nr_maps * step:
            raise FormatError(
                f"{self.path} is truncated: {size} bytes long, "
                f"{_PAGE + self._nr_maps * step} belong to {self.nr_regions} regions"
            )
        return step

    def __enter__(self) -> DirtyMaps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _pread(self, size: int, at: int) -> bytes:
        """Read *size* bytes, or fewer at the end of the file."""
        data = b""
        try:
            while more := os.pread(self._file.fileno(), size - len(data), at):
                data += more
                at += len(more)
        except OSError as error:
            raise from_errno(
                error.errno or errno.EIO, f"{self.path}: {error.strerror}"
            ) from None
        return data

    def _pieces(self, index: int) -> Iterator[tuple[int, bitarray]]:
        """Read a map from its start; yield each piece with its first region."""
        length = -(-self.nr_regions // 8)
        for at in range(0, length, _PIECE):
            size = min(_PIECE, length - at)
            data = self._pread(size, _PAGE + index * self._step + at)
            if len(data) < size:
                raise FormatError(f"{self.path} was cut short while it was read")
            first = at * 8
            bits = bitarray(buffer=data, endian="little")
            # The last byte may have bits beyond the last region.
            yield first, bits[: self.nr_regions - first]

    def _whole(self, index: int) -> frozenbitarray:
        bits = bitarray(endian="little")
        for _, piece in self._pieces(index):
            bits += piece
        return frozenbitarray(bits)

    def _count(self, index: int) -> int:
        return sum(bits.count() for _, bits in self._pieces(index))

    @property
    def dirty(self) -> frozenbitarray:
        """A copy of the regions that may differ on the remote, all in memory."""
        return self._whole(_DIRTY)

    @property
    def unflushed(self) -> tuple[frozenbitarray, frozenbitarray]:
        """Copies of the two sets of regions that it answered and has not flushed."""
        return self._whole(_UNFLUSHED0), self._whole(_UNFLUSHED1)

    @property
    def late(self) -> frozenbitarray:
        """A copy of the regions that a lost connection's command may still change."""
        return self._whole(_LATE)

    @property
    def doubts(self) -> frozenbitarray:
        """A copy of the regions of which neither copy is newer; of no plain remote."""
        if self._nr_maps <= _DOUBTS:
            return frozenbitarray(self.nr_regions)
        return self._whole(_DOUBTS)

    @property
    def doubted_regions(self) -> int:
        """The number of regions of which neither copy is newer."""
        return self._count(_DOUBTS) if self._nr_maps > _DOUBTS else 0

    @property
    def dirty_regions(self) -> int:
        """The number of dirty regions."""
        return self._count(_DIRTY)

    @property
    def late_regions(self) -> int:
        """The number of regions held back for late writes."""
        return self._count(_LATE)

    @property
    def unflushed_regions(self) -> int:
        """The number of regions in either unflushed set."""
        both = zip(self._pieces(_UNFLUSHED0), self._pieces(_UNFLUSHED1), strict=True)
        return sum(count_or(one, other) for (_, one), (_, other) in both)

    def bytes_of(self, regions: int, size: int = 0) -> int:
        """
        Return the size of that many regions in bytes.

        Args:
            regions: how many.
            size: of the volume; the last region may extend past it. 0: unknown.
        """
        total = regions * self.region_size
        return min(total, size) if size else total

    def runs(self) -> Iterator[Run]:
        """Yield the runs of dirty regions, from the first."""
        start = -1  # of a run that has not ended
        for first, bits in self._pieces(_DIRTY):
            at = 0
            while True:
                at = bits.find(0 if start >= 0 else 1, at)
                if at < 0:
                    break
                if start < 0:
                    start = first + at
                else:
                    yield self._run(start, first + at)
                    start = -1
        if start >= 0:
            yield self._run(start, self.nr_regions)

    def _run(self, start: int, end: int) -> Run:
        return Run(start * self.region_size, (end - start) * self.region_size)

    def longest_runs(self, count: int) -> tuple[list[Run], int, bool]:
        """
        Return the longest runs.

        Args:
            count: how many to return.
        Returns:
            The runs, longest first; how many were looked at; whether these were all
            (a map of millions of runs is not read to its end).
        """
        longest: list[tuple[int, int]] = []  # heap of (length, -offset)
        total = 0
        for run in self.runs():
            if total == MAX_RUNS:
                break
            total += 1
            heapq.heappush(longest, (run.length, -run.offset))
            if len(longest) > count:
                heapq.heappop(longest)
        else:
            return _sorted_runs(longest), total, True
        return _sorted_runs(longest), total, False

    def shares(self, cells: int) -> list[float]:
        """
        Return the share of dirty regions, 0 to 1, in each of *cells* equal slices.

        There are never more cells than regions.
        """
        cells = min(cells, self.nr_regions)
        edges = [self.nr_regions * i // cells for i in range(cells + 1)]
        dirty, cell = [0] * cells, 0
        for first, bits in self._pieces(_DIRTY):
            end = first + len(bits)
            while cell < cells and edges[cell] < end:
                low, high = max(edges[cell], first), min(edges[cell + 1], end)
                dirty[cell] += bits.count(1, low - first, high - first)
                if edges[cell + 1] > end:
                    break  # its rest is in the next piece
                cell += 1
        return [
            count / (high - low)
            for count, (low, high) in zip(dirty, pairwise(edges), strict=True)
        ]


def open_map(path: str | os.PathLike[str]) -> DirtyMaps:
    """
    Open a `dirty.<remote>` file read-only; it may be in use.

    Raises:
        MissingError: there is none. AccessError: it may not be read.
        FormatError: it is truncated, garbled, or of another version.
    """
    return DirtyMaps(path)


def _sorted_runs(heap: list[tuple[int, int]]) -> list[Run]:
    return [Run(-offset, length) for length, offset in sorted(heap, reverse=True)]
