# SPDX-License-Identifier: BSD-3-Clause
"""
A link between two unix sockets with delay and rate: the kernel here has no netem.

Each direction is a line. A piece is read when the line is free, occupies it for as long
as its bytes take at the rate, and is passed on after the delay. So the sender notices
through its socket's buffer when the line is full, as on a real one, and the bytes under
way are limited by rate times delay. All connections share both lines. `ceiling`
measures the link's real rate; a share of the link refers to that, and not to the
nominal rate.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from pathlib import Path

from .model import KIB, MIB, BenchError

__all__ = ["Line", "Link", "ceiling"]

PIECE = 256 * KIB
WARM_UP = 2 * MIB  # of a bulk transfer, before its time is measured
BULK = 64 * MIB
LATE_S = 0.005  # how late this process may wake up without an idle line


class Line:
    """
    When pieces leave a line of *rate* bytes per second, one after the other.

    Pure arithmetic, so that it can be tested without waiting.
    """

    def __init__(self, rate: float, delay_s: float) -> None:
        self._rate = rate
        self._delay_s = delay_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def send(
        self, now: float, length: int, *, waited: bool = False
    ) -> tuple[float, float]:
        """Send *length* bytes; return when the line is free, and when they arrive."""
        # Bytes that had waited for the line lost nothing because this woke up late.
        since = now - LATE_S if waited else now
        with self._lock:
            self._free_at = max(self._free_at, since) + length / self._rate
            return self._free_at, self._free_at + self._delay_s


class Link:
    """
    Listens on *near*, connects each client to *far*, until `close`.

    Args:
        rate: bytes per second, each way.
        round_trip_s: half of it each way.
    """

    def __init__(
        self, near: Path, far: Path, *, rate: float, round_trip_s: float
    ) -> None:
        self._far = far
        self._forth = Line(rate, round_trip_s / 2)
        self._back = Line(rate, round_trip_s / 2)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(near))
        self._listener.listen(16)
        self._thread(self._accept)

    def close(self) -> None:
        """Cut all connections and end."""
        self._closed = True
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _thread(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(os.fspath(self._far))
            except OSError:
                client.close()
                server.close()
                continue
            self._sockets += [client, server]
            self._carry(client, server, self._forth)
            self._carry(server, client, self._back)

    def _carry(self, source: socket.socket, target: socket.socket, line: Line) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        self._thread(self._take, source, line, under_way)
        self._thread(self._give, target, under_way)

    def _take(
        self,
        source: socket.socket,
        line: Line,
        under_way: queue.SimpleQueue[tuple[float, bytes]],
    ) -> None:
        """Read pieces as fast as the line accepts them."""
        while True:
            piece, waited = _receive(source)
            free_at, there_at = line.send(time.monotonic(), len(piece), waited=waited)
            under_way.put((there_at, piece))
            if not piece:
                return
            _sleep_until(free_at)

    def _give(
        self,
        target: socket.socket,
        under_way: queue.SimpleQueue[tuple[float, bytes]],
    ) -> None:
        """Pass pieces on when they arrive; the empty one is the end."""
        while True:
            there_at, piece = under_way.get()
            _sleep_until(there_at)
            try:
                if not piece:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(piece)
            except OSError:
                return


def _receive(source: socket.socket) -> tuple[bytes, bool]:
    """Return the available bytes, and whether they had waited; no bytes: the end."""
    try:
        try:
            return source.recv(PIECE, socket.MSG_DONTWAIT), True
        except BlockingIOError:
            return source.recv(PIECE), False
    except OSError:
        return b"", False


def _sleep_until(when: float) -> None:
    left = when - time.monotonic()
    if left > 0:
        time.sleep(left)


def ceiling(folder: Path, *, rate: float, round_trip_s: float) -> float:
    """
    Carry BULK bytes over a separate link to a reader.

    Returns:
        The rate of arrival, bytes per second.
    """
    near, far = folder / "bulk-near.sock", folder / "bulk-far.sock"
    arrived: list[float] = []
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(os.fspath(far))
        listener.listen(1)
        listener.settimeout(10)
        reader = threading.Thread(target=_drain, args=(listener, arrived), daemon=True)
        reader.start()
        link = Link(near, far, rate=rate, round_trip_s=round_trip_s)
        try:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as sender:
                sender.connect(os.fspath(near))
                sender.settimeout(60)
                block = bytes(MIB)
                for _ in range((WARM_UP + BULK) // MIB):
                    sender.sendall(block)
                sender.shutdown(socket.SHUT_WR)
                reader.join(60)
        finally:
            link.close()
            near.unlink()
            far.unlink()
    if not arrived:
        raise BenchError("the bulk transfer over the link did not end")
    return arrived[0]


def _drain(listener: socket.socket, arrived: list[float]) -> None:
    """Read to the end; store the rate of the bytes after WARM_UP."""
    sock, _ = listener.accept()
    buffer = bytearray(PIECE)
    with sock:
        count, mark, started = 0, 0, 0.0
        while length := sock.recv_into(buffer):
            count += length
            if not started and count >= WARM_UP:
                started, mark = time.monotonic(), count
        elapsed = time.monotonic() - started
    if count == WARM_UP + BULK:
        arrived.append((count - mark) / elapsed)
