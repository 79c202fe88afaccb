# SPDX-License-Identifier: BSD-3-Clause
"""
The direct door: `python -m nbd_mirror.server CONFIG` (__main__.py) calls it.

`serve` execs it, and passes the listening sockets as descriptors 3, 4 ... and their
names in LISTEN_FDNAMES, as systemd does. C serves the clients
(csrc/doors/direct_server.c) while the main thread waits there; Python keeps the volume.
"""

from __future__ import annotations

import os
import sys

from ..base.errors import MetadataFailedError
from ..base.listen import CLIENTS, NODES
from ..volume.config import VolumeConfig
from ..volume.core import Server, start_log
from ..volume.model import TlsFiles
from .process import log, or_exit
from .volume import Volume

__all__ = ["main"]

_LISTEN_FD = 3
_DRAIN_S = 1.0  # for requests that wait for a remote; then the engine's stop ends them


def main(path: str) -> None:
    """Serve the volume of the configuration at *path* until asked to end."""
    or_exit(start_log)
    ended: list[Server] = []

    def shutdown() -> None:
        for server in ended:
            server.end()

    def drain() -> None:
        for server in ended:
            server.drain(_DRAIN_S)

    volume = or_exit(lambda: Volume.open(path, "direct", shutdown, drain))
    server = or_exit(lambda: _make_server(volume))
    ended.append(server)
    or_exit(lambda: volume.serve(server.start))
    server.run()
    clean = volume.stop()  # a late `end` may still come, so nothing is freed
    code = 0 if clean else MetadataFailedError.exit_code
    volume.execute_again(code)
    sys.exit(code)


def _tls_files(config: VolumeConfig) -> TlsFiles:
    tls = config.tls
    assert tls is not None
    return TlsFiles(tls.key, tls.certificate, tls.private_key, tls.ca)


def listening() -> list[str]:
    """Return who connects to each socket from _LISTEN_FD on: CLIENTS or NODES."""
    count = int(os.environ.get("LISTEN_FDS", "1"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    # Another program that passes sockets on may have names of its own, or none.
    known = [NODES if name == NODES else CLIENTS for name in names[:count]]
    return known + [CLIENTS] * (count - len(known))


def _is_secure(config: VolumeConfig, name: str) -> bool:
    if name == NODES:
        return config.tls is not None and config.tls.on
    return config.listen.tls


def _make_server(volume: Volume) -> Server:
    config = volume.config
    names = listening()
    used = [i for i, name in enumerate(names) if volume.node or name == CLIENTS]
    sockets = [names[i] for i in used]
    server = Server(
        volume.engine,
        [_LISTEN_FD + i for i in used],
        max_clients=config.max_clients,
        max_memory=config.max_memory,
    )
    for listener, name in enumerate(sockets):
        if _is_secure(config, name):
            server.require_tls(listener, _tls_files(config))
    if volume.node:
        volume.node.attach(server, sockets)
    volume.max_clients = server.max_clients
    if server.max_clients < config.max_clients:
        log(
            "warning",
            f"volume {config.name}: max_clients is {config.max_clients}, but the limit "
            f"of open files leaves room for {server.max_clients} clients",
        )
    return server
