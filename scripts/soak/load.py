# SPDX-License-Identifier: BSD-3-Clause
"""
The soak's clients: threads that write, read, flush, zero and trim, all checked.

Each has its own connection and its own seeded choice of requests, which does not depend
on how they end: the same seed gives every client the same sequence. The interleaving of
different clients' sequences depends on the machine.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from e2e.lib.clients import connect, nbd

from .checker import Checker, Verdict
from .register import BLOCK

__all__ = ["Load", "ViolationError", "read_all"]

# Frequencies. Flushes and FUA differ by episode, because without them much is
# unflushed.
KINDS = {"write": 52.0, "read": 32.0, "zero": 7.0, "trim": 5.0}
FLUSHES = (0.05, 0.5, 4.0)
FUAS = (0.0, 0.02, 0.1)
LONGEST = 96  # blocks a request
HOT_SPOTS = 6
PATIENCE_S = 90.0  # for a request to be answered, well or not
SWEEP = 64  # blocks a read


class ViolationError(Exception):
    """A promise was broken; the message says which."""


@dataclass(frozen=True, slots=True)
class Request:
    """The next request of a client."""

    kind: str
    first: int
    count: int
    fua: bool
    no_hole: bool


@dataclass(frozen=True, slots=True)
class Habits:
    """The habits that an episode's clients share."""

    hot: list[int]  # blocks near which they like to write, so that they overlap
    flushes: float  # frequency, in addition to KINDS
    fuas: float  # share of the writes


class Choice:
    """
    One client's sequence of requests.

    Args:
        seed: of the sequence.
        blocks: of the volume.
        habits: of the episode's clients.
    """

    def __init__(self, seed: str, blocks: int, habits: Habits) -> None:
        self._random = random.Random(seed)
        self._blocks = blocks
        self._habits = habits
        kinds = {**KINDS, "flush": habits.flushes}
        self._kinds, self._weights = list(kinds), list(kinds.values())

    def next(self) -> Request:
        """Draw the next request."""
        draw = self._random
        (kind,) = draw.choices(self._kinds, self._weights)
        size = draw.random()
        most = 1 if size < 0.5 else 16 if size < 0.85 else LONGEST
        count = draw.randint(1, most)
        if draw.random() < 0.45:
            first = draw.choice(self._habits.hot) + draw.randint(-8, 8)
        else:
            first = draw.randrange(self._blocks)
        first = min(max(first, 0), self._blocks - count)
        fua = draw.random() < self._habits.fuas
        return Request(kind, first, count, fua, draw.random() < 0.3)


class Client(threading.Thread):
    """One connection's requests, one after another, over reconnects."""

    def __init__(self, load: Load, choice: Choice) -> None:
        super().__init__(daemon=True)
        self._load = load
        self._target = load.target
        self._choice = choice
        self._handle: Any = None
        self.parked = False
        self.since = time.monotonic()  # of the request under way

    @property
    def _checker(self) -> Checker:
        return self._target[1]

    def run(self) -> None:
        """Send requests until the load ends."""
        try:
            while not self._load.ending:
                if self._load.pausing:
                    self.parked = True
                    time.sleep(0.005)
                    continue
                self.parked = False
                self.since = time.monotonic()
                self._step(self._choice.next())
        except Exception as error:  # a bug of ours must not end in silence
            self._load.fail(f"a client ended: {type(error).__name__}: {error}")
        finally:
            self.parked = True

    def _step(self, request: Request) -> None:
        if self._target is not self._load.target:
            self._handle = None
        while self._handle is None:
            if self._load.ending or self._load.pausing:
                return
            try:
                self._target = self._load.target
                self._handle = connect(self._target[0])
                self._load.connects += 1
            except nbd.Error:
                self.since = time.monotonic()
                time.sleep(0.02)
        send = {"read": self._read, "flush": self._flush}
        try:
            send.get(request.kind, self._write)(request)
        except nbd.Error as error:
            if not self._handle.aio_is_ready():
                self._handle = None
                return
            self._load.errors[str(error.errno)] = (
                self._load.errors.get(str(error.errno), 0) + 1
            )
            time.sleep(0.005)  # policy stop refuses until the remotes are back

    def _write(self, request: Request) -> None:
        checker, handle = self._checker, self._handle
        op = checker.begin_write(
            request.kind, request.first, request.count, fua=request.fua
        )
        offset, length = request.first * BLOCK, request.count * BLOCK
        flags = nbd.CMD_FLAG_FUA if request.fua else 0
        try:
            if request.kind == "write":
                handle.pwrite(checker.content(op), offset, flags)
            elif request.kind == "trim":
                handle.trim(length, offset, flags)
            else:
                flags |= nbd.CMD_FLAG_NO_HOLE if request.no_hole else 0
                handle.zero(length, offset, flags)
        except nbd.Error:
            answered = handle.aio_is_ready()
            self._load.take(checker.end_write(op, "error" if answered else "lost"))
            raise
        self._load.take(checker.end_write(op, "ok"))

    def _read(self, request: Request) -> None:
        begun = self._checker.begin_read()
        try:
            data = self._handle.pread(request.count * BLOCK, request.first * BLOCK)
        except nbd.Error:
            self._checker.drop_read(begun)
            raise
        self._load.reads += 1
        self._load.take(self._checker.end_read(begun, request.first, data))

    def _flush(self, _: Request) -> None:
        begun = self._checker.begin_flush()
        self._handle.flush()
        self._checker.end_flush(begun)
        self._load.flushes += 1


