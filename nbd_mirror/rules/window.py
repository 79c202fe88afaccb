# SPDX-License-Identifier: BSD-3-Clause
"""How many bytes a resync has under way on its link: pure rules."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["Answered", "Window"]

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Answered:
    """
    The remote's answers to copies.

    Args:
        data_bytes, zero_bytes: running counts since the start; zeroes are sent as a
            command without data.
        answer_s: the shortest time of a copy of data in the present call, seconds; 0:
            none was answered yet.
    """

    data_bytes: int
    zero_bytes: int
    answer_s: float


class Window:
    """
    The number of bytes to have under way on a link without other users.

    It finds a link's rate as BBR does (Cardwell and others, "BBR: Congestion-Based
    Congestion Control", 2016). At first the window limits the rate, and the link is
    partly idle. So the window grows by the answered bytes, which doubles it in each
    round, until the rate has not grown for some rounds. From then on it follows the
    best of the last rates: answers come in bursts, and a flush or a busy machine delays
    them, so a single low rate says nothing about the link.

    Only data counts. The remote answers a hole of a gigabyte at once, whatever the
    link, so with holes a slow link would seem fast. In a period with more answered
    zeroes than data, the data did not fill the link, so its rate counts only if it is
    the best one. BBR does the same for a sender without enough data.

    With one copy under way, a long round trip looks like a slow link: the answer takes
    equally long. So sometimes two are tried. Otherwise a link that was slow for a while
    would never be filled again.
    """

    FIRST = MIB  # 8 s at 1 Mbit/s
    LEAST, MOST = 64 * KIB, 64 * MIB
    LEAST_COPY = 64 * KIB
    # If one copy takes this long, the link is slow, and the first window was too large.
    SLOW_S = 1.0
    # With a short round trip, more than the product: what the remote handles in this
    # time keeps it busy while this process is not scheduled.
    MOMENT_S, MOMENT_MOST = 0.02, 2 * MIB
    GROWTH = 1.25  # growth of the rate in a round: the link is not full yet
    FULL_ROUNDS = 3  # rounds without such growth: it is full
    PERIODS = 4  # answer times over which a rate is measured once it is full
    RATES = 4  # number of last rates, of which the best counts
    LONE_RATES = 8  # rates with one copy under way before two are tried

    def __init__(self) -> None:
        """Begin with little, because the link may be slow."""
        self.bytes = self.FIRST
        self._full = False
        self._stood = 0  # rounds in which the rate did not grow
        self._rates: deque[float] = deque(maxlen=self.RATES)
        self._lone = 0  # rates in a row that led to one copy
        self._opened = self.FIRST  # the value of `bytes` when the rate began
        self._grown_by = 0  # answered bytes by which the window has grown
        self._since: tuple[float, Answered] | None = None
        self._answer_s = 0.0

    def restart(self) -> None:
        """
        Forget when the last rate began: copying was interrupted.

        Also undo the window's growth since then, because the link may not have carried
        it.
        """
        if self._since is not None and not self._full:
            self.bytes = min(self.bytes, self._opened)
        self._since = None

    def update(self, now: float, answered: Answered) -> None:
        """Use what was answered until *now*."""
        data_bytes, answer_s = answered.data_bytes, answered.answer_s
        if answer_s <= 0:
            return
        if self._since is None or data_bytes < self._since[1].data_bytes:
            self._since, self._answer_s = (now, answered), answer_s
            self._grown_by, self._opened = data_bytes, self.bytes
            if answer_s > self.SLOW_S:
                self.bytes = self.LEAST
            return
        # A new call begins with an empty link and measures again, so grow only slowly.
        self._answer_s = min(answer_s, self._answer_s * 1.1)
        if not self._full:
            self.bytes = min(self.bytes + data_bytes - self._grown_by, self.MOST)
            self._grown_by = data_bytes
        then, before = self._since
        periods = self.PERIODS if self._full else 1
        data = data_bytes - before.data_bytes
        if now - then < periods * self._answer_s or data == 0:
            return
        rate = data / (now - then)
        zeroes = answered.zero_bytes - before.zero_bytes
        # If a copy takes so long, the link was not idle.
        limited = zeroes > data and self._answer_s <= self.SLOW_S
        self._take_rate(rate, limited=limited)
        self._since, self._opened = (now, answered), self.bytes

    def _take_rate(self, rate: float, *, limited: bool) -> None:
        """
        Adjust the window by one more rate (bytes per second).

        Args:
            limited: the available data limited the rate, and perhaps not the link.
        """
        best = max(self._rates, default=0.0)
        if not self._full:
            self._judge_growth(rate, best, limited=limited)
        if rate >= best or not limited:
            self._rates.append(rate)
        if self._full:
            self.bytes = self._wanted(max(self._rates))
            self._try_two()

    def _judge_growth(self, rate: float, best: float, *, limited: bool) -> None:
        """
        Decide whether the rate has followed the window, or the link is full.

        A limited rate does not show that the link is full. But the window keeps its
        growth only if the rate grew too; otherwise holes between the data would open
        it.
        """
        wanted = self.GROWTH
        if limited:  # the window grew by the data alone, which may be little
            wanted = 1 + (self.GROWTH - 1) * (self.bytes / self._opened - 1)
        if rate >= wanted * best:
            self._stood = 0
        elif limited:
            self.bytes = min(self.bytes, self._opened)
        else:
            self._stood += 1
            self._full = self._stood >= self.FULL_ROUNDS

    def _try_two(self) -> None:
        """After some rates with one copy under way, have two for one rate."""
        self._lone = self._lone + 1 if self.bytes == self.LEAST else 0
        # On a slow link a returning client would wait for the second copy.
        if self._lone >= self.LONE_RATES and self._answer_s < self.SLOW_S:
            self.bytes, self._lone = 2 * self.LEAST_COPY, 0

    def _wanted(self, rate: float) -> int:
        """Return twice the bytes under way at *rate*, in whole copies."""
        moment = min(rate * self.MOMENT_S, self.MOMENT_MOST)
        # The time of the copy's own bytes is not part of the round trip. On a slow link
        # it is nearly all of the answer time, and a client waits behind what is under
        # way.
        way_s = max(self._answer_s - self.LEAST_COPY / rate, 0.0)
        wanted = max(2 * rate * way_s + self.LEAST_COPY, moment)
        copies = round(wanted / self.LEAST_COPY)
        return min(max(copies * self.LEAST_COPY, self.LEAST), self.MOST)
