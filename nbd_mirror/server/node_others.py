# SPDX-License-Identifier: BSD-3-Clause
"""
Calls of this node to the other ones.

A shared key proves that the other end belongs to the volume, and nothing more. A
certificate also proves which node it is. In both cases each answer is checked for the
name and the id of the node that was called. A node whose id is not known yet is taken
as it is: the handshake stores it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from ..base.errors import (
    AccessError,
    FormatError,
    MirrorError,
    RemoteError,
    UnsupportedError,
    WrongDiskError,
)
from ..rules.claim import Claim, format_claim
from ..rules.generation import Lineage
from ..rules.node_side import Plan, Side
from ..volume import node_wire as wire
from ..volume.config import VolumeConfig
from ..volume.node_record import NodeRecord
from .node_local import LocalNode, Term, why_side_incredible

__all__ = ["Contact", "Others", "Wire", "node_uri"]

CALL_S = 5.0  # for a whole call, with its connection
FETCH_S = 15.0  # for a map, in addition to its bytes at the slowest speed
SLOWEST = 8 << 10  # bytes per second, as a connection may be at the slowest


@dataclass(frozen=True, slots=True)
class Wire:
    """
    How bytes reach another node.

    *call* takes an export's URI, a request and seconds, and returns the reply; *fetch*
    takes a URI, a size and seconds.
    """

    call: Callable[[str, bytes, float], bytes]
    fetch: Callable[[str, int, float], bytes]


@dataclass(frozen=True, slots=True)
class Contact:
    """What another node showed last; *side* None: it could not be reached, *why*."""

    side: Side | None
    why: str
    at: float  # seconds since 1970
    hint: str = ""


def node_uri(config: VolumeConfig, name: str, export: str) -> str:
    """
    Return the URI of an export of another node.

    With certificates the URI names the node, and C checks that the certificate is of
    that name, or of the host of its address (csrc/wire/tls_identity.c).
    """
    node = next(one for one in config.nodes if one.name == name)
    tls, path = config.tls, quote(export, safe="")
    if tls is None or not tls.on:
        return f"nbd://{node.address}/{path}"
    if tls.key is None:
        files = {
            "tls-certificate-file": tls.certificate,
            "tls-key-file": tls.private_key,
            "tls-ca-file": tls.ca,
            "tls-name": name,
        }
        words = "&".join(f"{key}={quote(text or '')}" for key, text in files.items())
        return f"nbds://{node.address}/{path}?{words}"
    user, key = quote(config.name, safe=""), quote(tls.key, safe="/")
    return f"nbds://{user}@{node.address}/{path}?tls-psk-file={key}"


class Others:
    """
    The other nodes.

    Args:
        uri: returns the URI of an export of a node.
        clock: gives seconds since 1970.
    """

    def __init__(
        self,
        local: LocalNode,
        wired: Wire,
        uri: Callable[[str, str], str],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._local = local
        self._wire = wired
        self._uri = uri
        self._clock = clock
        # Whole values alone are put into it, so readers need no lock.
        self._contacts: dict[str, Contact] = {}
        self._sessions: dict[str, int] = {}
        self._lacking: dict[str, int] = {}
        self._features: dict[str, tuple[str, ...]] = {}  # as of the latest meeting

    @property
    def contacts(self) -> Mapping[str, Contact]:
        """What each node showed last."""
        return dict(self._contacts)

    def session_at(self, other: str) -> int:
        """Return the session of this promotion in force at *other*, as it said last."""
        return self._sessions.get(other, 0)

    def saw(self, side: Side) -> None:
        """Remember what another node showed of itself."""
        self._lacking[side.node] = side.dirty
        self._contacts[side.node] = Contact(side, "", self._clock())

    def adopted(self, other: str) -> None:
        """Remember that this node has all that *other* has."""
        self._lacking[other] = 0

    @property
    def lacking(self) -> int:
        """At least so many regions were written by a node that this one met last."""
        return max(self._lacking.values(), default=0)

    def left(self, other: str) -> None:
        """Remember that the session of a primary has ended, until it is met again."""
        self._contacts[other] = Contact(None, "its session ended", self._clock())

    def claim_uri(self, other: str, claim: Claim) -> str:
        """Return the URI of another node's disk, claimed."""
        return self._uri(other, format_claim(self._local.volume, claim))

    # --- the calls: all raise MirrorError if the node does not answer, or refuses ---

    def meet(self, other: str) -> tuple[Side, Side, dict[str, object]]:
        """Return what both nodes show, and what *other* decided from that."""
        mine = self._local.side(other)
        body = wire.Meet(side=wire.SideWords.of(mine))
        answer = self._call(other, body)
        if answer.side is None or answer.plan is None:
            raise FormatError(f"{other} answered without its side")
        side = self._shown(other, answer.side)
        self._features[other] = answer.features
        self.saw(side)
        self._sessions[other] = answer.session
        return mine, side, dict(answer.plan)

    def require(self, other: str, feature: str) -> None:
        """
        Meet *other*, and check that its release knows a feature.

        Raises:
            UnsupportedError: it does not.
        """
        self.meet(other)
        if feature not in self._features[other]:
            raise UnsupportedError(
                f"the nbd-mirror of {other} does not know {feature}; nothing was "
                "changed",
                "install the same release of nbd-mirror on both nodes",
            )

    def begin(
        self, other: str, mine: Side, plan: Plan, claim: Claim, regions: int
    ) -> None:
        """Have *other* store what both decided, before the first copy."""
        self._call(
            other,
            wire.Begin(
                side=wire.SideWords.of(mine),
                plan=wire.plan_words(plan),
                claim=wire.ClaimWords.of(claim),
                regions=regions,
            ),
        )

    def adopt(self, other: str, claim: Claim, lineage: Lineage) -> int:
        """Have *other* take this node's generation; return the one that it holds."""
        body = wire.Adopt(
            claim=wire.ClaimWords.of(claim),
            generation=lineage.generation,
            history=lineage.history,
        )
        return self._call(other, body).generation

    def consent(self, other: str, epoch: int) -> Side:
        """Have *other* store the promotion of this node; return what it shows then."""
        answer = self._call(other, wire.Consent(epoch=epoch))
        if answer.side is None:
            raise FormatError(f"{other} answered without its side")
        side = self._shown(other, answer.side)
        self.saw(side)
        return side

    def token(self, other: str, generation: int, term: Term) -> None:
        """Give *other* the role of this demoted primary."""
        self._call(other, wire.Token(generation=generation, epoch=term[0]))

    def choose(self, other: str, mine: Side, plan: Plan) -> Side:
        """Have *other* store that it is kept, and this node is not; return its side."""
        body = wire.Choose(side=wire.SideWords.of(mine), plan=wire.plan_words(plan))
        answer = self._call(other, body)
        if answer.side is None:
            raise FormatError(f"{other} answered without its side")
        side = self._shown(other, answer.side)
        self.saw(side)
        return side

    def give_up(self, other: str, *, dry_run: bool, job: str) -> wire.JobWords:
        """Have *other* give up what it alone has, or say how far that is."""
        answer = self._call(other, wire.GiveUp(dry_run=dry_run, job=job))
        if answer.job is None:
            raise FormatError(f"{other} answered without saying what it does")
        return dict(answer.job)

    def fetch(self, other: str, size: int) -> bytes:
        """Return all regions that *other* names towards this node."""
        uri = self._uri(other, f"{self._local.volume}.dirty")
        return self._wire.fetch(uri, size, FETCH_S + size / SLOWEST)

    def _shown(self, other: str, words: wire.SideWords) -> Side:
        side = words.side()
        if side.node != other:
            raise FormatError(f"{other} shows itself as {side.node}")
        why_not = why_side_incredible(self._local.record(), side)
        if why_not:
            raise FormatError(
                f"{other}: {why_not}", "use the same configuration on all nodes"
            )
        return side

    def _call(self, other: str, body: wire.Body) -> wire.Answer:
        record = self._local.record()
        message = wire.Message(
            v=wire.VERSIONS,
            volume=self._local.volume,
            sender=record.node,
            id=record.id.hex,
            to=other,
            body=body,
        )
        uri = self._uri(other, f"{self._local.volume}.meta")
        try:
            words = self._wire.call(uri, wire.encode(message), CALL_S)
        except MirrorError as error:
            self._contacts[other] = Contact(None, str(error), self._clock())
            raise
        answer = wire.decode_answer(words)
        self._check(other, answer, record, body.call)
        return answer

    def _check(
        self, other: str, answer: wire.Answer, record: NodeRecord, call: str
    ) -> None:
        if answer.sender != other:
            raise AccessError(
                f"{other} was called, and {answer.sender} answers",
                "correct `address` in the configuration",
            )
        if not answer.ok:
            raise RemoteError(f"{other}: {answer.why}", answer.hint)
        known = {peer.node: peer.id for peer in record.peers}.get(other)
        # `meet` answers with all identities, and the handshake judges them.
        if call != "meet" and known is not None and known.hex != answer.id:
            raise WrongDiskError(
                f"{other} is not the node that this one knows by that name",
                f"nbd-mirror replace CONFIG {other} announces a new host",
            )
