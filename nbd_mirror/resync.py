# SPDX-License-Identifier: BSD-3-Clause
"""
How far resync is, and how fast it may go: pure rules, without I/O, clock or thread.

`Progress` turns what the engine counts into honest figures. `Pace` puts clients first
without a knob: it compares their mean write latency during a batch with that between
batches, and gives way when it doubled (additive increase, multiplicative decrease, as
TCP shares a link). Batches are sized to take about half a second, so that a pause, a
stop or a busy client is noticed soon on a slow link too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Pace", "Plan", "Progress"]

MIB = 1 << 20
SMOOTHING_S = 5.0  # time constant of the rate shown


class Progress:
    """
    One resync, from the first dirty byte to none.

    Feed it with `update` after each batch and whenever somebody asks. Its total is
    what was copied plus what is left, so it grows when clients dirty more, and done
    never exceeds it.
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
        self._sample = (now, dirty_bytes, copied_bytes)  # the rate's last one
        self._growth = 0.0
        self.dirty_bytes = dirty_bytes
        self.bytes_per_s = 0.0

    def update(self, now: float, dirty_bytes: int, copied_bytes: int) -> None:
        """Take the figures of *now*; what goes back is taken as standing still."""
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
        """Weigh a sample: the mean since the start, later of the last few seconds."""
        return max(
            1 - math.exp(-elapsed / SMOOTHING_S),
            min(1.0, elapsed / (now - self._started)),
        )

    def waited(self, now: float) -> None:
        """Say that nothing was to be done up to *now*: it is no stall."""
        self._moved = max(now, self._moved)

    @property
    def done_bytes(self) -> int:
        """Bytes made clean since this resync began."""
        return self._copied - self._first_copied

    @property
    def total_bytes(self) -> int:
        """What this resync comes to, as far as is known now."""
        return self.done_bytes + self.dirty_bytes

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None: not moving, so nobody knows."""
        if self.dirty_bytes == 0:
            return 0.0
        return self.dirty_bytes / self.bytes_per_s if self.bytes_per_s >= 1 else None

    @property
    def growing(self) -> bool:
        """Whether clients dirty more than is copied."""
        return self._growth > 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return self._sample[0] - self._started

    def stalled_s(self, now: float) -> float:
        """Seconds since a region was last finished."""
        return max(now - self._moved, 0.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """The next batch, and the seconds to leave to clients before it."""

    max_bytes: int
    depth: int
    pause_s: float


class Pace:
    """How much to copy at once, given how clients' writes fare."""

    MAX_BYTES = 32 * MIB
    MIN_BYTES = MIB
    MAX_DEPTH = 16
    BATCH_S = 0.5  # what a batch should take at most
    MAX_PAUSE_S = 0.05
    PROBE_S = 0.02  # a pause that only measures
    PROBE_EVERY = 16  # batches
    SLOWDOWN = 2.0  # clients' latency may grow by this factor

    def __init__(self) -> None:
        """Begin at full speed: the first batch tells whether that hurts anybody."""
        self._depth = self.MAX_DEPTH
        self._bytes = self.MAX_BYTES
        self._baseline_s: float | None = None
        self._since_probe = 0

    @property
    def plan(self) -> Plan:
        """The batch to begin with."""
        return Plan(self._bytes, self._depth, 0.0)

    def between(self, elapsed_s: float, writes: int, write_s: float) -> None:
        """
        Take what clients wrote while no batch was under way: undisturbed, if long.

        Args:
            elapsed_s: seconds since the last batch.
            writes: how many were answered.
            write_s: the sum of their latencies, seconds.
        """
        if writes > 0 and elapsed_s >= self.PROBE_S / 2:
            mean_s = write_s / writes
            old_s = self._baseline_s
            self._baseline_s = mean_s if old_s is None else (old_s + mean_s) / 2
            self._since_probe = 0

    def after_batch(
        self, elapsed_s: float, writes: int, write_s: float, copied_bytes: int
    ) -> Plan:
        """
        Judge a batch by what clients' writes took during it, and plan the next.

        Args:
            elapsed_s: seconds the batch took.
            writes, write_s: as for `between`.
            copied_bytes: what it copied.
        """
        self._since_probe += 1
        pause_s = 0.0
        baseline_s = self._baseline_s
        if writes == 0:
            self._depth, self._bytes = self.MAX_DEPTH, self.MAX_BYTES
        elif baseline_s is not None and write_s / writes > self.SLOWDOWN * baseline_s:
            self._depth = max(self._depth // 2, 1)
            self._bytes = max(self._bytes // 2, self.MIN_BYTES)
            # As long as the batch: resync always has half the time, so it ends.
            pause_s = min(max(elapsed_s, 0.0), self.MAX_PAUSE_S)
        else:
            self._depth = min(self._depth + 1, self.MAX_DEPTH)
            self._bytes = min(self._bytes + 2 * MIB, self.MAX_BYTES)
        if writes > 0 and (baseline_s is None or self._since_probe >= self.PROBE_EVERY):
            self._since_probe = 0
            pause_s = max(pause_s, self.PROBE_S)
        timely = self._timely_bytes(elapsed_s, copied_bytes)
        return Plan(min(self._bytes, timely), self._depth, pause_s)

    def _timely_bytes(self, elapsed_s: float, copied_bytes: int) -> int:
        """Give what the link carries in BATCH_S, going by the last batch."""
        if elapsed_s < 1e-3 or copied_bytes <= 0:
            return self.MAX_BYTES
        rate = copied_bytes / elapsed_s
        return max(self.MIN_BYTES, min(self.MAX_BYTES, int(rate * self.BATCH_S)))
