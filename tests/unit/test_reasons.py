# SPDX-License-Identifier: BSD-3-Clause
"""
The reasons of states: every combination of facts has one.

"Stuck, and does not say why" is the complaint about mirrors, so the reason is tested
for all facts there can be, not for examples.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from unit.facts import FACTS, LOCAL_FACTS

from nbd_mirror.rules.reasons import describe, describe_local, describe_stored
from nbd_mirror.rules.state import (
    STALLED_S,
    Facts,
    LocalFacts,
    LocalState,
    RemoteState,
    volume_state,
)


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


class TestDescribeStored:
    """The same for a remote of a volume without a server."""

    @given(FACTS)
    def test_whatever_is_not_in_sync_has_a_reason(self, facts: Facts) -> None:
        """A stopped volume says why too."""
        reason, _ = describe_stored(facts, "pg")
        if facts.state is not RemoteState.IN_SYNC or facts.assumed:
            assert reason.strip()

    def test_reason_within_the_late_window_says_so(self) -> None:
        """The server ended while writes of a lost connection could still come."""
        facts = Facts(
            "dr", RemoteState.OUT_OF_SYNC, dirty_bytes=1 << 20, late_bytes=1 << 16
        )
        assert describe_stored(facts) == (
            "writes of a lost connection may still be carried out in 64 KiB: the next "
            "server copies that again afterwards",
            "",
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
