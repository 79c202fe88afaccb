# SPDX-License-Identifier: BSD-3-Clause
"""
The role of this node: how it becomes primary, and how it stops to be.

A role change is a start. The engine's role is fixed while it is open, so this module
stores the new role durably, and then the server stops cleanly and executes itself again
(`leave`). A start never trusts memory: it opens as secondary, unless its environment
has the grant of the process that it replaces. A process that is killed and started
again has no grant, whatever its record says.

A promotion asks the other nodes, takes their consents, stores its term, cuts all
sessions at its own disk, and leaves with the grant. `may_promote` and `may_resume`
(rules/promotion.py) decide, once before the consents and once after them.

A node that was primary last, and was neither demoted nor handed its role away, tries to
resume by itself: `turn`. Until it may, it is a secondary, and says why.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..base.errors import BusyError, MirrorError, RoleError
from ..rules.generation import NO_DATA, create, share
from ..rules.node_side import Role, Side
from ..rules.promotion import Answer, Verdict, may_promote
from ..rules.state import RemoteState
from ..volume.config import GRANT_VARIABLE, HAND_OVER_VARIABLE
from ..volume.node_record import NodeRecord
from .node_calls import Fence, NodeCalls
from .node_handover import HAND_OVER_S, HandOver, Means
from .node_hooks import Hook, HookError, Hooks
from .node_local import LocalNode, Term, announced, term_of
from .node_others import Others
from .node_standing import (
    Met,
    Promotion,
    check_resumed,
    content_of,
    standing_of,
    was_primary,
    why_not_resume,
)

__all__ = [
    "GRANT_VARIABLE",
    "HAND_OVER_VARIABLE",
    "NodeRole",
]

POLL_S = 0.05
RESUME_S = 1.0  # between two attempts to resume
MEET_S = 5.0  # between two meetings of a secondary that no primary writes to
HOOK_REST_S = 15.0  # from a hook that failed to the next attempt to resume
CLIENTS_S = 2.0  # for clients that a hook ended to disconnect
FENCE_S = 10.0  # of a promotion


class NodeRole:
    """
    Changes the role.

    Args:
        leave: ends this process's service, and executes the server again with more
            variables in its environment; may return before that.
        start_alone_s: after that time the last primary resumes although it cannot reach
            the other nodes; 0: never.
        hand_over: the node that this one, just demoted, gives its role to, or "".
        hooks: the operator's programs; None: there are none.
        hooks_s: how long another node's hooks may delay its promotion.
        clock: gives seconds, monotonic.
        fresh: gives random numbers for generations.
    """

    def __init__(
        self,
        local: LocalNode,
        others: Others,
        calls: NodeCalls,
        door: Fence,
        *,
        leave: Callable[[Mapping[str, str]], object],
        log: Callable[[str, str], object],
        start_alone_s: float = 0.0,
        hand_over: str = "",
        hooks: Hooks | None = None,
        hooks_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        fresh: Callable[[], int] = lambda: secrets.randbits(64) or 1,
    ) -> None:
        self._local = local
        self._others = others
        self._calls = calls
        self._door = door
        self._leave = leave
        self._log = log
        self._start_alone_s = start_alone_s
        self._hooks = hooks
        self._clock = clock
        self._fresh = fresh
        self._started = clock()
        self._wake = threading.Event()
        # One change of role at a time; taken before the node's lock.
        self._acting = threading.Lock()
        self._handover = HandOver(
            local,
            others,
            hand_over,
            Means(self._promote, self._wait_because, log, clock),
            HAND_OVER_S + hooks_s,
        )
        self._unopened: Term | None = None  # stored by this process; no door is open
        self._overruled_by = ""  # the later primary for which this one steps down
        self._demoting = False
        # What status shows; only whole values are stored.
        self.waits: tuple[str, str] = ("", "")  # why it is not primary, and a hint

    # --- the thread ---

    def wake(self) -> None:
        """End the rest between two turns."""
        self._wake.set()

    def rest(self, seconds: float) -> None:
        """Wait for the next turn."""
        self._wake.wait(seconds)
        self._wake.clear()

    def turn(self) -> float:
        """Do what is to be done without an operator; return the seconds until then."""
        local = self._local
        if local.leaving:
            return MEET_S
        if local.primary:
            if self._overruled_by:
                self._step_down()
            return MEET_S
        if self._handover.token is not None:
            return self._handover.take_over()
        if self._handover.to:
            return self._handover.give()
        record = local.record()
        if was_primary(record):
            return self._resume()
        self.waits = ("", "")
        if local.session is None:
            self._meet_all()
        return MEET_S

    def take_token(self, generation: int, term: Term) -> None:
        """Have the thread take the role of a primary that demoted itself."""
        self._handover.token = (generation, term)
        self.wake()

    @property
    def changing(self) -> bool:
        """Whether a change of role is under way, or is being judged."""
        return self._acting.locked()

    def overrule(self, later: str) -> None:
        """Have the thread close the door: *later* is the later primary."""
        self._overruled_by = later
        if self._hooks:
            self._hooks.cancel()  # the door closes now, whatever a hook waits for
        self.wake()

    # --- promotion ---

    def promote(self, *, force: bool) -> dict[str, object]:
        """
        Make this node primary, as an operator asks.

        Raises:
            RoleError: it may not be, or only by force. BusyError: its role is changing.
            MirrorError: a node refused, or something could not be stored.
        """
        kind = Promotion.FORCED if force else Promotion.ASKED
        return {"role": Role.PRIMARY.value, "epoch": self._promote(kind)}

    def _promote(self, kind: Promotion, token: tuple[int, Term] | None = None) -> int:
        with self._acting:
            self._check_free(primary=False)
            met = self._judged(kind, token)
            # Before the consents, with which the other nodes give up their rights.
            if self._hooks and self._hooks.ask(Hook.PROMOTING):
                met = self._judged(kind, token)  # a hook takes time
            term = self._next_term(met)
            with self._local.lock:
                self._check_free(primary=False)
                self._local.asks = term
            try:
                self._ask_and_store(kind, met, term)
            finally:
                with self._local.lock:
                    self._local.asks = None
        words = f"promoted in epoch {term[0]} ({kind.value})"
        self._log("info", f"node {term[1]}: {words}: this server starts again")
        self._leave({GRANT_VARIABLE: str(term[0])})
        return term[0]

    def _next_term(self, met: Met) -> Term:
        """
        Return the term of the promotion that begins now.

        A stored promotion may fail before the door opens, and is tried every second. It
        keeps its term then: no client was served in it. A later term of another node
        voids it.
        """
        stored = term_of(met.record)
        terms = [one[1].term for one in met.sides.values() if one]
        if stored == self._unopened and max(terms, default=stored) <= stored:
            return stored
        return 1 + max(epoch for epoch, _ in (stored, *terms)), met.record.node

    def _judged(self, kind: Promotion, token: tuple[int, Term] | None) -> Met:
        """Look at all nodes; raise RoleError unless this one may be promoted now."""
        met = self._meet_all()
        if token not in (None, content_of(met.record)):
            raise RoleError("the token is of another generation or promotion")
        self._require(kind, met)
        return met

    def _ask_and_store(self, kind: Promotion, met: Met, term: Term) -> None:
        local = self._local
        local.reach("promote_asked")
        now = dict(met.sides)
        for name, one in met.sides.items():
            if one is not None:
                now[name] = one[0], self._others.consent(name, term[0])
        local.reach("promote_consented")
        # A node may have changed between its answer and its consent.
        record = local.record()
        self._require(kind, replace(met, record=record, sides=now), consented=term)
        with local.lock:
            if local.asks != term:
                raise RoleError("another node is promoted: this one has consented")
            local.change(lambda record: self._promoted(record, term, met.record))
            self._unopened = term
            local.reach("promote_stored")
            self._door.fence(FENCE_S)
            self._calls.end_session(clean=False)
            local.engine.node_flush()
            local.reach("promote_fenced")
            local.leaving = True

    def _promoted(
        self, record: NodeRecord, term: Term, judged: NodeRecord
    ) -> NodeRecord:
        if term_of(record) >= term and not term_of(record) == term == self._unopened:
            raise RoleError(f"{record.leader} is promoted in epoch {record.epoch}")
        # Before `asks` was set this node may have consented to another promotion, of
        # the same epoch and a name that comes first. Its proof is void then.
        if content_of(record) != content_of(judged):
            raise RoleError(
                f"{record.leader} was promoted in epoch {record.epoch} in the meantime"
                if term_of(record) != term_of(judged)
                else "its data have changed in the meantime"
            )
        lineage = record.lineage
        if lineage.generation == NO_DATA:
            lineage = create(lineage, self._fresh())
        else:
            lineage = share(lineage)
        return replace(
            record,
            lineage=lineage,
            role=Role.PRIMARY,
            epoch=term[0],
            leader=term[1],
            handed="",
            zero=False,
            own_session=0,
        )

    def _require(
        self, kind: Promotion, met: Met, consented: Term | None = None
    ) -> None:
        """Raise RoleError unless the rules allow the promotion."""
        if kind in (Promotion.RESUMED, Promotion.ALONE):
            reason = why_not_resume(met, alone=kind is Promotion.ALONE)
            # The consents have made the term of the others that of this promotion.
            if reason and consented is None:
                raise RoleError(*reason)
            if consented is None:
                return
        verdict = self.verdict(met, token=kind is Promotion.TOKEN)
        if kind is Promotion.RESUMED and consented is not None:
            check_resumed(met, consented)
            return
        if verdict.answer is Answer.NO:
            primary = any(
                one and one[1].role is Role.PRIMARY for one in met.sides.values()
            )
            raise RoleError(
                f"this node may not be promoted: {verdict.reason}",
                "nbd-mirror switchover CONFIG (on the primary)" if primary else "",
            )
        forced = kind in (Promotion.FORCED, Promotion.ALONE)
        if verdict.answer is Answer.FORCE and not forced:
            raise RoleError(
                f"this node is promoted only by force: {verdict.reason}",
                "nbd-mirror promote CONFIG --force",
            )

    def verdict(self, met: Met | None = None, *, token: bool = False) -> Verdict:
        """Say whether this node may be promoted, by what all nodes show."""
        met = met or self._known()
        local = self._local
        side = local.side(local.others[0], met.record)
        return may_promote(
            standing_of(met.record, side, met.sides, behind=local.behind, token=token)
        )

    # --- what the others show ---

    def _meet_all(self) -> Met:
        record = self._local.record()
        sides: dict[str, tuple[Side, Side] | None] = {}
        errors = {}
        for name in self._local.others:
            try:
                mine, side, _ = self._others.meet(name)
                sides[name] = (mine, side)
            except MirrorError as error:
                sides[name], errors[name] = None, str(error)
        return Met(record, sides, errors)

    def _known(self) -> Met:
        """Return what the nodes showed last, without asking them."""
        contacts = self._others.contacts
        sides: dict[str, tuple[Side, Side] | None] = {}
        for name in self._local.others:
            contact = contacts.get(name)
            side = contact.side if contact else None
            sides[name] = (self._local.side(name), side) if side else None
        return Met(self._local.record(), sides, {})

    # --- the start ---

    def _resume(self) -> float:
        """
        Become primary again, if no other node was promoted since.

        Returns:
            The seconds until the next attempt.
        """
        waited = self._clock() - self._started
        alone = 0 < self._start_alone_s <= waited
        kind = Promotion.ALONE if alone else Promotion.RESUMED
        try:
            self._promote(kind)
            self.waits = ("", "")
        except HookError as error:
            self._wait_because(error.message, error.hint)
            return HOOK_REST_S
        except MirrorError as error:
            self._wait_because(error.message, error.hint)
        return RESUME_S

    def _wait_because(self, why: str, hint: str) -> None:
        if self.waits[0] != why:
            self._log("warning", f"node {self._local.record().node}: waits: {why}")
        self.waits = (why, hint)

    # --- demotion ---

    def demote(self, *, force: bool) -> dict[str, object]:
        """
        Make this node secondary, as an operator asks; no node is primary then.

        Raises:
            RoleError: clients are connected or a hook failed, and *force* is not
            given; or it is secondary. BusyError: its role is changing.
        """
        with self._acting:
            self._check_free(primary=True)
            hooked = self._hooks and self._hooks.ask_demoting("demote", force=force)
            self._check_free(primary=True)
            clients = self._clients_left(CLIENTS_S if hooked else 0.0)
            if clients and not force:
                raise RoleError(
                    f"{clients} connections of clients would be cut",
                    "disconnect them first, or nbd-mirror demote CONFIG --force; "
                    "nbd-mirror switchover CONFIG moves the role",
                )
            self._close({})
        return {"role": Role.SECONDARY.value}

    def _clients_left(self, wait_s: float) -> int:
        """Return how many connections of clients there are, after a while at most."""
        deadline = self._clock() + wait_s
        clients = self._local.engine.status().clients
        while clients and self._clock() < deadline:
            time.sleep(POLL_S)
            clients = self._local.engine.status().clients
        return clients

    def switchover(self, node: str | None, *, force: bool = False) -> dict[str, object]:
        """
        Give the role to another node, which is in sync.

        Args:
            force: also if the hook `demoting` fails.
        Raises:
            RoleError: it cannot be given now. BusyError: the role is changing.
        """
        with self._acting:
            self._check_free(primary=True)
            target = self._heir(node)
            self._check_heir(target)
            if self._hooks and self._hooks.ask_demoting("switchover", force=force):
                self._check_free(primary=True)
                self._check_heir(target)  # a hook takes time
            self._close({HAND_OVER_VARIABLE: target})
        return {"role": Role.SECONDARY.value, "to": target}

    def _check_heir(self, target: str) -> None:
        """Raise RoleError unless the node is in sync and answers."""
        status = self._local.engine.remote_status(self._local.disk_of(target))
        in_sync = status.admitted and status.state is RemoteState.IN_SYNC
        if not in_sync or self._lacks(target):
            why = status.reason or status.state.value
            if not status.admitted:
                raise RoleError(
                    f"{target} is not connected, so this node stays primary: {why}",
                    "nbd-mirror status CONFIG",
                )
            raise RoleError(
                f"{target} is not in sync: {why}",
                "nbd-mirror wait CONFIG --for in_sync",
            )
        try:
            # A session is up for seconds after its node began to hang. If the role
            # was given to that node, no node would serve.
            self._others.meet(target)
        except MirrorError as error:
            raise RoleError(
                f"{target} does not answer, so this node stays primary: "
                f"{error.message}",
                "nbd-mirror status CONFIG",
            ) from None

    def replace(self, node: str | None) -> dict[str, object]:
        """
        Announce that another node is a new host, which is filled from this one.

        What only the earlier host of that name held is given up.

        Raises:
            RoleError: the volume has no such node, or it is connected and known.
        """
        target = self._heir(node)
        with self._acting:
            status = self._local.engine.remote_status(self._local.disk_of(target))
            session = self._local.session
            if status.admitted or (session is not None and session.node == target):
                raise RoleError(f"{target} is connected, and is the node that is known")
            stored = self._local.change(lambda record: announced(record, target))
        self._log("warning", f"node {target}: a new host of that name is taken")
        counts = {peer.node: peer.replaced for peer in stored.peers}
        return {"node": target, "replaced": counts[target]}

    def _heir(self, node: str | None) -> str:
        others = self._local.others
        if node is None and len(others) == 1:
            return others[0]
        if node not in others:
            names = ", ".join(others)
            raise RoleError(f"name another node of the volume: {names}")
        return node

    def _lacks(self, other: str) -> bool:
        """Tell whether *other* is not counted as a holder of this generation."""
        peer = self._local.record().lineage.peer(other)
        return bool(peer.bases) or not peer.shared

    def step_down(self) -> None:
        """End as primary, once the record says that this node is none."""
        self._close({})

    def _step_down(self) -> None:
        """Close the door for a later primary, which this node has no write over."""
        with self._acting:
            later, self._overruled_by = self._overruled_by, ""
            self._check_free(primary=True)
            self._log("warning", f"node {later} is the later primary: the door closes")
            self._close({})

    def _close(self, environment: Mapping[str, str]) -> None:
        """Leave as a secondary; `before_stop` stores it once no client is left."""
        with self._local.lock:
            self._local.leaving = True
            self._demoting = True
        self._leave(environment)

    def before_stop(self) -> None:
        """
        Store what the stop changes: clients are gone, and the engine still runs.

        Raises:
            MirrorError: it could not be stored; the role is as before.
        """
        local = self._local
        self._calls.end_session(clean=False)
        if not self._demoting:
            return
        local.engine.node_flush()
        local.reach("demote_drained")
        local.change(lambda record: replace(record, role=Role.SECONDARY))
        local.reach("demote_stored")

    def _check_free(self, *, primary: bool) -> None:
        with self._local.lock:
            if self._local.leaving or self._local.asks:
                raise BusyError("the role of this node is just changing")
            if self._local.primary and not primary:
                raise RoleError("this node is primary already")
            if primary and not self._local.primary:
                raise RoleError("this node is secondary already")
