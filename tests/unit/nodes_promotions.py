# SPDX-License-Identifier: BSD-3-Clause
"""
The machine of nodes_machine.py with each message and each store of a promotion apart.

As in server/node_role.py a promotion reads its record, meets the others, sets `asks`,
takes each consent, stores its term, and opens its door. Anything may happen between two
of these steps, also another promotion and a lost link. What it has seen stays as it was
seen (`Look`), so a check that the product makes too early or not at all is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from unit.nodes_machine import Machine
from unit.nodes_model import (
    NAMES,
    SYNC,
    Look,
    Node,
    State,
    ordered,
    others,
    put,
    session_of,
    side_of,
    standing_of,
    term,
    token,
)
from unit.nodes_replaced import first_chosen

from nbd_mirror.rules.generation import NO_DATA, create
from nbd_mirror.rules.node_handshake import decide
from nbd_mirror.rules.node_side import Action, Crash
from nbd_mirror.rules.promotion import Answer, Contact, Verdict
from nbd_mirror.server.node_standing import contact_of


class SplitMachine(Machine):
    """The same transitions, but a promotion is many."""

    def _operator(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        node = state.nodes[index]
        if node.primary:
            yield from super()._operator(state, index)
        elif node.stored:
            yield from self._opening(state, index)
        elif node.look is not None:
            yield from self._looking(state, index, node.look)
        else:
            yield from self._beginning(state, index)

    def _beginning(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        """Read the own record. Begin only what would be allowed now."""
        name, node, budget = NAMES[index], state.nodes[index], state.budget
        if node.leader == index and self._resumes(state, index):
            yield f"resume {name}", self._reads(state, index, resumes=True)
        answer = self._verdict(state, index, self._contacts(state, index), None).answer
        if answer is Answer.YES and budget.orders:
            orders = budget._replace(orders=budget.orders - 1)
            reads = self._reads(state, index)
            yield f"promote {name}", reads._replace(budget=orders)
        if node.line.generation == NO_DATA:
            return
        if answer is Answer.FORCE and budget.forces:
            forces = budget._replace(forces=budget.forces - 1)
            reads = self._reads(state, index, forced=True)
            yield f"force {name}", reads._replace(budget=forces)
        for at in others(state, index):
            if session_of(state, index, at) == SYNC:
                yield from self._hand_over(state, index, at)

    def _reads(
        self, state: State, index: int, *, forced: bool = False, resumes: bool = False
    ) -> State:
        node = state.nodes[index]
        given = not resumes and node.token == token(node)
        look = Look(forced, resumes, token(node), token=given)
        return put(state, index, node._replace(look=look))

    def _looking(
        self, state: State, index: int, look: Look
    ) -> Iterator[tuple[str, State]]:
        name, node = NAMES[index], state.nodes[index]
        if not look.epoch:
            yield f"{name} meets", self._meets(state, index, look)
        elif not look.asked:
            waits = frozenset[int]()
            if self.rules.consents:
                waits = frozenset(NAMES.index(one.node) for one in look.met)
            asks = (look.epoch, look.forced, waits)
            asking = node._replace(asks=asks, look=look._replace(asked=True))
            yield f"{name} asks", put(state, index, asking)
        elif node.asks is None:
            yield f"{name} gives up", self._gives_up(state, index)
        elif node.asks[2]:
            for at in node.asks[2]:
                consented = self._consent(state, index, at, node.asks)
                yield f"{name} asks {NAMES[at]}", consented
        else:
            yield f"{name} stores", self._stores(state, index, look)

    def _gives_up(self, state: State, index: int) -> State:
        return put(state, index, state.nodes[index]._replace(asks=None, look=None))

    # --- what the others show ---

    def _reached(self, state: State, index: int) -> list[int]:
        return [
            at
            for at in others(state, index)
            if ordered(index, at) in state.links and state.nodes[at].up
        ]

    def _contacts(self, state: State, index: int) -> tuple[Contact, ...]:
        return tuple(
            self._contact(state, index, at) for at in self._reached(state, index)
        )

    def _contact(self, state: State, index: int, at: int) -> Contact:
        both = side_of(state, index, at), side_of(state, at, index)
        return contact_of(NAMES[at], both)

    def _verdict(
        self, state: State, index: int, met: tuple[Contact, ...], look: Look | None
    ) -> Verdict:
        """Judge by what the others showed, which may be a while ago."""
        node = state.nodes[index]
        given = node.token == token(node) if look is None else look.token
        names = {one.node for one in met}
        absent = (Contact(NAMES[at]) for at in others(state, index))
        contacts = (*met, *(one for one in absent if one.node not in names))
        sides = [
            decide(side_of(state, index, at), side_of(state, at, index))
            for at in self._reached(state, index)
        ]
        behind = node.behind > 0 or (
            node.line.generation != NO_DATA
            and any(plan.target == NAMES[index] for plan in sides)
        )
        standing = replace(
            standing_of(state, index), behind=behind, token=given, others=contacts
        )
        return self.rules.may_promote(standing)

    def _resumes(self, state: State, index: int) -> bool:
        node = state.nodes[index]
        if node.demoted or node.handed >= 0 or node.line.generation == NO_DATA:
            return False
        return all(
            at in self._reached(state, index)
            and self.rules.may_resume(
                side_of(state, index, at), side_of(state, at, index)
            )
            for at in others(state, index)
        )

    def _meets(self, state: State, index: int, look: Look) -> State:
        node, met = state.nodes[index], self._contacts(state, index)
        if look.resumes:
            may = node.leader == index and self._resumes(state, index)
        else:
            answer = self._verdict(state, index, met, look).answer
            may = answer is Answer.YES or (look.forced and answer is Answer.FORCE)
        if not may:
            return self._gives_up(state, index)
        terms = [term(state.nodes[at]) for at in self._reached(state, index)]
        stored = look.content[1:]
        epoch = 1 + max(one[0] for one in (stored, *terms))
        if stored == (node.unopened, index) and max((stored, *terms)) == stored:
            epoch = node.unopened
        met_now = look._replace(epoch=epoch, met=met)
        return put(state, index, node._replace(look=met_now))

    # --- consents ---

    def _consent(
        self,
        state: State,
        index: int,
        at: int,
        asks: tuple[int, bool, frozenset[int]],
    ) -> State:
        node, there, asked = state.nodes[index], state.nodes[at], (asks[0], index)
        own = (there.asks[0], at) if there.asks else asked
        refused = there.primary or max(own, term(there)) > asked
        if refused or at not in self._reached(state, index) or node.look is None:
            return self._gives_up(state, index)
        state = put(state, at, self._follower(there, asked))
        plan = decide(side_of(state, index, at), side_of(state, at, index))
        ready = plan.action is Action.IN_SYNC or plan.source == NAMES[index]
        if node.look.resumes and not ready:
            return self._gives_up(state, index)
        met = tuple(
            self._contact(state, index, at) if one.node == NAMES[at] else one
            for one in node.look.met
        )
        node = node._replace(
            asks=(*asks[:2], asks[2] - {at}), look=node.look._replace(met=met)
        )
        return put(state, index, node)

    def _follower(self, node: Node, promoted: tuple[int, int]) -> Node:
        asks = node.asks
        node = super()._follower(node, promoted)._replace(unopened=0)
        return node if self.rules.asks_void else node._replace(asks=asks)

    # --- the store, and the door ---

    def _stores(self, state: State, index: int, look: Look) -> State:
        node = state.nodes[index]
        asked = (look.epoch, index)
        answer = self._verdict(state, index, look.met, look).answer
        allowed = answer is Answer.YES or (look.forced and answer is Answer.FORCE)
        may = allowed or look.resumes or not self.rules.asks_again
        retried = term(node) == asked == (node.unopened, index)
        may = may and (term(node) < asked or retried)
        if self.rules.compares:
            may = may and token(node) == look.content
        if not may:
            return self._gives_up(state, index)
        fresh = node.line.generation == NO_DATA
        if fresh:
            line = create(node.line, state.fresh + 1)
            state = first_chosen(state, index)._replace(fresh=state.fresh + 1)
        else:
            line = self.rules.share(node.line)
        node = self._follower(node, asked)._replace(
            line=line, asks=None, stored=look.epoch, ghost=() if fresh else node.ghost
        )
        return put(state, index, node)

    def _opening(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        name, node = NAMES[index], state.nodes[index]
        closed = node._replace(stored=0, look=None)
        if term(node) != (node.stored, index) and self.rules.grants:
            yield f"{name} does not open", put(state, index, closed)
            return
        yield f"{name} opens", self._opens(state, index)
        if not node.unopened and state.budget.crashes:
            crashes = state.budget._replace(crashes=state.budget.crashes - 1)
            stuck = put(state, index, closed._replace(unopened=node.stored))
            yield f"{name} stays closed", stuck._replace(budget=crashes)

    def _opens(self, state: State, index: int) -> State:
        look = state.nodes[index].look
        assert look is not None
        consented = {NAMES.index(one.node) for one in look.met}
        met = [at for at in consented if session_of(state, index, at)]
        state = self._end_all(state, index)
        state = self._counts(state, index)
        node = state.nodes[index]
        if self.rules.flushes_first:
            node = node._replace(safe=node.disk)
        node = node._replace(primary=True, behind=0, look=None, stored=0, unopened=0)
        state = put(state, index, node)
        if look.forced:
            return self._told_apart(state, [index, *met])
        return self._read(state, index)

    # --- what ends no promotion ---

    def _end(self, state: State, pair: tuple[int, int]) -> State:
        """End a session. The thread of a promotion does not learn of it."""
        asks = [node.asks for node in state.nodes]
        state = super()._end(state, pair)
        for at in pair:
            state = put(state, at, state.nodes[at]._replace(asks=asks[at]))
        return state

    def _drop(self, state: State, _: tuple[int, int]) -> State:
        return state

    def _down(self, state: State, index: int, node: Node, crash: Crash) -> State:
        node = node._replace(look=None, stored=0, unopened=0)
        state = super()._down(state, index, node, crash)
        return put(state, index, state.nodes[index]._replace(asks=None))
