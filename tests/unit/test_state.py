# SPDX-License-Identifier: BSD-3-Clause
"""The rules of states: every combination of facts has a step."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.facts import every_facts

from nbd_mirror.rules.state import (
    BACKOFF_LAST_S,
    Action,
    Facts,
    LocalState,
    RemoteState,
    Step,
    backoff_s,
    hold_retry_s,
    next_step,
    volume_state,
)


class TestNextStep:
    """What a keeper does next."""

    @every_facts
    def test_step_for_every_combination_keeps_the_rules(self, facts: Facts) -> None:
        """No step does what its remote's state forbids, and none is put off."""
        step = next_step(facts)
        if facts.state is RemoteState.FAILED or facts.volume_failed:
            assert step == Step(Action.WAIT)
            return
        if step.action is Action.CONNECT:
            assert not facts.admitted
            assert facts.retry_s == 0
        if step.action in (Action.RESYNC, Action.RELEASE_LATE):
            assert facts.admitted
        if step.action is Action.RESYNC:
            assert not facts.paused
            assert facts.state is RemoteState.RESYNCING
            assert facts.dirty_bytes == 0 or facts.dirty_bytes > facts.late_bytes
        if step.action is Action.RELEASE_LATE:
            assert facts.late_bytes > 0
            assert facts.late_s == 0
        if not facts.admitted and facts.retry_s == 0:
            assert step.action is Action.CONNECT

    @every_facts
    def test_wait_for_every_combination_has_a_way_out(self, facts: Facts) -> None:
        """A keeper waits without end for an operator alone, or has nothing to do."""
        step = next_step(facts)
        if step == Step(Action.WAIT):
            assert (
                facts.state is RemoteState.FAILED
                or facts.volume_failed
                or (facts.admitted and facts.paused and facts.late_bytes == 0)
                or (
                    facts.admitted
                    and facts.state is not RemoteState.RESYNCING
                    and facts.late_bytes == 0
                )
            )
        elif step.action is Action.WAIT:
            assert step.wait_s is not None
            assert step.wait_s > 0

    @every_facts
    def test_wait_when_its_time_is_over_ends(self, facts: Facts) -> None:
        """The step after a timed wait is no wait for the same time again."""
        step = next_step(facts)
        if step.wait_s is None:
            return
        later = dataclasses.replace(
            facts,
            retry_s=max(facts.retry_s - step.wait_s, 0.0),
            late_s=max(facts.late_s - step.wait_s, 0.0),
        )
        assert later != facts
        assert next_step(later) != step

    def test_step_of_a_paused_remote_not_connected_is_to_connect(self) -> None:
        """A pause holds back copying, not the mirroring of clean regions."""
        facts = Facts("dr", RemoteState.PAUSED, paused=True, dirty_bytes=1)
        assert next_step(facts) == Step(Action.CONNECT)

    def test_step_of_a_remote_with_late_regions_only_is_to_wait(self) -> None:
        """Late regions are not copied before the window is over."""
        facts = Facts(
            "dr",
            RemoteState.RESYNCING,
            admitted=True,
            dirty_bytes=64,
            late_bytes=64,
            late_s=12.5,
        )
        assert next_step(facts) == Step(Action.WAIT, 12.5)

    def test_step_of_a_resync_with_nothing_dirty_ends_it(self) -> None:
        """A resyncing remote without a dirty region is not left so."""
        facts = Facts("dr", RemoteState.RESYNCING, admitted=True)
        assert next_step(facts) == Step(Action.RESYNC)


class TestVolumeState:
    """One word for all."""

    ORDER = (
        RemoteState.IN_SYNC,
        RemoteState.HOLDING,
        RemoteState.RESYNCING,
        RemoteState.PAUSED,
        RemoteState.OUT_OF_SYNC,
        RemoteState.FAILED,
    )

    @pytest.mark.parametrize(
        "states", list(itertools.product(RemoteState, repeat=2)), ids=str
    )
    def test_volume_is_what_its_worst_remote_is(
        self, states: tuple[RemoteState, ...]
    ) -> None:
        """Two remotes: the worse one counts."""
        worst = max(states, key=self.ORDER.index).value
        assert worst == volume_state(
            states, failed=False, fenced=False, local=LocalState.OK
        )

    @pytest.mark.parametrize(
        ("failed", "local"), [(True, LocalState.OK), (False, LocalState.FAILED)]
    )
    def test_volume_that_failed_is_failed_whatever_its_remotes(
        self, failed: bool, local: LocalState
    ) -> None:
        """Metadata or the local disk failed: that is the word."""
        states = [RemoteState.IN_SYNC]
        assert "failed" == volume_state(
            states, failed=failed, fenced=False, local=local
        )

    @pytest.mark.parametrize("remote", RemoteState)
    def test_volume_whose_local_disk_is_copied_back_is_resyncing_or_worse(
        self, remote: RemoteState
    ) -> None:
        """The local disk counts as a remote that is resyncing."""
        worst = max(remote, RemoteState.RESYNCING, key=self.ORDER.index)
        assert worst.value == volume_state(
            [remote], failed=False, fenced=False, local=LocalState.RESYNCING
        )

    def test_volume_that_is_fenced_is_not_in_sync(self) -> None:
        """Writes that get EIO are not called in_sync or holding."""
        word = volume_state(
            [RemoteState.HOLDING], failed=False, fenced=True, local=LocalState.OK
        )
        assert "out_of_sync" == word


class TestRetries:
    """When the next attempt is made."""

    @given(
        st.integers(min_value=1, max_value=10_000),
        st.floats(min_value=0, max_value=1, exclude_max=True),
    )
    def test_backoff_doubles_within_its_jitter_and_bound(
        self, attempt: int, random: float
    ) -> None:
        """0.1 s, doubling to 30 s, give or take a quarter."""
        mean_s = min(0.1 * 2 ** min(attempt - 1, 20), BACKOFF_LAST_S)
        wait_s = backoff_s(attempt, random)
        assert 0.75 * mean_s <= wait_s * (1 + 1e-9)
        assert wait_s <= 1.25 * mean_s * (1 + 1e-9)

    @given(st.floats(min_value=0, max_value=1, exclude_max=True))
    def test_retry_while_requests_wait_is_quick(self, random: float) -> None:
        """50 to 200 ms: the hold lasts two seconds."""
        assert 0.05 <= hold_retry_s(random) <= 0.2

    def test_state_from_c_covers_the_enum_and_nothing_else(self) -> None:
        """The numbers of enum nbdm_remote_state, 1 to 6."""
        assert list(RemoteState) == [RemoteState.from_c(i) for i in range(1, 7)]
        for value in (0, 7):
            with pytest.raises(ValueError, match="unknown remote state"):
                RemoteState.from_c(value)
