# SPDX-License-Identifier: BSD-3-Clause
"""
Files whose every block says what it is, and a record of what fsync answered for.

The writer is the client that a crash is judged by. Each 4 KiB block carries its file,
its place, a stamp that only grows, and a checksum; after each fsync that was answered
the stamps it covered are recorded *outside* the disk under test. Whatever happens
then, a block may hold a later stamp than the recorded one, never an earlier one, and
never anything but a whole block of its own.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = [
    "BLOCK",
    "Answered",
    "Recorder",
    "Writer",
    "damage",
    "make_block",
    "merge",
    "records",
    "stamp_of",
]

BLOCK = 4096
NR_FILES = 12
NR_BLOCKS = 16  # of a file
MAGIC = b"nbdm-vm\n"
HEADER = struct.Struct("<8sIIQ")  # magic, file, block, stamp
RECORD_MAGIC = "answered"

# (file, block) -> the stamp that fsync last answered for.
Answered = dict[tuple[int, int], int]


def make_block(file: int, block: int, stamp: int) -> bytes:
    """Return the content of a block."""
    head = HEADER.pack(MAGIC, file, block, stamp)
    body = random.Random(stamp << 16 | file << 8 | block).randbytes(64)
    content = head + (body * (BLOCK // 64))[: BLOCK - HEADER.size - 4]
    return content + zlib.crc32(content).to_bytes(4, "little")


def stamp_of(content: bytes, file: int, block: int) -> int | None:
    """Return a block's stamp; None if it is not whole, or not this block."""
    if len(content) != BLOCK:
        return None
    magic, of_file, of_block, stamp = HEADER.unpack_from(content)
    crc = int.from_bytes(content[-4:], "little")
    if magic != MAGIC or zlib.crc32(content[:-4]) != crc:
        return None
    return stamp if (of_file, of_block) == (file, block) else None


def damage(folder: Path, answered: Answered) -> Iterator[str]:
    """Yield what is wrong in *folder*: answered blocks that are lost, torn or old."""
    for (file, block), stamp in sorted(answered.items()):
        try:
            with (folder / f"f{file}").open("rb") as opened:
                opened.seek(block * BLOCK)
                found = stamp_of(opened.read(BLOCK), file, block)
        except OSError as error:
            yield f"file {file}: {error}"
            continue
        if found is None or found < stamp:
            yield f"file {file} block {block}: answered {stamp}, found {found}"


def record(covered: Answered) -> bytes:
    """Return one record of what an fsync answered for."""
    items = [[file, block, stamp] for (file, block), stamp in covered.items()]
    return json.dumps({RECORD_MAGIC: items}).encode() + b"\n"


def merge(answered: Answered, line: bytes) -> None:
    """Add a record to what was answered."""
    for file, block, stamp in json.loads(line)[RECORD_MAGIC]:
        answered[file, block] = max(stamp, answered.get((file, block), 0))


def records(path: Path) -> Iterator[bytes]:
    """Yield the records in a file; the writer may have been killed in the last."""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield line


class Recorder:
    """
    Where answered fsyncs are recorded: a file, or a block device.

    On a device each record is a block of its own, on stable storage before `add`
    returns: its place among the writes of other devices is then known.
    """

    def __init__(self, path: Path) -> None:
        self._is_device = path.exists() and stat.S_ISBLK(path.stat().st_mode)
        flags = os.O_WRONLY | os.O_CREAT
        if self._is_device:
            flags |= os.O_DIRECT | os.O_DSYNC
        else:
            flags |= os.O_APPEND
        self._fd = os.open(path, flags, 0o600)
        self._place = 0
        # O_DIRECT wants an aligned buffer.
        self._page = mmap.mmap(-1, BLOCK)

    def add(self, covered: Answered) -> None:
        """Record that an fsync which covers *covered* was answered."""
        content = record(covered)
        if not self._is_device:
            os.write(self._fd, content)
            return
        assert len(content) <= BLOCK
        self._page[:] = content.ljust(BLOCK, b"\0")
        written = os.pwrite(self._fd, self._page, self._place)
        assert written == BLOCK
        self._place += BLOCK

    def close(self) -> None:
        """Let the file or device go."""
        os.close(self._fd)


class Writer:
    """
    Writes to files in *folder* in every way that ends in an fsync, one at a time.

    Args:
        folder: of the file system under test.
        recorder: of what was answered.
        seed: of the choices.
        stamp: all stamps are higher.
    """

    def __init__(
        self, folder: Path, recorder: Recorder, seed: int, stamp: int = 0
    ) -> None:
        self._folder = folder
        self._recorder = recorder
        self._choose = random.Random(seed)
        self._stamp = stamp

    def run(self, rounds: int | None = None) -> None:
        """Write until an error, or so many rounds. Raises OSError."""
        done = 0
        while rounds is None or done < rounds:
            self.step()
            done += 1

    def step(self) -> None:
        """Do one thing that ends in an fsync, and record that it was answered."""
        file = self._choose.randrange(NR_FILES)
        path = self._folder / f"f{file}"
        if not path.exists() or self._choose.random() < 0.25:
            self._recorder.add(self._replace(file, path))
        else:
            self._recorder.add(self._overwrite(file, path))

    def _stamps(self, blocks: Iterable[int]) -> dict[int, int]:
        """Return a new stamp for each of *blocks*."""
        stamps = {}
        for block in blocks:
            self._stamp += 1
            stamps[block] = self._stamp
        return stamps

    def _write(self, fd: int, file: int, stamps: dict[int, int]) -> Answered:
        for block, stamp in stamps.items():
            os.pwrite(fd, make_block(file, block, stamp), block * BLOCK)
        return {(file, block): stamp for block, stamp in stamps.items()}

    def _replace(self, file: int, path: Path) -> Answered:
        """Put a new file in the place of the old one, both durable."""
        new = path.with_suffix(".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            covered = self._write(fd, file, self._stamps(range(NR_BLOCKS)))
            os.fsync(fd)
        finally:
            os.close(fd)
        new.rename(path)
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return covered

    def _overwrite(self, file: int, path: Path) -> Answered:
        """Write some blocks in place: fsync, fdatasync, or O_DSYNC for each."""
        how = self._choose.choice((os.fsync, os.fdatasync, None))
        fd = os.open(path, os.O_WRONLY | (0 if how else os.O_DSYNC))
        try:
            nr = self._choose.randint(1, 6)
            blocks = self._choose.sample(range(NR_BLOCKS), nr)
            covered = self._write(fd, file, self._stamps(blocks))
            if how:
                how(fd)
        finally:
            os.close(fd)
        return covered
