# SPDX-License-Identifier: BSD-3-Clause
"""What a node reports of itself and of the others: it asks no other node for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..base.units import format_size, iso_time
from ..rules.generation import NO_DATA
from ..rules.node_side import Crash, Role
from ..rules.promotion import Answer, Verdict
from ..rules.state import RemoteState
from ..volume.config import VolumeConfig
from ..volume.model import RemoteStatus
from ..volume.node_record import NodeRecord
from ..volume.node_stopped import hex_generation
from ..volume.status import NodeStatus, OtherNode, Promotable
from .node_local import LocalNode
from .node_others import Contact, Others

__all__ = ["Facts", "node_status"]

FRESH_S = 15.0  # a meeting that is older tells nothing of now


@dataclass(frozen=True, slots=True)
class Facts:
    """
    What the status is made of.

    *waits*: why a last primary does not resume, and a hint; *verdict* says whether the
    node may be promoted; *keeper* gives the reason and hint of another node's keeper;
    *hook* is the hook that failed.
    """

    config: VolumeConfig
    local: LocalNode
    others: Others
    waits: tuple[str, str]
    verdict: Callable[[], Verdict]
    keeper: Callable[[str], tuple[str, str]]
    now: float
    hook: str = ""


def node_status(facts: Facts) -> NodeStatus:
    """Return the status of this node."""
    local = facts.local
    record = local.record()
    peers = tuple(_other(facts, record, name) for name in local.others)
    state, why, hint = _state(facts, record, peers)
    return NodeStatus(
        name=record.node,
        role=(Role.PRIMARY if local.primary else Role.SECONDARY).value,
        epoch=record.epoch,
        leader=record.leader,
        generation=hex_generation(record.lineage.generation),
        state=state,
        why=why,
        hint=hint,
        hook=facts.hook,
        peers=peers,
        promotable=_promotable(facts, record, peers),
    )


def _state(
    facts: Facts, record: NodeRecord, peers: tuple[OtherNode, ...]
) -> tuple[str, str, str]:
    local = facts.local
    if local.primary:
        for peer in peers:
            if not peer.in_sync:
                return "alone", f"{peer.name}: {peer.why}", facts.keeper(peer.name)[1]
        return "in_sync", "", ""
    if record.inconsistent:
        return "inconsistent", "a resync to it has not ended", ""
    if record.lineage.generation == NO_DATA:
        return (
            "no_data",
            facts.waits[0] or "no primary has filled it yet",
            facts.waits[1]
            or "nbd-mirror promote CONFIG (on the node whose disk has the data)",
        )
    if local.session is not None:
        if local.behind:
            return "behind", f"{local.session.node} has data that it lacks", ""
        return "in_sync", "", ""
    if facts.waits[0]:
        return "waiting", *facts.waits
    leader = f"{record.leader} was primary last, and " if record.leader else ""
    return "waiting", f"{leader}no primary is connected", facts.waits[1]


def _other(facts: Facts, record: NodeRecord, name: str) -> OtherNode:
    local, contact = facts.local, facts.others.contacts.get(name)
    address = next(
        str(node.address) for node in facts.config.nodes if node.name == name
    )
    met = {peer.node: peer.met for peer in record.peers}.get(name, 0)
    if local.primary:
        status = local.engine.remote_status(local.disk_of(name))
        in_sync = status.admitted and status.state is RemoteState.IN_SYNC
        why = "" if in_sync else _why_not(facts, name, status)
        connected = status.admitted or _answers(facts, contact)
        met = int(facts.now) if status.admitted else met
    else:
        session = local.session
        connected = _answers(facts, contact) or (
            session is not None and session.node == name
        )
        in_sync = session is not None and session.node == name and not local.behind
        why = "" if connected else (contact.why if contact else "not met yet")
        if connected and not in_sync:
            why = "no session writes to this node's disk"
    return OtherNode(
        name=name,
        address=address,
        connected=connected,
        role=_role(facts, name, contact),
        in_sync=in_sync,
        since=iso_time(int(facts.now) if connected else met),
        why=why,
    )


def _role(facts: Facts, name: str, contact: Contact | None) -> str:
    local, session = facts.local, facts.local.session
    if session is not None and session.node == name:
        return Role.PRIMARY.value
    # A meeting becomes old, while what is in use is what this primary writes to.
    if local.primary and local.engine.remote_status(local.disk_of(name)).admitted:
        return Role.SECONDARY.value
    if contact is not None and contact.side is not None and _answers(facts, contact):
        return contact.side.role.value
    return ""


def _answers(facts: Facts, contact: Contact | None) -> bool:
    fresh = contact is not None and facts.now - contact.at <= FRESH_S
    return contact is not None and fresh and contact.side is not None


def _why_not(facts: Facts, name: str, status: RemoteStatus) -> str:
    why = facts.keeper(name)[0] or status.reason
    left = facts.local.engine.status().bytes_of(status.dirty_regions)
    return why or f"{left} bytes are to be copied"


def _promotable(
    facts: Facts, record: NodeRecord, peers: tuple[OtherNode, ...]
) -> Promotable:
    if facts.local.primary:
        heirs = [peer.name for peer in peers if peer.in_sync]
        return Promotable(
            answer=Answer.NO.value,
            reason="it is primary",
            command="nbd-mirror switchover CONFIG" if heirs else "",
        )
    verdict = facts.verdict()
    command = {
        Answer.YES: "nbd-mirror promote CONFIG",
        Answer.FORCE: "nbd-mirror promote CONFIG --force",
        Answer.NO: "",
    }[verdict.answer]
    serving = [peer.name for peer in peers if peer.role == Role.PRIMARY.value]
    if verdict.answer is Answer.NO and serving:
        command = f"nbd-mirror switchover CONFIG (on {serving[0]})"
    return Promotable(
        answer=verdict.answer.value,
        reason=verdict.reason,
        command=command,
        lost=_lost(facts, record) if verdict.answer is Answer.FORCE else "",
    )


def _lost(facts: Facts, record: NodeRecord) -> str:
    """
    Say what a forced promotion may lose, as far as this node can know.

    It never invents a number: what another node counted when they met is a least
    number, because that node may have answered more since.
    """
    if record.lineage.generation == NO_DATA:
        return (
            "all that another node holds: this node's disk would count as it is, and "
            "the volume's data elsewhere would be unrelated to it"
        )
    met = max((peer.met for peer in record.peers), default=0)
    since = f" since {iso_time(met)}" if met else ""
    alone = f"unknown: at most what another node has answered alone{since}"
    known = facts.others.lacking
    if known:
        size = facts.local.engine.status().bytes_of(known)
        regions = "1 region" if known == 1 else f"{known} regions"
        return f"at least the writes in {regions} ({format_size(size)}); {alone}"
    if record.crash is Crash.HOST:
        return f"{alone}, and before that what was not flushed when its host went down"
    return alone
