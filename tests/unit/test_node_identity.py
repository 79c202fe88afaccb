# SPDX-License-Identifier: BSD-3-Clause
"""
A node that is another one than before; nodes_model.py shows what the rules keep.

The nodes of the table are a and b, which meet, and c, a third one.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from nbd_mirror.rules.node_handshake import decide, resolve
from nbd_mirror.rules.node_identity import NO_ID, Known, announce, learn, strangers
from nbd_mirror.rules.node_side import Action, Role, Side

A, B, C = Known("a", 1), Known("b", 2), Known("c", 3)
NEW_B = Known("b", 9)  # its state was lost, or another host has its name


def sides(*knows_of_b: Known) -> tuple[Side, Side]:
    """Give node a, which has data, and the node b that it meets, which has none."""
    known, shown = knows_of_b
    mine = Side("v", "a", 1 << 30, generation=1, identities=(A, known))
    other = Side("v", "b", 1 << 30, identities=(Known("a"), shown))
    return mine, other


# By case: what a knows of b, how b shows itself, and whether they may meet.
CASES = {
    "never met": (Known("b"), NEW_B, True),
    "the same": (B, B, True),
    "another one": (B, NEW_B, False),
    "another one, announced": (Known("b", NO_ID, 1), NEW_B, True),
    "announced and met": (Known("b", 9, 1), Known("b", 9, 1), True),
    "announced, met, and another one since": (Known("b", 9, 1), Known("b", 8), False),
    "announced elsewhere": (B, Known("b", 9, 1), True),
    "the earlier one, after the announcement": (Known("b", NO_ID, 1), B, True),
    "the earlier one, after the new one": (Known("b", 9, 1), B, False),
    "two of one count": (Known("b", 9, 1), Known("b", 8, 1), False),
}


@pytest.mark.parametrize("case", CASES)
def test_node_is_another_one(case: str) -> None:
    """A stop names the node and the command; nobody can resolve it the other way."""
    known, shown, may_meet = CASES[case]
    mine, other = sides(known, shown)
    for plan in (decide(mine, other), decide(other, mine)):
        if may_meet:
            assert (plan.action, plan.target) == (Action.RESYNC, "b")
            continue
        assert (plan.action, plan.row) == (Action.STOP, "1 another node")
        assert plan.reason.startswith("b is not the node that a knows: it lost its st")
        assert "nbd-mirror replace CONFIG b" in plan.hint
        assert not plan.split
    if not may_meet:
        assert resolve(mine, other).action is Action.STOP


def test_node_with_data_is_another_one() -> None:
    """It was filled by a node that never met the earlier one, and serves by now."""
    mine, other = sides(B, NEW_B)
    other = replace(other, generation=1, role=Role.PRIMARY)
    for plan in (decide(mine, other), decide(other, mine)):
        assert (plan.action, plan.row) == (Action.STOP, "1 another node")


def test_new_volume_needs_no_announcement() -> None:
    """No node has data yet: what an id tells apart holds nothing."""
    mine, other = sides(B, NEW_B)
    assert decide(replace(mine, generation=0), other).row == "2 both empty"


# By case: what a and b know of c, and what both know then; None: they stop.
THIRD: dict[str, tuple[Known, Known, Known | None]] = {
    "neither has met it": (Known("c"), Known("c"), Known("c")),
    "one has met it": (C, Known("c"), C),
    "both know the same": (C, C, C),
    "each knows another one": (C, Known("c", 4), None),
    "one was told": (C, Known("c", NO_ID, 1), Known("c", NO_ID, 1)),
    "one was told and met it": (C, Known("c", 4, 1), Known("c", 4, 1)),
    "both were told, one met it": (
        Known("c", NO_ID, 1),
        Known("c", 4, 1),
        Known("c", 4, 1),
    ),
    "both were told, and met two": (Known("c", 5, 1), Known("c", 4, 1), None),
    "one was told twice": (
        Known("c", 4, 1),
        Known("c", NO_ID, 2),
        Known("c", NO_ID, 2),
    ),
}


@pytest.mark.parametrize("case", THIRD)
def test_third_node_is_another_one(case: str) -> None:
    """Two nodes that know different ones are no proof for each other."""
    known, told, both = THIRD[case]
    mine, other = (A, B, known), (A, B, told)
    for one, two, first, second in (("a", "b", mine, other), ("b", "a", other, mine)):
        assert strangers(one, first, two, second) == (() if both else ("c",))
        if both:
            assert learn(one, first, two, second) == (A, B, both)
    if both is None:
        side = Side("v", "a", 1 << 30, generation=1, identities=mine)
        plan = decide(side, replace(side, node="b", identities=other))
        assert plan.reason.startswith("a and b know different nodes by the name c: ")
        assert "replace CONFIG c" in plan.hint


def test_any_knowledge_is_merged_by_both_alike() -> None:
    """Both agree then, nothing contradicts, and no announcement is taken back."""
    ids = [Known("x", number, count) for number in (NO_ID, 1, 2) for count in (0, 1, 2)]
    for known, told, third, told_third in itertools.product(ids, repeat=4):
        own = replace(known, node="a", id=known.id or 7)
        mine = (own, Known("b"), replace(third, node="c"))
        other = (replace(told, node="a"), B, replace(told_third, node="c"))
        found = strangers("a", mine, "b", other)
        assert found == strangers("b", other, "a", mine)
        if found:
            continue
        after, their = learn("a", mine, "b", other), learn("b", other, "a", mine)
        assert after == their
        assert not strangers("a", after, "b", their)
        assert (after[0].id, after[1].id) == (own.id, B.id)
        for before in (mine, other):
            for old, new in zip(before, after, strict=True):
                assert new.replaced >= old.replaced
        assert learn("a", after, "b", their) == after


def test_announcement_reaches_every_node() -> None:
    """One node is told; each that it meets takes the new node, and knows it then."""
    a: tuple[Known, ...] = (A, B, C)
    b: tuple[Known, ...] = (A, B, C)
    new: tuple[Known, ...] = (Known("a"), Known("b"), Known("c", 4))
    assert strangers("a", a, "c", new) == ("c",)
    a = announce(a, "c")
    assert a == (A, B, Known("c", NO_ID, 1))
    b = learn("b", b, "a", a)
    assert not strangers("b", b, "c", new)
    b, new = learn("b", b, "c", new), learn("c", new, "b", b)
    assert new == b == (A, B, Known("c", 4, 1))
    assert learn("a", a, "c", new) == b
