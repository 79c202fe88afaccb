# SPDX-License-Identifier: BSD-3-Clause
"""
What happens to a node between two steps of its own: a promotion, a client's write.

As in test_node_role.py each event comes at a named step, so no case depends on time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from unit.test_node_role import World, fill
from unit.volumes import REGION

from nbd_mirror.base.errors import MirrorError, RemoteError
from nbd_mirror.rules.claim import format_claim
from nbd_mirror.server.node_calls import RefusedError
from nbd_mirror.server.node_meeting import Agreed, Meeting
from nbd_mirror.server.node_role import HAND_OVER_VARIABLE
from nbd_mirror.volume.model import NodeMap


@pytest.fixture
def world(run_dir: Path) -> Iterator[World]:
    """Give two nodes of one content; alpha is primary."""
    found = World(run_dir)
    assert found.alpha.order("promote", force=False) == ""
    fill(found)
    yield found
    for host in found.hosts.values():
        host.kill()


def lost_after(act: Callable[[], object]) -> Callable[[str], object]:
    """Give a call that *act* precedes, and whose answer is lost."""

    def call(node: str) -> object:
        act()
        raise RemoteError(f"{node} has ended the connection")

    return call


# --- another promotion, after the record was read and before `asks` is set ---


def test_a_token_is_void_once_its_giver_is_promoted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beta takes its role, asks alpha, consents to alpha, and gets no answer."""
    world.alpha.role._close({HAND_OVER_VARIABLE: "beta"})
    world.alpha.turn()
    assert world.beta.role._handover.token is not None

    def taken_back() -> None:
        assert world.alpha.order("promote", force=False) == ""

    monkeypatch.setattr(world.beta.others, "meet", lost_after(taken_back))
    world.beta.turn()
    assert world.primaries == ["alpha"]
    assert world.beta.local.own_term() == (2, "alpha")
    assert "alpha was promoted in epoch 2 in the meantime" in world.beta.role.waits[0]


def test_a_token_is_compared_with_the_record_that_is_judged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The consent comes before the other nodes are asked."""
    world.alpha.role._close({HAND_OVER_VARIABLE: "beta"})
    world.alpha.turn()
    meet_all = world.beta.role._meet_all

    def later() -> object:
        assert world.alpha.order("promote", force=False) == ""
        world.cut()
        return meet_all()

    monkeypatch.setattr(world.beta.role, "_meet_all", later)
    world.beta.turn()
    assert world.primaries == ["alpha"]


def test_start_alone_is_void_once_the_node_has_consented(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beta was primary last; its time to start alone is over just as alpha asks."""
    world.alpha.role._close({})
    assert world.beta.order("promote", force=False) == ""
    world.beta.kill()
    world.beta.start()
    world.beta.role._start_alone_s = 30.0
    world.beta.time = 31.0

    def promoted() -> None:
        assert world.alpha.order("promote", force=False) == ""

    monkeypatch.setattr(world.beta.others, "meet", lost_after(promoted))
    world.beta.turn()
    assert world.primaries == ["alpha"]


# --- a promotion that is stored, and whose door does not open ----------------


