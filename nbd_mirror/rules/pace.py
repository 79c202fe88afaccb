# SPDX-License-Identifier: BSD-3-Clause
"""
The pace of resync: pure rules, without I/O, clock or thread.

While clients are idle, resync is as fast as the link allows. Twice the bandwidth-delay
product is under way, and no more, because a client that returns would wait behind it.
On a slow link that is one copy of 64 KiB: two seconds at 256 kbit/s.

While clients are active, they come first, without a setting. The engine counts each
request as disturbed by copying or quiet. `Pace` compares a high percentile of the two
for each kind of request. The mean would not do: resync changes it little compared with
the slow requests, and it even falls, because writes of dirty regions wait for no
remote. The pace moves on a ladder of steps, each about twice the one below. A step that
was too much is not tried again for a time, which grows with each failure; otherwise the
tries alone would make the slow requests. Copying alternates with rests, in which the
quiet requests are measured. The lowest step copies a sixteenth of the time, so a resync
ends under any load.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .window import KIB, MIB, Answered, Window

__all__ = ["Counts", "Latency", "Pace", "Plan", "quantile"]

Counts = Sequence[int]  # requests by their time; a bucket is 1/4 of an octave
_FIRST_NS = 1024


@dataclass(frozen=True, slots=True)
class Latency:
    """The engine's counts since its start: a histogram for each kind."""

    quiet: Sequence[Counts]
    disturbed: Sequence[Counts]


@dataclass(frozen=True, slots=True)
class Plan:
    """Copies under way, bytes of each, and the turns of copying and rest (seconds)."""

    depth: int
    copy_bytes: int
    burst_s: float = 0.0
    rest_s: float = 0.0


def _bound_s(bucket: float) -> float:
    """Return the lower bound of a bucket, or a point within it."""
    octave, quarter = divmod(bucket, 4)
    return float(_FIRST_NS * 2.0**octave * (1 + quarter / 4) / 1e9)


def quantile(counts: Sequence[float], share: float) -> float:
    """Return the seconds that *share* of the requests took at most; 0 for none."""
    rank, below = share * sum(counts), 0.0
    for bucket, count in enumerate(counts):
        if count > 0 and below + count >= rank:
            return _bound_s(bucket + (rank - below) / count)
        below += count
    return 0.0


class _Baseline:
    """The last quiet requests of one kind, as a histogram; older ones weigh less."""

    MOST = 2000  # requests remembered

    def __init__(self, counts: Counts) -> None:
        self.counts = [0.0] * len(counts)
        self.total = 0.0
        self.add(counts)

    def add(self, counts: Counts) -> None:
        old = self.counts
        total = self.total + sum(counts)
        keep = min(self.MOST / total, 1.0) if total > 0 else 1.0
        self.counts = [(a + b) * keep for a, b in zip(old, counts, strict=True)]
        self.total = total * keep


