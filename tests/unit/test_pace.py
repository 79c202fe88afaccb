# SPDX-License-Identifier: BSD-3-Clause
"""Resync's pace fills an idle link, gives way to clients, and always goes on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_mirror.rules.pace import Latency, Pace, Plan, quantile
from nbd_mirror.rules.window import KIB, MIB, Answered, Window

BUCKETS = 112
TICK_S = 0.05


def bucket(seconds: float) -> int:
    """Give the bucket that the engine counts so long a request in."""
    octave = math.log2(max(seconds * 1e9, 1024) / 1024)
    whole = int(octave)
    return min(whole * 4 + int((2 ** (octave - whole) - 1) * 4), BUCKETS - 1)


class Model:
    """
    Clients beside a resync, a tick of 50 ms at a time, on a pace's word.

    Args:
        rate: of the link, bytes a second.
        way_s: of a copy's answer on an empty link.
        latency: of a request of either kind, by what is under way meanwhile.
        requests_per_s: of each kind.
    """

    def __init__(
        self,
        latency: Callable[[int], float],
        *,
        rate: float = 1e9,
        way_s: float = 1e-4,
        requests_per_s: float = 10_000,
    ) -> None:
        self.pace = Pace()
        self.latency, self.rate, self.way_s = latency, rate, way_s
        self.requests_per_s = requests_per_s
        self.now = 100.0
        self.answered = 0.0
        self.quiet = [[0] * BUCKETS for _ in range(2)]
        self.disturbed = [[0] * BUCKETS for _ in range(2)]
        self.owed = 0.0  # requests, where they are rare
        self.plans: list[Plan] = []

    def run(self, seconds: float) -> list[Plan]:
        """Go on for a while; returns the plans of that time."""
        before = len(self.plans)
        for _ in range(round(seconds / TICK_S)):
            counted = Latency(
                [list(one) for one in self.quiet], [list(one) for one in self.disturbed]
            )
            answer_s = self.way_s if self.answered else 0.0
            plan = self.pace.judge(
                self.now, counted, Answered(int(self.answered), 0, answer_s)
            )
            self.plans.append(plan)
            self._tick(plan)
        return self.plans[before:]

    def _tick(self, plan: Plan) -> None:
        under_way = plan.depth * plan.copy_bytes
        share = busy_share(plan)
        self.answered += share * TICK_S * min(self.rate, under_way / self.way_s)
        self.owed += self.requests_per_s * TICK_S
        number, self.owed = int(self.owed), self.owed % 1
        disturbed = round(number * share)
        for kind in range(2):
            self.disturbed[kind][bucket(self.latency(under_way))] += disturbed
            self.quiet[kind][bucket(self.latency(0))] += number - disturbed
        self.now += TICK_S


def busy_share(plan: Plan) -> float:
    """Give the share of the time in which it copies."""
    return 1.0 if plan.rest_s == 0 else plan.burst_s / (plan.burst_s + plan.rest_s)


def slowdowns(model: Model, plans: list[Plan]) -> list[float]:
    """Give the factor that clients' requests took longer, for each plan."""
    alone = model.latency(0)
    return [model.latency(one.depth * one.copy_bytes) / alone for one in plans]


class TestQuantile:
    """Of a histogram."""

    def test_share_of_nothing_is_zero(self) -> None:
        """No request, no time."""
        assert quantile([0] * BUCKETS, 0.99) == 0

    @given(st.lists(st.floats(2e-6, 10), min_size=1, max_size=200), st.floats(0.01, 1))
    def test_share_is_within_a_bucket_of_the_exact_one(
        self, times: list[float], share: float
    ) -> None:
        """A bucket is a quarter of an octave, 25 % at most."""
        counts = [0] * BUCKETS
        for one in times:
            counts[bucket(one)] += 1
        exact = sorted(times)[max(math.ceil(share * len(times) - 1e-9) - 1, 0)]
        assert exact / 1.27 <= quantile(counts, share) <= exact * 1.27