@pytest.fixture
def stuck(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Give the last primary, started again; requests at its disk do not end."""
    world.alpha.kill()
    world.alpha.start()

    def fence(*_: object) -> int:
        raise MirrorError("requests remain")

    monkeypatch.setattr(world.alpha.role._door, "fence", fence)
    return world


def test_a_retry_keeps_its_term(stuck: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried every second: else each second would count an epoch."""
    for _ in range(3):
        stuck.alpha.turn()
        assert stuck.primaries == []
        assert stuck.alpha.role.waits[0] == "requests remain"
        for host in stuck.hosts.values():
            assert host.local.own_term() == (2, "alpha")
    monkeypatch.undo()
    stuck.alpha.turn()
    assert stuck.primaries == ["alpha"]
    assert stuck.alpha.local.own_term() == (2, "alpha")


def test_a_retry_after_another_promotion_is_none(
    stuck: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beta was promoted in the meantime, so alpha follows, and later counts on."""
    stuck.alpha.turn()
    assert stuck.beta.order("promote", force=False) == ""
    monkeypatch.undo()
    stuck.alpha.turn()
    assert stuck.primaries == ["beta"]
    assert stuck.beta.order("demote", force=False) == ""
    assert stuck.alpha.order("promote", force=False) == ""
    assert stuck.alpha.local.own_term() == (4, "alpha")


def test_a_retry_counts_on_after_a_later_term_that_it_did_not_hear_of(
    stuck: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator forced beta, alone. Its term is later than the stored one."""
    stuck.alpha.turn()
    stuck.cut()
    assert stuck.beta.order("promote", force=True) == ""
    assert stuck.beta.order("demote", force=False) == ""
    stuck.linked = True
    monkeypatch.undo()
    stuck.alpha.turn()
    assert stuck.primaries == []
    assert stuck.alpha.order("promote", force=False) == ""
    assert stuck.alpha.local.own_term() == (4, "alpha")


# --- a meeting ---------------------------------------------------------------


def session(world: World, *, alone: bool = False) -> tuple[Meeting, Agreed]:
    """Have alpha meet beta, and claim its disk."""
    alpha, beta = world.alpha, world.beta
    meeting = Meeting(alpha.local, alpha.others, "beta", alone=alone)
    agreed = meeting.agree()

    def connect(_: str) -> None:
        assert meeting._claim is not None
        export = format_claim("v", meeting._claim)
        beta.calls.claim(export, None, lambda: True)

    meeting.claim(agreed, connect)
    return meeting, agreed


def test_a_cut_off_resync_is_not_in_sync_before_it_is_adopted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All was copied and the adoption was not: else beta could never be promoted."""
    monkeypatch.setattr(
        world.alpha.others, "fetch", lambda *_: world.beta.calls.dirty()
    )
    world.beta.local.change(lambda record: replace(record, inconsistent=True))
    meeting, agreed = session(world)
    meeting.begin(agreed)
    assert not meeting.is_settled()
    assert world.beta.local.behind
    assert meeting.settle(lambda: False)
    assert meeting.is_settled()
    assert not world.beta.local.record().inconsistent


@pytest.mark.parametrize("alone", [True, False])
def test_the_only_copy_does_not_become_inconsistent(
    world: World, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """
    Alpha's disk is lost, and what was active on beta is in doubt: nothing is copied.

    With a third copy, alpha can get those regions from there, and copy them.
    """
    alpha, beta = world.alpha, world.beta
    size = len(beta.local.bits("alpha", NodeMap.DOUBTS))
    doubts = b"\x06".ljust(size, b"\0")
    beta.engine.node_mark(beta.local.disk_of("alpha"), NodeMap.DOUBTS, doubts)
    monkeypatch.setattr(alpha.others, "fetch", lambda *_: beta.calls.dirty())
    bits = alpha.local.bits

    def lost(other: str, which: NodeMap) -> bytes:
        found = bits(other, which)
        return b"\xff" * len(found) if which is NodeMap.MISSED else found

    monkeypatch.setattr(alpha.local, "bits", lost)
    meeting, agreed = session(world, alone=alone)
    assert meeting.begin(agreed) == (0 if alone else 2)
    assert beta.local.record().inconsistent is not alone


def test_a_write_during_the_meeting_is_announced(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the maps were read; beta must know that a region is copied."""

    def fetch(*_: object) -> bytes:
        world.alpha.engine.pwrite(b"x" * 512, REGION)
        return world.beta.calls.dirty()

    monkeypatch.setattr(world.alpha.others, "fetch", fetch)
    meeting, agreed = session(world)
    assert meeting.begin(agreed) == 1
    assert world.beta.local.record().inconsistent
    assert not meeting.is_settled()


def test_a_write_after_the_meeting_keeps_the_node_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beta was told that it lacks nothing, so it may not be used as it is now."""
    monkeypatch.setattr(
        world.alpha.others, "fetch", lambda *_: world.beta.calls.dirty()
    )
    alpha, disk = world.alpha, world.alpha.local.disk_of("beta")
    alpha.at["begin_marked"] = lambda: alpha.engine.pwrite(b"x" * 512, REGION)
    meeting, agreed = session(world)
    assert meeting.begin(agreed) == 0
    assert not world.beta.local.record().inconsistent
    assert not meeting.is_settled()
    with pytest.raises(MirrorError, match="missed a write in the meantime"):
        alpha.engine.node_admit(disk)
    meeting, agreed = session(world)
    assert meeting.begin(agreed) == 1
    with pytest.raises(MirrorError, match="connection was lost"):
        alpha.engine.admit(disk)


def test_a_connection_that_leaves_ends_no_session_of_others(world: World) -> None:
    """It shows the claim in force: the session lives, and its loss still counts."""
    meeting, _ = session(world)
    claim = meeting._claim
    assert claim is not None
    assert world.beta.local.session == claim
    world.beta.calls.claim(format_claim("v", claim), None, lambda: False)
    assert world.beta.local.session == claim


def test_a_primary_that_has_left_is_not_shown_as_connected(world: World) -> None:
    """Otherwise its status would refuse a promotion until the next meeting."""
    meeting, _ = session(world)
    claim = meeting._claim
    assert claim is not None
    assert world.beta.others.contacts["alpha"].side is not None
    world.beta.calls.session_ended(format_claim("v", claim), clean=True)
    assert world.beta.others.contacts["alpha"].side is None


def test_a_node_that_lacks_something_is_not_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write came as its adoption was prepared: it is not offered the generation."""
    monkeypatch.setattr(
        world.alpha.others, "fetch", lambda *_: world.beta.calls.dirty()
    )
    disk = world.alpha.local.disk_of("beta")
    meeting, agreed = session(world)
    meeting.begin(agreed)
    world.alpha.at["offer_stored"] = lambda: world.alpha.engine.pwrite(
        b"x" * 512, REGION
    )
    assert not meeting.settle(lambda: not world.alpha.engine.node_whole(disk))
    assert not meeting.is_settled()


# --- the other node changes between two steps of a meeting -------------------

MEETING = ("meeting_agreed", "claim_numbered", "begin_marked", "offer_stored")


def copied(
    world: World, monkeypatch: pytest.MonkeyPatch, meetings: list[Meeting]
) -> None:
    """Have alpha meet beta, which lacks a write, and have it adopt in the end."""
    monkeypatch.setattr(
        world.alpha.others, "fetch", lambda *_: world.beta.calls.dirty()
    )
    meeting, agreed = session(world)
    meetings.append(meeting)
    assert meeting.begin(agreed) == 1
    meeting.settle(lambda: False)


@pytest.mark.parametrize("step", MEETING)
def test_a_forced_promotion_inside_a_meeting(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What alpha decided before it is void: it neither demotes nor counts beta."""
    alpha, beta = world.alpha, world.beta
    alpha.engine.pwrite(b"x" * 512, REGION)

    def forced() -> None:
        world.cut()
        beta.local.change(lambda record: replace(record, inconsistent=False))
        assert beta.order("promote", force=True) == ""
        world.linked = True

    alpha.at[step] = forced
    meetings: list[Meeting] = []
    with pytest.raises((MirrorError, RefusedError)):
        copied(world, monkeypatch, meetings)
    assert beta.primary
    assert beta.local.own_term() == (2, "beta")
    assert not beta.local.record().inconsistent
    generation = alpha.local.record().lineage.generation
    assert beta.local.record().lineage.generation != generation
    assert not any(meeting.is_settled() for meeting in meetings)


@pytest.mark.parametrize("step", MEETING)
def test_a_kill_inside_a_meeting(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Beta starts again: it adopts in a session that it knows, or not at all."""
    alpha, beta = world.alpha, world.beta
    alpha.engine.pwrite(b"x" * 512, REGION)

    def again() -> None:
        beta.kill()
        beta.start()

    alpha.at[step] = again
    meetings: list[Meeting] = []
    late = step in ("begin_marked", "offer_stored")
    if late:
        with pytest.raises(MirrorError):
            copied(world, monkeypatch, meetings)
    else:
        copied(world, monkeypatch, meetings)
    generation = alpha.local.record().lineage.generation
    same = beta.local.record().lineage.generation == generation
    assert meetings[-1].is_settled() is same is (not late)
