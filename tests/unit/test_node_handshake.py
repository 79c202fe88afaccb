# SPDX-License-Identifier: BSD-3-Clause
"""
The handshake of nodes, one decision at a time.

Rows of `REPORTED` are faults that DRBD had from 2020 to 2026, each as the state of two
nodes at its beginning. nodes_model.py shows that the rules hold over time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nbd_mirror.rules.node_handshake import decide, healable, resolve
from nbd_mirror.rules.node_side import Action, Crash, Extent, Plan, Role, Side
from nbd_mirror.rules.promotion import may_hand_over, may_resume

A = Side("v", "a", 1 << 30, generation=1, epoch=1, leader="a")
B = replace(A, node="b")


def in_direction(plan: Plan) -> str:
    """Give "a>b" for a resync from a to b, else the action."""
    if plan.action is Action.RESYNC:
        return f"{plan.source}>{plan.target}"
    return str(plan.action.value)


# By row: side a, side b, what they do, and what is copied.
ROWS = {
    "1 another volume": (A, replace(B, volume="w"), "stop", Extent.NOTHING),
    "1 another size": (A, replace(B, size=1 << 20), "stop", Extent.NOTHING),
    "2 one is empty": (A, replace(B, generation=0), "a>b", Extent.DIFFERENT),
    "2 both are empty": (
        replace(A, generation=0),
        replace(B, generation=0),
        "stop",
        Extent.NOTHING,
    ),
    "2 both are proven zero": (
        replace(A, generation=0, zero=True),
        replace(B, generation=0, zero=True),
        "new",
        Extent.NOTHING,
    ),
    "2 both are empty, one is proven zero": (
        replace(A, generation=0, zero=True),
        replace(B, generation=0),
        "stop",
        Extent.NOTHING,
    ),
    "3 two secondaries, one knows of a later third primary": (
        A,
        replace(B, epoch=2, leader="c"),
        "in_sync",
        Extent.NOTHING,
    ),
    "3 nothing differs": (A, B, "in_sync", Extent.NOTHING),
    "4 one is inconsistent": (replace(A, inconsistent=True), B, "b>a", Extent.MARKED),
    "4 both are inconsistent": (
        replace(A, inconsistent=True),
        replace(B, inconsistent=True),
        "stop",
        Extent.NOTHING,
    ),
    "5 one crashed, the other stayed up": (
        replace(A, doubts=3, crash=Crash.HOST),
        B,
        "b>a",
        Extent.MARKED,
    ),
    "5 it crashed, and is primary again": (
        replace(A, doubts=3, crash=Crash.HOST, role=Role.PRIMARY),
        B,
        "a>b",
        Extent.MARKED,
    ),
    "6 both lost power": (
        replace(A, doubts=3, crash=Crash.HOST),
        replace(B, doubts=2, crash=Crash.HOST),
        "a>b",
        Extent.MARKED,
    ),
    "5 the server of the last primary was killed": (
        replace(A, doubts=3, crash=Crash.PROCESS),
        replace(B, doubts=3, crash=Crash.SESSION),
        "a>b",
        Extent.MARKED,
    ),
    "5 a killed server, and a host that lost power": (
        replace(A, doubts=3, crash=Crash.HOST),
        replace(B, doubts=3, crash=Crash.PROCESS),
        "b>a",
        Extent.MARKED,
    ),
    "6 both lost power, and one is primary": (
        replace(A, doubts=3, crash=Crash.HOST),
        replace(B, doubts=2, crash=Crash.HOST, role=Role.PRIMARY),
        "b>a",
        Extent.MARKED,
    ),
    "6 both lost power, and the other was last": (
        replace(A, doubts=3, crash=Crash.HOST),
        replace(B, doubts=2, crash=Crash.HOST, epoch=2, leader="b"),
        "b>a",
        Extent.MARKED,
    ),
    "6 both lost power, and both know that the other was last": (
        replace(A, doubts=3, crash=Crash.HOST, leader="b"),
        replace(B, doubts=2, crash=Crash.HOST, leader="b"),
        "b>a",
        Extent.MARKED,
    ),
    "6 both lost power, and a third node was last": (
        replace(A, doubts=3, crash=Crash.HOST, leader="c"),
        replace(B, doubts=2, crash=Crash.HOST, leader="c"),
        "a>b",
        Extent.MARKED,
    ),
    "7 one has a map": (replace(A, dirty=4), B, "a>b", Extent.MARKED),
    "7 the other is the only primary": (
        replace(A, dirty=4),
        replace(B, role=Role.PRIMARY),
        "b>a",
        Extent.MARKED,
    ),
    "8 both have a map": (
        replace(A, dirty=1),
        replace(B, dirty=1),
        "stop",
        Extent.NOTHING,
    ),
    "9 the other counts from this one's": (
        A,
        replace(B, generation=2, bases=(1,), dirty=5),
        "b>a",
        Extent.MARKED,
    ),
    "9 its disk misses regions": (
        replace(A, missed=2),
        replace(B, generation=2, bases=(1,), missed=3),
        "b>a",
        Extent.MARKED,
    ),
    "10 this one counts from the other's": (
        replace(A, generation=2, bases=(1,), dirty=5),
        replace(B, dirty=2, doubts=1),
        "a>b",
        Extent.MARKED,
    ),
    "11 an ancestor": (
        A,
        replace(B, generation=3, history=(2, 1)),
        "b>a",
        Extent.DIFFERENT,
    ),
    "12 both moved from a base": (
        replace(A, generation=2, bases=(1,), dirty=1),
        replace(B, generation=3, bases=(1,), dirty=1),
        "stop",
        Extent.NOTHING,
    ),
    "13 both moved from an ancestor": (
        replace(A, generation=2, history=(1,)),
        replace(B, generation=3, history=(1,)),
        "stop",
        Extent.NOTHING,
    ),
    "14 nothing in common": (A, replace(B, generation=9), "stop", Extent.NOTHING),
    "one disk misses regions": (replace(A, missed=7), B, "b>a", Extent.MARKED),
    "a primary's disk misses regions": (
        replace(A, missed=7, role=Role.PRIMARY),
        B,
        "a>b",
        Extent.MARKED,
    ),
    "veto: the source is inconsistent": (
        replace(A, generation=2, bases=(1,), inconsistent=True),
        B,
        "stop",
        Extent.NOTHING,
    ),
    "veto: by checksums, and the source misses regions": (
        replace(A, generation=2, history=(1,), missed=1),
        B,
        "stop",
        Extent.NOTHING,
    ),
    "veto: the target serves": (
        replace(A, generation=2, bases=(1,)),
        replace(B, role=Role.PRIMARY),
        "stop",
        Extent.NOTHING,
    ),
    "veto: the target serves, and wrote": (
        replace(A, role=Role.PRIMARY, dirty=2),
        replace(B, role=Role.PRIMARY, epoch=2, leader="b"),
        "stop",
        Extent.NOTHING,
    ),
    "no veto: the target serves, and answered nothing": (
        replace(A, role=Role.PRIMARY),
        replace(B, role=Role.PRIMARY, epoch=2, leader="b"),
        "b>a",
        Extent.MARKED,
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_row(row: str) -> None:
    """Each row of the table, from both sides."""
    mine, other, expected, extent = ROWS[row]
    for plan in (decide(mine, other), decide(other, mine)):
        assert in_direction(plan) == expected
        assert plan.extent is extent
        assert (plan.action is Action.STOP) == bool(plan.reason)


# By the report: the state at its beginning, and the outcome that must not happen.
REPORTED = {
    "1 a flag said no resync, 16 bits were dropped (LINBIT/drbd#145)": (
        replace(A, dirty=16),
        replace(B, crash=Crash.HOST),
        "a>b",
    ),
    "2 equal ids, bits on both sides were dropped": (
        replace(A, dirty=1),
        replace(B, dirty=1),
        "stop",
    ),
    "3 a source that may not be one was tried for ever (LINBIT/drbd#143)": (
        replace(A, generation=2, bases=(1,), inconsistent=True),
        B,
        "stop",
    ),
    "4 two disks made alike passed for equal": (
        replace(A, generation=0),
        replace(B, generation=0),
        "stop",
    ),
    "10 history was not inherited: two good nodes were unrelated": (
        replace(A, generation=3, history=(2, 1)),
        replace(B, generation=1),
        "a>b",
    ),
    "11 no common base, a wrong bitmap was used": (
        replace(A, generation=4, history=(1,)),
        replace(B, generation=5, history=(1,), bases=(2,), dirty=1),
        "stop",
    ),
    "14 the map of two inconsistent nodes was dropped": (
        replace(A, inconsistent=True, dirty=1),
        replace(B, inconsistent=True),
        "stop",
    ),
    "12 the map of a node that was removed was empty, its id matched": (
        replace(A, generation=2, history=(1,)),  # removing it erased the base
        B,
        "a>b",
    ),
    "17 one side missed the end of the resync": (replace(A, bases=(9,)), B, "in_sync"),
    "18 both nodes were the source": (
        replace(A, generation=2, bases=(3,)),
        replace(B, generation=3, bases=(2,)),
        "stop",
    ),
    "19 the role decided that data was old": (
        replace(A, role=Role.PRIMARY),
        replace(B, epoch=0),
        "in_sync",
    ),
    "22 a stale disk was attached and trusted": (
        replace(A, missed=7),
        replace(B, role=Role.PRIMARY),
        "b>a",
    ),
}


@pytest.mark.parametrize("report", REPORTED)
def test_reported(report: str) -> None:
    """In these states other programs diverged silently, or retried forever."""
    mine, other, expected = REPORTED[report]
    assert in_direction(decide(mine, other)) == expected
    assert in_direction(decide(other, mine)) == expected


def sides(node: str) -> Iterator[Side]:
    """Every kind of node, as another one may meet it."""
    for generation, history, bases in (
        (0, (), ()),
        (1, (), ()),
        (2, (1,), (1,)),
        (3, (1,), (1,)),
        (3, (2, 1), ()),
        (4, (2, 1), (2, 1)),
    ):
        for (
            dirty,
            doubts,
            missed,
            crash,
            inconsistent,
            role,
            epoch,
        ) in itertools.product(
            (0, 1),
            (0, 1),
            (0, 1),
            (Crash.NONE, Crash.HOST),
            (False, True),
            Role,
            (1, 2),
        ):
            yield Side(
                "v",
                node,
                1 << 30,
                generation,
                history,
                bases,
                dirty,
                doubts,
                missed,
                crash,
                inconsistent,
                role=role,
                epoch=epoch,
                leader=node if role is Role.PRIMARY else "ab"[epoch - 1],
            )


@pytest.mark.slow
def test_every_combination() -> None:
    """Both sides agree; no marked region is in sync; no veto is ignored."""
    others = list(sides("b"))
    for mine in sides("a"):
        for other in others:
            plan = decide(mine, other)
            assert plan == decide(other, mine)
            check(plan, mine, other)


def check(plan: Plan, mine: Side, other: Side) -> None:
    """Check the rules that a plan may never break, for any two nodes."""
    by_name = {side.node: side for side in (mine, other)}
    if plan.action is Action.STOP:
        assert plan.reason
        assert plan.hint or not plan.split
        return
    if plan.action is Action.IN_SYNC:
        marks = [side.dirty + side.doubts + side.missed for side in (mine, other)]
        assert not any(marks)
        assert mine.generation == other.generation
        assert not any(side.inconsistent for side in (mine, other))
    if plan.action is Action.RESYNC:
        source, target = by_name[plan.source], by_name[plan.target]
        assert not source.inconsistent
        assert source.generation != 0
        assert plan.heals_source == (source.missed > 0)
        assert plan.extent is not Extent.DIFFERENT or not source.missed
        assert target.role is Role.SECONDARY or source.role is Role.PRIMARY
        assert plan.demotes == (target.role is Role.PRIMARY)
        assert not (plan.demotes and target.dirty)
        assert plan.discards == target.dirty
        assert plan.epoch > target.epoch or source.term >= target.term
        exact = source.generation == target.generation
        exact = exact or target.generation in source.bases
        assert (plan.extent is Extent.MARKED) == exact


def test_resolve_overrules_a_split_brain_only() -> None:
    """The kept node begins a generation; unrelated data stay apart."""
    mine, other, _, _ = ROWS["12 both moved from a base"]
    for keep, lose in ((mine, other), (other, mine)):
        plan = resolve(keep, lose)
        assert (plan.source, plan.target) == (keep.node, lose.node)
        assert plan.extent is Extent.MARKED
        assert plan.begins
        assert plan.epoch == 2
        assert plan.discards == lose.dirty
    mine, other, _, _ = ROWS["13 both moved from an ancestor"]
    assert resolve(mine, other).extent is Extent.DIFFERENT
    mine, other, _, _ = ROWS["14 nothing in common"]
    assert resolve(mine, other).action is Action.STOP


@pytest.mark.parametrize(
    "keep",
    [
        replace(B, generation=9, epoch=2, leader="c"),
        replace(B, generation=0, epoch=2, leader="c"),
    ],
    ids=["unrelated", "empty"],
)
def test_resolve_copies_no_unrelated_data_at_the_news_of_a_later_primary(
    keep: Side,
) -> None:
    """A third node's promotion changes nothing about what the two nodes hold."""
    serving = replace(A, role=Role.PRIMARY)
    for plan in (resolve(keep, serving), resolve(serving, keep)):
        assert plan.action is not Action.RESYNC or plan.source == "a"
    assert resolve(keep, serving).action is Action.STOP
    assert resolve(keep, serving).reason