class TestPace:
    """Foreground first, and always forward."""

    def test_plan_without_clients_never_rests(self) -> None:
        """Idle: the whole window, after the first look."""
        model = Model(lambda _: 1e-4, requests_per_s=0)
        plans = model.run(2)
        assert all(one.rest_s == 0 for one in plans[1:])
        assert model.answered > 0.9 * 2 * model.rate

    def test_plan_that_harms_nobody_goes_up_to_the_window(self) -> None:
        """Clients that do not notice are no reason to go slowly."""
        model = Model(lambda _: 1e-3)
        last = model.run(10)[-1]
        assert last.depth * last.copy_bytes >= model.pace.window.bytes / 2
        assert busy_share(last) == pytest.approx(Pace.BUSY_SHARE)

    @pytest.mark.parametrize("harm", [256 * KIB, MIB, 4 * MIB])
    def test_plan_settles_where_clients_hardly_notice(self, harm: int) -> None:
        """
        What is under way delays them: it is kept to what they hardly notice.

        Args:
            harm: bytes under way that double what a request takes.
        """
        model = Model(lambda under_way: 1e-3 * (1 + under_way / harm))
        model.run(5)
        plans = model.run(30)
        factors = sorted(slowdowns(model, plans))
        assert factors[int(0.9 * len(factors))] <= 1 + Pace.SLOWDOWN - 1 + 0.05
        # And not far below: each step is about twice the one before.
        mean = sum(one.depth * one.copy_bytes for one in plans) / len(plans)
        assert mean >= 0.2 * harm * (Pace.SLOWDOWN - 1)

    def test_plan_that_always_harms_goes_on_at_the_floor(self) -> None:
        """Every copy delays clients: it takes a sixteenth of the time, and ends."""
        model = Model(lambda under_way: 1e-3 if under_way == 0 else 10e-3)
        model.run(10)
        plans = model.run(20)
        assert min(map(busy_share, plans)) == pytest.approx(Pace.SHARES[0])
        assert sum(map(busy_share, plans)) / len(plans) < 2 * Pace.SHARES[0]
        before = model.answered
        model.run(10)
        assert model.answered - before > 0.05 * 10 * min(
            model.rate, 64 * KIB / model.way_s
        )

    def test_rare_requests_are_judged_too(self) -> None:
        """20 a second, as over a long way: a queue that doubles them is seen."""
        model = Model(
            lambda under_way: 0.05 + under_way / 125e6,
            rate=125e6,
            way_s=0.05,
            requests_per_s=20,
        )
        model.run(60)
        factors = sorted(slowdowns(model, model.run(60)))
        assert factors[int(0.8 * len(factors))] <= 2

    def test_clients_who_leave_and_come_back(self) -> None:
        """Full speed soon after they left; a small step when they are back."""
        model = Model(lambda under_way: 1e-3 * (1 + under_way / MIB))
        model.run(10)
        model.requests_per_s = 0
        assert model.run(1)[-1].rest_s == 0
        model.requests_per_s = 10_000
        back = model.run(0.1)[-1]
        assert back.rest_s > 0
        assert back.depth * back.copy_bytes <= MIB

    def test_load_that_becomes_harmless_is_noticed(self) -> None:
        """A step that was too much once is tried again, also after many times."""
        model = Model(lambda under_way: 1e-3 if under_way == 0 else 10e-3)
        model.run(60)
        model.latency = lambda _: 1e-3
        model.run(60)
        assert busy_share(model.plans[-1]) == pytest.approx(Pace.BUSY_SHARE)
        last = model.plans[-1]
        assert last.depth * last.copy_bytes >= MIB

    @given(
        st.lists(
            st.tuples(
                st.integers(0, 5000), st.integers(0, 5000), st.integers(0, BUCKETS - 1),
                st.integers(0, BUCKETS - 1), st.integers(0, 1 << 40),
                st.floats(0, 100), st.floats(0, 10),
            ),
            max_size=40,
        )
    )  # fmt: skip
    def test_plan_after_any_history_is_within_its_bounds(
        self, history: list[tuple[int, int, int, int, int, float, float]]
    ) -> None:
        """Whatever is measured: memory is bounded, rests are short, it goes on."""
        pace, now, answered = Pace(), 0.0, 0
        quiet, disturbed = [[0] * BUCKETS], [[0] * BUCKETS]
        for nr_quiet, nr, at_quiet, at, more, elapsed, answer_s in history:
            quiet[0][at_quiet] += nr_quiet
            disturbed[0][at] += nr
            answered += more
            now += elapsed
            counted = Latency([list(quiet[0])], [list(disturbed[0])])
            plan = pace.judge(now, counted, Answered(answered, 0, answer_s))
            assert 1 <= plan.depth <= 64
            assert 64 * KIB <= plan.copy_bytes <= MIB
            assert plan.depth * plan.copy_bytes <= Window.MOST
            assert plan.rest_s <= Pace.MOST_REST_S
            assert busy_share(plan) >= Pace.SHARES[0] - 1e-9
