# SPDX-License-Identifier: BSD-3-Clause
"""The two stores that end a split brain, and what the handshake says after them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbd_mirror.rules.generation import Lineage, Peer, begin
from nbd_mirror.rules.node_handshake import decide
from nbd_mirror.rules.node_side import Action, Extent, Role, Side
from nbd_mirror.rules.resolution import chosen, given_up, why_not_resolved

COMMON, LEFT, RIGHT, NEW = 1, 2, 3, 4


def line(other: str) -> Lineage:
    """Give a node that shares its generation with another one."""
    return Lineage(COMMON, (), (Peer(other, shared=True),))


def side(node: str, lineage: Lineage, **more: object) -> Side:
    """Show a node."""
    (peer,) = lineage.peers
    shown = Side(
        "v",
        node,
        1 << 20,
        generation=lineage.generation,
        history=lineage.history,
        bases=peer.bases,
        leader=node,
        epoch=1,
    )
    return replace(shown, **more)  # type: ignore[arg-type]


def kept_and_lost(
    kept: Lineage, lost: Lineage, **more: object
) -> tuple[Side, Side, bool]:
    """Do both stores; return what both show then, and whether the maps are all."""
    after = side("a", chosen(kept, NEW, "b"), epoch=2, role=Role.PRIMARY)
    found = given_up(lost, after)
    assert found is not None
    other = side("b", found.lineage, epoch=2, leader="a", dirty=1, **more)
    return after, other, found.exact


def test_both_wrote_since_they_were_equal() -> None:
    """Row 12 becomes row 9: the base is the target, by both maps."""
    one, other = begin(line("b"), LEFT, ["b"]), begin(line("a"), RIGHT, ["a"])
    assert decide(side("a", one), side("b", other)).row == "12 common base"
    kept, lost, exact = kept_and_lost(one, other)
    plan = decide(kept, lost)
    assert (plan.row, plan.target, plan.extent) == ("9 base", "b", Extent.MARKED)
    assert exact
    assert decide(lost, kept) == plan


def test_between_the_stores_the_nodes_are_as_split_as_before() -> None:
    """Killed there, an operator may still choose either side."""
    one, other = begin(line("b"), LEFT, ["b"]), begin(line("a"), RIGHT, ["a"])
    after = side("a", chosen(one, NEW, "b"), epoch=2)
    left = side("b", other)
    assert decide(after, left).split
    for keep, lose in ((after, left), (left, after)):
        assert why_not_resolved(keep, lose)[1] == ""


def test_the_kept_node_wrote_nothing() -> None:
    """It serves, and the other one has more: the other one goes back to its content."""
    one, other = line("b"), begin(line("a"), RIGHT, ["a"])
    serving = side("a", one, role=Role.PRIMARY, epoch=2)
    assert decide(serving, side("b", other)).split
    kept, lost, exact = kept_and_lost(one, other)
    plan = decide(kept, lost)
    assert (plan.action, plan.target, plan.extent) == (
        Action.RESYNC,
        "b",
        Extent.MARKED,
    )
    assert exact


def test_without_a_base_all_is_compared() -> None:
    """Row 13 becomes row 11."""
    one = Lineage(LEFT, (7, COMMON), (Peer("b", (7,)),))
    other = Lineage(RIGHT, (8, COMMON), (Peer("a", (8,)),))
    assert decide(side("a", one), side("b", other)).row == "13 common ancestor"
    kept, lost, exact = kept_and_lost(one, other)
    plan = decide(kept, lost)
    assert (plan.row, plan.target) == ("11 ancestor", "b")
    assert not exact
    assert lost.generation == COMMON


def test_a_promotion_of_the_losing_node_splits_them_again() -> None:
    """An operator regrets it: its next write is in a generation with that base."""
    one, other = begin(line("b"), LEFT, ["b"]), begin(line("a"), RIGHT, ["a"])
    after = side("a", chosen(one, NEW, "b"), epoch=2)
    found = given_up(other, after)
    assert found is not None
    again = begin(found.lineage, 9, ["a"])
    plan = decide(after, side("b", again, epoch=3, dirty=1))
    assert (plan.row, plan.split) == ("12 common base", True)


def test_nothing_in_common_is_not_resolved() -> None:
    """No generation of the kept node is one of the losing node."""
    one = Lineage(LEFT, (), (Peer("b"),))
    other = Lineage(RIGHT, (), (Peer("a"),))
    assert given_up(other, side("a", one)) is None
    assert "nothing in common" in why_not_resolved(side("a", one), side("b", other))[1]


@pytest.mark.parametrize("primary", [True, False])
def test_what_is_no_split_brain_is_not_resolved(primary: bool) -> None:
    """Nodes in sync, and a node that is behind."""
    role = Role.PRIMARY if primary else Role.SECONDARY
    one = side("a", line("b"), role=role)
    for other in (line("a"), Lineage(COMMON, (), (Peer("a", (9,)),))):
        plan, why_not = why_not_resolved(one, side("b", other))
        assert "are no split brain" in why_not
        assert plan.action is Action.IN_SYNC
