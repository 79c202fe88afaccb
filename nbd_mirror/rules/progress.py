# SPDX-License-Identifier: BSD-3-Clause
"""
The progress of a resync: pure rules, without I/O, clock or thread.

`Progress` turns the engine's counts into honest figures; pace.py decides the speed.
"""

from __future__ import annotations

import math

__all__ = ["Progress"]

SMOOTHING_S = 5.0  # time constant of the rate shown


class Progress:
    """
    One resync, from the first dirty byte to none.

    Call `update` after each batch and before each status. Its total is what was copied
    plus what is left, so it grows when clients make more dirty, and done never exceeds
    it.
    """

    def __init__(self, now: float, dirty_bytes: int, copied_bytes: int) -> None:
        """
        Begin at *now* (seconds, monotonic).

        Args:
            copied_bytes: the engine's running count, which need not start at 0.
        """
        self._started = now
        self._moved = now
        self._first_copied = self._copied = copied_bytes
        self._sample = (now, dirty_bytes, copied_bytes)  # the last one of the rate
        self._growth = 0.0
        self.dirty_bytes = dirty_bytes
        self.bytes_per_s = 0.0

    def update(self, now: float, dirty_bytes: int, copied_bytes: int) -> None:
        """Use the figures of *now*; a figure that falls counts as unchanged."""
        copied = max(copied_bytes, self._copied)
        if copied > self._copied or dirty_bytes < self.dirty_bytes:
            self._moved = max(now, self._moved)
        self._copied, self.dirty_bytes = copied, dirty_bytes
        then, then_dirty, then_copied = self._sample
        elapsed = now - then
        if elapsed > 0:
            weight = self._weight(elapsed, now)
            rate = (copied - then_copied) / elapsed
            growth = (dirty_bytes - then_dirty) / elapsed
            self.bytes_per_s += weight * (rate - self.bytes_per_s)
            self._growth += weight * (growth - self._growth)
            self._sample = (now, dirty_bytes, copied)

    def _weight(self, elapsed: float, now: float) -> float:
        """Return a sample's weight: first the mean, later the last few seconds."""
        return max(
            1 - math.exp(-elapsed / SMOOTHING_S),
            min(1.0, elapsed / (now - self._started)),
        )

    def waited(self, now: float) -> None:
        """Note that nothing had to be done up to *now*, so that this is no stall."""
        self._moved = max(now, self._moved)

    @property
    def done_bytes(self) -> int:
        """Bytes made clean since this resync began."""
        return self._copied - self._first_copied

    @property
    def total_bytes(self) -> int:
        """The bytes of this resync, as far as is known now."""
        return self.done_bytes + self.dirty_bytes

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None: nothing moves, so unknown."""
        if self.dirty_bytes == 0:
            return 0.0
        return self.dirty_bytes / self.bytes_per_s if self.bytes_per_s >= 1 else None

    @property
    def growing(self) -> bool:
        """Whether clients make more dirty than is copied."""
        return self._growth > 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return self._sample[0] - self._started

    def stalled_s(self, now: float) -> float:
        """Seconds since a region was last finished."""
        return max(now - self._moved, 0.0)
