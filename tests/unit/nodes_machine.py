# SPDX-License-Identifier: BSD-3-Clause
"""
The transitions of nodes_model.py's state: all that can happen to two or three nodes.

The nodes decide by the product's own rules (nbd_mirror/rules). `Rules` holds these
functions, so that a test can leave one out and see that the exploration finds it. Each
durable step is a transition of its own, so the exploration meets every order of steps
and failures: kills, power loss, cut links, and operators that promote, demote, hand the
role over, force, resolve and announce replacements.
"""

from __future__ import annotations

from collections.abc import Iterator

from unit.nodes_meetings import Meetings
from unit.nodes_model import (
    NAMES,
    SYNC,
    Node,
    State,
    connected,
    ordered,
    others,
    pairs,
    put,
    renewed,
    session_of,
    side_of,
    standing_of,
    term,
    token,
)
from unit.nodes_replaced import announcements, first_chosen, renamed

from nbd_mirror.rules.generation import NO_DATA, create
from nbd_mirror.rules.promotion import Answer


class Machine(Meetings):
    """The transitions of a state, under given rules."""

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """Give every transition: its name, and the state it leads to."""
        for name, reached in self._steps(state):
            yield name, renamed(renewed(reached))

    def _steps(self, state: State) -> Iterator[tuple[str, State]]:
        for index, node in enumerate(state.nodes):
            if not node.up:
                yield f"start {NAMES[index]}", self._start(state, index)
                continue
            if node.primary:
                yield from self._serving(state, index)
            elif node.active and not self.rules.keeps_active:
                flushed = node._replace(
                    safe=node.disk, active=frozenset(), forgets=frozenset()
                )
                yield f"{NAMES[index]} own flush", put(state, index, flushed)
            if node.forgets:
                yield f"{NAMES[index]} forgets", self._forget(state, index)
            yield from self._operator(state, index)
            yield from announcements(state, index)
            if state.budget.losses:
                yield from self._losses(state, index)
            if state.budget.crashes:
                yield from self._crashes(state, index)
        for pair in pairs(state):
            yield from self._pair(state, pair)

    def _operator(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        name, node = NAMES[index], state.nodes[index]
        orders = state.budget._replace(orders=state.budget.orders - 1)
        if node.primary:
            if node.flight is None and state.budget.orders:
                yield (
                    f"demote {name}",
                    self._demote(state, index)._replace(budget=orders),
                )
            return
        if node.asks is not None:
            yield from self._asking(state, index, node.asks)
            return
        if node.leader == index and self._resumes(state, index):
            yield f"resume {name}", self._ask(state, index, forced=False)
        answer = self.rules.may_promote(standing_of(state, index)).answer
        if answer is Answer.YES and state.budget.orders:
            promoted = self._ask(state, index, forced=False)
            yield f"promote {name}", promoted._replace(budget=orders)
        if node.line.generation == NO_DATA:
            return  # what an operator forces on an empty node is unrelated data
        if answer is Answer.FORCE and state.budget.forces:
            forces = state.budget._replace(forces=state.budget.forces - 1)
            promoted = self._ask(state, index, forced=True)
            yield f"force {name}", promoted._replace(budget=forces)
        for at in others(state, index):
            if session_of(state, index, at) == SYNC:
                yield from self._hand_over(state, index, at)

    def _resumes(self, state: State, index: int) -> bool:
        """Tell whether the last primary has met all others, and none was promoted."""
        node = state.nodes[index]
        if node.demoted or node.behind or node.inconsistent:
            return False
        return all(
            session_of(state, index, at) is not None
            and self.rules.may_resume(
                side_of(state, index, at), side_of(state, at, index)
            )
            for at in others(state, index)
        )

    def _ask(self, state: State, index: int, *, forced: bool) -> State:
        """Begin a promotion: each node with a session has to store its term first."""
        for at in others(state, index):
            if (session_of(state, index, at) or SYNC).target == index:
                state = self._end(state, ordered(index, at))
        met = [at for at in others(state, index) if connected(state, index, at)]
        epoch = 1 + max(state.nodes[at].epoch for at in (index, *met))
        waits = frozenset(met) if self.rules.consents else frozenset[int]()
        node = state.nodes[index]._replace(asks=(epoch, forced, waits))
        return put(state, index, node)

    def _asking(
        self, state: State, index: int, asks: tuple[int, bool, frozenset[int]]
    ) -> Iterator[tuple[str, State]]:
        name, (_, forced, waits) = NAMES[index], asks
        for at in waits:
            yield f"{name} asks {NAMES[at]}", self._consent(state, index, at, asks)
        if waits:
            return
        if forced or not self.rules.asks_again or self._still_may(state, index):
            yield f"{name} opens", self._promote(state, index, asks[0], forced=forced)
        else:
            node = state.nodes[index]._replace(asks=None)
            yield f"{name} gives up", put(state, index, node)

    def _still_may(self, state: State, index: int) -> bool:
        verdict = self.rules.may_promote(standing_of(state, index))
        resumes = state.nodes[index].leader == index and self._resumes(state, index)
        return resumes or verdict.answer is Answer.YES

    def _consent(
        self,
        state: State,
        index: int,
        at: int,
        asks: tuple[int, bool, frozenset[int]],
    ) -> State:
        """Have a node store the term of another's promotion, or refuse it."""
        node, there = state.nodes[index], state.nodes[at]
        asked = (asks[0], index)
        own = (there.asks[0], at) if there.asks else asked
        if there.primary or max(own, term(there)) > asked:
            return put(state, index, node._replace(asks=None))
        state = put(state, at, self._follower(there, asked))
        left = (*asks[:2], asks[2] - {at})
        return put(state, index, node._replace(asks=left))

    def _follower(self, node: Node, promoted: tuple[int, int]) -> Node:
        epoch, leader = promoted
        return node._replace(
            epoch=epoch,
            leader=leader,
            token=None,
            demoted=False,
            handed=-1,
            asks=None,
        )

    def _promote(self, state: State, index: int, epoch: int, *, forced: bool) -> State:
        met = [at for at in others(state, index) if connected(state, index, at)]
        node = self._follower(state.nodes[index], (epoch, index))
        if node.line.generation == NO_DATA:
            line = create(node.line, state.fresh + 1)
            state = first_chosen(state, index)._replace(fresh=state.fresh + 1)
            node = node._replace(ghost=())
        else:
            line = self.rules.share(node.line)
        state = put(state, index, node._replace(line=line))
        state = self._counts(state, index)
        node = state.nodes[index]
        if self.rules.flushes_first:
            node = node._replace(safe=node.disk)
        state = put(state, index, node._replace(primary=True, behind=0))
        for at in met:
            state = self._follows(state, ordered(index, at))
        if forced:
            return self._told_apart(state, [index, *met])
        return self._read(state, index)

    def _read(self, state: State, index: int) -> State:
        """Require that a promoted node's data stay: clients may read them at once."""
        node = state.nodes[index]
        stories = list(state.stories)
        story = stories[node.story]
        need = tuple(map(max, story.need, node.disk))
        stories[node.story] = story._replace(need=need)
        return state._replace(stories=tuple(stories))

    def _counts(self, state: State, index: int) -> State:
        """Let this node's content of doubtful regions count: clients will read it."""
        node = state.nodes[index]
        doubted = [NAMES[at] for at, bits in enumerate(node.doubts) if bits]
        if not self.rules.counts_doubts or not doubted:
            return state
        state = self._begin(state, index, doubted)
        node = state.nodes[index]
        dirty = tuple(
            bits | more for bits, more in zip(node.dirty, node.doubts, strict=True)
        )
        doubts = (frozenset[int](),) * len(node.doubts)
        return put(state, index, node._replace(dirty=dirty, doubts=doubts))

    def _demote(self, state: State, index: int) -> State:
        state = self._forget(self._flush(state, index), index)
        node = state.nodes[index]
        return put(state, index, node._replace(primary=False, demoted=True))

    def _hand_over(
        self, state: State, index: int, at: int
    ) -> Iterator[tuple[str, State]]:
        """Give the role of a demoted primary to a node that is in sync."""
        node, there = state.nodes[index], state.nodes[at]
        may = self.rules.may_hand_over(
            side_of(state, index, at), side_of(state, at, index)
        )
        if not may or not node.demoted or there.token == token(node):
            return
        if node.handed != at:
            if state.budget.orders:
                orders = state.budget._replace(orders=state.budget.orders - 1)
                out = put(state, index, node._replace(handed=at))
                yield f"hand over to {NAMES[at]}", out._replace(budget=orders)
        else:
            given = put(state, at, there._replace(token=token(node)))
            yield f"token to {NAMES[at]}", given
