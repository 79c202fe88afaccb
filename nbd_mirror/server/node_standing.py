# SPDX-License-Identifier: BSD-3-Clause
"""
What all nodes show when this one is to change its role, and what follows from it.

`Met` is one look at all nodes. The functions judge it by the rules (rules/promotion.py)
and ask nobody, so node_role.py can judge the same look again after each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ..base.errors import RoleError
from ..rules.generation import NO_DATA
from ..rules.node_handshake import decide
from ..rules.node_side import Action, Crash, Role, Side
from ..rules.promotion import Contact, Standing, may_resume
from ..volume.node_record import NodeRecord
from .node_local import Term, term_of

__all__ = [
    "Met",
    "Promotion",
    "check_resumed",
    "contact_of",
    "content_of",
    "standing_of",
    "was_primary",
    "why_not_resume",
]


class Promotion(Enum):
    """Why a node is promoted."""

    ASKED = "asked"  # by an operator, without force
    FORCED = "forced"
    RESUMED = "resumed"  # it was primary last
    ALONE = "alone"  # the same, and start_alone is over
    TOKEN = "token"  # noqa: S105  # the last primary handed it the role


@dataclass(frozen=True, slots=True)
class Met:
    """What all nodes show now; a side is None if its node cannot be reached."""

    record: NodeRecord
    sides: Mapping[str, tuple[Side, Side] | None]
    errors: Mapping[str, str]


def contact_of(name: str, sides: tuple[Side, Side] | None) -> Contact:
    """Return another node as `may_promote` judges it; None: it cannot be reached."""
    if sides is None:
        return Contact(name)
    mine, side = sides
    plan = decide(mine, side)
    waits = mine.generation == side.generation == NO_DATA  # for the first promotion
    # A primary that answers counts even if the two nodes would stop: it serves.
    connected = plan.action is not Action.STOP or waits or side.role is Role.PRIMARY
    return Contact(
        name,
        connected=connected,
        role=side.role,
        has_data=side.generation != NO_DATA,
    )


def standing_of(
    record: NodeRecord,
    side: Side,
    sides: Mapping[str, tuple[Side, Side] | None],
    *,
    behind: bool,
    token: bool,
) -> Standing:
    """Return this node as `may_promote` judges it."""
    targets = [
        decide(*one).target == record.node for one in sides.values() if one is not None
    ]
    return Standing(
        has_data=record.lineage.generation != NO_DATA,
        behind=behind or (record.lineage.generation != NO_DATA and any(targets)),
        inconsistent=record.inconsistent,
        missed=side.missed,
        lost_power=record.crash is Crash.HOST and side.doubts > 0,
        token=token,
        others=tuple(contact_of(name, one) for name, one in sides.items()),
    )


def content_of(record: NodeRecord) -> tuple[int, Term]:
    """Return what a promotion's proof is about: generation and latest promotion."""
    return record.lineage.generation, term_of(record)


def was_primary(record: NodeRecord) -> bool:
    """Tell whether the node was primary last, and neither demoted nor handed over."""
    last = record.role is Role.PRIMARY and record.leader == record.node
    return last and not record.handed and record.lineage.generation != NO_DATA


def _why_waits(name: str, mine: Side, side: Side) -> tuple[str, str]:
    """Return why *mine* does not resume now that it has met *side*."""
    plan = decide(mine, side)
    if side.role is Role.PRIMARY:
        words = f"{name} is primary since epoch {side.epoch}"
        return (f"{words}, and {plan.reason}", plan.hint) if plan.split else (words, "")
    if plan.split:  # no promotion ends that
        return plan.reason, plan.hint
    if side.term > mine.term and side.leader != mine.node:
        return (
            f"{side.leader} was promoted in epoch {side.epoch}, after this node",
            "nbd-mirror promote CONFIG (on the node that is to serve)",
        )
    if plan.action is Action.STOP:
        return plan.reason, plan.hint
    if plan.target == mine.node:
        return (
            f"{name} has the better copy, as this host went down with its cache",
            f"nbd-mirror promote CONFIG (on {name})",
        )
    return f"this node's disk misses {mine.missed} regions", ""


def why_not_resume(met: Met, *, alone: bool) -> tuple[str, str] | None:
    """Return why the last primary does not resume, and a hint; None: it does."""
    if not was_primary(met.record):
        return "another node was promoted since", ""
    for name, one in met.sides.items():
        if one is None:
            if alone:
                continue
            return (
                f"{name} may have been promoted, and cannot be asked: "
                f"{met.errors.get(name, '')}",
                "nbd-mirror promote CONFIG --force, if it was not",
            )
        if may_resume(*one):
            continue
        return _why_waits(name, *one)
    return None


def check_resumed(met: Met, term: Term) -> None:
    """Raise RoleError if a node has changed since this one was to resume."""
    for name, one in met.sides.items():
        if one is None:
            continue
        later = one[1].role is Role.PRIMARY or one[1].term > term
        plan = decide(*one)
        ready = plan.action is Action.IN_SYNC or plan.source == met.record.node
        if later or not ready:
            raise RoleError(f"{name} has changed in the meantime: {plan.row}")
