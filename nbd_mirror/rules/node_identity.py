# SPDX-License-Identifier: BSD-3-Clause
"""
Whether a node is still the one that the others know: pure rules.

A node that lost its state directory begins again without data, under its old name and
at its old address. By its generation alone it would be the target of the next node that
it meets. But its disk may have the only copy of answered writes: it may have been the
primary, alone. Then those writes would be gone, and no operator would have decided it.

So a node has an id: a random number, made with its state directory. Each node stores
the id of every other node. A node that shows another id than the one that is known
stops the handshake, until an operator announces the replacement. For the announcement
the nodes count the replacements of each name:

- `announce` increases the count and forgets the id: the next node of that name is taken
  as it is, and its id is known from then on.
- A higher count replaces a lower one. So an announcement at one node reaches the others
  as they meet.
- Two ids with the same count are two nodes of one name, and one of them was never
  announced.

Nodes also compare what they know of *third* nodes. A node that never met the third one
takes it as it is, and may fill it. Then it is in sync with both, but must not count as
a proof that no write is missing.

A new volume needs no announcement, as no node knows an id yet.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["NO_ID", "Known", "announce", "learn", "strangers"]

NO_ID = 0  # not known: the node was never met, or its replacement was announced


@dataclass(frozen=True, slots=True)
class Known:
    """
    What a node knows of the identity of a node: of another one, or its own.

    Args:
        node: the name.
        id: random, or NO_ID.
        replaced: how many replacements of this node were announced.
    """

    node: str
    id: int = NO_ID
    replaced: int = 0


def strangers(
    mine: str, knows: Collection[Known], other: str, told: Collection[Known]
) -> tuple[str, ...]:
    """
    Name the nodes that were replaced, as one of two nodes shows, without announcement.

    Args:
        mine, other: the names of the two nodes.
        knows, told: what each of them knows, of itself too.
    """
    theirs = {known.node: known for known in told}
    found = []
    for known in knows:
        told_of = theirs.get(known.node, Known(known.node))
        # The node's own word comes first, where one of the two is that node.
        pair = (told_of, known) if known.node == other else (known, told_of)
        if _contradict(*pair, own=known.node in (mine, other)):
            found.append(known.node)
    return tuple(sorted(found))


def learn(
    mine: str, knows: Collection[Known], other: str, told: Collection[Known]
) -> tuple[Known, ...]:
    """
    Return what *mine* knows after it has met *other*.

    A node stores it before it does what the handshake decided. The arguments are those
    of `strangers`, which named none.
    """
    theirs = {known.node: known for known in told}
    return tuple(
        _merged(known, theirs.get(known.node, Known(known.node)), mine, other)
        for known in knows
    )


def announce(knows: Collection[Known], node: str) -> tuple[Known, ...]:
    """Return what a node knows once an operator has announced a new host for *node*."""
    return tuple(
        Known(node, NO_ID, known.replaced + 1) if known.node == node else known
        for known in knows
    )


def _contradict(one: Known, two: Known, *, own: bool) -> bool:
    """
    Tell whether two nodes know one name as different nodes.

    Args:
        own: *one* is what the node itself shows.
    """
    if one.id == two.id or NO_ID in (one.id, two.id):
        return False
    # A lower count is old news, but not if the node itself has it: then it is a node
    # that nobody announced, or one that was replaced and has come back.
    return one.replaced == two.replaced or (own and one.replaced < two.replaced)


def _merged(known: Known, told: Known, mine: str, other: str) -> Known:
    replaced = max(known.replaced, told.replaced)
    if known.node == mine:
        return Known(mine, known.id, replaced)
    if told.node == other and told.id != NO_ID:
        return Known(other, told.id, replaced)
    if known.replaced == told.replaced:
        return Known(known.node, known.id or told.id, replaced)
    return max(known, told, key=lambda one: one.replaced)