class Load:
    """
    The clients of one episode.

    Args:
        uri: of the volume.
        blocks: of it.
        checker: judges all they read.
        seed: of their sequences.
        clients: how many.
    """

    def __init__(
        self, uri: str, blocks: int, checker: Checker, seed: str, clients: int
    ) -> None:
        self.target = (uri, checker)
        self.ending = self.pausing = False
        self.reads = self.flushes = self.connects = 0
        self.errors: dict[str, int] = {}  # answered, by errno
        self._verdicts: list[str] = []
        draw = random.Random(seed)
        hot = [draw.randrange(blocks) for _ in range(HOT_SPOTS)]
        habits = Habits(hot, draw.choice(FLUSHES), draw.choice(FUAS))
        self._clients = [
            Client(self, Choice(f"{seed} client {i}", blocks, habits))
            for i in range(clients)
        ]

    @property
    def checker(self) -> Checker:
        """Of what the clients see now."""
        return self.target[1]

    def move(self, uri: str, checker: Checker) -> None:
        """Have every client go elsewhere when its request has ended."""
        self.target = (uri, checker)

    def start(self) -> None:
        """Start the clients."""
        for client in self._clients:
            client.start()

    def take(self, verdicts: list[Verdict]) -> None:
        """Keep verdicts for check()."""
        self._verdicts += map(str, verdicts)

    def fail(self, text: str) -> None:
        """Keep a complaint for check()."""
        self._verdicts.append(text)

    def longest_wait(self) -> float:
        """Return how long the oldest request has waited, in seconds."""
        now = time.monotonic()
        waits = [
            now - one.since
            for one in self._clients
            if one.is_alive() and not one.parked
        ]
        return max(waits, default=0.0)

    def check(self) -> None:
        """Raise ViolationError for what a client saw, or if it waits too long."""
        if self._verdicts:
            raise ViolationError("\n".join(self._verdicts[:20]))
        waited = self.longest_wait()
        if waited > PATIENCE_S:
            raise ViolationError(f"a request was not answered for {waited:.0f} s")

    def pause(self, watch: Callable[[], None]) -> None:
        """Return once no request is under way; calls *watch* while it waits."""
        self.pausing = True
        while not all(client.parked for client in self._clients):
            watch()
            time.sleep(0.01)

    def go_on(self) -> None:
        """Let the clients send again."""
        for client in self._clients:
            client.since = time.monotonic()
            client.parked = False
        self.pausing = False

    def stop(self) -> None:
        """End the clients."""
        self.ending = True
        deadline = time.monotonic() + PATIENCE_S
        for client in self._clients:
            if client.ident is not None:
                client.join(max(0.0, deadline - time.monotonic()))

    def add_up(self, counts: Counter[str]) -> None:
        """Add what was done to the totals."""
        checker = self.checker
        for name, count in (
            ("writes sent", checker.sent),
            ("writes answered", checker.answered),
            ("writes durable", checker.flushed),
            ("writes answered by an error", checker.failed),
            ("writes lost with a server", checker.lost),
            ("reads checked", self.reads),
            ("blocks checked", checker.checked),
            ("torn beside a write", checker.torn),
            ("flushes", self.flushes),
            ("connects of clients", self.connects),
        ):
            counts[name] += count


def read_all(uri: str, blocks: int, checker: Checker) -> list[Verdict] | None:
    """Read the whole volume and judge it; None if its server went away."""
    verdicts: list[Verdict] = []
    begun = 0
    try:
        handle = connect(uri)
        for first in range(0, blocks, SWEEP):
            count = min(SWEEP, blocks - first)
            begun = checker.begin_read()
            data = handle.pread(count * BLOCK, first * BLOCK)
            verdicts += checker.end_read(begun, first, data, "read after a start")
        handle.shutdown()
    except nbd.Error:
        checker.drop_read(begun)
        return verdicts or None
    return verdicts
