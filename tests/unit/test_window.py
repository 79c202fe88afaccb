# SPDX-License-Identifier: BSD-3-Clause
"""A resync's window fills an idle link, and a slow one has little in its queue."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_mirror.rules.pace import Pace
from nbd_mirror.rules.window import KIB, MIB, Answered, Window

TICK_S = 0.05


class Line:
    """
    A link that answers copies one by one, with nothing else on it.

    Args:
        rate: of the link, bytes a second.
        way_s: from the last byte of a copy on the link to its answer.
        holds: from when to when (seconds) no answer comes, as while a server flushes.
    """

    def __init__(
        self, rate: float, way_s: float, holds: Sequence[tuple[float, float]] = ()
    ) -> None:
        self.rate, self.way_s, self.holds = rate, way_s, holds
        self.answered, self.answer_s = 0, 0.0
        self._free_at = 0.0
        self._under_way: deque[tuple[float, float, int]] = deque()

    def run(self, window: Window, since: float, until: float) -> None:
        """Keep the link as full as *window* says, from *since* to *until*."""
        now = since
        while now < until:
            self._send(window, now)
            now = max(self._under_way[0][1], now)
            while self._under_way and self._under_way[0][1] <= min(now, until):
                sent, came, length = self._under_way.popleft()
                self.answered += length
                took = came - sent
                self.answer_s = min(self.answer_s or took, took)

    def _send(self, window: Window, now: float) -> None:
        plan = Pace.sized(window.bytes, 8)
        while len(self._under_way) < plan.depth:
            self._free_at = max(self._free_at, now) + plan.copy_bytes / self.rate
            came = self._free_at + self.way_s
            for first, last in self.holds:
                came = last if first <= came < last else came
            self._under_way.append((now, came, plan.copy_bytes))


class TestWindow:
    """What is under way on an idle link."""

    @staticmethod
    def settled(rate: float, way_s: float) -> int:
        """Return the window after some seconds of that link."""
        window, answered = Window(), 0.0
        for tick in range(200):
            window.update(tick * TICK_S, Answered(int(answered), 0, way_s))
            answered += TICK_S * min(rate, window.bytes / way_s)
        return window.bytes

    def test_window_of_a_long_fat_link_is_twice_its_product(self) -> None:
        """1 Gbit/s at 50 ms: 6 MB are on the way, and as much waits to be."""
        assert self.settled(125e6, 0.058) == pytest.approx(2 * 125e6 * 0.058, rel=0.05)

    def test_window_that_is_too_small_grows_until_the_link_is_full(self) -> None:
        """10 Gbit/s at 20 ms needs more than it begins with."""
        assert self.settled(1.25e9, 0.02) == pytest.approx(2 * 1.25e9 * 0.02, rel=0.05)

    @given(
        phase=st.floats(0, TICK_S),
        late=st.lists(st.floats(0, 0.02), min_size=1, max_size=8),
        hold_at=st.floats(0.05, 0.5),
    )
    def test_long_fat_link_is_soon_full(
        self, phase: float, late: list[float], hold_at: float
    ) -> None:
        """
        1 Gbit/s at 50 ms carries four fifths of what it can from the first byte on.

        However the looks at it fall beside the bursts of answers, with a flush that
        holds them up for a round trip, and with looks that come late.
        """
        rate, seconds = 125e6, 3.0
        line, window = Line(rate, 0.05, [(hold_at, hold_at + 0.05)]), Window()
        now, looks = 0.0, itertools.cycle(late)
        look_at = phase
        while now < seconds:
            line.run(window, now, look_at)
            now = look_at
            window.update(now, Answered(line.answered, 0, line.answer_s))
            look_at = now + TICK_S + next(looks)
        assert line.answered >= 0.8 * rate * now

    @pytest.mark.parametrize("way_s", [0.02, 0.05, 0.2])
    def test_link_that_was_slow_for_a_while_is_filled_again(self, way_s: float) -> None:
        """
        1 Gbit/s was 1 Mbit/s for a while: afterwards it carries more than a copy a
        round trip.
        """
        window, answered, looks = Window(), 0.0, itertools.count()
        seen = []
        for rate in (125e6, 125e3, 125e6):
            took_s = way_s + 64 * KIB / rate
            for _ in range(600):
                window.update(next(looks) * TICK_S, Answered(int(answered), 0, took_s))
                answered += TICK_S * min(rate, window.bytes / took_s)
            seen.append(window.bytes)
        before, slow, after = seen
        assert slow <= 2 * Window.LEAST_COPY
        assert after == pytest.approx(before, rel=0.1)

    def test_window_that_is_never_measured_does_not_grow(self) -> None:
        """Clients leave 0.8 s of idle time, again and again, and a copy takes 0.9 s."""
        window, answered, now = Window(), 0, 0.0
        for _ in range(100):
            window.update(now, Answered(answered, 0, 0.9))
            answered += 64 * KIB
            window.update(now + 0.8, Answered(answered, 0, 0.9))
            window.restart()
            now += 1.3
        assert window.bytes <= Window.FIRST

    def test_hole_does_not_open_the_window(self) -> None:
        """1 Mbit/s: a remote that zeroes a gigabyte a second has no quicker link."""
        rate, took_s = 125e3, 64 * KIB / 125e3
        window, data, zeroes, now = Window(), 0, 0, 0.0
        for _ in range(20):
            now += took_s
            data += int(rate * took_s)
            zeroes += int(1e9 * took_s)
            window.update(now, Answered(data, zeroes, took_s))
            assert window.bytes <= Window.FIRST + data
        for _ in range(20):  # behind the hole
            now += took_s
            data += int(rate * took_s)
            window.update(now, Answered(data, zeroes, took_s))
        assert window.bytes == Window.LEAST

    def test_little_data_beside_a_hole_says_nothing_of_the_link(self) -> None:
        """1 Gbit/s at 50 ms stays filled behind a hole with some data in it."""
        rate, way_s = 125e6, 0.05
        window, data, zeroes, now = Window(), 0.0, 0, 0.0
        sizes = []
        for tick in range(400):
            window.update(now, Answered(int(data), zeroes, way_s))
            now += TICK_S
            in_hole = tick >= 200
            zeroes += 64 * MIB * in_hole
            most = 1e6 if in_hole else rate
            data += TICK_S * min(most, window.bytes / way_s)
            sizes.append(window.bytes)
        assert sizes[-1] == pytest.approx(sizes[199], rel=0.1)

    def test_window_has_bounds(self) -> None:
        """Memory is bounded on any link; on a slow one little waits in the queue."""
        assert self.settled(10e9, 0.2) == Window.MOST
        assert self.settled(1e6, 0.01) == Window.LEAST

    @pytest.mark.parametrize("rate", [32e3, 125e3, 1e6])
    def test_window_of_a_slow_link_is_one_copy(self, rate: float) -> None:
        """A copy takes long because of its bytes, and more of them would not help."""
        window, answered, now = Window(), 0.0, 0.0
        for _ in range(40):
            copy_s = 64 * KIB / rate
            now += copy_s
            answered += 64 * KIB
            window.update(now, Answered(int(answered), 0, copy_s + 0.01))
        assert window.bytes == 64 * KIB

    def test_window_of_a_medium_link_keeps_it_busy(self) -> None:
        """10 Mbit/s at 20 ms: a copy under way, and another on it."""
        assert self.settled(1.25e6, 0.02 + 64 * KIB / 1.25e6) == 2 * 64 * KIB

    @pytest.mark.parametrize("rate", [125e3, 1.25e6])
    def test_holes_between_data_do_not_open_the_window(self, rate: float) -> None:
        """Copies of data take turns with holes, for as long as it likes."""
        window, now = Window(), 0.0
        copy_s = 64 * KIB / rate
        for count in range(1, 400):
            now += copy_s
            took = Answered(count * 64 * KIB, count * 32 * MIB, copy_s + 0.01)
            window.update(now, took)
            assert window.bytes <= 2 * Window.FIRST

    def test_window_grows_where_most_is_zeroes(self) -> None:
        """1 Gbit/s at 50 ms, and nine bytes in ten are zeroes: soon it is full."""
        window, answered, zeroes, way_s = Window(), 0.0, 0.0, 0.05
        for tick in range(100):
            took = Answered(int(answered), int(zeroes), way_s)
            window.update(tick * TICK_S, took)
            came = TICK_S * min(125e6, 0.1 * window.bytes / way_s)
            answered += came
            zeroes += 9 * came
        assert window.bytes >= 16 * MIB

    def test_first_answer_that_takes_long_is_enough(self) -> None:
        """Nothing more is put into the queue of a link that turns out to be slow."""
        window = Window()
        window.update(4.0, Answered(128 * KIB, 0, 4.0))
        assert window.bytes == Window.LEAST

    def test_window_of_a_short_way_is_what_is_copied_in_a_moment(self) -> None:
        """2 GB/s at 0.1 ms: the product alone would starve it."""
        assert self.settled(2e9, 1e-4) == Window.MOMENT_MOST
