# SPDX-License-Identifier: BSD-3-Clause
"""
What a node stores of itself and of the other nodes of its volume, as plain values.

It mirrors struct nbdm_node of csrc/nbdm.h in the types of the rules, so that a rule
takes what was stored and gives what is to be stored next.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..rules.claim import Claim
from ..rules.generation import Lineage, Peer
from ..rules.node_side import Crash, Role

__all__ = ["NodeRecord", "PeerRecord", "node_record"]

_ROLES = {1: Role.PRIMARY, 2: Role.SECONDARY}  # enum nbdm_role


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """
    What is known of another node beside its generations.

    Args:
        id: its node id, shown by itself or told by another node; None: not known.
        replaced: how many replacements of it were announced.
        met: when the last session with it ended, seconds since 1970; 0: never.
    """

    node: str
    id: uuid.UUID | None = None
    replaced: int = 0
    met: int = 0


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """
    A node's record.

    Args:
        node: its name in the configuration.
        id: random, made with its state directory: a node that lost its state has
            another one.
        epoch, leader: the latest promotion that it knows, and of which node; "": none.
        handed: the node that has the token of its role, or "".
        claim: the highest that it has granted.
        own_session: of the latest claim that it made.
        replaced: how many replacements of this node were announced.
        peers: in the order of `lineage.peers`.
    """

    node: str
    id: uuid.UUID
    role: Role
    lineage: Lineage
    crash: Crash
    inconsistent: bool
    zero: bool
    epoch: int
    leader: str
    handed: str
    claim: Claim | None
    own_session: int
    replaced: int
    peers: tuple[PeerRecord, ...]


def node_record(c: Any, text: Callable[[Any], str]) -> NodeRecord | None:
    """Translate struct nbdm_node; None: the volume has no nodes."""
    name = text(c.name)
    if not name:
        return None
    peers = [c.peers[i] for i in range(c.nr_peers)]
    return NodeRecord(
        node=name,
        id=uuid.UUID(bytes=bytes(c.id)),
        role=_ROLES[c.role],
        lineage=Lineage(
            generation=c.generation,
            history=_known(c.history),
            peers=tuple(_lineage_peer(peer, text) for peer in peers),
        ),
        crash=Crash(c.crash),
        inconsistent=bool(c.inconsistent),
        zero=bool(c.zero),
        epoch=c.epoch,
        leader=text(c.leader),
        handed=text(c.handed),
        claim=_claim(c.claim, text),
        own_session=c.own_session,
        replaced=c.replaced,
        peers=tuple(_peer(peer, text) for peer in peers),
    )


def _known(generations: Any) -> tuple[int, ...]:
    return tuple(number for number in generations if number)


def _lineage_peer(c: Any, text: Callable[[Any], str]) -> Peer:
    return Peer(text(c.name), _known(c.bases), bool(c.shared))


def _peer(c: Any, text: Callable[[Any], str]) -> PeerRecord:
    raw = bytes(c.id)
    known = uuid.UUID(bytes=raw) if any(raw) else None
    return PeerRecord(text(c.name), known, c.replaced, c.met)


def _claim(c: Any, text: Callable[[Any], str]) -> Claim | None:
    node = text(c.node)
    if not node:
        return None
    return Claim(c.epoch, node, c.session, bytes(c.nonce).hex())
