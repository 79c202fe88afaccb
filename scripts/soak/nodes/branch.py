# SPDX-License-Identifier: BSD-3-Clause
"""
What the image of a node must hold, also after an operator has forced a promotion.

Clients see one history until an operator forces: a *branch*, with a checker of its own.
A forced promotion begins another branch, with what the promoted disk holds. That may
lack only what the last primary answered alone: nothing that it answered before it last
said that the promoted node was in sync, and nothing at all if it never began a
generation that the promoted node does not hold.

The old branch goes on while its primary lives. When the nodes meet again, one of the
branches ends.
"""

from __future__ import annotations

import itertools
from collections import deque

from ..checker import Checker, Data, Verdict
from ..register import NEVER, TORN, ZERO, Claim, Op

__all__ = ["Branch"]

APART = 1 << 40  # ticks between two branches: a number names a write of one branch
_numbers = itertools.count(1)


class Branch(Checker):
    """A checker that forgets no value, because an old one may come back by force."""

    def __init__(self, blocks: int, run: int) -> None:
        super().__init__(blocks, run)
        self._blocks = blocks
        self.name = "the first branch"
        # By node: all that was answered before this tick is on its disk.
        self.certain: dict[str, int] = {}
        for register in self._registers:
            register.old = deque()

    def now(self) -> int:
        """Return the tick of this moment."""
        with self._lock:
            return self._now()

    def holds(self, node: str, since: int) -> None:
        """Note that *node* was in sync at a moment after the tick *since*."""
        with self._lock:
            self.certain[node] = max(since, self.certain.get(node, 0))

    def judge_forced(
        self, first: int, data: Data, node: str, *, whole: bool
    ) -> list[Verdict]:
        """
        Judge the disk that an operator has promoted by force.

        Args:
            whole: the last primary cannot have answered anything alone.
        """
        found = list(self._decoded(first, data))
        verdicts = []
        with self._lock:
            until = NEVER if whole else self.certain.get(node, 0)
            self.checked += len(found)
            for block, value, text in found:
                register = self._registers[block]
                claims = [*register.old, *register.claims]
                floor = max(
                    (c.op.seq for c in claims if c.op.answered and c.op.ended <= until),
                    default=0,
                )
                allowed = [c for c in claims if c.op.ended >= floor]
                if not any(c.value == value for c in allowed):
                    where = f"{node}, promoted by force"
                    verdicts.append(self._verdict(block, text, where, allowed))
        return verdicts

    def fork(self, content: bytes, name: str) -> Branch:
        """Return the branch that begins with *content*."""
        with self._lock:
            notes = list(self._notes)
        one = Branch(self._blocks, self.run)
        one.name = name
        one._tick = next(_numbers) * APART
        one.sent, one.answered, one.checked = self.sent, self.answered, self.checked
        one.failed, one.lost, one.flushed = self.failed, self.lost, self.flushed
        one._notes.extend(notes)
        begin = one._now()
        for block, value, _ in self._decoded(0, content):
            assert value != TORN
            kind = "zero" if value == ZERO else "write"
            op = Op(value, kind, block, 1, True, begin, True, "ok", flushed=begin)
            one._registers[block].claims = [Claim(op)]
        return one
