# SPDX-License-Identifier: BSD-3-Clause
"""What each block of a volume may hold, by what was asked and answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from e2e.lib.oracle import SIZE

__all__ = ["BLOCK", "Model", "Pending", "bytes_of"]

BLOCK = 4096


@dataclass
class Pending:
    """A write that has been sent and not answered."""

    number: int
    blocks: range
    stamp: int


@dataclass
class Model:
    """What each block may hold, as stamps; 0 is all zeroes."""

    may: list[set[int]] = field(default_factory=lambda: [{0}] * (SIZE // BLOCK))

    def begin(self, blocks: range, stamp: int) -> None:
        """Take note of a request that is under way."""
        for block in blocks:
            self.may[block] = self.may[block] | {stamp}

    def answered(self, blocks: range, stamp: int) -> None:
        """Take note of its answer."""
        for block in blocks:
            self.may[block] = {stamp}

    def check(self, blocks: range, content: bytes) -> None:
        """Fail unless *content* is allowed; it is what they hold from now on."""
        for at, block in enumerate(blocks):
            words = content[at * BLOCK : (at + 1) * BLOCK]
            stamp = int.from_bytes(words[:8], "little")
            assert words == bytes_of(stamp), f"block {block} is torn"
            assert stamp in self.may[block], (
                f"block {block} holds {stamp}, may hold {sorted(self.may[block])}"
            )
            self.may[block] = {stamp}


def bytes_of(stamp: int, blocks: int = 1) -> bytes:
    """Return what blocks with *stamp* hold."""
    return stamp.to_bytes(8, "little") * (blocks * BLOCK // 8)
