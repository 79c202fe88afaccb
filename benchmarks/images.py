# SPDX-License-Identifier: BSD-3-Clause
"""Images: random ones, sparse ones, and the comparison of two."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from .model import MIB

__all__ = ["data_runs", "random_data", "same_content"]

CHUNK = 8 * MIB


def random_data(path: Path, runs: list[tuple[int, int]]) -> None:
    """
    Write random bytes, which no program treats as zeroes or compresses.

    Args:
        runs: offset and length of each piece, bytes.
    """
    with path.open("r+b") as file:
        for offset, length in runs:
            file.seek(offset)
            for at in range(0, length, CHUNK):
                file.write(os.urandom(min(CHUNK, length - at)))


def data_runs(fd: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each piece of a file that is no hole."""
    at, size = 0, os.fstat(fd).st_size
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after it
                return
            raise
        end = os.lseek(fd, at, os.SEEK_HOLE)
        yield at, end
        at = end


def same_content(one: Path, other: Path) -> bool:
    """
    Return whether two images hold the same bytes.

    It reads only where either has data: comparing 16 TiB of holes takes hours.
    """
    with one.open("rb", 0) as a, other.open("rb", 0) as b:
        if os.fstat(a.fileno()).st_size != os.fstat(b.fileno()).st_size:
            return False
        left, right = bytearray(CHUNK), bytearray(CHUNK)
        done = 0
        for start, end in sorted([*data_runs(a.fileno()), *data_runs(b.fileno())]):
            for at in range(max(start, done), end, CHUNK):
                length = min(CHUNK, end - at)
                views = memoryview(left)[:length], memoryview(right)[:length]
                for file, view in zip((a, b), views, strict=True):
                    if os.preadv(file.fileno(), [view], at) != length:
                        return False
                if views[0] != views[1]:
                    return False
            done = max(done, end)
    return True
