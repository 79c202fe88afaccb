# SPDX-License-Identifier: BSD-3-Clause
"""
A small NBD server for one read-only image on a unix socket.

The doors of a volume serve an engine, and this image has none. It is read by a person
who looks for lost files, so a thread for each client is fast enough. Numbers are those
of doc/proto.md of the NBD project.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..base import unix

__all__ = ["Image", "serve_image"]

_MAGIC, _OPTION_MAGIC = 0x4E42444D41474943, 0x49484156454F5054
_REPLY_MAGIC = 0x3E889045565A9
_EXPORT_NAME, _ABORT, _LIST, _INFO, _GO = 1, 2, 3, 6, 7
_ACK, _SERVER, _INFO_REPLY, _UNSUPPORTED, _INVALID = 1, 2, 3, 1 << 31 | 1, 1 << 31 | 3
_FLAGS = 1 << 0 | 1 << 1 | 1 << 8  # has flags, read-only, many connections
_READ, _WRITE, _DISC = 0, 1, 2
_REQUEST, _REPLY = 0x25609513, 0x67446698
_EPERM, _EIO, _EINVAL = 1, 5, 22
_MOST = 32 << 20  # bytes of a read
_MOST_OPTION = 8192
_MOST_CLIENTS = 16


class Image(Protocol):
    """What is served."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, length: int, offset: int) -> bytes | None:
        """Return bytes; None: they cannot be read."""


class _EndError(Exception):
    """The client is gone, or speaks no NBD."""


def serve_image(image: Image, path: Path, ready: Callable[[], object]) -> None:
    """
    Serve an image until Ctrl-C ends the process.

    Args:
        path: of the socket, which must not exist.
        ready: called once clients may connect.
    Raises:
        OSError: the socket cannot be made.
    """
    room = threading.Semaphore(_MOST_CLIENTS)
    listener = unix.bind(path, _MOST_CLIENTS)
    try:
        ready()
        while True:
            room.acquire()
            client, _ = listener.accept()
            threading.Thread(
                target=_serve, args=(client, image, room), daemon=True
            ).start()
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            path.unlink()


def _serve(client: socket.socket, image: Image, room: threading.Semaphore) -> None:
    try:
        with client, contextlib.suppress(_EndError, OSError):
            _handshake(client, image)
            while True:
                _answer(client, image)
    finally:
        room.release()


def _take(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = client.recv(min(size - len(data), 1 << 20))
        if not more:
            raise _EndError
        data += more
    return data


def _handshake(client: socket.socket, image: Image) -> None:
    client.sendall(struct.pack(">QQH", _MAGIC, _OPTION_MAGIC, 1 | 2))
    (flags,) = struct.unpack(">I", _take(client, 4))
    while True:
        magic, option, length = struct.unpack(">QII", _take(client, 16))
        if magic != _OPTION_MAGIC or length > _MOST_OPTION:
            raise _EndError
        data = _take(client, length)
        if option == _EXPORT_NAME:
            client.sendall(struct.pack(">QH", image.size, _FLAGS))
            if not flags & 2:
                client.sendall(bytes(124))
            return
        if _option(client, image, option, data):
            return


def _option(client: socket.socket, image: Image, option: int, data: bytes) -> bool:
    """Answer an option; tell whether the transmission begins."""

    def reply(kind: int, words: bytes = b"") -> None:
        head = struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(words))
        client.sendall(head + words)

    if option == _ABORT:
        reply(_ACK)
        raise _EndError
    if option == _LIST:
        reply(_SERVER, struct.pack(">I", 0))
        reply(_ACK)
    elif option not in (_INFO, _GO):
        reply(_UNSUPPORTED)
    elif len(data) < 6:
        reply(_INVALID)
    else:
        reply(_INFO_REPLY, struct.pack(">HQH", 0, image.size, _FLAGS))
        reply(_ACK)
        return option == _GO
    return False


def _answer(client: socket.socket, image: Image) -> None:
    """Answer one request."""
    magic, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", _take(client, 28))
    if magic != _REQUEST or kind == _DISC:
        raise _EndError
    if kind == _WRITE:
        for _ in range(0, length, 1 << 20):
            _take(client, min(length, 1 << 20))
            length -= min(length, 1 << 20)
    error, data = (_EPERM, b"") if kind != _READ else _read(image, length, offset)
    client.sendall(struct.pack(">IIQ", _REPLY, error, cookie) + data)


def _read(image: Image, length: int, offset: int) -> tuple[int, bytes]:
    if length > _MOST or offset + length > image.size:
        return _EINVAL, b""
    data = image.read(length, offset)
    return (_EIO, b"") if data is None else (0, data)