def test_a_missed_region_is_never_taken_from_an_older_copy() -> None:
    """The target lacks region 1, and its own disk misses region 2."""
    assert healable({1, 2, 3}, {1}, {2}) == {3}


def test_resolve_never_copies_from_an_inconsistent_image() -> None:
    """An operator cannot choose an image that is of no instant."""
    mine, other, _, _ = ROWS["12 both moved from a base"]
    plan = resolve(replace(mine, inconsistent=True), other)
    assert plan.action is Action.STOP
    assert (plan.begins, plan.epoch) == (False, 0)
    assert "of no instant" in plan.reason


def test_the_last_primary_resumes() -> None:
    """A node may resume only if none was promoted since, and only with all data."""
    killed = replace(A, doubts=2, crash=Crash.PROCESS)
    crashed = replace(A, doubts=2, crash=Crash.HOST)
    assert may_resume(A, B)
    assert may_resume(replace(A, dirty=1), B)  # the other one waits for its data
    assert not may_resume(B, A)
    assert may_resume(killed, replace(B, doubts=2, crash=Crash.SESSION))
    assert not may_resume(crashed, B)  # it waits for the other's data first
    # Power was cut at both: no copy is better, so none is waited for.
    assert may_resume(crashed, replace(B, doubts=1, crash=Crash.HOST))
    assert not may_resume(crashed, replace(B, doubts=1, crash=Crash.PROCESS))
    assert not may_resume(A, replace(B, role=Role.PRIMARY))
    assert not may_resume(A, replace(B, epoch=2, leader="b"))
    # It consented to a promotion of this node that was cut off.
    assert may_resume(A, replace(B, epoch=2, leader="a"))
    assert not may_resume(replace(A, handed="b"), B)
    assert not may_resume(replace(A, role=Role.PRIMARY, missed=1), B)


