# SPDX-License-Identifier: BSD-3-Clause
"""
Change a device of the kernel's nbd while it is in use, over generic netlink.

nbd-client 3.24 can connect a device. It cannot set how long the kernel waits for a new
connection after the last one was lost, nor give the device one. See linux/nbd-netlink.h
and linux/genetlink.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

__all__ = ["give_socket", "set_timeout", "wait_for_new_socket"]

NETLINK_GENERIC = 16
REQUEST_AND_ACK = 1 | 4
NLMSG_ERROR = 2
CONTROLLER, GETFAMILY, FAMILY_ID, FAMILY_NAME = 16, 3, 1, 2
RECONFIGURE = 3
INDEX, TIMEOUT, SOCKETS, DEAD_CONN_TIMEOUT = 1, 4, 7, 8
SOCK_ITEM, SOCK_FD = 1, 1
NESTED = 0x8000
HEADER = struct.Struct("=IHHII")
TIMEOUT_S = 10.0


def wait_for_new_socket(index: int, seconds: int) -> None:
    """
    Let requests of /dev/nbd*index* wait for a new connection instead of failing.

    Raises:
        OSError: not permitted, or the kernel or nbd-client uses no netlink.
    """
    _reconfigure(index, _attribute(DEAD_CONN_TIMEOUT, struct.pack("=Q", seconds)))


def set_timeout(index: int, seconds: int) -> None:
    """
    Change the time-out of requests that are sent from now on.

    Raises:
        OSError: as above.
    """
    _reconfigure(index, _attribute(TIMEOUT, struct.pack("=Q", seconds)))


def give_socket(index: int, sock: socket.socket) -> None:
    """
    Give /dev/nbd*index* a connection in place of a lost one.

    Raises:
        OSError: ENOSPC: none was lost. Otherwise as above.
    """
    item = _attribute(SOCK_FD, struct.pack("=I", sock.fileno()))
    items = _attribute(SOCK_ITEM | NESTED, item)
    _reconfigure(index, _attribute(SOCKETS | NESTED, items))


def _reconfigure(index: int, attributes: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.bind((0, 0))
        named = _ask(sock, CONTROLLER, GETFAMILY, _attribute(FAMILY_NAME, b"nbd\0"))
        family = next(data for kind, data in _attributes(named) if kind == FAMILY_ID)
        number = struct.unpack("=H", family[:2])[0]
        which = _attribute(INDEX, struct.pack("=I", index))
        _ask(sock, number, RECONFIGURE, which + attributes)


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind & ~NESTED, data[4:length]
        data = data[length + -length % 4 :]


def _ask(sock: socket.socket, family: int, command: int, attributes: bytes) -> bytes:
    """Send a command; return the attributes of its answer once it is acknowledged."""
    body = struct.pack("=BBH", command, 1, 0) + attributes
    length = HEADER.size + len(body)
    sock.send(HEADER.pack(length, family, REQUEST_AND_ACK, 1, 0) + body)
    answer = b""
    while True:
        data = sock.recv(65536)
        while len(data) >= HEADER.size:
            length, kind, *_ = HEADER.unpack_from(data)
            content, data = data[HEADER.size : length], data[length + -length % 4 :]
            if kind != NLMSG_ERROR:
                answer += content[4:]
                continue
            error = -struct.unpack_from("=i", content)[0]
            if error:
                raise OSError(error, os.strerror(error))
            return answer
