# SPDX-License-Identifier: BSD-3-Clause
"""
What this node does when another one calls it: it judges by the rules, and stores.

One thread, the control thread, takes the calls from the door and answers them. Requests
of a granted session never pass through here.

The order of a claim that fences (rules/claim.py): the claim is stored, so that no lower
one is granted after a crash; all other sessions are cut, and wait until their requests
are off the disk; what they left active becomes doubts; the disk is flushed; then the
claim is granted. Each step is durable before the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..base.errors import MirrorError
from ..rules.claim import Claim, Judgement, judge, parse_claim, why_refused
from ..rules.generation import NO_DATA, Lineage, adopt, settle, share
from ..rules.node_handshake import decide
from ..rules.node_side import Action, Crash, Plan, Role, Side
from ..volume import node_wire as wire
from ..volume.node_record import NodeRecord
from .node_local import (
    LocalNode,
    Term,
    follows,
    knows_now,
    term_of,
    union,
    why_incredible,
    why_side_incredible,
)
from .node_others import Others

__all__ = [
    "Fence",
    "NodeCalls",
    "RefusedError",
    "Resolves",
    "Speaks",
    "Wishes",
    "with_key",
]

FENCE_S = 4.0  # of a claim; the claiming node waits a little longer


# Says why a call cannot be of the node with this name, or "".
Speaks = Callable[[str], str]


def with_key(_: str) -> str:
    """Believe any node's name: all nodes have one key, or none."""
    return ""


class RefusedError(Exception):
    """
    A call is refused; both nodes show why.

    Args:
        why: the reason.
        hint: the command that helps, or "".
    """

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.hint = hint


class Fence(Protocol):
    """The part of the door that cuts sessions."""

    def fence(self, timeout_s: float, keep: Any = None) -> int:
        """Cut all sessions but that of the call *keep*, and wait for their requests."""


