# SPDX-License-Identifier: BSD-3-Clause
"""
The keep file: regions of a disk that are about to be overwritten, saved durably.

`resolve` makes it before the losing side of a split brain gives up its data. The file
is written from front to end and only then gets its name, so a file under its name is
whole. docs/FORMAT.md describes the bytes.

A reader believes nothing. Each record has a checksum, over the file's id too. A region
whose record is broken is reported as broken: other bytes never take its place. If the
index is broken, the records are found by reading them in order. What comes behind a
broken one cannot be found then, so it may be any region: the reader says so (`lost`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..base.errors import FormatError, MirrorError, SpaceError, from_errno
from ..base.files import open_plain, opened_folder

__all__ = [
    "FOLDER",
    "HEADER_BYTES",
    "RECORD_BYTES",
    "KeepHeader",
    "KeepReader",
    "KeepWriter",
    "keep_names",
    "remove_leftovers",
]

FOLDER = "keep"  # in the state directory
VERSION = 1
HEADER_BYTES = 4096
RECORD_BYTES = 16
MAGIC, END_MAGIC = b"NBDMKEEP", b"NBDMKEND"
UNFINISHED = "~new"  # behind the name of a file that is not whole

_HEADER = struct.Struct("<8sII16sI")  # magic, version, crc, id, bytes of the words
_RECORD = struct.Struct("<QII")  # region, bytes of data (0: zeroes), crc
_ENTRY = struct.Struct("<QQ")  # region, offset of its record
_END = struct.Struct("<8sIIQQ16s")  # magic, version, crc, entries, index, id
_MAX_REGION_SIZE = 4 << 20
_MAX_SIZE = 1 << 50
_BATCH = 16 << 20  # bytes between two syncs


@dataclass(frozen=True, slots=True)
class KeepHeader:
    """
    What a keep file is of; stored as JSON, so a later release may add to it.

    Args:
        volume, uuid: the volume's name, and the id of the losing node's state.
        node, kept: the losing node, and the one that counts.
        generation, base: of the losing node, as 16 hexadecimal digits: what it held,
            and what it goes back to.
        epoch: the promotion in which it gave up its data.
        time: seconds since 1970.
        size, region_size: of the disk, bytes.
        regions: how many records the file has.
        claim: the highest claim that the node had granted: epoch, node, session.
        reason: why the two nodes stopped.
    """

    volume: str
    uuid: str
    node: str
    kept: str
    generation: str
    base: str
    epoch: int
    time: int
    size: int
    region_size: int
    regions: int
    claim: str
    reason: str


def _check(header: KeepHeader) -> None:
    """Raise ValueError if a header is of no disk."""
    for field in fields(KeepHeader):
        value = getattr(header, field.name)
        wanted = int if field.type in ("int", int) else str
        if type(value) is not wanted:
            raise ValueError(f"{field.name} is wrong")
    small, large = 512, _MAX_REGION_SIZE
    power = header.region_size > 0 and not header.region_size & (header.region_size - 1)
    if not power or not small <= header.region_size <= large:
        raise ValueError("the region size is wrong")
    if not 0 < header.size <= _MAX_SIZE:
        raise ValueError("the size is wrong")
    if not 0 <= header.regions <= -(-header.size // header.region_size):
        raise ValueError("the number of regions is wrong")
    if not 0 <= header.time < 1 << 40:
        raise ValueError("the time is wrong")


def _crc(key: bytes, *parts: bytes | memoryview) -> int:
    crc = zlib.crc32(key)
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _pack_header(header: KeepHeader, key: bytes) -> bytes:
    words = json.dumps(asdict(header), sort_keys=True).encode()
    if len(words) > HEADER_BYTES - _HEADER.size:
        raise FormatError("the description of a keep file is too long")
    padded = words.ljust(HEADER_BYTES - _HEADER.size, b"\0")
    bare = _HEADER.pack(MAGIC, VERSION, 0, key, len(words))
    crc = _crc(b"", bare, padded)
    return _HEADER.pack(MAGIC, VERSION, crc, key, len(words)) + padded


def keep_names(state: Path) -> list[str]:
    """
    Return the names of the whole keep files of a volume, the oldest first.

    Raises:
        MirrorError: the folder cannot be read.
    """
    try:
        found = [path.name for path in (state / FOLDER).iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_errno(
            error.errno or errno.EIO, f"{state / FOLDER}: {error.strerror}"
        ) from None
    return sorted(name for name in found if not name.endswith(UNFINISHED))


def remove_leftovers(state: Path) -> None:
    """Remove the keep files that were never finished: nothing was given up for them."""
    folder = state / FOLDER
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name.endswith(UNFINISHED):
                path.unlink()


class KeepWriter:
    """
    Writes one keep file; the name appears with `finish`, and never before.

    Use it as a context manager: without `finish` nothing stays.

    Args:
        state: the volume's state directory.
        name: of the new file.
        header: its `regions` is the number of `add` calls that follow.
    """

    def __init__(self, state: Path, name: str, header: KeepHeader) -> None:
        self._folder = state / FOLDER
        self._name, self._header = name, header
        self._new = name + UNFINISHED
        self._key = os.urandom(16)
        self._index: list[tuple[int, int]] = []
        self._at = 0
        self._unsynced = 0
        self._file: BinaryIO | None = None
        self._whole = False

    def __enter__(self) -> KeepWriter:
        with self._told():
            self._make_folder()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            fd = open_plain(self._folder / self._new, flags)
            self._file = open(fd, "wb", buffering=1 << 20)
            self._write(_pack_header(self._header, self._key))
        return self

    def _make_folder(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
            with opened_folder(self._folder.parent) as fd:
                os.fsync(fd)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        if not self._whole:
            with contextlib.suppress(OSError):
                (self._folder / self._new).unlink()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an error of the file system into one that says what it means."""
        try:
            yield
        except OSError as error:
            number = error.errno or errno.EIO
            text = f"{self._folder / self._new}: {error.strerror}; nothing was given up"
            if number in (errno.ENOSPC, errno.EDQUOT):
                raise SpaceError(
                    text, "make room on the file system of `state`, then try again"
                ) from None
            raise from_errno(number, text) from None

    def _write(self, *parts: bytes | memoryview) -> None:
        assert self._file is not None
        for part in parts:
            self._file.write(part)
            self._at += len(part)
            self._unsynced += len(part)
        if self._unsynced >= _BATCH:
            self._sync()

    def _sync(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self._unsynced = 0

    def add(self, region: int, data: bytes | memoryview) -> None:
        """Save the content of a region; one that is all zero takes a record alone."""
        if not any(data):
            data = b""
        bare = _RECORD.pack(region, len(data), 0)
        crc = _crc(self._key, bare, data)
        self._index.append((region, self._at))
        with self._told():
            self._write(_RECORD.pack(region, len(data), crc), data)

    def finish(self) -> int:
        """Make the file durable under its name; return its bytes."""
        assert self._file is not None
        index = b"".join(_ENTRY.pack(*entry) for entry in sorted(self._index))
        end = [END_MAGIC, VERSION, 0, len(self._index), self._at, self._key]
        end[2] = _crc(self._key, index, _END.pack(*end))
        with self._told():
            self._write(index, _END.pack(*end))
            self._sync()
            os.fsync(self._file.fileno())
            self._file.close()
            with opened_folder(self._folder) as fd:
                os.rename(self._new, self._name, src_dir_fd=fd, dst_dir_fd=fd)
                os.fsync(fd)
        self._whole = True
        return self._at


class KeepReader:
    """
    Reads one keep file; any bytes may be in it.

    Attributes:
        header: what it is of.
        broken_index: the records were found by reading them in order.
        lost: records that the header counts and that could not be found. Then any
            region without a record may be one of them.
    Raises:
        FormatError: it is no keep file, of another version, or its header is garbled.
        MirrorError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            fd = open_plain(path, os.O_RDONLY)
        except OSError as error:
            raise from_errno(
                error.errno or errno.EIO, f"{path}: {error.strerror}"
            ) from None
        self._file = open(fd, "rb", buffering=0)  # noqa: SIM115  `close` closes it
        try:
            self.bytes = os.fstat(fd).st_size
            self.header, self._key = self._read_header()
            self._places = self._read_index()
            self.broken_index = self._places is None
            if self._places is None:
                self._places = self._scan()
            self.lost = max(self.header.regions - len(self._places), 0)
        except MirrorError:
            self._file.close()
            raise

    def __enter__(self) -> KeepReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _pread(self, size: int, at: int) -> bytes:
        """Read up to *size* bytes; fewer at the end of the file, or where it fails."""
        data = io.BytesIO()
        with contextlib.suppress(OSError, OverflowError):
            while data.tell() < size:
                more = os.pread(
                    self._file.fileno(), size - data.tell(), at + data.tell()
                )
                if not more:
                    break
                data.write(more)
        return data.getvalue()

    def _read_header(self) -> tuple[KeepHeader, bytes]:
        page = self._pread(HEADER_BYTES, 0)
        if len(page) < HEADER_BYTES or page[:8] != MAGIC:
            raise FormatError(f"{self.path} is no keep file")
        _, version, crc, key, length = _HEADER.unpack_from(page)
        if version != VERSION:
            raise FormatError(
                f"{self.path} has version {version}, known is {VERSION}",
                "the nbd-mirror that wrote it, or a newer one",
            )
        bare = _HEADER.pack(MAGIC, version, 0, key, length)
        if crc != _crc(b"", bare, page[_HEADER.size :]):
            raise FormatError(f"{self.path}: its header is garbled")
        try:
            words = json.loads(page[_HEADER.size : _HEADER.size + length])
            known = {one.name for one in fields(KeepHeader)}
            header = KeepHeader(**{k: words[k] for k in known})
            _check(header)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise FormatError(f"{self.path}: its header is garbled") from None
        return header, key

    def _read_index(self) -> dict[int, int] | None:
        """Return where each region's record is; None: the index is broken."""
        tail = self._pread(_END.size, self.bytes - _END.size)
        if len(tail) < _END.size:
            return None
        magic, version, crc, count, at, key = _END.unpack(tail)
        size = count * _ENTRY.size
        fits = at + size + _END.size == self.bytes and count == self.header.regions
        if (magic, version, key) != (END_MAGIC, VERSION, self._key) or not fits:
            return None
        index = self._pread(size, at)
        bare = _END.pack(magic, version, 0, count, at, key)
        if len(index) < size or crc != _crc(self._key, index, bare):
            return None
        return dict(_ENTRY.iter_unpack(index))

    def _scan(self) -> dict[int, int]:
        """Find the records in order, up to the first broken one."""
        places: dict[int, int] = {}
        at = HEADER_BYTES
        while len(places) < self.header.regions:
            found = self._record(at)
            if found is None or found[0] in places:
                break
            places[found[0]] = at
            at += RECORD_BYTES + len(found[1])
        return places

    def _record(self, at: int) -> tuple[int, bytes] | None:
        """Return a region and its data, "" for zeroes; None: it is broken."""
        head = self._pread(RECORD_BYTES, at)
        if len(head) < RECORD_BYTES:
            return None
        region, length, crc = _RECORD.unpack(head)
        if length not in (0, self.length_of(region)):
            return None
        data = self._pread(length, at + RECORD_BYTES)
        bare = _RECORD.pack(region, length, 0)
        if len(data) < length or crc != _crc(self._key, bare, data):
            return None
        return region, data

    # --- what it holds ---

    def length_of(self, region: int) -> int:
        """Return the bytes of a region; the last one may be shorter. 0: no region."""
        left = self.header.size - region * self.header.region_size
        return max(min(left, self.header.region_size), 0)

    @property
    def regions(self) -> list[int]:
        """The regions that have a record, in order."""
        return sorted(self._places or ())

    def holds(self, region: int) -> bool:
        """Tell whether the file has a record of the region."""
        return region in (self._places or ())

    def read(self, region: int) -> bytes | None:
        """
        Return the content of a region that has a record.

        Returns:
            None: its record is broken.
        """
        assert self._places is not None
        found = self._record(self._places[region])
        if found is None or found[0] != region:
            return None
        return found[1] or bytes(self.length_of(region))

    def broken(self) -> list[int]:
        """Return the regions whose record is broken; reads the whole file."""
        return [region for region in self.regions if self.read(region) is None]
