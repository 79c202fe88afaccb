# SPDX-License-Identifier: BSD-3-Clause
"""
Whether a node may open its door: pure rules.

That a node remembers to be primary is never a reason to open its door. It needs proof
that no other node has answered a write that it lacks, and that no other node serves
now. Without proof an operator has to force it, and is told what may be lost. A node
cannot know how many writes an unreachable primary has answered: so it names a time, and
never invents a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nbd_mirror.rules.node_handshake import decide
from nbd_mirror.rules.node_side import Action, Role, Side

__all__ = [
    "Answer",
    "Contact",
    "Standing",
    "Verdict",
    "may_hand_over",
    "may_promote",
    "may_resume",
]


class Answer(Enum):
    """The values are the words of `status`."""

    YES = "yes"
    FORCE = "force"  # an operator may: something may be lost
    NO = "no"  # not even by force


@dataclass(frozen=True, slots=True)
class Contact:
    """
    Another node, as this one sees it now.

    Args:
        connected: the handshake has succeeded and a session is up; or neither node has
            data, and the handshake waits for the first promotion.
        has_data: it holds a generation.
    """

    node: str
    connected: bool = False
    role: Role = Role.SECONDARY
    has_data: bool = True


@dataclass(frozen=True, slots=True)
class Standing:
    """
    A node that is asked to become primary.

    Args:
        has_data: it holds a generation.
        behind: a primary counts regions that this node lacks.
        inconsistent: a resync to it was cut off; *undo*: it can be rolled back.
        missed: regions that its own disk lacks.
        lost_power: it ended uncleanly and has not met its primary since, so that it may
            lack writes that were answered and not flushed.
        token: the last primary demoted itself and handed its role to this node; no
            generation or epoch came after that.
        others: every other node of the volume.
    """

    has_data: bool = True
    behind: bool = False
    inconsistent: bool = False
    undo: bool = False
    missed: int = 0
    lost_power: bool = False
    token: bool = False
    others: tuple[Contact, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer, and why."""

    answer: Answer
    reason: str


def may_promote(node: Standing) -> Verdict:
    """
    Answer whether *node* may become primary: the first line that applies.

    The answer is given to the node that asks. Before it opens its door, each connected
    node stores the new term, or refuses it. A node refuses if it is primary, if it
    knows a later term, or if it asks for a later one itself. The stored term takes back
    the node's token and its own right to resume. When the last node has consented, the
    answer must still be the same. Otherwise two connected nodes could be answered "yes"
    at the same time.

        another node is connected as primary     no: switch over instead
        its disk misses regions                  no
        a resync was cut off, no undo log        no
        a resync was cut off, with an undo log   force: the last consistent image
        no data, a connected node has some       no: it is filled first
        no data, no node that it knows has some  force: its disk would count as it is
        behind                                   force: its image is old
        it holds the role's token                yes
        every other node is connected and a
        secondary                                yes
        it lost power                            force: unflushed writes may be lost
        else                                     force: a primary may have gone on alone
    """
    for applies, answer, reason in (
        (
            any(_serves(other) for other in node.others),
            Answer.NO,
            "another node is primary and connected",
        ),
        (node.missed > 0, Answer.NO, "its own disk misses regions"),
        (
            node.inconsistent and not node.undo,
            Answer.NO,
            "a resync to it was cut off: its image is of no instant",
        ),
        (
            node.inconsistent,
            Answer.FORCE,
            "a resync to it was cut off: its last consistent image is older",
        ),
        (
            not node.has_data and any(_filled(other) for other in node.others),
            Answer.NO,
            "it holds no data yet, and a connected node does",
        ),
        (
            not node.has_data and not _proven(node),
            Answer.FORCE,
            "it holds no data of the volume, and another node may",
        ),
        (node.behind, Answer.FORCE, "it lacks writes that another node has answered"),
        (node.token, Answer.YES, "the last primary handed it the role"),
        (_proven(node), Answer.YES, "every other node is connected and secondary"),
        (
            node.lost_power,
            Answer.FORCE,
            "it ended uncleanly: it may lack writes that were not flushed",
        ),
    ):
        if applies:
            return Verdict(answer, reason)
    return Verdict(Answer.FORCE, "another node may have gone on alone")


def may_resume(mine: Side, other: Side) -> bool:
    """
    Tell whether the last primary opens its door again without an operator.

    This node has met *other* after a restart, was not demoted and did not hand over its
    role. The other node must not know of a promotion since, of any other node: it may
    have consented to one of this node that was cut off. And this node must not have to
    wait for data.
    """
    plan = decide(mine, other)
    ready = plan.action is Action.IN_SYNC or (
        plan.action is Action.RESYNC and plan.source == mine.node
    )
    later = other.term > mine.term and other.leader != mine.node
    newer = other.role is Role.PRIMARY or later
    last = mine.leader == mine.node and not mine.handed
    return ready and not newer and last and not mine.missed


def may_hand_over(mine: Side, other: Side) -> bool:
    """
    Tell whether *mine* may hand the role of primary to *other*, with a token.

    Only the last primary may, and only to one node. The token makes *other* primary
    without the consent of other nodes, so no third node can have been promoted since.
    """
    last = mine.leader == mine.node and mine.term == other.term
    closed = Role.PRIMARY not in (mine.role, other.role)
    free = mine.handed in ("", other.node)
    return last and closed and free and decide(mine, other).action is Action.IN_SYNC


def _serves(other: Contact) -> bool:
    return other.connected and other.role is Role.PRIMARY


def _filled(other: Contact) -> bool:
    return other.connected and other.has_data


def _proven(node: Standing) -> bool:
    return all(other.connected for other in node.others)
