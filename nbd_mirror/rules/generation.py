# SPDX-License-Identifier: BSD-3-Clause
"""
Which data a node holds, and which data it knows other nodes to hold: pure rules.

A generation is a random number that names one content of the disk. A primary begins a
new one lazily, by one rule:

    A node answers a write which another node lacks only in a generation that the other
    node cannot hold.

So two nodes of one generation hold the same data, except in regions that one of them
names: its dirty map, and what was under way when a session or a node ended. The node
handshake (node_handshake.py) rests on this rule alone.

A node "may hold" a generation from the moment when it is offered, not from the moment
when the node confirms it: the answer can be lost, and the node with it. `Peer.shared`
records this, and is stored before the offer is sent. DRBD relied on the confirmation,
and got nodes of one id with different data (drbd@7bc900858).

Each function returns the lineage that the node has to store next. The node stores it
before it does what the function's name says.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

__all__ = [
    "BASES",
    "HISTORY",
    "NO_DATA",
    "Lineage",
    "Peer",
    "adopt",
    "begin",
    "create",
    "must_begin",
    "offer",
    "settle",
    "share",
]

NO_DATA = 0  # no generation: the disk has no content yet
HISTORY = 32  # ancestors kept; a node that is older than all of them is unrelated
BASES = 4  # bases kept for a node; a forgotten one costs a comparison, never data


@dataclass(frozen=True, slots=True)
class Peer:
    """
    What a node knows of the generation of another node.

    Args:
        node: the other node's name.
        bases: the other node held the content of one of these generations, in full,
            when this node's dirty map towards it was empty. Everything that this node
            changed since is in that map.
        shared: the other node may hold this node's present generation.

            bases   shared   the other node
            ------  -------  ------------------------------------------------------
            none    yes      is counted: it holds this node's generation
            some    yes      was offered this node's generation; its answer is open
            some    no       lacks writes that this node has answered
            none    no       has never met this node: nothing is known of it

    A node keeps a map towards every other node of the volume, even if the two have
    never met: `share` says why.
    """

    node: str
    bases: tuple[int, ...] = ()
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Lineage:
    """
    A node's generation, its ancestors and what is known of the other nodes.

    Args:
        history: strict ancestors of *generation*, the latest first, at most `HISTORY`.
        peers: one for each other node of the volume.
    """

    generation: int = NO_DATA
    history: tuple[int, ...] = ()
    peers: tuple[Peer, ...] = ()

    def peer(self, node: str) -> Peer:
        """Find what is known of *node*; KeyError: the volume has no such node."""
        for peer in self.peers:
            if peer.node == node:
                return peer
        raise KeyError(node)


def create(lineage: Lineage, fresh: int) -> Lineage:
    """
    Give a disk its first generation: an operator says that its content counts.

    Args:
        fresh: a random number that no node has used.

    Raises:
        ValueError: the disk has a generation already.
    """
    if lineage.generation != NO_DATA:
        raise ValueError("the disk holds data of a generation already")
    return replace(lineage, generation=_checked(lineage, fresh))


def must_begin(lineage: Lineage, missing: Collection[str]) -> bool:
    """
    Tell whether a write needs a new generation before it is answered.

    Args:
        missing: the nodes that lack the write.
    """
    return any(lineage.peer(node).shared for node in missing)


def begin(lineage: Lineage, fresh: int, missing: Collection[str]) -> Lineage:
    """
    Begin a generation that the nodes *missing* cannot hold.

    The other nodes that share the present generation are offered the new one: each of
    them has to confirm it, or be among those that miss the write. In the second case
    `must_begin` is true again.

    Raises:
        ValueError: the disk has no data, and so no generation to continue from.
    """
    if lineage.generation == NO_DATA:
        raise ValueError("a disk without data gets its first generation by `create`")
    peers = tuple(
        _counted_from(peer, lineage.generation, offered=peer.node not in missing)
        for peer in lineage.peers
    )
    history = (lineage.generation, *lineage.history)[:HISTORY]
    return Lineage(_checked(lineage, fresh), history, peers)


def offer(lineage: Lineage, node: str) -> Lineage:
    """Record that *node*, which has been sent everything, may adopt the generation."""
    return _with(lineage, replace(lineage.peer(node), shared=True))


def share(lineage: Lineage) -> Lineage:
    """
    Record that every other node may hold the present generation.

    A node does this when it meets another node of its generation, and when it becomes
    primary. The other node may have given the generation to a third one in the
    meantime, and this node does not know it. DRBD did not assume this, and got nodes of
    one id with different data (drbd@499533fe3). The assumption costs one more
    generation at the next write that a node lacks.
    """
    peers = tuple(replace(peer, shared=True) for peer in lineage.peers)
    return replace(lineage, peers=peers)


def settle(lineage: Lineage, node: str, confirmed: int) -> Lineage:
    """
    Record that *node* has confirmed that it holds the generation *confirmed*.

    It is counted if that is the present one. If this node has begun another one since
    it sent its offer, the node still has to confirm that.
    """
    counted = confirmed == lineage.generation
    bases = () if counted else (confirmed,)
    return _with(lineage, Peer(node, bases, shared=True))


def adopt(target: Lineage, source: Lineage) -> Lineage:
    """
    Take the source's generation: everything it holds has been copied and flushed.

    The target forgets its bases towards all nodes. Its dirty maps no longer show all
    regions that differ from them, because copying has changed more regions. So the
    caller first enters these maps, and those of the source, into the target's doubts
    (`inherited`, node_handshake.py). Every node may hold the source's generation.
    """
    peers = tuple(Peer(peer.node, shared=True) for peer in target.peers)
    return Lineage(source.generation, source.history, peers)


def _counted_from(peer: Peer, generation: int, *, offered: bool) -> Peer:
    if not peer.shared:
        return peer
    bases = (generation, *(base for base in peer.bases if base != generation))
    if len(bases) > BASES:  # the oldest is the one that the node confirmed
        bases = (*bases[: BASES - 1], bases[-1])
    return Peer(peer.node, bases, shared=offered)


def _with(lineage: Lineage, changed: Peer) -> Lineage:
    peers = (changed if peer.node == changed.node else peer for peer in lineage.peers)
    return replace(lineage, peers=tuple(peers))


def _checked(lineage: Lineage, fresh: int) -> int:
    if fresh in (NO_DATA, lineage.generation, *lineage.history):
        raise ValueError("a new generation has to be one that no node has used")
    return fresh