class Resolves(Protocol):
    """Resolves a split brain (node_resolve.py)."""

    def answer(
        self, sender: str, body: wire.Choose | wire.GiveUp, reply: wire.Answer
    ) -> wire.Answer:
        """Answer a call of another node."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """
    What another node may ask the thread of the role to do.

    *demote*: close the door, as *the other node* is the later primary. *token*: take
    the role, which is good for a generation and a term.
    """

    demote: Callable[[str], object]
    token: Callable[[int, Term], object]


class NodeCalls:
    """
    Answers the calls of other nodes.

    Args:
        clock: gives seconds since 1970.
    """

    def __init__(
        self,
        local: LocalNode,
        others: Others,
        door: Fence,
        wishes: Wishes,
        log: Callable[[str, str], object],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._local = local
        self._others = others
        self._door = door
        self._wishes = wishes
        self._log = log
        self._clock = clock
        # Answers `choose` and `give_up`; it calls other nodes, so it is made later.
        self.resolve: Resolves | None = None

    # --- claims and sessions ---

    def claim(
        self,
        export: str,
        call: object,
        grant: Callable[[], bool],
        speaks: Speaks = with_key,
    ) -> None:
        """
        Judge the claim of another node, and grant it.

        Args:
            export: the export's name.
            call: the door's.
            grant: tells the other node; False: it has left in the meantime.
            speaks: for which node the certificate of the call lets it speak.
        Raises:
            RefusedError: it is refused.
        """
        found = parse_claim(export)
        if found is None or found[0] != self._local.volume:
            raise RefusedError("this is no claim of the volume's disk")
        claim = found[1]
        if claim.node not in self._local.others:
            raise RefusedError(f"the volume has no other node {claim.node}")
        _check_speaker(claim.node, speaks)
        self._believe(why_incredible(self._local.record(), claim.epoch))
        with self._local.lock:
            begins = self._judge(claim, call)
            # Still with the lock: a promotion that comes later cuts this session.
            if not grant() and begins:
                self.end_session(clean=False)

    def _judge(self, claim: Claim, call: object) -> bool:
        """Make way for the claim; tell whether its session begins."""
        local = self._local
        closed = local.primary or local.leaving

        def stored(record: NodeRecord) -> NodeRecord:
            judgement = judge(
                claim,
                record.claim,
                term=term_of(record),
                whole=local.session is not None and local.session == record.claim,
                primary=closed,
            )
            if judgement is Judgement.REFUSE:
                raise RefusedError(
                    why_refused(
                        claim, record.claim, term=term_of(record), primary=closed
                    )
                )
            if judgement is Judgement.JOIN:
                return record
            later = claim.term > term_of(record)
            known = follows(record, claim.term) if later else record
            return replace(known, claim=claim)

        before = local.session
        local.reach("claim_judged")
        local.change(stored)
        if claim == before:
            return False
        local.reach("claim_stored")
        self._fence(call)
        local.session = claim
        local.behind = True  # until `begin` says more
        self._log("info", f"node {claim.node}: session {claim.session} may write")
        return True

    def _fence(self, keep: object) -> None:
        """Cut all sessions but that of the call *keep*; the lock is held."""
        local = self._local
        try:
            self._door.fence(FENCE_S, keep)
        except MirrorError as error:
            raise RefusedError(
                f"requests of an earlier session remain: {error}"
            ) from None
        local.reach("claim_fenced")
        self.end_session(clean=False)
        local.engine.node_flush()
        local.reach("claim_flushed")

    def end_session(self, *, clean: bool) -> None:
        """
        End the session that may write, if there is one.

        Args:
            clean: its primary closed it, and had no request under way.
        """
        local = self._local
        with local.lock:
            claim, local.session = local.session, None
            if claim is None:
                return
            if clean:
                local.engine.cool(0)
            else:
                local.engine.node_session_lost()
            local.reach("session_ended")
            local.change(lambda record: _met(record, claim.node, int(self._clock())))
        how = "closed" if clean else "lost"
        self._log("info", f"node {claim.node}: session {claim.session} was {how}")

    def session_ended(self, export: str, *, clean: bool) -> None:
        """Note that the last connection of a session is gone."""
        found = parse_claim(export)
        with self._local.lock:
            # A session that was fenced has ended before the door says so.
            if found is not None and found[1] == self._local.session:
                self._others.left(found[1].node)
                self.end_session(clean=clean)

    # --- maps ---

    def dirty(self, speaks: Speaks = with_key) -> bytes:
        """
        Return all regions that this node names towards any other one.

        Raises:
            RefusedError: no node asks.
        """
        if all(speaks(other) for other in self._local.others):
            raise RefusedError(speaks(self._local.others[0]))
        found = b""
        for other in self._local.others:
            found = union(found, self._local.marks(other))
        return found

    # --- calls ---

    def meta(self, words: bytes, speaks: Speaks = with_key) -> bytes:
        """Answer a call; any bytes may come, and a refusal is an answer."""
        try:
            message = wire.decode_call(words)
            _check_speaker(message.sender, speaks)
            answer = self._answer(message)
        except RefusedError as error:
            answer = self._reply(ok=False, why=error.why, hint=error.hint)
        except MirrorError as error:
            answer = self._reply(ok=False, why=error.message, hint=error.hint)
        return wire.encode(answer)

    def _reply(self, *, ok: bool, why: str = "", hint: str = "") -> wire.Answer:
        record = self._local.record()
        return wire.Answer(
            v=wire.VERSIONS[1],
            sender=record.node,
            id=record.id.hex,
            ok=ok,
            why=why[: wire.TEXT_MAX],
            hint=hint[: wire.TEXT_MAX],
        )

    def _answer(self, message: wire.Message) -> wire.Answer:
        record, sender = self._local.record(), message.sender
        if message.volume != self._local.volume:
            raise RefusedError(
                f"this is volume {self._local.volume}, not {message.volume}",
                "correct `address` in the configuration",
            )
        if message.to != record.node:
            raise RefusedError(
                f"this node is {record.node}, not {message.to}",
                "correct `address` in the configuration",
            )
        if sender not in self._local.others:
            raise RefusedError(
                f"the configuration here has no other node {sender}",
                "use the same configuration on all nodes",
            )
        body = message.body
        known = {peer.node: peer.id for peer in record.peers}[sender]
        stranger = known is not None and known.hex != message.id
        if stranger and not isinstance(body, wire.Meet):
            raise RefusedError(
                f"{sender} is not the node that {record.node} knows by that name",
                f"nbd-mirror replace CONFIG {sender} announces a new host",
            )
        reply = self._reply(ok=True)
        match body:
            case wire.Meet():
                return self._meet(sender, body, reply)
            case wire.Begin():
                return self._begin(sender, body, reply)
            case wire.Adopt():
                return self._adopt(sender, body, reply)
            case wire.Consent():
                return self._consent(sender, body, reply)
            case wire.Token():
                self._token(sender, body)
                return reply
            case wire.Choose() | wire.GiveUp():
                if self.resolve is None:
                    raise RefusedError("this server cannot resolve a split brain")
                return self.resolve.answer(sender, body, reply)

    def _with_side(self, reply: wire.Answer, other: str) -> wire.Answer:
        side = wire.SideWords.of(self._local.side(other))
        return reply.model_copy(update={"side": side})

    def _meet(self, sender: str, body: wire.Meet, reply: wire.Answer) -> wire.Answer:
        side = self._shown(sender, body.side)
        self._others.saw(side)
        mine = self._local.side(sender)
        plan = wire.plan_words(decide(mine, side))
        words = wire.SideWords.of(mine)
        claim = self._local.record().claim
        session = claim.session if claim and claim.term == (side.epoch, sender) else 0
        told = {"side": words, "plan": plan, "session": session}
        return reply.model_copy(update=told | {"features": wire.FEATURES})

    def _begin(self, sender: str, body: wire.Begin, reply: wire.Answer) -> wire.Answer:
        side, claim = self._shown(sender, body.side), body.claim.claim()
        self._others.saw(side)
        with self._local.lock:
            mine = self._local.side(sender)
            plan = decide(mine, side)
            if wire.plan_words(plan) != body.plan:
                raise RefusedError(
                    f"{mine.node} and {sender} decide differently: {plan.row} here"
                )
            self._check_begin(plan, mine, side)
            if claim != self._local.session:
                raise RefusedError("its session has ended")
            self._local.reach("begin_agreed")
            self._local.change(
                lambda record: _begun(record, mine, side, plan, body.regions)
            )
            in_sync = body.regions == 0 and plan.action is Action.IN_SYNC
            self._local.behind = not in_sync or mine.generation != side.generation
            self._local.asks = None
            self._local.reach("begin_stored")
        return self._with_side(reply, sender)

    def _check_begin(self, plan: Plan, mine: Side, side: Side) -> None:
        agreed = plan.action is Action.IN_SYNC or (
            plan.action is Action.RESYNC and plan.target == mine.node
        )
        if not agreed or side.role is not Role.PRIMARY or side.term < mine.term:
            raise RefusedError(plan.reason or "only a later primary begins a session")
        if not self._local.primary:
            return
        if plan.demotes:
            self._wishes.demote(side.node)
            raise RefusedError(
                f"{mine.node} closes its door first: {side.node} is the later primary"
            )
        raise RefusedError(f"{mine.node} is primary")

    def _adopt(self, sender: str, body: wire.Adopt, reply: wire.Answer) -> wire.Answer:
        """
        Take the generation of the session's primary.

        The primary has copied and flushed all that either node named. A session that
        has ended is refused: a later one may have begun to copy again.
        """
        local, source = self._local, Lineage(body.generation, body.history)
        with local.lock:
            if body.claim.claim() != local.session or local.primary:
                raise RefusedError("its session has ended")
            if body.generation == NO_DATA:
                raise RefusedError("there is no generation to adopt")
            local.engine.node_flush()
            local.reach("adopt_flushed")
            local.change(lambda record: _adopted(record, source))
            local.reach("adopt_stored")
            # Killed here, it names regions that are equal: they are copied once more.
            local.engine.node_clear(local.disk_of(sender))
            local.reach("adopt_cleared")
            # A resync has been everywhere: what is durable is no doubt later.
            local.engine.cool(0)
            local.behind = False
        self._others.adopted(sender)
        self._log("info", f"node {sender}: in sync, in its generation")
        return reply.model_copy(update={"generation": body.generation})

    def _consent(
        self, sender: str, body: wire.Consent, reply: wire.Answer
    ) -> wire.Answer:
        """Store the term of another node's promotion, or refuse it."""
        local, asked = self._local, (body.epoch, sender)
        self._believe(why_incredible(local.record(), body.epoch))
        with local.lock:
            if local.primary:
                raise RefusedError("it is primary", "nbd-mirror switchover CONFIG")
            own = local.asks or asked

            def stored(record: NodeRecord) -> NodeRecord:
                latest = max(own, term_of(record))
                if latest > asked:
                    raise RefusedError(
                        f"{latest[1]} is promoted in epoch {latest[0]}, which is later"
                    )
                return follows(record, asked)

            local.reach("consent_asked")
            local.change(stored)
            local.asks = None
            local.reach("consent_stored")
        self._log("info", f"node {sender}: may be primary in epoch {body.epoch}")
        return self._with_side(reply, sender)

    def _token(self, sender: str, body: wire.Token) -> None:
        local, term = self._local, (body.epoch, sender)
        with local.lock:
            record = local.record()
            if local.primary or local.leaving:
                return  # it has taken the role already: the answer was lost
            if (record.lineage.generation, term_of(record)) != (body.generation, term):
                raise RefusedError("the token is of another generation or promotion")
        self._wishes.token(body.generation, term)

    def _shown(self, sender: str, words: wire.SideWords) -> Side:
        side = words.side()
        if side.node != sender:
            raise RefusedError(f"{sender} shows itself as {side.node}")
        self._believe(why_side_incredible(self._local.record(), side))
        return side

    def _believe(self, why_not: str) -> None:
        if why_not:
            raise RefusedError(why_not, "use the same configuration on all nodes")


