# SPDX-License-Identifier: BSD-3-Clause
"""Resync's figures are honest for any counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_mirror.rules.progress import Progress

MIB = 1 << 20

# How much time passed, how much was copied, how much clients dirtied.
STEPS = st.lists(
    st.tuples(
        st.floats(min_value=0, max_value=100),
        st.integers(min_value=0, max_value=1 << 40),
        st.integers(min_value=0, max_value=1 << 40),
    ),
    max_size=30,
)


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
        """A resync that does not move has no known end."""
        progress = Progress(0.0, 100, 0)
        progress.update(5.0, 100, 0)
        assert progress.eta_s is None

    def test_stall_while_waiting_knowingly_is_not_counted(self) -> None:
        """A late-write window or a pause is no stall."""
        progress = Progress(0.0, 100, 0)
        progress.waited(40.0)
        assert progress.stalled_s(41.0) == pytest.approx(1.0)
