# SPDX-License-Identifier: BSD-3-Clause
"""
The own node of a volume: its record and maps, and what the control threads share of it.

The record is changed by compare and swap alone. The engine begins generations by
itself, and the control thread stores what other nodes ask for, at any time. So each
change is a function of the record as it is, applied again if the record has changed.

`lock` orders the changes of role and of the session that may write to the disk. A
thread that stores a term keeps the lock until all earlier sessions are cut. Otherwise
the control thread could grant a claim that it judged before that store. No thread calls
another node while it has the lock: two nodes that call each other would both wait.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from ..base.errors import BusyError
from ..rules.claim import Claim
from ..rules.node_identity import NO_ID, Known, announce, learn
from ..rules.node_side import Role, Side
from ..volume.model import Disk, NodeMap, RemoteStatus, VolumeStatus
from ..volume.node_record import NodeRecord

__all__ = [
    "LocalNode",
    "NodeEngine",
    "Term",
    "announced",
    "follows",
    "ids_of",
    "knows_now",
    "popcount",
    "term_of",
    "union",
    "why_incredible",
    "why_side_incredible",
    "without",
]

EPOCHS_AHEAD = 1 << 32  # more promotions than this node can have missed
# One lie reaches this count of replacements, half of what a record has room for, and
# all nodes take it over as they meet. From there on it takes many lies to go further.
REPLACED_MOST = 1 << 31
REPLACED_AHEAD = 16  # more replacements than this node can have missed
TRIES = 100  # of a change of the record; each loses only to another that won

Term = tuple[int, str]


class NodeEngine(Protocol):
    """The part of the engine that the control of nodes needs."""

    def node_get(self) -> NodeRecord:
        """Return the record as it is now."""

    def node_store(self, before: NodeRecord, after: NodeRecord) -> bool:
        """Replace *before* by *after*, durably; False: it is no longer *before*."""

    def node_map(self, disk: Disk, which: NodeMap) -> bytes:
        """Return the regions of a map, a bit each."""

    def node_mark(self, disk: Disk, which: NodeMap, bits: bytes) -> None:
        """Add regions to a map, durably."""

    def node_clear(self, disk: Disk) -> None:
        """Empty both maps towards a node, durably."""

    def node_session_lost(self) -> None:
        """Doubt what was active: the primary's session ended uncleanly."""

    def node_flush(self) -> None:
        """Make every answered write durable, whatever the policy is."""

    def cool(self, idle_s: float) -> None:
        """Flush, and forget the active extents."""

    def active_extents(self) -> list[int]:
        """Return the indexes of the extents in the activity log."""

    def status(self) -> VolumeStatus:
        """Report the volume."""

    def remote_status(self, disk: Disk) -> RemoteStatus:
        """Report another node, as a remote."""


