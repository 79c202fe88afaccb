# SPDX-License-Identifier: BSD-3-Clause
"""
A block of 4 KiB as a register: which values may it hold after all its writes?

A written block carries its number, the numbers of the run and of the write, and a
checksum; a zeroed or trimmed block is a write of the value "zero".

The judgement is linearizability. With unique values it is exact and cheap (Gibbons and
Korach). Take a write and all reads of it; *first_end* is the first of them to end and
*last_start* the last to begin. Two writes contradict each other if each has a part that
ended before a part of the other began, because then each would have to come first. This
one comparison finds a lost write, a stale read, and a value that reverts after it was
seen, whatever was under way at the same time.

A write without a good answer (an error, or the server died) may have taken effect at
any time until it ended, or never: it counts only once it is seen. It ends when the
error arrives, or when its server dies.

A whole block is written by one pwrite inside a page, so a killed server leaves no half
block. A read may be torn only beside a write of its block, and a disk that lost power
only where a write was never answered.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from dataclasses import dataclass, field

__all__ = [
    "BLOCK",
    "NEVER",
    "TORN",
    "ZERO",
    "Claim",
    "Op",
    "Register",
    "decode",
    "encode",
]

BLOCK = 4096
MAGIC = b"NBDMREG1"
HEADER = struct.Struct("<8sQQQ")
CRC = struct.Struct("<I")
ZEROES = bytes(BLOCK)
ZERO, TORN = 0, -1  # found in place of a write's number
NEVER = 1 << 62
KEPT = 8  # claims of a block that are kept before checking which still matter
OLD_KEPT = 8  # claims that no longer matter, for reports
MASK = (1 << 128) - 1


def encode(block: int, seq: int, run: int) -> bytes:
    """Return the content of *block* after write *seq* of *run*."""
    fill = ((block + 1) * 0x9E3779B97F4A7C15 * (seq + 1) & MASK).to_bytes(16, "little")
    head = HEADER.pack(MAGIC, run, block, seq)
    body = head + (fill * 254)[: BLOCK - len(head) - CRC.size]
    return body + CRC.pack(zlib.crc32(body))


def decode(content: bytes | memoryview) -> tuple[int, int, int]:
    """Return block, write and run that *content* names; the write may be ZERO, TORN."""
    if content == ZEROES:
        return 0, ZERO, 0
    magic, run, block, seq = HEADER.unpack_from(content)
    (crc,) = CRC.unpack_from(content, BLOCK - CRC.size)
    if magic != MAGIC or crc != zlib.crc32(content[: BLOCK - CRC.size]):
        return block, TORN, run
    return block, seq, run


@dataclass(slots=True, eq=False)
class Op:
    """A write, zero or trim; times are ticks of the checker's clock."""

    seq: int  # also when it was sent
    kind: str
    first: int  # block
    count: int
    fua: bool
    ended: int = NEVER
    answered: bool = False  # with success
    outcome: str = "pending"
    server_ended: int = NEVER  # when the server that had it was dead
    flushed: int = NEVER


@dataclass(slots=True, eq=False)
class Claim:
    """One write's claim to one block."""

    op: Op
    seen_end: int = NEVER  # the earliest end of a read that saw it
    seen_start: int = 0  # the latest begin of such a read

    @property
    def value(self) -> int:
        """The value of a block after it."""
        return self.op.seq if self.op.kind == "write" else ZERO

    @property
    def first_end(self) -> int:
        """When the first of the write and its reads ended."""
        return min(self.op.ended, self.seen_end)

    @property
    def last_start(self) -> int:
        """When the last of the write and its reads began."""
        return max(self.op.seq, self.seen_start)

    def contradicts(self, other: Claim) -> bool:
        """Return whether each must have come before the other."""
        return self.first_end < other.last_start and other.first_end < self.last_start

    def __str__(self) -> str:
        op = self.op
        text = f"{op.seq} {op.kind}{' fua' if op.fua else ''} of blocks "
        text += f"{op.first}-{op.first + op.count - 1}, {op.outcome}"
        if op.ended < NEVER:
            text += f" at {op.ended}"
        if op.flushed < NEVER:
            text += f", durable at {op.flushed}"
        if self.seen_end < NEVER:
            text += f", seen at {self.seen_end}, last by a read of {self.seen_start}"
        return text