def _check_speaker(node: str, speaks: Speaks) -> None:
    why_not = speaks(node)
    if why_not:
        raise RefusedError(
            f"a call of {node}: {why_not}",
            "a certificate needs the node's name, or the host of its address",
        )


def _met(record: NodeRecord, other: str, now: int) -> NodeRecord:
    return replace(
        record,
        peers=tuple(
            replace(peer, met=now) if peer.node == other else peer
            for peer in record.peers
        ),
    )


def _begun(
    record: NodeRecord, mine: Side, side: Side, plan: Plan, regions: int
) -> NodeRecord:
    """Return the record of a node that a primary's session begins to write to."""
    record = follows(knows_now(record, side.node, side.identities), side.term)
    lineage = record.lineage
    if plan.action is Action.IN_SYNC:
        lineage = settle(lineage, side.node, lineage.generation)
    if mine.generation == side.generation:
        lineage = share(lineage)
    calm = plan.action is Action.IN_SYNC and not mine.doubts
    return replace(
        record,
        lineage=lineage,
        crash=Crash.NONE if calm else record.crash,
        inconsistent=record.inconsistent or regions > 0,
        zero=record.zero and regions == 0,
    )


def _adopted(record: NodeRecord, source: Lineage) -> NodeRecord:
    return replace(
        record,
        lineage=adopt(record.lineage, source),
        crash=Crash.NONE,
        inconsistent=False,
        zero=False,
    )
