# SPDX-License-Identifier: BSD-3-Clause
"""
Communicate with a process that may be another user's.

Over a unix socket it can send open files. The kernel closes those that the receiver
does not take, on the thread that receives or closes the socket, and the last close of a
file may wait for as long as that user likes (csrc/wire/receive.c). A command takes such
files, or leaves the socket open: when the command ends, the kernel closes all without a
wait. An urgent byte (MSG_OOB) can carry files too, and a receive that skips it closes
them. Linux from 6.16 refuses files when they are sent, if the socket has an option.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterator

__all__ = ["close", "closing", "receive", "refuse_files"]

MAX_FILES = 253  # in a message: the kernel's SCM_MAX_FD
# Linux 6.16; two architectures number the options on their own.
SO_PASSRIGHTS = {"sparc64": 0x5C, "parisc64": 0x4051}.get(os.uname().machine, 83)


def refuse_files(sock: socket.socket) -> None:
    """
    Have the kernel refuse open files as they are sent to *sock*, if it can.

    An accepted socket has the option of its listener, from the client's connect on.
    """
    with contextlib.suppress(OSError):  # an older kernel, or TCP
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


def receive(sock: socket.socket, most: int) -> bytes:
    """
    Return at most *most* bytes, as `recv` does.

    Raises:
        ValueError: open files came with them, which no honest process sends.
        OSError: as `recv`.
    """
    # so that no urgent byte is skipped
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    room = socket.CMSG_SPACE(MAX_FILES * struct.calcsize("i"))
    data, control, flags, _ = sock.recvmsg(most, room, socket.MSG_CMSG_CLOEXEC)
    if control or flags & socket.MSG_CTRUNC:
        raise ValueError("it sent open files")
    return data


def close(sock: socket.socket) -> None:
    """Close a connected socket, unless it holds bytes that were not received."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # nothing more can arrive
    unread = b"\0" * 4
    with contextlib.suppress(OSError):
        unread = fcntl.ioctl(sock, termios.FIONREAD, unread)
    if any(unread):
        sock.detach()
    else:
        sock.close()


@contextlib.contextmanager
def closing(sock: socket.socket) -> Iterator[socket.socket]:
    """Give *sock*, and close it at the end, as `close` does."""
    try:
        yield sock
    finally:
        close(sock)
