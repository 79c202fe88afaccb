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

__all__ = ["ROLES", "NodeRecord", "PeerRecord", "fill_node", "node_record"]

ROLES = {1: Role.PRIMARY, 2: Role.SECONDARY}  # enum nbdm_role


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
        role=ROLES[c.role],
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


def fill_node(c: Any, record: NodeRecord) -> None:
    """
    Translate a record into *c*, a struct nbdm_node of zeroes.

    Raises:
        ValueError: a name or a list is too long for its field.
    """
    c.name, c.id = record.node.encode(), record.id.bytes
    c.role = next(number for number, role in ROLES.items() if role is record.role)
    c.crash = record.crash.value
    c.inconsistent, c.zero = int(record.inconsistent), int(record.zero)
    c.generation = record.lineage.generation
    _put(c.history, record.lineage.history)
    c.epoch, c.leader = record.epoch, record.leader.encode()
    c.handed, c.replaced = record.handed.encode(), record.replaced
    c.own_session = record.own_session
    if record.claim is not None:
        c.claim.epoch, c.claim.node = record.claim.epoch, record.claim.node.encode()
        c.claim.session = record.claim.session
        c.claim.nonce = bytes.fromhex(record.claim.nonce)
    c.nr_peers = len(record.peers)
    both = zip(record.peers, record.lineage.peers, strict=True)
    for entry, (peer, line) in zip(c.peers, both, strict=False):
        entry.name = peer.node.encode()
        if peer.id is not None:
            entry.id = peer.id.bytes
        entry.replaced, entry.met = peer.replaced, peer.met
        entry.shared = int(line.shared)
        _put(entry.bases, line.bases)


def _put(field: Any, generations: tuple[int, ...]) -> None:
    if len(generations) > len(field):
        raise ValueError("more generations than a record has room for")
    for at, number in enumerate(generations):
        field[at] = number


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
