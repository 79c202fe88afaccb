# SPDX-License-Identifier: BSD-3-Clause
"""
The faulty server's disk: an image, and before it, if told so, a volatile cache.

A disk with a write cache answers a write when it is in memory, and keeps it only if
a flush or FUA came before the crash. It may have written out some of the rest by
itself, in any order: both are what rule 4 is about.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

__all__ = ["Image"]

PAGE = 4096  # what a volatile cache loses or keeps as a whole


class Image:
    """The disk: a file, and before it, if volatile, pages not flushed yet."""

    def __init__(self, path: Path, *, volatile: bool) -> None:
        self._file = os.open(path, os.O_RDWR)
        self._pages: dict[int, bytearray] | None = {} if volatile else None

    def close(self) -> None:
        """Lose what was not flushed."""
        os.close(self._file)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes as a client sees them."""
        content = bytearray(os.pread(self._file, length, offset))
        content += bytes(length - len(content))
        for number, page in (self._pages or {}).items():
            first = max(number * PAGE, offset)
            last = min((number + 1) * PAGE, offset + length)
            if first < last:
                there = slice(first - offset, last - offset)
                content[there] = page[first - number * PAGE : last - number * PAGE]
        return bytes(content)

    def write(self, offset: int, content: bytes) -> None:
        """Write, into memory if volatile."""
        if self._pages is None:
            os.pwrite(self._file, content, offset)
            return
        for number in range(offset // PAGE, -(-(offset + len(content)) // PAGE)):
            if number not in self._pages:
                page = os.pread(self._file, PAGE, number * PAGE)
                self._pages[number] = bytearray(page.ljust(PAGE, b"\0"))
            first = max(number * PAGE, offset)
            last = min((number + 1) * PAGE, offset + len(content))
            there = slice(first - number * PAGE, last - number * PAGE)
            self._pages[number][there] = content[first - offset : last - offset]

    def flush(self, offset: int = 0, length: int = 1 << 62) -> None:
        """Take what lies in a range out of memory into the file."""
        for number in list(self._pages or {}):
            if number * PAGE < offset + length and (number + 1) * PAGE > offset:
                self._write_out(number)

    def keep_some(self, choose: random.Random) -> None:
        """Write some pages out, as a cache does by itself, in any order."""
        numbers = list(self._pages or {})
        for number in choose.sample(numbers, choose.randint(0, len(numbers))):
            self._write_out(number)

    def _write_out(self, number: int) -> None:
        assert self._pages is not None
        size = os.fstat(self._file).st_size
        page = self._pages.pop(number)
        os.pwrite(self._file, page[: max(0, size - number * PAGE)], number * PAGE)

    @property
    def unflushed(self) -> int:
        """Bytes a crash would lose."""
        return PAGE * len(self._pages or {})