class Pace:
    """How much to copy at once, depending on the clients' latency."""

    SLOWDOWN = 1.4  # the allowed growth of a high percentile
    IDLE_S = 0.5  # without a request for so long, clients count as idle
    LEAST_COPY, MOST_COPY = 64 * KIB, MIB
    SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the time: the ladder's lowest steps
    BUSY_SHARE = 0.9  # for all steps above
    FIRST_STEP = len(SHARES)
    LEAST_REST_S, MOST_REST_S = 0.01, 0.25
    REST_TIMES = 4  # times a request's duration, so that some fit into a rest
    # The part of a client's request outside the engine: sockets and wake-ups. Compared
    # with it, a read from memory of 20 us instead of 5 does not matter.
    OUTSIDE_S = 100e-6
    ENOUGH, FEW, FEWEST = 400, 40, 3  # requests of a kind to judge by: at once,
    FEW_S, FEWEST_S = 0.5, 2.0  # after this time, and after this
    RETRY_S, MOST_RETRY_S = 1.0, 16.0

    def __init__(self) -> None:
        """Begin as if a client were there; one call of `judge` will tell."""
        self.window = Window()
        self._seen: Latency | None = None
        self._request_at: float | None = None  # when the last one was seen
        self._baselines: list[_Baseline] = []
        self._pool: list[list[int]] = []  # disturbed requests on this step
        self._pooled_since: float | None = None
        self._step = self.FIRST_STEP
        self._ceiling: int | None = None  # a step that was too much
        self._retry_at, self._retry_s = 0.0, self.RETRY_S
        self._busy = True

    @property
    def plan(self) -> Plan:
        """The plan until the next call of `judge`."""
        if self._busy:
            return self._busy_plan()
        return self.sized(self.window.bytes, 8)

    def judge(self, now: float, latency: Latency, answered: Answered) -> Plan:
        """
        Use the engine's counts up to *now*, and return the next plan.

        Args:
            latency: counted since the start.
            answered: by the target of the copies.
        """
        requests = self._take(latency)
        if self._request_at is None or requests:
            self._request_at = now if requests else now - self.IDLE_S
        was_busy, self._busy = self._busy, now - self._request_at < self.IDLE_S
        if self._busy:
            self.window.restart()
            if not was_busy:
                self._start_over(now)
            self._climb(now)
        else:
            self.window.update(now, answered)
        return self.plan

    def _take(self, latency: Latency) -> bool:
        """Sort the new counts; return whether there were any."""
        seen, self._seen = self._seen, latency
        if seen is None:
            # The quiet requests before the resync are the best baseline.
            self._baselines = [_Baseline(one) for one in latency.quiet]
            self._pool = [[0] * len(one) for one in latency.disturbed]
            return False
        new = False
        for kind, baseline in enumerate(self._baselines):
            quiet = _grown(seen.quiet[kind], latency.quiet[kind])
            disturbed = _grown(seen.disturbed[kind], latency.disturbed[kind])
            if any(quiet):
                baseline.add(quiet)
            pool = self._pool[kind]
            self._pool[kind] = [a + b for a, b in zip(pool, disturbed, strict=True)]
            new = new or any(quiet) or any(disturbed)
        return new

    def _start_over(self, now: float) -> None:
        """From now on judge the step only by new requests."""
        self._pool = [[0] * len(one) for one in self._pool]
        self._pooled_since = now

    def _climb(self, now: float) -> None:
        """Go a step up or down, once enough is known about the present one."""
        if self._pooled_since is None:
            self._pooled_since = now
        slowdown = self._slowdown(now - self._pooled_since)
        if slowdown is None:
            return
        self._start_over(now)
        if slowdown > self.SLOWDOWN:
            self._ceiling = self._step
            self._retry_at = now + self._retry_s
            self._retry_s = min(2 * self._retry_s, self.MOST_RETRY_S)
            self._step = max(self._step - (2 if slowdown > 2 else 1), 0)
            return
        if self._ceiling is not None and self._step >= self._ceiling:
            # The step is fine now: the load has changed.
            self._ceiling, self._retry_s = None, self.RETRY_S
        known = self._ceiling is None or self._step + 1 < self._ceiling
        if known or now >= self._retry_at:
            self._step = min(self._step + 1, self._top)

    def _slowdown(self, elapsed_s: float) -> float | None:
        """
        Return the factor by which slow requests became slower, for the worst kind.

        The percentile is as high as the number of requests allows: the two worst ones
        prove nothing. None: not enough is known.
        """
        worst = None
        enough = self.ENOUGH
        if elapsed_s >= self.FEW_S:
            enough = self.FEWEST if elapsed_s >= self.FEWEST_S else self.FEW
        for baseline, pool in zip(self._baselines, self._pool, strict=True):
            number = min(sum(pool), baseline.total)
            if number < enough:
                if any(pool) and elapsed_s < self.FEW_S:
                    return None  # this kind may be the worst
                continue
            share = 1 - max(0.01, 2 / number)
            quiet_s = quantile(baseline.counts, share) + self.OUTSIDE_S
            factor = (quantile(pool, share) + self.OUTSIDE_S) / quiet_s
            worst = factor if worst is None else max(worst, factor)
        return worst

    # --- steps ---

    @property
    def _top(self) -> int:
        sizes = max(self.window.bytes // self.LEAST_COPY, 1).bit_length()
        return len(self.SHARES) + sizes - 1

    def _busy_plan(self) -> Plan:
        step = min(self._step, self._top)
        size, share = self.LEAST_COPY, self.BUSY_SHARE
        if step < len(self.SHARES):
            share = self.SHARES[step]
        else:
            size <<= step - len(self.SHARES)
        sized = self.sized(size, 2)
        rest_s = self._rest_s()
        burst_s = rest_s * share / (1 - share)
        if burst_s < self.LEAST_REST_S:
            burst_s = self.LEAST_REST_S
            rest_s = burst_s * (1 - share) / share
        return Plan(sized.depth, sized.copy_bytes, burst_s, rest_s)

    def _rest_s(self) -> float:
        """Return a rest that is long enough to contain whole requests."""
        took_s = max(
            (quantile(one.counts, 0.5) for one in self._baselines if one.total > 0),
            default=max((quantile(one, 0.5) for one in self._pool), default=0.0),
        )
        return min(max(self.REST_TIMES * took_s, self.LEAST_REST_S), self.MOST_REST_S)

    @classmethod
    def sized(cls, under_way: int, depth: int) -> Plan:
        """Cut the bytes to have under way into about *depth* copies."""
        copy_bytes = cls.LEAST_COPY
        while copy_bytes < cls.MOST_COPY and copy_bytes * depth < under_way:
            copy_bytes *= 2
        return Plan(max(under_way // copy_bytes, 1), copy_bytes)


def _grown(before: Counts, now: Counts) -> list[int]:
    """Subtract two readings of counters, which are not of one instant."""
    return [max(b - a, 0) for a, b in itertools.zip_longest(before, now, fillvalue=0)]
