# SPDX-License-Identifier: BSD-3-Clause
"""Generations, one step at a time; nodes_model.py shows what they keep over time."""

from __future__ import annotations

import pytest

from nbd_mirror.rules.generation import (
    BASES,
    HISTORY,
    Lineage,
    Peer,
    adopt,
    begin,
    create,
    must_begin,
    offer,
    settle,
    share,
)

NEW = Lineage(peers=(Peer("b"), Peer("c")))
PAIR = Lineage(1, (), (Peer("b", shared=True), Peer("c", shared=True)))


def test_a_write_that_a_counted_node_lacks_begins_a_generation() -> None:
    """The rule that all others rest on."""
    assert not must_begin(PAIR, [])
    assert must_begin(PAIR, ["b"])
    moved = begin(PAIR, 2, ["b"])
    assert (moved.generation, moved.history) == (2, (1,))
    assert moved.peer("b") == Peer("b", (1,), shared=False)
    assert not must_begin(moved, ["b"])


def test_a_counted_node_has_to_confirm_the_generation() -> None:
    """Until then it may hold either generation."""
    moved = begin(PAIR, 2, ["b"])
    assert moved.peer("c") == Peer("c", (1,), shared=True)
    assert must_begin(moved, ["b", "c"])  # c did not answer, and may hold it
    assert settle(moved, "c", 2).peer("c") == Peer("c", (), shared=True)


def test_a_late_confirmation_counts_for_what_it_names() -> None:
    """DRBD took an answer for the present id; the peer had the one before."""
    moved = begin(begin(PAIR, 2, ["b"]), 3, ["b"])
    late = settle(moved, "c", 2)
    assert late.peer("c") == Peer("c", (2,), shared=True)


def test_an_offer_makes_the_next_write_begin() -> None:
    """The node may have adopted, and its answer may be lost."""
    moved = begin(PAIR, 2, ["b", "c"])
    offered = offer(moved, "b")
    assert must_begin(offered, ["b"])
    again = begin(offered, 3, ["b", "c"])
    assert again.peer("b") == Peer("b", (2, 1), shared=False)
    assert again.peer("c") == Peer("c", (1,), shared=False)


def test_adoption_forgets_bases() -> None:
    """Copying changed more than the dirty maps tell."""
    source = begin(PAIR, 2, ["c"])
    target = Lineage(1, (), (Peer("a", (7,)), Peer("c", (5,))))
    adopted = adopt(target, source)
    assert (adopted.generation, adopted.history) == (2, (1,))
    assert adopted.peers == (Peer("a", shared=True), Peer("c", shared=True))


def test_bounds() -> None:
    """A link that flaps for years makes neither list longer."""
    line = PAIR
    for generation in range(2, HISTORY + 9):
        line = begin(offer(line, "b"), generation, ["b"])
    assert len(line.history) == HISTORY
    assert line.history[0] == line.generation - 1
    # The oldest base is the one that the node confirmed.
    assert line.peer("b").bases == (*line.history[: BASES - 1], 1)


def test_a_generation_is_used_once() -> None:
    """And data are declared once."""
    with pytest.raises(ValueError, match="no node has used"):
        begin(PAIR, 1, ["b"])
    with pytest.raises(ValueError, match="no node has used"):
        create(NEW, 0)
    with pytest.raises(ValueError, match="without data"):
        begin(NEW, 2, ["b"])
    with pytest.raises(ValueError, match="already"):
        create(PAIR, 2)
    assert create(NEW, 5).generation == 5
    with pytest.raises(KeyError):
        PAIR.peer("d")


def test_reported_6_a_third_node_got_the_id_behind_the_primarys_back() -> None:
    """While a was away, b may have given the generation to c (drbd@499533fe3)."""
    moved = settle(begin(PAIR, 2, ["c"]), "b", 2)
    assert not must_begin(moved, ["c"])
    assert must_begin(share(moved), ["c"])
    assert begin(share(moved), 3, ["c"]).peer("c") == Peer("c", (2, 1), shared=False)


def test_reported_8_a_second_loss_during_the_change_of_the_id() -> None:
    """The new generation is shared with c, so that its loss needs another one."""
    moved = begin(PAIR, 2, ["b"])
    assert must_begin(moved, ["c"])
    again = begin(moved, 3, ["b", "c"])
    assert again.peer("b") == Peer("b", (1,), shared=False)
    assert again.peer("c") == Peer("c", (2, 1), shared=False)


def test_reported_9_history_is_strict_ancestors() -> None:
    """What another node counts from is no ancestor of this one's generation."""
    target = Lineage(7, (1,), (Peer("a", (6,)), Peer("c", (5,))))
    source = Lineage(3, (2, 1), (Peer("b", (1,)), Peer("c", (4,))))
    assert adopt(target, source).history == (2, 1)
    assert begin(source, 8, ["b"]).history == (3, 2, 1)
