# SPDX-License-Identifier: BSD-3-Clause
"""
Bind the sockets that a volume listens on, before its server starts.

This process binds them and passes them on. So it can report a socket in use with its
own clear error, replace a stale socket of a killed server, and make a unix socket 0600
from its first moment.

A node listens for clients, and at its address for the other nodes. The server is told
which socket is which as systemd does it: by names, in LISTEN_FDNAMES.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..base import unix
from ..base.errors import (
    AccessError,
    BusyError,
    ConfigError,
    MirrorError,
    from_errno,
)
from ..base.files import user_name
from ..base.listen import CLIENTS, NODES, Listen
from ..volume.config import VolumeConfig
from ..volume.config_tables import NodeConfig

__all__ = ["MAX_LISTENERS", "Listeners", "bind", "bind_all", "remove_stale"]

FOLDER_LOCK_S = 2.0  # limit for the lock of the socket's folder; then go on without
STALE_LOOKS, STALE_PAUSE_S = 3, 0.03  # checks of a socket on which no server answers
# A server that ends keeps its sockets until its last moment, as its locks (open.c).
BUSY_PATIENCE_S, BUSY_PAUSE_S = 1.0, 0.02
MAX_LISTENERS = 16  # NBDM_MAX_LISTENERS
BACKLOG = 128  # connections that wait to be accepted


class Listeners(contextlib.ExitStack):
    """
    The *sockets* that a volume listens on; they are closed with this object.

    Each socket is named CLIENTS or NODES, after the peers that connect there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sockets: list[socket.socket] = []
        self.names: list[str] = []

    def add(self, sock: socket.socket, name: str) -> None:
        """Add *sock*, which this object closes."""
        self.sockets.append(self.enter_context(sock))
        self.names.append(name)

    def environment(self) -> dict[str, str]:
        """Return what tells a server of them, by the protocol of systemd."""
        return {
            "LISTEN_FDS": str(len(self.sockets)),
            "LISTEN_FDNAMES": ":".join(self.names),
            "LISTEN_PID": str(os.getpid()),
        }


def bind_all(config: VolumeConfig) -> Listeners:
    """
    Bind `listen`, and with nodes this one's address.

    Raises:
        BusyError: another server listens at one of them. Others: see bind().
    """

    def add_all(listeners: Listeners) -> None:
        _bind(listeners, config.listen)
        for node in config.nodes:
            if node.name == config.node:
                _bind_node(listeners, node)
        if len(listeners.sockets) > MAX_LISTENERS:
            raise ConfigError(
                f"`listen` and `address` of node {config.node} together stand for "
                f"{len(listeners.sockets)} addresses, more than {MAX_LISTENERS}"
            )

    return _patiently(add_all)


def _patiently(add_all: Callable[[Listeners], None]) -> Listeners:
    """Return what *add_all* adds; wait a moment for a server that still listens."""
    until = time.monotonic() + BUSY_PATIENCE_S
    while True:
        listeners = Listeners()
        try:
            add_all(listeners)
        except BaseException as error:
            listeners.close()
            if not isinstance(error, BusyError) or time.monotonic() >= until:
                raise
        else:
            return listeners
        time.sleep(BUSY_PAUSE_S)


def _bind_node(listeners: Listeners, node: NodeConfig) -> None:
    listen = Listen(host=node.address.host, port=node.address.port)
    shown = f'the address of node "{node.name}", {node.address}'
    try:
        _bind_tcp(listeners, listen, shown, NODES)
    except ConfigError as error:
        error.hint = (
            f"correct `address` of node {node.name}; or, if this host is another node, "
            "name it: --node NODE"
        )
        raise


def bind(listen: Listen) -> Listeners:
    """
    Bind and listen; a socket file on which no server answers is replaced.

    A host's name, and no host at all, stand for several addresses: this listens on all
    of them that this host has.

    Raises:
        BusyError: another server listens there. MissingError, AccessError: the
        folder does not exist or may not be written. ConfigError: no such address.
    """
    return _patiently(lambda listeners: _bind(listeners, listen))


def _bind(listeners: Listeners, listen: Listen) -> None:
    if listen.path is None:
        _bind_tcp(listeners, listen, str(listen), CLIENTS)
    else:
        listeners.add(_bind_unix(Path(listen.path)), CLIENTS)


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


def _bind_tcp(listeners: Listeners, listen: Listen, shown: str, name: str) -> None:
    """Add a socket for each address; *shown* is *listen* in messages."""
    found = _addresses(listen, shown)
    both = {family for family, _ in found} == {socket.AF_INET, socket.AF_INET6}
    before = len(listeners.sockets)
    missing: OSError | None = None
    try:
        for family, address in found:
            try:
                listeners.add(_listen_on(family, address, v6only=both), name)
            except OSError as error:
                # "localhost" is also ::1 on a host without IPv6.
                if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise
                missing = error
        if len(listeners.sockets) == before and missing is not None:
            raise missing
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"socket in use: another server listens on {shown}"
            ) from None
        number = errno.EINVAL if error is missing else error.errno
        raise from_errno(
            number or errno.EIO, f"cannot listen on {shown}: {error.strerror}"
        ) from None


def _addresses(
    listen: Listen, shown: str
) -> Sequence[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(
            listen.host or None,
            listen.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
    except (OSError, ValueError) as error:  # the latter for a name that can be none
        words = getattr(error, "strerror", None) or error
        raise from_errno(errno.EINVAL, f"cannot listen on {shown}: {words}") from None
    unique = list(dict.fromkeys((one[0], one[4]) for one in found))
    if len(unique) > MAX_LISTENERS:
        raise from_errno(
            errno.EINVAL,
            f"cannot listen on {shown}: it stands for {len(unique)} addresses, "
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
