# SPDX-License-Identifier: BSD-3-Clause
"""
A disk that fails when told to: a plugin for `nbdkit python`, over an image.

nbdkit's error filter cannot fail a flush, nor a sector until it is written again,
which is what a real disk does: it keeps spare sectors, and uses one at a write. And
it has a write cache, which it loses when it is killed or a flush fails.

Parameters: image=FILE, switch=DIR. While DIR/read, DIR/write or DIR/flush is there,
requests of that kind get the errno it names. DIR/bad lists sectors, `OFFSET LENGTH` a
line: reads of them get EIO, and a write over one takes it off the list.
"""

# ruff: noqa: D103  the callbacks are nbdkit's
from __future__ import annotations

import errno
import os
from pathlib import Path

import nbdkit

API_VERSION = 2
SECTOR = 512

parameters: dict[str, str] = {}
image = -1
cache: dict[int, bytes] = {}  # sector -> what was written and not flushed


def config(key: str, value: str) -> None:
    parameters[key] = value


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS)


def get_ready() -> None:
    global image  # noqa: PLW0603  there is one
    image = os.open(parameters["image"], os.O_RDWR)


def open(readonly: bool) -> bool:  # noqa: A001  nbdkit's name
    return True


def get_size(_: bool) -> int:
    return os.fstat(image).st_size


def can_flush(_: bool) -> bool:
    return True


def can_multi_conn(_: bool) -> bool:
    return True


def _fail(number: int) -> None:
    nbdkit.set_error(number)
    raise OSError(number, os.strerror(number)).with_traceback(None)


def _switch(kind: str) -> None:
    try:
        word = (Path(parameters["switch"]) / kind).read_text()
    except FileNotFoundError:
        return
    _fail(getattr(errno, word))


def _bad() -> list[tuple[int, int]]:
    try:
        lines = (Path(parameters["switch"]) / "bad").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def pread(_: bool, buf: bytearray, offset: int, flags: int) -> None:
    _switch("read")
    for start, length in _bad():
        if start < offset + len(buf) and offset < start + length:
            _fail(errno.EIO)
    buf[:] = os.pread(image, len(buf), offset)
    for at in range(0, len(buf), SECTOR) if cache else ():
        found = cache.get((offset + at) // SECTOR)
        if found is not None:
            buf[at : at + SECTOR] = found


def pwrite(_: bool, buf: bytes, offset: int, flags: int) -> None:
    _switch("write")
    for at in range(0, len(buf), SECTOR):
        cache[(offset + at) // SECTOR] = bytes(buf[at : at + SECTOR])
    bad = _bad()
    # A sector is mended by what covers it, in as many writes as it takes.
    left = [piece for one in bad for piece in _without(one, offset, len(buf))]
    if left != bad:
        text = "".join(f"{start} {length}\n" for start, length in left)
        (Path(parameters["switch"]) / "bad").write_text(text)


def _without(one: tuple[int, int], offset: int, count: int) -> list[tuple[int, int]]:
    start, end = one[0], one[0] + one[1]
    if end <= offset or offset + count <= start:
        return [one]
    pieces = [(start, offset - start), (offset + count, end - offset - count)]
    return [piece for piece in pieces if piece[1] > 0]


def flush(_: bool, flags: int) -> None:
    try:
        _switch("flush")
        for sector, content in cache.items():
            os.pwrite(image, content, sector * SECTOR)
    finally:
        cache.clear()