@dataclass(slots=True)
class Register:
    """A block's claims that may still matter, and the latest of the others."""

    claims: list[Claim] = field(default_factory=list)
    old: deque[Claim] = field(default_factory=lambda: deque(maxlen=OLD_KEPT))

    def allowed(self, span: tuple[int, int], value: int | None = None) -> list[Claim]:
        """
        Return the claims that a read may return.

        Args:
            span: when the read began and ended.
            value: only claims of this value.
        """
        return [
            claim
            for claim in self.claims
            if claim.op.seq < span[1]
            and value in (None, claim.value)
            and self._possible(claim, span, self.claims)
        ]

    def copied(self, span: tuple[int, int], since: int) -> list[Claim]:
        """
        Return the claims that an in-sync copy may hold whose primary is dead.

        Of the requests that this primary had not answered, each disk may have its own
        part, even if they were read from the other disk. What an earlier primary left
        was made equal.

        Args:
            span: when the copy is judged.
            since: when the primary before the dead one had ended.
        """
        own = {id(c) for c in self.claims if c.op.seq > since and not c.op.answered}
        others = [c for c in self.claims if id(c) not in own]
        floor = max((c.op.seq for c in others if c.op.answered), default=0)
        return [
            claim
            for claim in self.claims
            if (
                claim.op.ended >= floor
                if id(claim) in own
                else self._possible(claim, span, others)
            )
        ]

    @staticmethod
    def _possible(one: Claim, span: tuple[int, int], claims: list[Claim]) -> bool:
        """Return whether *one* could be seen in *span* and contradict nothing."""
        begun, ended = span
        first_end = min(one.op.ended, one.seen_end, ended)
        last_start = max(one.op.seq, one.seen_start, begun)
        for other in claims:
            if other is one or not (other.op.answered or other.seen_end < NEVER):
                continue
            if first_end < other.last_start and other.first_end < last_start:
                return False
        return True

    def see(self, value: int, span: tuple[int, int]) -> bool:
        """Hold later reads to the result of this one; False if it was not allowed."""
        fitting = self.allowed(span, value)
        # It is unknown which of several zeroes it was: then it holds no later read.
        if len(fitting) == 1:
            fitting[0].seen_end = min(fitting[0].seen_end, span[1])
            fitting[0].seen_start = max(fitting[0].seen_start, span[0])
        return bool(fitting)

    def may_be_torn(self, span: tuple[int, int]) -> bool:
        """Return whether a write of the block ran beside a read in *span*."""
        return any(c.op.seq < span[1] and c.op.ended > span[0] for c in self.claims)

    def durable(self) -> list[Claim]:
        """Return the claims that a disk may hold that lost everything unflushed."""
        floor = max(c.op.seq for c in self.claims if c.op.flushed < NEVER)
        return [c for c in self.claims if c.op.ended >= floor]

    def contradicting(self, op: Op) -> list[Claim]:
        """Return the claims that *op*'s own contradicts."""
        mine = next((c for c in self.claims if c.op is op), None)
        if mine is None or not mine.op.answered:
            return []
        return [
            other
            for other in self.claims
            if other is not mine
            and (other.op.answered or other.seen_end < NEVER)
            and mine.contradicts(other)
        ]

    def forget(self, oldest_read: int) -> None:
        """
        Move to *old* what is completely before a durable write.

        Claims that were seen so late that a remaining one might contradict them are
        kept.

        Args:
            oldest_read: when the oldest read under way began.
        """
        if len(self.claims) <= KEPT:
            return
        done = [c for c in self.claims if c.op.flushed < NEVER]
        floor = max((c.op.seq for c in done if c.op.ended < oldest_read), default=0)
        kept = [c for c in self.claims if c.op.ended >= floor]
        earliest = min((c.first_end for c in kept), default=NEVER)
        late = [
            c for c in self.claims if c.op.ended < floor and c.last_start > earliest
        ]
        if len(kept) + len(late) < len(self.claims):
            staying = {id(c) for c in (*kept, *late)}
            self.old.extend(c for c in self.claims if id(c) not in staying)
            self.claims = [c for c in self.claims if id(c) in staying]
