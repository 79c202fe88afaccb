# SPDX-License-Identifier: BSD-3-Clause
"""
The rules of states: every combination of facts has a step, and a reason.

"Stuck, and does not say why" is the complaint about mirrors, so the reason is tested
for all facts there can be, not for examples.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_mirror.rules.reasons import describe, describe_local
from nbd_mirror.rules.state import (
    BACKOFF_LAST_S,
    STALLED_S,
    Action,
    Facts,
    LocalFacts,
    LocalState,
    RemoteState,
    Step,
    backoff_s,
    hold_retry_s,
    next_step,
    volume_state,
)

AMOUNTS = st.integers(min_value=0, max_value=1 << 50)
TIMES = st.floats(min_value=0, max_value=1e6)
WORDS = st.sampled_from(["", "Connection refused"])
FACTS = st.builds(
    Facts,
    name=st.just("dr"),
    state=st.sampled_from(RemoteState),
    paused=st.booleans(),
    assumed=st.booleans(),
    admitted=st.booleans(),
    dirty_bytes=AMOUNTS,
    late_bytes=AMOUNTS,
    outstanding=st.integers(min_value=0, max_value=1000),
    reason=WORDS,
    last_error=WORDS,
    connecting=st.booleans(),
    retry_s=TIMES,
    late_s=TIMES,
    stalled_s=TIMES,
    volume_failed=st.booleans(),
)
LOCAL_FACTS = [
    LocalFacts(state, dirty, sources, reason, error, stalled_s)
    for state in LocalState
    for dirty in (0, 1, 5 << 30)
    for sources in (0, 2)
    for reason in ("", "the local disk failed to write at 0: Input/output error")
    for error in ("", "no remote that has it is connected")
    for stalled_s in (0.0, STALLED_S + 1)
]


def every_combination() -> list[Facts]:
    """Give all combinations of what a step can depend on."""
    flags = [False, True]
    amounts = [(0, 0), (100, 0), (100, 100), (100, 40)]
    return [
        Facts(
            name="dr",
            state=state,
            paused=paused,
            admitted=admitted,
            dirty_bytes=dirty,
            late_bytes=late,
            retry_s=retry_s,
            late_s=late_s,
            volume_failed=failed,
        )
        for state, paused, admitted, (dirty, late), retry_s, late_s, failed in (
            itertools.product(
                RemoteState, flags, flags, amounts, [0.0, 3.0], [0.0, 7.0], flags
            )
        )
    ]


def every_facts(test: Callable[[Any, Facts], None]) -> Callable[[Any], None]:
    """Run a method for every combination, as one test."""

    @functools.wraps(test)
    def run(self: object) -> None:
        for facts in every_combination():
            test(self, facts)

    # Else pytest takes the wrapped function's parameter for a fixture.
    del run.__wrapped__
    return run


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


class TestDescribe:
    """Why a remote is in its state, and what helps."""

    @given(FACTS)
    def test_reason_of_whatever_is_not_in_sync_is_never_empty(
        self, facts: Facts
    ) -> None:
        """Stuck without saying why is impossible."""
        reason, _ = describe(facts, "pg")
        if (
            facts.state is not RemoteState.IN_SYNC
            or not facts.admitted
            or facts.assumed
            or facts.volume_failed
        ):
            assert reason.strip()

    @given(FACTS)
    def test_hint_if_any_names_volume_and_remote(self, facts: Facts) -> None:
        """A hint can be typed as it stands."""
        _, hint = describe(facts, "pg")
        assert hint == "" or (hint.startswith("nbd-mirror ") and " pg dr" in hint)

    @given(FACTS)
    def test_remote_that_an_operator_has_to_see_to_has_a_hint(
        self, facts: Facts
    ) -> None:
        """What does not go away by itself comes with the command that helps."""
        _, hint = describe(facts, "pg")
        if facts.state is RemoteState.FAILED:
            assert "invalidate pg dr" in hint
            assert "resume pg dr" in hint
        elif facts.state is RemoteState.PAUSED and not facts.volume_failed:
            assert hint == "nbd-mirror resume pg dr"

    def test_reason_while_connecting_fails_tells_error_and_next_attempt(self) -> None:
        """A reason says what the far side said, and when it is tried again."""
        facts = Facts(
            "dr", RemoteState.OUT_OF_SYNC, last_error="Connection refused", retry_s=3.2
        )
        reason, _ = describe(facts)
        assert reason == "Connection refused; next attempt in 4 s"

    def test_reason_within_the_late_window_says_so(self) -> None:
        """Waiting for late writes does not look like a stall."""
        facts = Facts(
            "dr",
            RemoteState.RESYNCING,
            admitted=True,
            dirty_bytes=65536,
            late_bytes=65536,
            late_s=11.4,
            stalled_s=STALLED_S + 5,
        )
        reason, _ = describe(facts)
        assert "64 KiB are copied again in 12 s" in reason

    def test_reason_of_a_stall_names_the_cause(self) -> None:
        """No region finished for a while: the reason says what it waits for."""
        facts = Facts(
            "dr",
            RemoteState.RESYNCING,
            admitted=True,
            dirty_bytes=65536,
            outstanding=3,
            stalled_s=STALLED_S + 1,
        )
        reason, _ = describe(facts)
        assert "no region was copied for 11 s" in reason
        assert "has not answered 3 commands" in reason

    def test_reason_of_a_copy_that_fails_is_its_error(self) -> None:
        """A resync that is retried shows the error and the bytes left."""
        facts = Facts(
            "dr",
            RemoteState.RESYNCING,
            admitted=True,
            dirty_bytes=3 << 20,
            last_error="local: Input/output error",
            retry_s=5.0,
        )
        reason, _ = describe(facts)
        assert reason == (
            "3.0 MiB left to copy; the last copy failed: local: Input/output error; "
            "next attempt in 5 s"
        )


class TestDescribeLocal:
    """Why the local disk is as it is, and what helps."""

    @pytest.mark.parametrize("facts", LOCAL_FACTS, ids=str)
    def test_whatever_is_not_ok_has_a_reason_and_an_operators_state_a_hint(
        self, facts: LocalFacts
    ) -> None:
        """Only a failed disk waits for an operator; a copy back goes on by itself."""
        reason, hint = describe_local(facts, "pg")
        assert bool(reason) is (facts.state is not LocalState.OK)
        assert bool(hint) is (facts.state is LocalState.FAILED)
        if hint:
            assert "nbd-mirror resume pg local" in hint
            assert "nbd-mirror invalidate pg local" in hint
            assert facts.reason in reason

    def test_failed_without_a_remote_says_that_requests_fail(self) -> None:
        """No text says that remotes serve when there is none."""
        alone, _ = describe_local(LocalFacts(LocalState.FAILED, sources=0))
        served, _ = describe_local(LocalFacts(LocalState.FAILED, sources=1))
        assert "EIO" in alone
        assert "EIO" not in served
        assert "the remotes serve" in served

    def test_copying_back_without_a_remote_says_that_it_waits(self) -> None:
        """A copy that cannot go on names what it waits for."""
        facts = LocalFacts(LocalState.RESYNCING, 3 << 20, sources=0)
        reason, _ = describe_local(facts)
        assert reason.startswith("3.0 MiB left to copy back from the remotes")
        assert "no remote is connected" in reason

    def test_stalled_copy_says_so(self) -> None:
        """No region finished for a while: not passed over in silence."""
        facts = LocalFacts(
            LocalState.RESYNCING, 65536, sources=1, stalled_s=STALLED_S + 1
        )
        assert "no region was copied for 11 s" in describe_local(facts)[0]

    def test_state_from_c_covers_the_enum_and_nothing_else(self) -> None:
        """The numbers of enum nbdm_local_state, 1 to 3."""
        assert list(LocalState) == [LocalState.from_c(i) for i in range(1, 4)]
        for value in (0, 4):
            with pytest.raises(ValueError, match="unknown local state"):
                LocalState.from_c(value)


class TestSilentDisk:
    """A local disk that keeps requests waiting is not well, whatever its state."""

    def test_it_is_said_for_how_long(self) -> None:
        """The copy back shows it as well; a disk that is not used does not."""
        for state in (LocalState.OK, LocalState.RESYNCING):
            facts = LocalFacts(state, sources=1, silent_s=11.5)
            assert facts.silent
            assert "has not answered for 12 s" in describe_local(facts)[0]
        assert not LocalFacts(LocalState.FAILED, silent_s=11.5).silent
        assert not LocalFacts(LocalState.OK, silent_s=2.0).silent

    def test_failed_one_that_keeps_a_request_says_so(self) -> None:
        """No disk is attached before it has let go: the reason says why."""
        for silent_s, said in ((0.0, False), (0.4, True)):
            facts = LocalFacts(
                LocalState.FAILED, sources=1, reason="gone", silent_s=silent_s
            )
            reason, _ = describe_local(facts)
            assert said == reason.startswith("gone and still keeps a request; ")

    def test_the_volume_is_not_in_sync_then(self) -> None:
        """Requests wait, as for a lost remote."""
        word = volume_state(
            [RemoteState.IN_SYNC],
            failed=False,
            fenced=False,
            local=LocalState.OK,
            silent=True,
        )
        assert word == "holding"


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
