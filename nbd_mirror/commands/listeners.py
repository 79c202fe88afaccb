# SPDX-License-Identifier: BSD-3-Clause
"""
Bind the sockets that a volume listens on, before its server starts.

This process binds them and passes them on. So it can report a socket in use with its
own clear error, replace a stale socket of a killed server, and make a unix socket 0600
from its first moment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..base import unix
from ..base.errors import AccessError, BusyError, MirrorError, from_errno
from ..base.files import user_name
from ..base.listen import Listen

__all__ = ["MAX_LISTENERS", "Listeners", "bind", "remove_stale"]

FOLDER_LOCK_S = 2.0  # limit for the lock of the socket's folder; then go on without
STALE_LOOKS, STALE_PAUSE_S = 3, 0.03  # checks of a socket on which no server answers
MAX_LISTENERS = 16  # NBDM_MAX_LISTENERS
BACKLOG = 128  # connections that wait to be accepted


class Listeners(contextlib.ExitStack):
    """The *sockets* that a volume listens on; they are closed with this object."""

    def __init__(self) -> None:
        super().__init__()
        self.sockets: list[socket.socket] = []

    def add(self, sock: socket.socket) -> None:
        """Add *sock*, which this object closes."""
        self.sockets.append(self.enter_context(sock))


def bind(listen: Listen) -> Listeners:
    """
    Bind and listen; a socket file on which no server answers is replaced.

    A host's name, and no host at all, stand for several addresses: this listens on all
    of them that this host has.

    Raises:
        BusyError: another server listens there. MissingError, AccessError: the
        folder does not exist or may not be written. ConfigError: no such address.
    """
    if listen.path is None:
        return _bind_tcp(listen)
    listeners = Listeners()
    listeners.add(_bind_unix(Path(listen.path)))
    return listeners


def _bind_unix(path: Path) -> socket.socket:
    try:
        with _locked_folder(path.parent) as dir_fd:
            _remove_in_the_way(path, dir_fd)
            return unix.bind(path, BACKLOG)
    except MirrorError:
        raise
    except OSError as error:
        raise from_errno(
            error.errno or errno.EIO, f"cannot listen on {path}: {error.strerror}"
        ) from None


def _remove_in_the_way(path: Path, dir_fd: int) -> None:
    """Remove the socket file of a server that has ended, but nothing else."""
    try:
        found = _lstat(path, dir_fd)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise BusyError(f"{path} exists and is no socket: choose another path")
    try:
        if not _is_stale(path, dir_fd):
            raise BusyError(f"socket in use: another server listens on {path}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=dir_fd)
    except PermissionError:
        if found.st_uid == os.geteuid():
            raise
        raise AccessError(
            f"cannot listen on {path}: a socket of user {user_name(found.st_uid)} is "
            "there, which this user cannot replace",
            "choose another path for `listen`; or have that user remove it, if no "
            "server of theirs listens there",
        ) from None


def _lstat(path: Path, dir_fd: int) -> os.stat_result:
    return os.stat(path.name, dir_fd=dir_fd, follow_symlinks=False)


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[int]:
    """
    Let one process at a time check and replace a socket in *folder*; yield it, opened.

    Names are looked up in the opened folder alone. It may be another user's, who could
    put a link in its place between a check and what root does then.

    Without the lock, two processes that start at once could both find the socket stale,
    and the second would remove the first one's. But any user who can read the folder
    can lock it, so the wait is short; without the lock `_is_stale` still checks more
    than once.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + FOLDER_LOCK_S
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.02)
        yield fd
    finally:
        os.close(fd)


def _is_stale(path: Path, dir_fd: int) -> bool:
    """
    Return whether no server answers on a socket's name.

    It checks again after a moment: another server may just have bound the socket and
    not listen yet.
    """
    first = _lstat(path, dir_fd)
    for _ in range(STALE_LOOKS):
        if unix.answers(path, dir_fd):
            return False
        time.sleep(STALE_PAUSE_S)
    last = _lstat(path, dir_fd)
    return (first.st_dev, first.st_ino) == (last.st_dev, last.st_ino)


def _bind_tcp(listen: Listen) -> Listeners:
    found = _addresses(listen)
    both = {family for family, _ in found} == {socket.AF_INET, socket.AF_INET6}
    listeners = Listeners()
    missing: OSError | None = None
    try:
        for family, address in found:
            try:
                listeners.add(_listen_on(family, address, v6only=both))
            except OSError as error:
                # "localhost" is also ::1 on a host without IPv6.
                if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise
                missing = error
        if not listeners.sockets and missing is not None:
            raise missing
    except OSError as error:
        listeners.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"socket in use: another server listens on {listen}"
            ) from None
        number = errno.EINVAL if error is missing else error.errno
        raise from_errno(
            number or errno.EIO, f"cannot listen on {listen}: {error.strerror}"
        ) from None
    return listeners


def _addresses(listen: Listen) -> Sequence[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(
            listen.host or None,
            listen.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
    except (OSError, ValueError) as error:  # the latter for a name that can be none
        words = getattr(error, "strerror", None) or error
        raise from_errno(errno.EINVAL, f"cannot listen on {listen}: {words}") from None
    unique = list(dict.fromkeys((one[0], one[4]) for one in found))
    if len(unique) > MAX_LISTENERS:
        raise from_errno(
            errno.EINVAL,
            f"cannot listen on {listen}: it stands for {len(unique)} addresses, "
            f"more than {MAX_LISTENERS}",
        )
    return unique


def _listen_on(
    family: socket.AddressFamily, address: Any, *, v6only: bool
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Only IPv6 if there is a socket for IPv4 too; alone, "[::]" also takes
            # IPv4.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def remove_stale(path: Path) -> None:
    """Remove a socket file whose server has ended; nbdkit leaves it behind."""
    with contextlib.suppress(OSError), _locked_folder(path.parent) as dir_fd:
        if stat.S_ISSOCK(_lstat(path, dir_fd).st_mode) and _is_stale(path, dir_fd):
            os.unlink(path.name, dir_fd=dir_fd)
