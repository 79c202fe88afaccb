# SPDX-License-Identifier: BSD-3-Clause
"""
A disk behind a write cache: a plugin for `nbdkit python`, over an image.

It answers writes at once, and a flush takes as long as a disk of so many bytes a second
would take for what was written since the last flush. Parameters: image=FILE, rate=FILE,
a file that holds this number and is read at each flush; 0 is a quick disk.
"""

# ruff: noqa: D103  the callbacks are nbdkit's
from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import nbdkit

API_VERSION = 2

parameters: dict[str, str] = {}
lock = threading.Lock()
image = -1
written = 0  # and not flushed


def config(key: str, value: str) -> None:
    parameters[key] = value


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    global image  # noqa: PLW0603  there is one
    image = os.open(parameters["image"], os.O_RDWR)


def open(readonly: bool) -> bool:  # noqa: A001  nbdkit's name
    return True


def get_size(_: bool) -> int:
    return os.fstat(image).st_size


def can_flush(_: bool) -> bool:
    return True


def can_fua(_: bool) -> int:
    return int(nbdkit.FUA_EMULATE)


def can_multi_conn(_: bool) -> bool:
    return True


def pread(_: bool, buf: bytearray, offset: int, flags: int) -> None:
    buf[:] = os.pread(image, len(buf), offset)


def pwrite(_: bool, buf: bytes, offset: int, flags: int) -> None:
    global written  # noqa: PLW0603  there is one
    os.pwrite(image, buf, offset)
    with lock:
        written += len(buf)


def flush(_: bool, flags: int) -> None:
    global written
    with lock:
        count, written = written, 0
    rate = int(Path(parameters["rate"]).read_text())
    if rate > 0:
        time.sleep(count / rate)  # a slow disk is its time: there is no state to await
