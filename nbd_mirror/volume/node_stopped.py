# SPDX-License-Identifier: BSD-3-Clause
"""
The status of a node without a server, from its record.

A record tells what the node knew when it was stored. What another node has done since
is not known, so nothing here claims that the nodes are in sync, or that this one may
be promoted.
"""

from __future__ import annotations

from ..base.units import iso_time
from .config import VolumeConfig
from .node_record import NodeRecord
from .status import NodeStatus, OtherNode, Promotable

__all__ = ["hex_generation", "stopped_node"]

_NOT_KNOWN = "no server runs for this node: what the other nodes do now is not known"


def stopped_node(config: VolumeConfig, record: NodeRecord | None) -> NodeStatus | None:
    """Return what is stored of this node; what the others do now is not known."""
    if record is None:
        return None
    state = "inconsistent" if record.inconsistent else "waiting"
    if not record.lineage.generation:
        state = "no_data"
    met = {peer.node: peer.met for peer in record.peers}
    return NodeStatus(
        name=record.node,
        role=record.role.value,
        epoch=record.epoch,
        leader=record.leader,
        generation=hex_generation(record.lineage.generation),
        state=state,
        why=_NOT_KNOWN,
        hint="nbd-mirror serve CONFIG",
        peers=tuple(
            OtherNode(
                name=other.name,
                address=str(other.address),
                connected=False,
                role="",
                in_sync=False,
                since=iso_time(met.get(other.name, 0)),
                why="not known without a server",
            )
            for other in config.others
        ),
        promotable=Promotable(
            answer="no",
            reason="no server runs for this node",
            command="nbd-mirror serve CONFIG",
        ),
    )


def hex_generation(generation: int) -> str:
    """Return a generation as status shows it; "" for no data."""
    return f"{generation:016x}" if generation else ""
