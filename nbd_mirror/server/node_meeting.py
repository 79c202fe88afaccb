# SPDX-License-Identifier: BSD-3-Clause
"""
How a primary connects to another node, and how that node gets in sync.

    agree    meet it, decide on both sides; store the epoch that the plan asks for
    claim    store a higher session, and connect with the claim as the export's name
    begin    fetch its maps, mark their union here, and have it store what was decided
    admit    the engine resyncs; requests go to it from now on
    settle   store the offer, have it adopt the generation, store that it is counted

Each step is durable before the next one. The claim comes before the maps: it fences the
other node's disk, and what an earlier session left active there are doubts then.

No step clears a bit. After a connection was lost at any step, the next begins with
`agree`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..base.errors import RoleError
from ..rules.claim import Claim, next_session
from ..rules.generation import offer, settle, share
from ..rules.node_handshake import decide
from ..rules.node_side import Action, Extent, Plan, Role, Side
from ..volume import node_wire as wire
from ..volume.model import NodeMap
from ..volume.node_record import NodeRecord
from .node_local import (
    LocalNode,
    follows,
    knows_now,
    popcount,
    term_of,
    union,
    without,
)
from .node_others import Others

__all__ = ["Agreed", "Meeting"]


@dataclass(frozen=True, slots=True)
class Agreed:
    """What two nodes decided, and from what."""

    plan: Plan
    side: Side  # the other node's


class Meeting:
    """
    The meetings of this primary with one other node.

    Args:
        other: its name.
        alone: there is no third copy, so nothing is copied to the other node that the
            own disk misses.
    """

    def __init__(
        self, local: LocalNode, others: Others, other: str, *, alone: bool = False
    ) -> None:
        self._local = local
        self._others = others
        self._other = other
        self._alone = alone
        self._claim: Claim | None = None  # of the latest session
        # The session since which this map has all that may differ; 0: none has.
        self._covered = 0
        # The other node has stored that it is behind, and has not adopted since.
        self._behind = False

    def agree(self) -> Agreed:
        """
        Meet the other node, and decide.

        Raises:
            RoleError: this primary does not connect to it; with the reason and a hint.
            MirrorError: it cannot be reached, or refuses.
        """
        plan, side = self._decide()
        if plan.epoch and plan.source == side.node:
            raise RoleError(
                f"{side.node} is the later primary, and connects to this one"
            )
        if plan.epoch:
            # The epoch is stored before the other node does anything, and shown then.
            self._local.change(lambda record: _in_epoch(record, plan.epoch))
            self._local.reach("meeting_epoch")
            again, side = self._decide()
            if again.action is not plan.action or again.source != plan.source:
                raise RoleError(f"{side.node} has changed: {again.row}")
            plan = again
        if plan.action is Action.STOP:
            raise RoleError(plan.reason, plan.hint)
        if plan.action is Action.NEW or plan.target == self._local.record().node:
            raise RoleError(f"{side.node} has what this node lacks: {plan.row}")
        self._local.change(lambda record: knows_now(record, side.node, side.identities))
        self._local.reach("meeting_agreed")
        return Agreed(plan, side)

    def _decide(self) -> tuple[Plan, Side]:
        mine, side, told = self._others.meet(self._other)
        plan = decide(mine, side)
        if wire.plan_words(plan) != told:
            raise RoleError(
                f"{mine.node} and {side.node} decide differently: {plan.row} here, "
                f"{told.get('row')} there",
                "install the same release of nbd-mirror on both nodes",
            )
        return plan, side

    def claim(self, agreed: Agreed, connect: Callable[[str], object]) -> None:
        """
        Store a higher session, and connect to the disk with its claim.

        Args:
            connect: takes the URI; raises MirrorError.
        """
        if agreed.side.role is Role.PRIMARY:
            # It grants no claim. It closes its door because of this call.
            self._begin(agreed, Claim(0, "", 0, "0" * 32), 0)
            raise RoleError(f"{self._other} closes its door first")
        told = self._others.session_at(self._other)
        stored = self._local.change(
            lambda record: replace(
                record, own_session=next_session(record.own_session, told)
            )
        )
        self._local.reach("claim_numbered")
        self._claim = Claim(
            stored.epoch, stored.node, stored.own_session, wire.new_nonce()
        )
        connect(self._others.claim_uri(self._other, self._claim))

    def begin(self, agreed: Agreed) -> int:
        """
        Mark what is to be copied, and have the other node store the beginning.

        Returns:
            The number of regions that are copied.
        """
        local, disk = self._local, self._local.disk_of(self._other)
        assert self._claim is not None
        doubts = local.bits(self._other, NodeMap.DOUBTS)
        marks = union(self._others.fetch(self._other, len(doubts)), doubts)
        different = agreed.plan.extent is Extent.DIFFERENT
        if different and not self._is_covered(agreed.side):
            marks = b"\xff" * len(doubts)
        if different:
            # Marked first: what the other node stores next then proves the marks.
            local.engine.node_mark(disk, NodeMap.DIRTY, marks)
            local.reach("begin_marked")
            self._covered = self._covered or self._claim.session
        mine = local.side(self._other)
        # Read after all else: clients write on, and the other node misses that.
        dirty = local.bits(self._other, NodeMap.DIRTY)
        # Bits behind the last region count too.
        todo = popcount(union(dirty, self._copied(marks)))
        now = Agreed(decide(mine, agreed.side), agreed.side)
        stays = (now.plan.target or self._other) == self._other
        if now.plan.action not in (Action.IN_SYNC, Action.RESYNC) or not stays:
            raise RoleError(f"{self._other}: the decision has changed: {now.plan.row}")
        if now.plan.extent is Extent.DIFFERENT and not different:
            raise RoleError(f"{self._other}: the decision has changed: {now.plan.row}")
        self._begin(now, self._claim, todo, mine)
        # A node whose resync was cut off is behind until it adopts, even if all of it
        # was copied: before that it stays inconsistent.
        in_sync = todo == 0 and now.plan.action is Action.IN_SYNC
        self._behind = not in_sync or mine.generation != agreed.side.generation
        if not different:
            # Marked last. Two nodes of one generation that both have dirty regions are
            # a split brain, unless one of them has stored that it is the target.
            local.engine.node_mark(disk, NodeMap.DIRTY, marks)
            local.reach("begin_marked")
        if mine.generation == agreed.side.generation:
            local.change(lambda record: self._same(record, mine, counts=in_sync))
        return todo

    def _copied(self, marks: bytes) -> bytes:
        """
        Return the regions of *marks* that this node can copy to the other one.

        The engine makes no region dirty whose only copy the other node has. If that
        node stored that it is copied to, and this one was lost then, the only good copy
        could never be promoted.
        """
        if not self._alone:
            return marks
        return without(marks, self._local.bits(self._other, NodeMap.MISSED))

    def _begin(
        self, agreed: Agreed, claim: Claim, regions: int, mine: Side | None = None
    ) -> None:
        mine = mine or self._local.side(self._other)
        self._others.begin(self._other, mine, agreed.plan, claim, regions)

    def _is_covered(self, side: Side) -> bool:
        """
        Tell whether this map has all that may differ, as a resync was cut off.

        All regions were marked in an earlier session of this process, and only copies
        clear a mark. The other node is still inconsistent, and follows this one: so no
        other node has written to its disk since.
        """
        return self._covered > 0 and side.inconsistent and side.term[1] == self._name

    @property
    def _name(self) -> str:
        return self._local.record().node

    def _same(self, record: NodeRecord, mine: Side, *, counts: bool) -> NodeRecord:
        """Return the record after a meeting in one generation."""
        lineage = record.lineage
        if lineage.generation != mine.generation:
            return record  # the engine has begun another one in the meantime
        if counts:
            lineage = settle(lineage, self._other, mine.generation)
        return replace(record, lineage=share(lineage))

    # --- the end of a resync ---

    def is_settled(self) -> bool:
        """Tell whether the other node holds this generation, and both know it."""
        peer = self._local.record().lineage.peer(self._other)
        return peer.shared and not peer.bases and not self._behind

    def settle(self, lacks: Callable[[], bool]) -> bool:
        """
        Have the other node take this generation, now that it misses nothing.

        Args:
            lacks: tells whether it lacks a region, or its connection was lost. If not,
                the engine ends the connection once it lacks one.
        Returns:
            False: it lacks something now, and nothing was offered to it.
        """
        local, claim = self._local, self._claim
        assert claim is not None
        local.engine.node_flush()
        offered = local.change(self._offered).lineage
        local.reach("offer_stored")
        # A write that it missed before the offer was stored began no generation. Its
        # bit stays until a resync, which this thread alone does. So nothing was missed
        # if there is no bit now, and a later write begins a generation.
        if lacks():
            return False
        held = self._others.adopt(self._other, claim, offered)
        local.reach("adopt_answered")
        if held != offered.generation:
            raise RoleError(f"{self._other} adopted another generation")
        local.change(
            lambda record: replace(
                record, lineage=settle(record.lineage, self._other, held)
            )
        )
        local.reach("settle_stored")
        self._covered, self._behind = 0, False
        return True

    def _offered(self, record: NodeRecord) -> NodeRecord:
        return replace(record, lineage=offer(record.lineage, self._other))


def _in_epoch(record: NodeRecord, epoch: int) -> NodeRecord:
    term = (epoch, record.node)
    if term_of(record) >= term:
        return record
    return replace(follows(record, term), role=record.role, own_session=0)
