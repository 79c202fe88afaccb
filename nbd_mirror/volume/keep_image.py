# SPDX-License-Identifier: BSD-3-Clause
"""
The disk as the losing side of a split brain had it: read-only, from two places.

A region that the keep file has comes from there, any other one from the local disk as
it is now. Bytes of a broken record are never replaced by others: a read of such a
region fails. So does a read of any region without a record, if records were lost.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from ..base.errors import from_errno
from ..rules.node_side import Role
from .keep_file import KeepReader
from .node_record import NodeRecord

__all__ = ["KeepImage", "was_written_since"]


def was_written_since(reader: KeepReader, record: NodeRecord | None) -> bool:
    """
    Tell whether the local disk may have been written to since the file was made.

    A node that gave up its data is written to only in a session of the kept one, which
    stores a claim first, or after a promotion of its own.
    """
    if record is None:
        return True
    claim = record.claim
    words = f"{claim.epoch}.{claim.node}.{claim.session}" if claim else ""
    header = reader.header
    same = words == header.claim and record.role is Role.SECONDARY
    return not (same and record.node == header.node and record.leader == header.kept)


class KeepImage:
    """
    Reads the image.

    Args:
        reader: of the keep file.
        local: the path of the local disk.
        log: gets a line for each region that cannot be read, once.
    Raises:
        MirrorError: the local disk cannot be opened.
    """

    def __init__(
        self, reader: KeepReader, local: str, log: Callable[[str], object]
    ) -> None:
        self._reader, self._path, self._log = reader, local, log
        self._told: set[int] = set()
        try:
            self._fd = os.open(local, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise from_errno(
                error.errno or errno.EIO, f"{local}: {error.strerror}"
            ) from None

    def close(self) -> None:
        """Close the local disk."""
        os.close(self._fd)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._reader.header.size

    def read(self, length: int, offset: int) -> bytes | None:
        """
        Return bytes of the image.

        Returns:
            None: a part of them is broken, or cannot be read.
        """
        parts, step = [], self._reader.header.region_size
        while length > 0:
            region, skip = divmod(offset, step)
            size = min(length, step - skip)
            part = self._part(region, skip, size)
            if part is None:
                return None
            parts.append(part)
            offset, length = offset + size, length - size
        return b"".join(parts)

    def _part(self, region: int, skip: int, size: int) -> bytes | None:
        if self._reader.holds(region):
            content = self._reader.read(region)
            if content is not None:
                return content[skip : skip + size]
            return self._cannot(region, "its record in the keep file is broken")
        if self._reader.lost:
            return self._cannot(region, "its record may be one of those that are lost")
        at, data = region * self._reader.header.region_size + skip, b""
        try:
            while len(data) < size:
                more = os.pread(self._fd, size - len(data), at + len(data))
                if not more:
                    return self._cannot(region, f"{self._path} is too short")
                data += more
        except OSError as error:
            return self._cannot(region, f"{self._path}: {error.strerror}")
        return data

    def _cannot(self, region: int, why: str) -> bytes | None:
        if region not in self._told:
            self._told.add(region)
            at = region * self._reader.header.region_size
            self._log(f"the region at byte {at} cannot be read: {why}")
        return None
