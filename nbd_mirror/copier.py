# SPDX-License-Identifier: BSD-3-Clause
"""
One resync's copying: where it is, and how fast it goes on.

`Pace` decides and the engine copies; this carries the figures between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .model import Batch, VolumeStatus
from .resync import Pace

if TYPE_CHECKING:
    from .core import Engine

__all__ = ["Copier"]

BUSY_FIRST_S, BUSY_LAST_S = 0.05, 1.0  # rests while clients hold all dirty regions


# Engine.resync of a remote, or Engine.local_resync: first region, bytes, depth.
Copy = Callable[[int, int, int], Batch]


class Copier:
    """Copies a disk's dirty regions by *copy*, a batch a call, round and round."""

    def __init__(self, engine: Engine, copy: Copy, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._copy = copy
        self._clock = clock
        self._pace = Pace()
        self._plan = self._pace.plan
        self._next_region = 0
        self._empty_rounds = 0
        self._ended: tuple[float, VolumeStatus] | None = None  # the last batch

    def copy(self) -> tuple[Batch, float]:
        """
        Copy a batch, and judge its effect on clients. Blocks, about half a second.

        Returns:
            What was done, and the seconds to wait before the next batch.
        """
        before, started = self._engine.status(), self._clock()
        if self._ended is not None:
            ended, then = self._ended
            self._pace.between(started - ended, *_written(then, before))
        first, plan = self._next_region, self._plan
        batch = self._copy(first, plan.max_bytes, plan.depth)
        after, ended = self._engine.status(), self._clock()
        self._plan = self._pace.after_batch(
            ended - started, *_written(before, after), batch.copied_bytes
        )
        self._ended = ended, after
        self._next_region = batch.next_region
        return batch, self._rest_s(first, batch.copied_bytes)

    def _rest_s(self, first: int, copied_bytes: int) -> float:
        """
        Give the pause the plan wants, or a longer one after an empty round.

        A batch from the first region on that copied nothing found them all clean,
        which ends the resync, or held by clients: asking again at once would spin.
        """
        if copied_bytes > 0:
            self._empty_rounds = 0
        elif first == 0:
            self._empty_rounds += 1
        if self._empty_rounds == 0:
            return self._plan.pause_s
        return min(BUSY_FIRST_S * 2.0 ** (self._empty_rounds - 1), BUSY_LAST_S)


def _written(before: VolumeStatus, after: VolumeStatus) -> tuple[int, float]:
    return after.writes - before.writes, after.write_s - before.write_s
