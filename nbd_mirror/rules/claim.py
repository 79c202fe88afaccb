# SPDX-License-Identifier: BSD-3-Clause
"""
Which connection may write to a node's disk: claims, pure rules.

A primary that connects to another node claims the node's disk. The claim is the
export's name. So it arrives before the first request, and a plain client cannot make a
claim by accident:

    NAME@EPOCH.NODE.SESSION.NONCE

Claims are ordered by epoch, node and session. The node stores the highest one that it
has granted. A higher claim fences: the node stores it, then cuts the connections of all
others, waits until none of their requests is under way at its disk, and flushes the
disk. Then it grants the claim. So no write of a lower claim reaches the disk later,
even if the network or a stopped process still holds one, and a node's
`late_write_window` is 0.

A node also refuses a claim of an earlier promotion than the latest one that it knows.
Its own promotions count: before one, the node cuts and drains all connections, as it
does for a claim. Otherwise a primary that was stopped between its handshake and its
claim could claim the disk of a node that was promoted, has answered writes and is
secondary again.

Why each part is there:

- The **node**: two operators who force two nodes at once give both the same epoch.
- The **session**: the primary stores it, raises it at each reconnect, and begins again
  with each promotion, as each start is one. A request of a lost connection may still
  reach the disk, so the same primary has to fence it too.
- The **nonce**: a random number of the claim's first connection. A second connection of
  the same session shows it. A primary whose state was restored from a copy does not
  know it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

__all__ = [
    "SESSIONS_AHEAD",
    "Claim",
    "Judgement",
    "format_claim",
    "is_credible",
    "judge",
    "next_session",
    "parse_claim",
    "why_refused",
]

SESSIONS_AHEAD = 1 << 32  # more of one promotion than a node can have missed
NUMBER_MAX = (1 << 64) - 1  # of epoch and session: the superblock has 64 bits
NONCE_DIGITS = 32  # hexadecimal

_CLAIM = re.compile(
    r"(?P<volume>.+)@(?P<epoch>\d{1,20})\.(?P<node>[^@]+)\.(?P<session>\d{1,20})"
    rf"\.(?P<nonce>[0-9a-f]{{{NONCE_DIGITS}}})",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Claim:
    """One session of one promoted node."""

    epoch: int
    node: str
    session: int
    nonce: str

    @property
    def rank(self) -> tuple[int, str, int]:
        """The order of claims."""
        return self.epoch, self.node, self.session

    @property
    def term(self) -> tuple[int, str]:
        """The promotion that it belongs to; see `Side.term`."""
        return self.epoch, self.node


class Judgement(Enum):
    """What a node does with a claim."""

    FENCE = "fence"  # store it, cut and drain all others, flush; then it is granted
    JOIN = "join"  # one more connection of the session that is in force
    REFUSE = "refuse"  # and say which one is in force


def judge(
    claim: Claim,
    in_force: Claim | None,
    *,
    term: tuple[int, str],
    whole: bool,
    primary: bool,
) -> Judgement:
    """
    Judge a claim.

    Args:
        in_force: the highest claim that was ever stored, or None.
        term: the latest promotion that this node knows, its own ones included.
        whole: no connection of *in_force* has ended since it was granted, and the node
            has not been restarted. Once one has ended, its requests may be lost or
            still under way: only another session tells them apart.
        primary: this node serves clients; it grants no claim.
    """
    if primary or claim.term < term or not is_credible(claim, in_force):
        return Judgement.REFUSE
    if in_force is None or claim.rank > in_force.rank:
        return Judgement.FENCE
    if claim == in_force and whole:
        return Judgement.JOIN
    return Judgement.REFUSE


def is_credible(claim: Claim, in_force: Claim | None) -> bool:
    """
    Tell whether a primary can have come to this session.

    A claim is stored, and nothing takes it back: no session follows the highest one, so
    its promotion would never write here again. Each promotion counts from 0.
    """
    return claim.session <= _latest_of(claim.term, in_force) + SESSIONS_AHEAD


def next_session(own: int, told: int) -> int:
    """
    Return the session that a primary claims next.

    Args:
        own: its latest one.
        told: the one in force for its promotion, as the other node says; 0: none is. It
            is higher if a third party with the nodes' key has claimed in this primary's
            name. The primary goes on behind it, unless the other node lies.
    """
    return max(own, told if told <= own + SESSIONS_AHEAD else own) + 1


def _latest_of(term: tuple[int, str], in_force: Claim | None) -> int:
    same = in_force is not None and in_force.term == term
    return in_force.session if in_force is not None and same else 0


def why_refused(
    claim: Claim, in_force: Claim | None, *, term: tuple[int, str], primary: bool
) -> str:
    """Return the reason, which both the claiming node and this one show."""
    asked = f"epoch {claim.epoch} of {claim.node}, session {claim.session}"
    if primary:
        return f"this node is primary: it grants no claim ({asked})"
    if not is_credible(claim, in_force):
        held = f"epoch {in_force.epoch}, session {in_force.session}" if in_force else ""
        return (
            f"{asked} is too far after {held or 'none'}: no primary connects so often"
        )
    if claim.term < term or in_force is None:
        return f"{term[1]} was promoted in epoch {term[0]}, which is later than {asked}"
    held = f"epoch {in_force.epoch} of {in_force.node}, session {in_force.session}"
    if claim.rank == in_force.rank:
        return (
            f"a connection of {held} was lost or is another's: claim a higher session"
        )
    return f"{held} is in force, which is later than {asked}"


def format_claim(volume: str, claim: Claim) -> str:
    """Make the export's name of a claim."""
    return f"{volume}@{claim.epoch}.{claim.node}.{claim.session}.{claim.nonce}"


def parse_claim(export: str) -> tuple[str, Claim] | None:
    """
    Read an export's name; None: it is no claim, or not one of this version.

    Any text that a hostile client sends gives None or a claim, never an error.
    """
    match = _CLAIM.fullmatch(export)
    if match is None:
        return None
    epoch, session = int(match["epoch"]), int(match["session"])
    if max(epoch, session) > NUMBER_MAX:
        return None
    return match["volume"], Claim(epoch, match["node"], session, match["nonce"])
