# SPDX-License-Identifier: BSD-3-Clause
"""
A link that can fail and be slow: it passes a socket's connections on to another one.

It is a process of its own, so that the faults are signals and its code need not know
them. SIGKILL is a cut: both ends see the connection end, and data that has passed is
still executed. SIGSTOP is a network that drops everything: neither end notices, and
what was under way arrives late, when the process continues.

It reads its speed from a file, again and again: bytes a second towards the target and
back, "-" for no limit, 0 for an end that accepts nothing more. "early" in place of the
first: of the next long write only the header is read, and it is answered.

usage: link.py LISTEN TARGET SPEED    (each a path, or HOST:PORT)
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from pathlib import Path

# This file is run by its path, without the package around it.
from wire import Requests, simple_answer

CHUNK = 256 << 10  # bytes
SLICE_S = 0.02  # of a slow link: passed on at once
LEAST = 512  # bytes at once
BUFFER = 16 << 10  # bytes that wait in a TCP socket
LONG = 128 << 10  # a write of this length is answered early
QUIET_S = 0.2  # for what the target has answered
LOOK_S = 0.05  # interval between reads of the file


class Speed:
    """The limit in the file, and when more may pass in one direction."""

    def __init__(self, path: Path, direction: int) -> None:
        self._path, self._direction = path, direction
        self.upwards = direction == 0
        self._limit: float | None = None
        self.early = False
        self._looked = self._free = 0.0

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        with contextlib.suppress(OSError, ValueError, IndexError):
            word = self._path.read_text().split()[self._direction]
            self.early = word == "early"
            self._limit = None if word in ("-", "early") else float(word)

    def wait(self) -> int:
        """Return how many bytes may pass, once any may."""
        while True:
            self._look()
            left = self._free - time.monotonic()
            if self._limit is None or (self._limit > 0 and left <= 0):
                break
            time.sleep(min(max(left, 0.001), SLICE_S))
        if self._limit is None:
            # Small pieces while a header is awaited; otherwise as much as there is.
            return LEAST if self.early else CHUNK
        return min(CHUNK, max(LEAST, int(self._limit * SLICE_S)))

    def passed(self, count: int) -> None:
        """Count what has passed."""
        if self._limit:
            begin = max(self._free, time.monotonic())
            self._free = begin + count / self._limit


def answer_early(client: socket.socket, cookie: bytes, speed: Speed) -> None:
    """Answer a write that has not arrived, and read nothing more."""
    time.sleep(QUIET_S)
    client.sendall(simple_answer(cookie))
    while speed.early:
        speed.wait()
        time.sleep(LOOK_S)


def pass_on(source: socket.socket, target: socket.socket, speed: Speed) -> None:
    """Copy until *source* ends, then shut *target* down."""
    buffer = memoryview(bytearray(CHUNK))
    requests = Requests() if speed.upwards else None
    over_tcp = socket.AF_INET in (source.family, target.family)
    most = BUFFER if over_tcp else CHUNK
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer[: min(most, speed.wait())]):
            speed.passed(count)
            if source.family == socket.AF_INET:
                # Otherwise a sender of small packets waits for a delayed
                # acknowledgement.
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            writes = requests.take(buffer[:count]) if requests else []
            cookies = [cookie for cookie, length in writes if length >= LONG]
            if speed.early and cookies:
                answer_early(source, cookies[-1], speed)
                break
            target.sendall(buffer[:count])
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            end.shutdown(how)


def open_socket(where: str) -> tuple[socket.socket, str | tuple[str, int]]:
    """Return a socket and the address for it."""
    if "/" in where:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), where
    host, _, port = where.rpartition(":")
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock, (host, int(port))


def serve(client: socket.socket, target: str, path: Path) -> None:
    """Connect *client* with a new connection to *target*, in both directions."""
    server, address = open_socket(target)
    with client, server:
        try:
            server.connect(address)
        except OSError:
            return
        for sock in (client, server):
            if sock.family == socket.AF_INET:
                # A slow link must be felt, and not hidden by buffers in here.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(
            target=pass_on, args=(server, client, Speed(path, 1)), daemon=True
        )
        back.start()
        pass_on(client, server, Speed(path, 0))
        back.join()


def main() -> None:
    """Accept connections until killed."""
    listen, target, speed = sys.argv[1:]
    if "/" in listen:
        Path(listen).unlink(missing_ok=True)
    # Use another name until it listens, so that the name accepts connections.
    early = f"{listen}.new" if "/" in listen else listen
    listener, address = open_socket(early)
    with listener:
        listener.bind(address)
        listener.listen(64)
        if early != listen:
            Path(early).rename(listen)
        while True:
            client, _ = listener.accept()
            threading.Thread(
                target=serve, args=(client, target, Path(speed)), daemon=True
            ).start()


if __name__ == "__main__":
    main()
