# SPDX-License-Identifier: BSD-3-Clause
"""
The direct door's process: `python -m nbd_mirror.direct CONFIG`, which `serve` execs.

The listening socket is handed to it as descriptor 3. Clients are served in C
(csrc/direct_server.c), while the main thread waits there; Python keeps the volume.
"""

from __future__ import annotations

import sys

from .core import Server
from .errors import MetadataFailedError
from .process import or_exit
from .volume import Volume

__all__ = ["main"]

_LISTEN_FD = 3


def main(path: str) -> None:
    """Serve the volume of the configuration at *path* until it is told to end."""
    ended: list[Server] = []

    def shutdown() -> None:
        for server in ended:
            server.end()

    volume = or_exit(lambda: Volume.open(path, "direct", shutdown))
    server = or_exit(lambda: Server(volume.engine, _LISTEN_FD))
    ended.append(server)
    or_exit(volume.serve)
    or_exit(server.run)
    clean = volume.stop()  # a late `end` may still come, so nothing is freed
    sys.exit(0 if clean else MetadataFailedError.exit_code)


if __name__ == "__main__":
    main(sys.argv[1])
