# SPDX-License-Identifier: BSD-3-Clause
"""
How an operator ends a split brain: two stores, one on each node. Pure rules.

Both nodes have answered writes that the other one lacks. An operator says which node
counts. Then each of the two stores one record, the kept node first:

    chosen     the kept node takes a later term, and begins a generation
    given_up   the losing node goes back to a generation that the kept node holds as a
               base, and keeps its maps

After the second store the ordinary handshake says that the losing node is behind (row 9
of node_handshake.py), and what is copied: the union of both maps. Between the two
stores the nodes are as split as before, and an operator may still choose the other one.
So a node that is killed at any step leaves a state that another `resolve` ends.

No store clears a bit. The losing node's maps say what it changed since that base, so
what it answered is overwritten by the next resync, and by nothing before that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .generation import Lineage, Peer, begin
from .node_handshake import resolve
from .node_side import Action, Plan, Side

__all__ = ["GivenUp", "chosen", "given_up", "why_not_resolved"]


@dataclass(frozen=True, slots=True)
class GivenUp:
    """
    What the losing node stores.

    Args:
        lineage: its new one.
        exact: both maps together are all that differs. If not, the node first doubts
            all of its regions: nothing says which of them differ.
    """

    lineage: Lineage
    exact: bool


def chosen(lineage: Lineage, fresh: int, loser: str) -> Lineage:
    """
    Give the lineage of the kept node, which the losing node cannot hold.

    Its earlier generation becomes a base towards the losing node, if that node may hold
    it. A third node that has the losing node's data is then not taken for newer.
    """
    return begin(lineage, fresh, [loser])


def given_up(loser: Lineage, kept: Side) -> GivenUp | None:
    """
    Give the lineage of the losing node, once the kept one has stored `chosen`.

    The losing node counts as an earlier self: it holds a generation that the kept node
    has left behind, except in the regions that its maps name. Every other node may hold
    that generation, so a write there begins another one: if an operator promotes this
    node after all, the two are split again, and nothing is lost.

    Args:
        kept: what the kept node shows, with its bases towards the losing one.
    Returns:
        None: the two have no generation in common.
    """
    own = loser.peer(kept.node).bases
    for base in kept.bases:  # the latest first
        if base == loser.generation or base in own:
            return GivenUp(_back_to(loser, base), exact=True)
    for ancestor in kept.history:
        if ancestor in (loser.generation, *loser.history):
            return GivenUp(_back_to(loser, ancestor), exact=False)
    return None


def why_not_resolved(keep: Side, other: Side) -> tuple[Plan, str]:
    """
    Give the plan if an operator keeps *keep*, and why that changes nothing, or "".

    Only a split brain is resolved: every other meeting has its own result.
    """
    plan = resolve(keep, other)
    if plan.action is Action.STOP:
        return plan, plan.reason
    if not plan.begins:
        return plan, f"{keep.node} and {other.node} are no split brain: {plan.row}"
    return plan, ""


def _back_to(lineage: Lineage, generation: int) -> Lineage:
    """Give the lineage at a generation that this node has left."""
    if generation == lineage.generation:
        history = lineage.history
    elif generation in lineage.history:
        history = lineage.history[lineage.history.index(generation) + 1 :]
    else:
        history = ()  # so old that the node has forgotten what came before it
    peers = tuple(Peer(peer.node, shared=True) for peer in lineage.peers)
    return replace(lineage, generation=generation, history=history, peers=peers)
