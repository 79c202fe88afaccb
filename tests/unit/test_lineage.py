# SPDX-License-Identifier: BSD-3-Clause
"""
The generation that the engine begins by itself, compared with the rule.

rules/generation.py is the oracle. Whatever else it does with a lineage, Python does.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from unit import cmodules

from nbd_mirror.rules.generation import (
    BASES,
    HISTORY,
    NO_DATA,
    Lineage,
    Peer,
    adopt,
    begin,
    offer,
    settle,
    share,
)

ffi, lib = cmodules.load("lineage")

NUMBERS = st.integers(1, 2**64 - 1)
FEW = st.integers(1, 60)  # so that numbers are met again
NAMES = [f"n{i}" for i in range(8)]


def in_c(lineage: Lineage) -> Any:
    """Translate a lineage."""
    node = ffi.new("struct nbdm_node *")
    node.generation, node.nr_peers = lineage.generation, len(lineage.peers)
    node.history[0 : len(lineage.history)] = list(lineage.history)
    for entry, peer in zip(node.peers, lineage.peers, strict=False):
        entry.name, entry.shared = peer.node.encode(), int(peer.shared)
        entry.bases[0 : len(peer.bases)] = list(peer.bases)
    return node


def of_c(node: Any) -> Lineage:
    """Translate it back; nothing but zeroes is behind the last number."""
    return Lineage(
        node.generation,
        known(node.history),
        tuple(
            Peer(ffi.string(peer.name).decode(), known(peer.bases), bool(peer.shared))
            for peer in node.peers[0 : node.nr_peers]
        ),
    )


def known(numbers: Any) -> tuple[int, ...]:
    """Give the numbers up to the first 0."""
    found = list(numbers)
    nr = found.index(0) if 0 in found else len(found)
    assert not any(found[nr:])
    return tuple(found[:nr])


@st.composite
def lineages(draw: st.DrawFn, numbers: st.SearchStrategy[int]) -> Lineage:
    """Draw a lineage as any record could have it."""
    line = draw(st.lists(numbers, min_size=1, max_size=HISTORY + 1, unique=True))
    peers = tuple(
        Peer(
            name,
            tuple(draw(st.lists(st.sampled_from(line) | numbers, max_size=BASES))),
            draw(st.booleans()),
        )
        for name in NAMES[: draw(st.integers(0, len(NAMES)))]
    )
    return Lineage(line[0], tuple(line[1:]), peers)


@given(lineages(NUMBERS) | lineages(FEW), st.sets(st.sampled_from(NAMES)), NUMBERS)
def test_begin_is_that_of_the_rule(
    lineage: Lineage, missing: set[str], fresh: int
) -> None:
    """C and the rule agree for any record, any missing nodes and any new number."""
    used = (lineage.generation, *lineage.history)
    while fresh in used:
        fresh = fresh % (2**64 - 1) + 1
    node = in_c(lineage)
    flags = [peer.node in missing for peer in lineage.peers]
    lib.lineage_begin(node, fresh, flags + [False] * (8 - len(flags)))
    assert of_c(node) == begin(lineage, fresh, missing)


@given(st.data())
def test_a_walk_of_rules_and_begins_stays_equal(data: st.DataObject) -> None:
    """As a record changes in a long life: by Python's rules, and by the engine."""
    lineage = Lineage(1, (), tuple(Peer(name) for name in NAMES[:3]))
    for fresh in range(2, 2 + data.draw(st.integers(1, 50))):
        name = data.draw(st.sampled_from(NAMES[:3]))
        step = data.draw(
            st.sampled_from(["begin", "offer", "settle", "share", "adopt"])
        )
        if step == "begin":
            missing = data.draw(st.sets(st.sampled_from(NAMES[:3])))
            node = in_c(lineage)
            flags = [peer in missing for peer in NAMES]
            lib.lineage_begin(node, fresh, flags)
            lineage = begin(lineage, fresh, missing)
            assert of_c(node) == lineage
        elif step == "offer":
            lineage = offer(lineage, name)
        elif step == "settle":
            held = data.draw(st.sampled_from([lineage.generation, fresh]))
            lineage = settle(lineage, name, held)
        elif step == "share":
            lineage = share(lineage)
        else:
            history = (lineage.generation, *lineage.history)[:HISTORY]
            lineage = adopt(lineage, Lineage(fresh, history))


@given(lineages(FEW), FEW | st.just(NO_DATA))
def test_a_fresh_number_is_one_that_the_rule_takes(
    lineage: Lineage, number: int
) -> None:
    """And a node is counted if it holds the generation, by the rule's own table."""
    node = in_c(lineage)
    used = (NO_DATA, lineage.generation, *lineage.history)
    assert lib.lineage_is_fresh(node, number) == (number not in used)
    for peer in lineage.peers:
        found = lib.lineage_peer(node, peer.node.encode())
        assert lib.lineage_counted(found) == (peer.shared and not peer.bases)
    assert lib.lineage_peer(node, b"other") == ffi.NULL
