# SPDX-License-Identifier: BSD-3-Clause
"""
The register checker: judges every block of a disk by its history.

It learns when each request was sent and how it ended, across crashes and failovers of
the servers, and what was read from the volume or found on a disk. It reports each block
with forbidden content, with the allowed values and the block's history. register.py
decides what a block may hold, and why; this module has the clock, the lock, and the
requests under way. It is a tool for tests: the server does not use it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .register import BLOCK, NEVER, TORN, ZERO, Claim, Op, Register, decode, encode

__all__ = ["Checker", "Verdict"]

FOREIGN = -2  # a whole block, but of another run or place
MAX_NOTES = 500

Data = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Verdict:
    """A block with forbidden content."""

    block: int
    where: str
    found: str
    allowed: str
    history: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"block {self.block} (byte {self.block * BLOCK}), {self.where}:",
            f"  found:   {self.found}",
            f"  allowed: {self.allowed}",
            "  history, in ticks (a write's number is when it was sent):",
            *(f"    {line}" for line in self.history),
        ]
        return "\n".join(lines)


class Checker:
    """
    Remembers what was sent, answered and flushed, and judges what is found.

    May be used from many threads. The volume begins all zero.

    Args:
        blocks: of the volume.
        run: a number that no other run on these disks has.
    """

    def __init__(self, blocks: int, run: int) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._tick = 0
        begin = Op(ZERO, "begin", 0, blocks, True, 0, True, "ok", flushed=0)
        self._registers = [Register([Claim(begin)]) for _ in range(blocks)]
        self._pending: dict[int, Op] = {}
        self._unflushed: deque[Op] = deque()  # answered, in that order
        self._reading: dict[int, None] = {}  # starts of reads under way
        self._notes: deque[tuple[int, str]] = deque(maxlen=MAX_NOTES)
        self._ends: deque[int] = deque([0, 0], maxlen=2)  # of the last two servers
        # For the totals: writes by their end, blocks judged, and torn blocks allowed.
        self.sent = self.answered = self.failed = self.lost = 0
        self.flushed = self.checked = self.torn = 0

    def _now(self) -> int:
        self._tick += 1
        return self._tick

    # --- what was done ---

    def note(self, text: str) -> None:
        """Add an event to the histories."""
        with self._lock:
            self._notes.append((self._now(), text))

    def begin_write(self, kind: str, first: int, count: int, *, fua: bool) -> Op:
        """Note a "write", "zero" or "trim" that is about to be sent."""
        with self._lock:
            op = Op(self._now(), kind, first, count, fua)
            self._pending[op.seq] = op
            for register in self._registers[first : first + count]:
                register.claims.append(Claim(op))
            self.sent += 1
            return op

    def content(self, op: Op) -> bytes:
        """Return the bytes that *op* writes."""
        numbers = range(op.first, op.first + op.count)
        return b"".join(encode(block, op.seq, self.run) for block in numbers)

    def end_write(self, op: Op, outcome: str) -> list[Verdict]:
        """
        Note how a write ended.

        Args:
            outcome: "ok", "error" (an answer, but a bad one), or "lost": its
                connection was lost, and it may be executed while its server lives.
        Returns:
            What an answer that came to light late proves wrong; usually nothing.
        """
        with self._lock:
            now = self._now()
            op.outcome = outcome
            # A server that is dead by now executed before its death what it answered.
            end = min(now, op.server_ended)
            if outcome == "lost":
                self.lost += 1
                if end == now:
                    return []  # still pending: server_ended() will end it
            self._pending.pop(op.seq, None)
            op.ended = end
            self.failed += outcome == "error"
            if outcome != "ok":
                return []
            op.answered = True
            self.answered += 1
            if op.fua:
                op.flushed = now
                self.flushed += 1
            else:
                self._unflushed.append(op)
            self._forget(op)
            return list(self._recheck(op)) if end < now else []

    def begin_flush(self) -> int:
        """Note a flush that is about to be sent."""
        with self._lock:
            return self._now()

    def end_flush(self, begun: int) -> None:
        """Note a good answer to a flush: what was answered before is durable."""
        with self._lock:
            now = self._now()
            while self._unflushed and self._unflushed[0].ended < begun:
                self._unflushed.popleft().flushed = now
                self.flushed += 1

    def server_ended(self, text: str) -> None:
        """Note that the server is dead: from now on it executes nothing."""
        with self._lock:
            now = self._now()
            self._notes.append((now, text))
            self._ends.append(now)
            for op in list(self._pending.values()):
                op.server_ended = min(op.server_ended, now)
                if op.outcome == "lost":
                    op.ended = op.server_ended
                    del self._pending[op.seq]

    # --- what was found ---

    def begin_read(self) -> int:
        """Note a read that is about to be sent."""
        with self._lock:
            now = self._now()
            self._reading[now] = None
            return now

    def drop_read(self, begun: int) -> None:
        """Forget a read that got no data."""
        with self._lock:
            self._reading.pop(begun, None)

    def end_read(
        self, begun: int, first: int, data: Data, where: str = "read by a client"
    ) -> list[Verdict]:
        """Judge the result of a read, and hold later reads to it."""
        found = list(self._decoded(first, data))
        verdicts = []
        with self._lock:
            span = begun, self._now()
            self._reading.pop(begun, None)
            self.checked += len(found)
            for block, value, text in found:
                register = self._registers[block]
                if value == TORN and register.may_be_torn(span):
                    self.torn += 1
                elif not register.see(value, span):
                    allowed = register.allowed(span)
                    verdicts.append(self._verdict(block, text, where, allowed))
        return verdicts

    def judge(self, first: int, data: Data, where: str) -> list[Verdict]:
        """Judge a quiet disk: as a read that begins and ends now."""
        return self.end_read(self.begin_read(), first, data, where)

    def judge_copy(self, first: int, data: Data, where: str) -> list[Verdict]:
        """
        Judge an in-sync disk beside the one that clients saw; its primary is dead.

        It holds every answered write. Of the unanswered ones it may have another part
        than local, whatever was read there, and later reads need not agree.
        """
        found = list(self._decoded(first, data))
        verdicts = []
        with self._lock:
            now = self._now()
            self.checked += len(found)
            for block, value, text in found:
                register = self._registers[block]
                allowed = register.copied((now, now), self._ends[0])
                if not any(claim.value == value for claim in allowed):
                    verdicts.append(self._verdict(block, text, where, allowed))
        return verdicts

    def judge_lost(self, first: int, data: Data, where: str) -> list[Verdict]:
        """Judge a disk that lost its volatile cache: what was flushed must be there."""
        found = list(self._decoded(first, data))
        verdicts = []
        with self._lock:
            self.checked += len(found)
            for block, value, text in found:
                allowed = self._registers[block].durable()
                torn = value == TORN and any(not c.op.answered for c in allowed)
                if not torn and not any(c.value == value for c in allowed):
                    verdicts.append(self._verdict(block, text, where, allowed))
        return verdicts

    def explain(self, block: int, content: bytes, where: str) -> Verdict:
        """Return what a block holds, and what it may hold, without judging it."""
        ((_, _, text),) = self._decoded(block, content)
        with self._lock:
            now = self._now()
            allowed = self._registers[block].allowed((now, now))
            return self._verdict(block, text, where, allowed)

    def _decoded(self, first: int, data: Data) -> Iterator[tuple[int, int, str]]:
        """Yield block, value and words for each block of *data*."""
        view = memoryview(data)
        for at in range(0, len(data), BLOCK):
            content = bytes(view[at : at + BLOCK])
            block, (named, value, run) = first + at // BLOCK, decode(content)
            text = f"write {value}"
            if value == ZERO:
                text = "zeroes"
            elif value == TORN:
                text = f"no whole block, it begins {content[:32].hex()}"
            elif (named, run) != (block, self.run):
                text = f"write {value} of block {named} of run {run:#x}"
                value = FOREIGN
            yield block, value, text

    # --- the lock is held ---

    def _forget(self, op: Op) -> None:
        oldest = min(self._reading, default=NEVER)
        for register in self._registers[op.first : op.first + op.count]:
            register.forget(oldest)

    def _recheck(self, op: Op) -> Iterator[Verdict]:
        for block in range(op.first, op.first + op.count):
            for other in self._registers[block].contradicting(op):
                text = f"write {other.op.seq}, though {op.seq} had been answered"
                yield self._verdict(block, text, "as seen by an earlier read", [])

    def _verdict(
        self, block: int, found: str, where: str, allowed: Iterable[Claim]
    ) -> Verdict:
        words = [
            f"write {c.op.seq}" if c.value != ZERO else f"zeroes ({c.op.seq})"
            for c in allowed
        ]
        text = ", ".join(words) or "nothing that fits what was seen before"
        return Verdict(block, where, found, text, tuple(self._history(block)))

    def _history(self, block: int) -> Iterator[str]:
        register = self._registers[block]
        claims = sorted([*register.old, *register.claims], key=lambda c: c.op.seq)
        since = claims[0].op.seq
        if since == ZERO and len(claims) > 1:
            since = claims[1].op.seq
        lines = [(claim.op.seq, str(claim)) for claim in claims]
        lines += [(at, f"{at} {text}") for at, text in self._notes if at >= since]
        yield from (line for _, line in sorted(lines))
        yield f"{self._tick} now"
