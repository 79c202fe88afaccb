# SPDX-License-Identifier: BSD-3-Clause
"""
What disks hold after lost power, from a log that dm-log-writes kept of them.

The kernel's target logs every write with its data, and every flush, FUA and mark, in
the order they were completed (Documentation/admin-guide/device-mapper/log-writes.rst;
the structures are in drivers/md/dm-log-writes.c). One log under several disks puts
them all on one time line.

Unlike the kernel's own replay tool this one knows of several disks, each with a write
cache of its own: a flush of one makes nothing durable on another. So at any entry of
the log each disk may hold everything between `least`, what its own flushes vouch for,
and `most`, every write that was logged.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BLOCK", "Content", "Disk", "Entry", "in_order", "read_log", "save"]

MAGIC = 0x6A736677736872
VERSION = 1
SUPER = struct.Struct("<QQQI")  # magic, version, number of entries, sector size
HEADER = struct.Struct("<QQQQ")  # sector, sectors, flags, length of inline data
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8

# A disk loses or keeps whole blocks of this size.
BLOCK = 4096
SECTOR = 512

# Block number -> bytes; a block that is not in it was never written: zeroes.
Content = dict[int, bytes]


@dataclass(frozen=True)
class Entry:
    """
    One entry of the log.

    Attributes:
        offset, data: of a write, bytes; empty for a mere flush.
        flush: everything completed before it is durable, on its own disk.
        fua: the write itself is durable.
        mark: what `dmsetup message ... mark` said, or empty.
    """

    offset: int
    data: bytes
    flush: bool
    fua: bool
    mark: str


def read_log(path: Path) -> Iterator[Entry]:
    """Yield a log's entries, in order. Raises ValueError if it is none."""
    with path.open("rb") as log:
        magic, version, count, sector_size = SUPER.unpack(log.read(SUPER.size))
        if (magic, version) != (MAGIC, VERSION):
            raise ValueError(f"{path} is no log of dm-log-writes")
        log.seek(sector_size)
        for _ in range(count):
            head = log.read(sector_size)
            sector, sectors, flags, inline = HEADER.unpack_from(head)
            mark = head[HEADER.size :][:inline].rstrip(b"\0") if flags & MARK else b""
            # Discards carry no data, and the test's disks ignore them.
            has_data = sectors and not flags & (DISCARD | MARK)
            data = log.read(sectors * sector_size) if has_data else b""
            yield Entry(
                sector * sector_size,
                data,
                bool(flags & FLUSH),
                bool(flags & FUA),
                mark.decode(),
            )


def in_order(entries: Iterable[Entry], disk_of: Callable[[int], str]) -> list[Entry]:
    """
    Put flushes behind writes that they waited for, and that the log has after them.

    The target takes the writes that were completed when a flush is *submitted*, of all
    disks, as they share one device, and logs them when that flush is *completed*. Of
    two flushes at the same time, to two disks, the first takes the writes of both, and
    the second none; where the second ends first it is logged first, ahead of writes
    that were complete before it began. So a flush without writes of its own goes behind
    those of the next one if that is another disk's. One that really was that much
    earlier cannot be told from it, and is believed.

    Args:
        disk_of: names the disk that lies at an offset.
    """
    found: list[Entry] = []
    empty: list[Entry] = []  # flushes without writes, not put anywhere yet
    writes: list[Entry] = []  # of the next flush
    for entry in entries:
        plain = not (entry.flush or entry.fua or entry.mark)
        if plain and entry.data:
            writes.append(entry)
        elif entry.flush and not entry.data and not writes:
            empty.append(entry)
        else:
            own = disk_of(entry.offset) if entry.flush and not entry.data else ""
            later = [one for one in empty if own and disk_of(one.offset) != own]
            found += [one for one in empty if one not in later]
            found += [*writes, *later, entry]
            empty, writes = [], []
    return [*found, *empty, *writes]


class Disk:
    """
    A slice of the logged device, a disk of its own to its user.

    Args:
        name: for messages.
        start: bytes from the start of the logged device.
        size: bytes.
    """

    def __init__(self, name: str, start: int, size: int) -> None:
        self.name = name
        self.start = start
        self.size = size
        self.least: Content = {}
        self.most: Content = {}
        self.flushes = 0  # grows when `least` changes
        self._cached: list[tuple[int, bytes]] = []

    def holds(self, entry: Entry) -> bool:
        """Tell whether an entry is of this disk."""
        return self.start <= entry.offset < self.start + self.size

    def apply(self, entry: Entry) -> None:
        """Carry out an entry: first its flush, then its write."""
        if entry.flush:
            self.least = dict(self.most)
            self._cached.clear()
        self.flushes += entry.flush or entry.fua
        for number, data in self._blocks(entry):
            self.most[number] = data
            if entry.fua:
                self.least[number] = data
                self._cached = [one for one in self._cached if one[0] != number]
            else:
                self._cached.append((number, data))

    def _blocks(self, entry: Entry) -> Iterator[tuple[int, bytes]]:
        """Yield the entry's data as whole blocks, cut out of what was there."""
        place, data = entry.offset - self.start, entry.data
        while data:
            number, within = divmod(place, BLOCK)
            part = data[: BLOCK - within]
            if len(part) < BLOCK:
                old = self.most.get(number, bytes(BLOCK))
                yield number, old[:within] + part + old[within + len(part) :]
            else:
                yield number, part
            place += len(part)
            data = data[len(part) :]

    def some(self, choose: random.Random) -> Content:
        """Return what is left if of the cached writes only some came to the disk."""
        content = dict(self.least)
        for number, data in self._cached:
            if choose.random() < 0.5:
                content[number] = data
        return content


def save(content: Content, path: Path, size: int) -> None:
    """Write *content* as a sparse image of *size* bytes."""
    with path.open("wb") as image:
        image.truncate(size)
        for number, data in content.items():
            image.seek(number * BLOCK)
            image.write(data)
