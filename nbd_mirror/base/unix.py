# SPDX-License-Identifier: BSD-3-Clause
"""
Unix sockets that a server listens on, for its clients and for commands.

Only the owner may connect, from the moment the name exists: the mode is set on the
descriptor before, so the umask of the process stays unchanged while other threads make
files.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from . import strangers

__all__ = ["MAX_UNIX_PATH", "answers", "bind", "short_name", "unix_socket"]

MAX_UNIX_PATH = 107  # bytes; sun_path without its NUL
FOLDERS = Path("/proc/self/fd")


def unix_socket() -> socket.socket:
    """Make one, which no started program inherits."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    strangers.refuse_files(sock)
    return sock


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """
    Yield a name of *path* that fits into a socket address.

    A state directory may be deeper than the 107 bytes of an address; its entry under
    /proc/self/fd never is.
    """
    if len(os.fsencode(path)) <= MAX_UNIX_PATH:
        yield os.fspath(path)
        return
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def bind(path: Path, backlog: int) -> socket.socket:
    """
    Listen on *path*, which must not exist.

    Args:
        backlog: connections that may wait to be accepted.
    Raises:
        OSError: it cannot be made.
    """
    sock = unix_socket()
    try:
        os.fchmod(sock.fileno(), 0o600)
        with short_name(path) as name:
            sock.bind(name)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def answers(path: Path, dir_fd: int | None = None) -> bool:
    """
    Return whether a server accepts on *path*; raises OSError without access.

    Args:
        dir_fd: the opened folder of *path*, in which alone its name is looked up.
    """
    with _named(path, dir_fd) as name, strangers.closing(unix_socket()) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(name)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (TimeoutError, BlockingIOError):
            return True  # its queue is full, so a server has it open
        return True


@contextlib.contextmanager
def _named(path: Path, dir_fd: int | None) -> Iterator[str]:
    folder = FOLDERS / str(dir_fd)
    # Without /proc the name would count as one on which no server answers.
    if dir_fd is not None and folder.is_dir():
        yield f"{folder}/{path.name}"
        return
    with short_name(path) as name:
        yield name