def test_only_the_last_primary_hands_over() -> None:
    """The token needs no other node's consent, so only one token may exist."""
    assert may_hand_over(A, B)
    assert not may_hand_over(B, A)
    assert not may_hand_over(replace(A, handed="c"), B)
    assert not may_hand_over(replace(A, role=Role.PRIMARY), B)
    assert not may_hand_over(A, replace(B, epoch=2, leader="c"))
    assert not may_hand_over(replace(A, dirty=1), B)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(B, volume="w"), "serves volume w"),
        (replace(B, size=1 << 20), "1048576 bytes on b"),
        (replace(B, generation=9), "nothing in common"),
        (replace(B, generation=3, history=(1,), bases=(2,)), "contradict each other"),
        (replace(B, generation=3, history=(2, 1)), "contradict each other"),
        (
            replace(B, generation=3, history=(9, 1), epoch=2, leader="c"),
            "c was promoted after it",
        ),
    ],
)
def test_a_stop_names_what_is_wrong(other: Side, words: str) -> None:
    """The operator is told the reason that must be resolved first."""
    serving = replace(A, role=Role.PRIMARY, generation=2, history=(1,), bases=(3,))
    if other.leader == "c":
        serving = replace(serving, bases=())
    for plan in (decide(serving, other), decide(other, serving)):
        assert plan.action is Action.STOP
        assert words in plan.reason


def test_a_primary_that_stays_one_gets_the_later_term() -> None:
    """The other node was promoted later, answered nothing, and serves no more."""
    serving = replace(A, role=Role.PRIMARY)
    ended = replace(B, epoch=2, leader="b")
    for plan in (decide(serving, ended), decide(ended, serving)):
        assert plan.action is Action.IN_SYNC
        assert (plan.source, plan.epoch) == ("a", 3)


def test_a_primary_stops_at_the_news_of_a_later_one() -> None:
    """A third node was promoted, and may have answered writes that neither has."""
    old = replace(A, role=Role.PRIMARY)
    knows = replace(B, epoch=2, leader="c")
    for plan in (decide(old, knows), decide(knows, old)):
        assert plan.action is Action.STOP
        assert plan.split
        assert "c was promoted after it" in plan.reason
