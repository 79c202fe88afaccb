# SPDX-License-Identifier: BSD-3-Clause
"""Resync's figures are honest whatever is counted, and its pace gives way and ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_mirror.resync import MIB, Pace, Progress

# How much time passed, how much was copied, how much clients dirtied.
STEPS = st.lists(
    st.tuples(
        st.floats(min_value=0, max_value=100),
        st.integers(min_value=0, max_value=1 << 40),
        st.integers(min_value=0, max_value=1 << 40),
    ),
    max_size=30,
)
ELAPSED = st.floats(min_value=0, max_value=60)
WRITES = st.integers(min_value=0, max_value=100_000)
LATENCY = st.floats(min_value=1e-6, max_value=5)


class TestProgress:
    """Done, total, rate, time left."""

    @given(st.integers(min_value=0, max_value=1 << 40), STEPS)
    def test_done_of_any_history_never_exceeds_total(
        self, dirty: int, steps: list[tuple[float, int, int]]
    ) -> None:
        """Never above 100 %, never backwards, and 100 % only when nothing is left."""
        now, copied, before = 10.0, 777, 0
        progress = Progress(now, dirty, copied)
        for elapsed, cleaned, dirtied in steps:
            now += elapsed
            cleaned = min(cleaned, dirty)  # noqa: PLW2901
            copied += cleaned
            dirty += dirtied - cleaned
            progress.update(now, dirty, copied)
            assert before <= progress.done_bytes <= progress.total_bytes
            assert progress.bytes_per_s >= 0
            assert progress.stalled_s(now) >= 0
            assert progress.total_bytes - progress.done_bytes == dirty
            assert progress.eta_s is None or progress.eta_s >= 0
            before = progress.done_bytes

    @given(st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 1000)), max_size=20))
    def test_figures_of_a_clock_that_jumps_back_stay_sane(
        self, steps: list[tuple[float, int]]
    ) -> None:
        """A clock or a counter that goes back stands still instead."""
        now = 100.0
        progress = Progress(now, 5000, 0)
        for jump, copied in steps:
            now += jump
            progress.update(now, 5000, copied)
            assert 0 <= progress.done_bytes <= progress.total_bytes
            assert progress.bytes_per_s >= 0

    def test_rate_of_a_steady_copy_is_its_rate(self) -> None:
        """10 MiB a second for a while is shown as that, and the time left fits."""
        progress = Progress(0.0, 1000 * MIB, 0)
        for second in range(1, 31):
            progress.update(second, (1000 - 10 * second) * MIB, 10 * second * MIB)
        assert progress.bytes_per_s == pytest.approx(10 * MIB)
        assert progress.eta_s == pytest.approx(70)
        assert not progress.growing

    def test_rate_after_a_change_follows_within_seconds(self) -> None:
        """A link that becomes slow is seen to be slow soon."""
        progress = Progress(0.0, 10_000 * MIB, 0)
        progress.update(100.0, 9000 * MIB, 1000 * MIB)
        for second in range(1, 31):
            progress.update(100.0 + second, 9000 * MIB, 1000 * MIB)
        assert progress.bytes_per_s < 0.1 * MIB
        assert progress.stalled_s(130.0) == pytest.approx(30.0)

    def test_growth_when_clients_dirty_more_than_is_copied_is_said(self) -> None:
        """Growing is not hidden behind a rate."""
        progress = Progress(0.0, 100, 0)
        progress.update(1.0, 500, 50)
        assert progress.growing
        assert (50, 550) == (progress.done_bytes, progress.total_bytes)

    def test_time_left_without_movement_is_unknown(self) -> None:
        """Nobody can say when what does not move is done."""
        progress = Progress(0.0, 100, 0)
        progress.update(5.0, 100, 0)
        assert progress.eta_s is None

    def test_stall_while_waiting_knowingly_is_not_counted(self) -> None:
        """A late-write window or a pause is no stall."""
        progress = Progress(0.0, 100, 0)
        progress.waited(40.0)
        assert progress.stalled_s(41.0) == pytest.approx(1.0)


class TestPace:
    """Foreground first."""

    @given(
        st.lists(
            st.tuples(
                st.booleans(), ELAPSED, WRITES, LATENCY, st.integers(0, 64 * MIB)
            ),
            max_size=50,
        )
    )
    def test_plan_after_any_history_is_within_its_bounds(
        self, history: list[tuple[bool, float, int, float, int]]
    ) -> None:
        """Whatever is measured: 1 to 32 MiB, 1 to 16 commands, a short pause."""
        pace = Pace()
        for is_batch, elapsed_s, writes, mean_s, copied in history:
            if not is_batch:
                pace.between(elapsed_s, writes, writes * mean_s)
                continue
            plan = pace.after_batch(elapsed_s, writes, writes * mean_s, copied)
            assert MIB <= plan.max_bytes <= 32 * MIB
            assert 1 <= plan.depth <= 16
            assert 0 <= plan.pause_s <= 0.05

    @given(ELAPSED, WRITES, LATENCY)
    def test_plan_once_clients_are_idle_is_full_speed(
        self, elapsed_s: float, writes: int, mean_s: float
    ) -> None:
        """Nobody writes: nobody is given way to."""
        pace = Pace()
        pace.between(1.0, 100, 0.01)
        for _ in range(10):
            pace.after_batch(elapsed_s, writes, writes * mean_s, MIB)
        plan = pace.after_batch(0.01, 0, 0.0, 32 * MIB)
        assert (32 * MIB, 16, 0.0) == (plan.max_bytes, plan.depth, plan.pause_s)

    def test_plan_while_clients_suffer_gives_way_to_the_least(self) -> None:
        """Latency tripled: half each time, down to one command of 1 MiB and rests."""
        pace = Pace()
        pace.between(1.0, 1000, 0.1)
        depths = []
        for _ in range(6):
            plan = pace.after_batch(0.03, 100, 0.03, 32 * MIB)
            depths.append(plan.depth)
        assert [8, 4, 2, 1, 1, 1] == depths
        assert plan.max_bytes == MIB
        assert plan.pause_s == pytest.approx(0.03)

    def test_plan_once_clients_fare_well_again_grows_step_by_step(self) -> None:
        """Given way once, speed comes back slowly."""
        pace = Pace()
        pace.between(1.0, 1000, 0.1)
        for _ in range(6):
            pace.after_batch(0.01, 100, 0.1, 8 * MIB)
        depths = [pace.after_batch(0.01, 100, 0.01, 8 * MIB).depth for _ in range(4)]
        assert [2, 3, 4, 5] == depths

    def test_plan_without_a_baseline_pauses_to_measure_one(self) -> None:
        """Clients write but nobody knows their latency undisturbed: find out."""
        plan = Pace().after_batch(0.01, 100, 0.05, 8 * MIB)
        assert plan.pause_s == Pace.PROBE_S

    def test_baseline_from_a_gap_too_short_is_not_taken(self) -> None:
        """Writes answered just after a batch began during it and prove nothing."""
        pace = Pace()
        pace.between(0.001, 100, 10.0)
        assert pace.after_batch(0.01, 100, 0.05, 8 * MIB).pause_s == Pace.PROBE_S

    def test_batch_on_a_slow_link_takes_half_a_second(self) -> None:
        """2 MiB in a second: the next batch is 1 MiB, not 32."""
        assert Pace().after_batch(1.0, 0, 0.0, 2 * MIB).max_bytes == MIB
        assert Pace().after_batch(1.0, 0, 0.0, 20 * MIB).max_bytes == 10 * MIB
