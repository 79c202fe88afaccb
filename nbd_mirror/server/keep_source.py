# SPDX-License-Identifier: BSD-3-Clause
"""
What goes into a keep file: regions of the local disk, read as they are.

The disk is only read, and beside the engine that has it open: no request changes it in
the meantime. A region that lies in a hole of a sparse file is not read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from bitarray import bitarray

from ..base.errors import from_errno
from ..volume.keep_file import HEADER_BYTES, RECORD_BYTES

__all__ = ["KeepSource"]

INDEX_BYTES = 16  # of a region; the end of the file is shorter than the header


class KeepSource:
    """
    The regions of a disk that are to be saved.

    Args:
        path: of the local disk.
        size, region_size: bytes.
        bits: the regions, a bit each; None: all that are not zero.
    Raises:
        MirrorError: the disk cannot be opened.
    """

    def __init__(
        self, path: str, size: int, region_size: int, bits: bytes | None
    ) -> None:
        self._path, self._size, self._region_size = path, size, region_size
        self._bits = bitarray(endian="little")
        nr = -(-size // region_size)
        if bits is not None:
            self._bits.frombytes(bits)
            del self._bits[nr:]
        else:
            self._bits = bitarray(nr, endian="little")
            self._bits.setall(1)
        fd = self._open()
        try:
            holes = [
                at for at in self._bits.search(bitarray("1")) if self._hole(fd, at)
            ]
        finally:
            os.close(fd)
        if bits is None:
            for at in holes:
                self._bits[at] = 0
            holes = []
        self.count = self._bits.count()
        self.bytes = sum(map(self._length, self._bits.search(bitarray("1"))))
        data = self.bytes - sum(map(self._length, holes))
        each = RECORD_BYTES + INDEX_BYTES
        self.keep_bytes = 2 * HEADER_BYTES + self.count * each + data

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise from_errno(
                error.errno or errno.EIO, f"{self._path}: {error.strerror}"
            ) from None

    def _length(self, region: int) -> int:
        return min(self._region_size, self._size - region * self._region_size)

    def _hole(self, fd: int, region: int) -> bool:
        start = region * self._region_size
        try:
            return os.lseek(fd, start, os.SEEK_DATA) >= start + self._length(region)
        except OSError as error:
            return error.errno == errno.ENXIO  # no data up to the end of the file

    def read(self) -> Iterator[tuple[int, bytes]]:
        """
        Yield each region with its content.

        Raises:
            MirrorError: a region cannot be read.
        """
        fd = self._open()
        try:
            for region in self._bits.search(bitarray("1")):
                if self._hole(fd, region):
                    yield region, b""
                else:
                    yield region, self._content(fd, region)
        finally:
            os.close(fd)

    def _content(self, fd: int, region: int) -> bytes:
        start, length, data = region * self._region_size, self._length(region), b""
        try:
            while len(data) < length:
                more = os.pread(fd, length - len(data), start + len(data))
                if not more:
                    raise OSError(errno.EIO, "the disk is shorter than the volume")
                data += more
        except OSError as error:
            raise from_errno(
                error.errno or errno.EIO,
                f"{self._path}: region {region}, at byte {start}, cannot be read: "
                f"{error.strerror}; nothing was changed",
            ) from None
        return data
