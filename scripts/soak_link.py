# SPDX-License-Identifier: BSD-3-Clause
"""
A link that can fail: passes a unix socket's connections on to another one.

A process of its own, so that the faults are signals and nothing in it need know
them. SIGKILL is a cut: both ends see the connection end, and what had passed is still
carried out. SIGSTOP is a network that drops everything: nobody learns of it, and what
was under way arrives when it goes on, late.

usage: soak_link.py LISTEN TARGET
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from pathlib import Path

CHUNK = 256 << 10  # bytes


def pass_on(source: socket.socket, target: socket.socket) -> None:
    """Copy until *source* ends, then say so to *target*."""
    buffer = memoryview(bytearray(CHUNK))
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(buffer[:count])
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            end.shutdown(how)


def serve(client: socket.socket, target: str) -> None:
    """Join *client* with a new connection to *target*, both ways."""
    with client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        try:
            server.connect(target)
        except OSError:
            return
        back = threading.Thread(target=pass_on, args=(server, client), daemon=True)
        back.start()
        pass_on(client, server)
        back.join()


def main() -> None:
    """Take connections until killed."""
    listen, target = sys.argv[1:]
    Path(listen).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(listen)
        listener.listen(64)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=serve, args=(client, target), daemon=True).start()


if __name__ == "__main__":
    main()
