# SPDX-License-Identifier: BSD-3-Clause
"""
The disk of a keep file: nbdkit's callbacks under `nbdkit python`, read-only.

A person looks for lost files in it, so one request at a time is fast enough. nbdkit
runs this file as `__main__`, so imports are absolute, and finds the callbacks by their
names.

Parameters: keep=FILE, local=DISK.
"""

# ruff: noqa: D103  the callbacks are nbdkit's
from __future__ import annotations

import errno
import sys
from pathlib import Path

import nbdkit

from nbd_mirror.volume.keep_file import KeepReader
from nbd_mirror.volume.keep_image import KeepImage

API_VERSION = 2

_parameters: dict[str, str] = {}
_image: KeepImage | None = None


def _warn(text: str) -> None:
    sys.stderr.write(f"nbd-mirror: warning: {text}\n")


def config(key: str, value: str) -> None:
    _parameters[key] = value


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS)


def get_ready() -> None:
    global _image  # noqa: PLW0603  there is one
    reader = KeepReader(Path(_parameters["keep"]))
    _image = KeepImage(reader, _parameters["local"], _warn)


def open(readonly: bool) -> bool:  # noqa: A001, ARG001  nbdkit's name
    return True


def get_size(_: bool) -> int:
    assert _image is not None
    return _image.size


def can_write(_: bool) -> bool:
    return False


def can_multi_conn(_: bool) -> bool:
    return True


def pread(_: bool, buf: bytearray, offset: int, flags: int) -> None:  # noqa: ARG001
    assert _image is not None
    data = _image.read(len(buf), offset)
    if data is None:
        nbdkit.set_error(errno.EIO)
        raise OSError(errno.EIO, "a region is broken").with_traceback(None)
    buf[:] = data
