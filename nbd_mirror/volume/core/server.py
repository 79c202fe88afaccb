# SPDX-License-Identifier: BSD-3-Clause
"""The direct door."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from ...base.threads import no_thread
from ..model import TlsFiles
from .boundary import check, ffi, lib, whole_ms
from .engine import Engine


class Server:
    """
    The direct door: serves an engine to the clients of listening sockets.

    Args:
        engine: must stay open as long as this object.
        listen_fds: the caller keeps and closes them.
        max_clients: the limit, lowered if there are too few descriptors.
        max_memory: bytes for the requests of all clients together; 0: the default.
    Raises:
        MirrorError: no memory, or no descriptor.
    """

    def __init__(
        self,
        engine: Engine,
        listen_fds: Sequence[int],
        *,
        max_clients: int = 0,
        max_memory: int = 0,
    ) -> None:
        """Accept no client yet."""
        server = ffi.new("struct direct_server **")
        fds = ffi.new("int[]", list(listen_fds))
        limits = ffi.new("struct nbdm_limits *")
        limits.max_clients, limits.max_memory = max_clients, max_memory
        rc = lib.nbdm_server_open(engine.handle, fds, len(fds), limits, server)
        check(rc, "serve")
        self._handle = server[0]

    def require_tls(self, listener: int, files: TlsFiles) -> None:
        """
        Let clients of a listening socket in only with TLS; before `run`.

        Args:
            listener: the socket's index in *listen_fds*.
            files: that prove this server, and check its clients.
        Raises:
            MirrorError: a file is missing or wrong, or others may read a secret.
        """
        paths = (files.psk, files.certificate, files.private_key, files.ca)
        texts = [
            ffi.NULL if path is None else ffi.new("char[]", os.fsencode(path))
            for path in paths
        ]
        tls = ffi.new("struct nbdm_tls *")
        tls.psk, tls.certificate, tls.private_key, tls.ca = texts
        check(lib.nbdm_server_tls(self._handle, listener, tls), "TLS")

    @property
    def max_clients(self) -> int:
        """The limit of clients, as far as there are descriptors."""
        return int(lib.nbdm_server_max_clients(self._handle))

    def start(self) -> None:
        """
        Start the threads for requests; `run` serves.

        Raises:
            MirrorError: the system gives no thread.
        """
        rc: int = lib.nbdm_server_start(self._handle)
        if rc == -errno.EAGAIN:
            raise no_thread("requests")
        check(rc, "serve")

    def run(self) -> None:
        """Serve. Blocks until `end`, and then until requests under way are answered."""
        lib.nbdm_server_run(self._handle)

    def end(self) -> None:
        """Make `run` return. May be called from any thread, any number of times."""
        lib.nbdm_server_end(self._handle)

    def drain(self, timeout_s: float) -> bool:
        """
        Like `end`, and wait until requests under way are answered.

        Blocks up to *timeout_s*.

        Returns:
            True: all clients are answered and disconnected.
        """
        return bool(lib.nbdm_server_drain(self._handle, whole_ms(timeout_s)) == 0)

    def close(self) -> None:
        """Free it. `run` must have returned, and no `end` may follow."""
        lib.nbdm_server_close(self._handle)
