# SPDX-License-Identifier: BSD-3-Clause
"""
What a node shows of itself to another one, and the plan of the two.

The handshake sends a `Side` each way; node_handshake.py makes a `Plan` from the two.
`relate` is its first step: it compares the generations (generation.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nbd_mirror.rules.generation import NO_DATA
from nbd_mirror.rules.node_identity import Known

__all__ = [
    "Action",
    "Crash",
    "Extent",
    "Plan",
    "Relation",
    "Role",
    "Side",
    "relate",
]


class Role(Enum):
    """What a node does; the values are the words of status and protocol."""

    PRIMARY = "primary"  # its door is open to clients
    SECONDARY = "secondary"


class Crash(Enum):
    """How a node's doubts came about; only `HOST` can cost an answered write."""

    NONE = 0  # its last session ended cleanly
    SESSION = 1  # it stayed up; its primary's session ended without a clean close
    PROCESS = 2  # its server was killed, its kernel stayed up: it kept every write
    HOST = 3  # its host went down: it may lack writes that were not flushed


@dataclass(frozen=True, slots=True)
class Side:
    """
    One node as it meets another: what it sends in the handshake.

    Args:
        node: its name; unique in the volume, it breaks ties.
        size: bytes.
        generation, history, bases: see generation.py; *bases* towards the other node.
        dirty: regions that it changed and the other node lacks.
        doubts: regions that may differ towards the other node, also those that are
            under way in a session with a third node.
        missed: regions that its own disk lacks, as the disk failed.
        crash: how the doubts came about.
        inconsistent: a resync to it was cut off half-way, so that its image is of no
            instant.
        zero: it has no data yet, and its disk is proven to read as zeroes.
        epoch: the latest promotion that it knows.
        leader: the node that was primary in *epoch*, or "".
        handed: the node to which this one gave the token of its role, or "".
        identities: what it knows of the identity of each node, of its own too.
    """

    volume: str
    node: str
    size: int
    generation: int = NO_DATA
    history: tuple[int, ...] = ()
    bases: tuple[int, ...] = ()
    dirty: int = 0
    doubts: int = 0
    missed: int = 0
    crash: Crash = Crash.NONE
    inconsistent: bool = False
    zero: bool = False
    role: Role = Role.SECONDARY
    epoch: int = 0
    leader: str = ""
    handed: str = ""
    identities: tuple[Known, ...] = ()

    @property
    def term(self) -> tuple[int, str]:
        """
        The latest promotion that this node knows, in the order of promotions.

        Two operators who force two nodes at once give both the same epoch; the names
        make one of them the later.
        """
        return self.epoch, self.leader


class Relation(Enum):
    """How the generation of one side relates to the other's."""

    BOTH_EMPTY = "neither node has data"
    EMPTY = "this node has no data"
    FILLED = "the other node has no data"
    SAME = "both hold the same generation"
    BEHIND = "the other node counts what this node lacks"
    AHEAD = "this node counts what the other node lacks"
    OLDER = "this node's generation is an ancestor of the other's"
    NEWER = "the other node's generation is an ancestor of this one's"
    FORKED = "both nodes answered writes since they were equal, and counted them"
    FORKED_LONG_AGO = "both nodes answered writes since a common ancestor"
    UNRELATED = "the nodes have no generation in common"
    CONTRADICTION = "each node says that the other one is behind"


class Action(Enum):
    """What the two nodes do."""

    IN_SYNC = "in_sync"  # nothing to copy: writes go to both
    RESYNC = "resync"
    NEW = "new"  # both disks are zero: they take a random generation together
    STOP = "stop"  # they do not connect; the reason says why, the hint what helps


class Extent(Enum):
    """What a resync copies."""

    NOTHING = "nothing"
    MARKED = "marked"  # both dirty maps, both sides' doubts, what either disk misses
    DIFFERENT = "different"  # every region whose checksums differ


@dataclass(frozen=True, slots=True)
class Plan:
    """
    The result, the same for both sides.

    Args:
        row: the name of the rule that decided.
        source, target: node names, of RESYNC.
        epoch: to be stored by *source* before the other node does anything, or 0.
        demotes: the target serves clients: it fails the requests that it holds, closes
            its door and continues as a secondary.
        heals_source: the source's disk misses regions: what is `healable` comes from
            the target.
        discards: regions that only the target has and that are overwritten.
        begins: the source begins a generation first (`resolve`).
        split: an operator must choose a side (`resolve`).
        reason, hint: of STOP: why, and the command that helps.
    """

    action: Action
    row: str
    source: str = ""
    target: str = ""
    extent: Extent = Extent.NOTHING
    epoch: int = 0
    demotes: bool = False
    heals_source: bool = False
    discards: int = 0
    begins: bool = False
    split: bool = False
    reason: str = ""
    hint: str = ""


def relate(mine: Side, other: Side) -> Relation:
    """Compare two generations by what both sides know of each other."""
    if mine.generation == other.generation:
        return Relation.BOTH_EMPTY if mine.generation == NO_DATA else Relation.SAME
    if mine.generation == NO_DATA:
        return Relation.EMPTY
    if other.generation == NO_DATA:
        return Relation.FILLED
    behind = mine.generation in other.bases
    ahead = other.generation in mine.bases
    older = mine.generation in other.history
    newer = other.generation in mine.history
    if (behind or older) and (ahead or newer):
        return Relation.CONTRADICTION
    for holds, relation in (
        (behind, Relation.BEHIND),
        (ahead, Relation.AHEAD),
        (older, Relation.OLDER),
        (newer, Relation.NEWER),
        (bool(set(mine.bases) & set(other.bases)), Relation.FORKED),
        (bool(set(mine.history) & set(other.history)), Relation.FORKED_LONG_AGO),
    ):
        if holds:
            return relation
    return Relation.UNRELATED