class LocalNode:
    """
    The own node, as the server of it has it open.

    Args:
        volume: its name.
        others: the other nodes' names; the engine's disks from 1 on are theirs.
        primary: the engine was opened as primary.
        reach: called with the name of each durable step, for fault points.
    """

    def __init__(
        self,
        engine: NodeEngine,
        volume: str,
        others: Sequence[str],
        *,
        primary: bool,
        reach: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.engine = engine
        self.volume = volume
        self.others = tuple(others)
        self.primary = primary
        self.reach = reach
        self.lock = threading.RLock()
        # The lock guards these. The session that may write to the disk, or None: none
        # has been granted since this start, or it has ended.
        self.session: Claim | None = None
        self.behind = False  # the session's primary has data that this node lacks
        self.asks: Term | None = None  # a promotion of this node that is under way
        self.leaving = False  # the role changes: this process serves nobody any more

    # --- the record ---

    def record(self) -> NodeRecord:
        """Return the record as it is now."""
        return self.engine.node_get()

    def change(self, step: Callable[[NodeRecord], NodeRecord]) -> NodeRecord:
        """
        Store what *step* makes of the record, durably, and return it.

        Args:
            step: may raise, and then nothing is stored.
        Raises:
            MirrorError: it cannot be stored.
        """
        for _ in range(TRIES):
            before = self.record()
            after = step(before)
            if after == before or self.engine.node_store(before, after):
                return after
        raise BusyError("the node's record changes all the time")

    # --- the maps ---

    def disk_of(self, other: str) -> Disk:
        """Return the engine's number of another node."""
        return Disk(1 + self.others.index(other))

    def bits(self, other: str, which: NodeMap) -> bytes:
        """Return a map towards *other*; a secondary's doubts with what is active."""
        found = self.engine.node_map(self.disk_of(other), which)
        if which is NodeMap.DOUBTS and not self.primary:
            found = union(found, self._active(len(found)))
        return found

    def marks(self, other: str) -> bytes:
        """Return all regions that this node names towards *other*."""
        found = b""
        for which in NodeMap:
            found = union(found, self.bits(other, which))
        return found

    def _active(self, size: int) -> bytes:
        """Return the regions of the active extents."""
        status = self.engine.status()
        each = status.extent_size // status.region_size
        nr = -(-status.size // status.region_size)
        bits = bytearray(size)
        for extent in self.engine.active_extents():
            for region in range(extent * each, min((extent + 1) * each, nr)):
                bits[region // 8] |= 1 << region % 8
        return bytes(bits)

    # --- what it shows ---

    def side(self, other: str, record: NodeRecord | None = None) -> Side:
        """Return what this node shows of itself to *other*."""
        record = record or self.record()
        known = {peer.node for peer in record.lineage.peers}
        return Side(
            volume=self.volume,
            node=record.node,
            size=self.engine.status().size,
            generation=record.lineage.generation,
            history=record.lineage.history,
            bases=record.lineage.peer(other).bases if other in known else (),
            dirty=popcount(self.bits(other, NodeMap.DIRTY)),
            doubts=popcount(self.bits(other, NodeMap.DOUBTS)),
            missed=popcount(self.bits(other, NodeMap.MISSED)),
            crash=record.crash,
            inconsistent=record.inconsistent,
            zero=record.zero,
            # What it does now: the stored role is what it would do after a start.
            role=Role.PRIMARY if self.primary else Role.SECONDARY,
            epoch=record.epoch,
            leader=record.leader,
            handed=record.handed,
            identities=ids_of(record),
        )

    def own_term(self) -> Term:
        """Return the latest promotion that this node knows."""
        return term_of(self.record())


def term_of(record: NodeRecord) -> Term:
    """Return the latest promotion that a record names."""
    return record.epoch, record.leader


def why_incredible(record: NodeRecord, epoch: int, *names: str) -> str:
    """
    Return why a term of another node is not taken over, or "".

    A node stores the terms that others show, and nothing takes them back. A wrong name
    would be a third node whose promotion stops both, and no promotion follows the
    highest epoch. An operator does not promote so often.
    """
    nodes = ("", record.node, *(peer.node for peer in record.peers))
    for name in names:
        if name not in nodes:
            return f"the volume has no node {name} here"
    if epoch > record.epoch + EPOCHS_AHEAD:
        return f"epoch {epoch} is too far after {record.epoch}"
    return ""


def why_side_incredible(record: NodeRecord, side: Side) -> str:
    """Return why what another node shows of itself cannot be true, or ""."""
    known = {one.node: one.replaced for one in ids_of(record)}
    for told in side.identities:
        # A node that was told no lie must still believe one that was: a limit that
        # followed only what this node knows would part the two for good.
        if told.replaced > max(known.get(told.node, 0), REPLACED_MOST) + REPLACED_AHEAD:
            return f"{told.node} was not replaced {told.replaced} times"
    return why_incredible(record, side.epoch, side.leader, side.handed)


def ids_of(record: NodeRecord) -> tuple[Known, ...]:
    """Return what a record knows of each node's identity, of its own first."""
    own = Known(record.node, record.id.int, record.replaced)
    return own, *(
        Known(peer.node, peer.id.int if peer.id else NO_ID, peer.replaced)
        for peer in record.peers
    )


def knows_now(record: NodeRecord, other: str, told: Sequence[Known]) -> NodeRecord:
    """Return the record with what *other* told of the nodes' identities."""
    return _with_ids(record, learn(record.node, ids_of(record), other, told))


def announced(record: NodeRecord, node: str) -> NodeRecord:
    """Return the record once an operator has announced a new host for *node*."""
    return _with_ids(record, announce(ids_of(record), node))


def _with_ids(record: NodeRecord, known: Sequence[Known]) -> NodeRecord:
    own, *peers = known
    return replace(
        record,
        replaced=own.replaced,
        peers=tuple(
            replace(
                peer,
                id=uuid.UUID(int=one.id) if one.id != NO_ID else None,
                replaced=one.replaced,
            )
            for peer, one in zip(record.peers, peers, strict=True)
        ),
    )


def follows(record: NodeRecord, term: Term) -> NodeRecord:
    """Return the record of a node that knows another node's promotion."""
    return replace(
        record, role=Role.SECONDARY, epoch=term[0], leader=term[1], handed=""
    )


def union(one: bytes, other: bytes) -> bytes:
    """Return the regions of either map."""
    size = max(len(one), len(other))
    bits = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return bits.to_bytes(size, "little")


def without(one: bytes, other: bytes) -> bytes:
    """Return the regions of the first map that the second one has not."""
    bits = int.from_bytes(one, "little") & ~int.from_bytes(other, "little")
    return bits.to_bytes(len(one), "little")


def popcount(bits: bytes) -> int:
    """Return how many regions a map has."""
    return int.from_bytes(bits, "little").bit_count()
