# SPDX-License-Identifier: BSD-3-Clause
"""Two nodes meet: the handshake, and the session or the stop that follows it."""

from __future__ import annotations

from collections.abc import Iterator

from unit.nodes_model import (
    NAMES,
    SYNC,
    Session,
    State,
    all_doubt,
    judged,
    ordered,
    others,
    put,
    session_of,
    side_of,
    term,
    with_session,
)
from unit.nodes_writes import Writes

from nbd_mirror.rules.node_side import Action, Crash, Extent, Plan
from nbd_mirror.rules.resolution import why_not_resolved


class Meetings(Writes):
    """Meetings of nodes."""

    def _pair(self, state: State, pair: tuple[int, int]) -> Iterator[tuple[str, State]]:
        name = f"{NAMES[pair[0]]}{NAMES[pair[1]]}"
        session = session_of(state, *pair)
        if pair not in state.links:
            yield f"join {name}", state._replace(links=state.links | {pair})
        elif state.budget.cuts:
            budget = state.budget._replace(cuts=state.budget.cuts - 1)
            cut = state._replace(links=state.links - {pair}, budget=budget)
            ended = self._end(cut, pair) if session else self._drop(cut, pair)
            yield f"cut {name}", ended
        if session is None:
            if self._may_meet(state, pair):
                met = self.meet(state, pair, None)
                if met is not None:
                    yield f"meet {name}", met
                if state.budget.forces:
                    yield from self._resolutions(state, pair)
                    yield from self._choices_stored(state, pair)
        elif session != SYNC:
            yield from self._resync(state, pair, session)

    def _may_meet(self, state: State, pair: tuple[int, int]) -> bool:
        """Whether both are up, and neither follows a third node as its primary."""
        if pair not in state.links or not all(state.nodes[at].up for at in pair):
            return False
        for one, other in (pair, pair[::-1]):
            if state.nodes[one].primary:
                continue
            for leader in self._leaders(state, one):
                newer = term(state.nodes[other]) > term(state.nodes[leader])
                if not (state.nodes[other].primary and newer):
                    return False
            if self._is_target(state, one):
                return False
        return True

    def _leaders(self, state: State, index: int) -> list[int]:
        return [
            at
            for at in others(state, index)
            if state.nodes[at].primary and session_of(state, index, at) is not None
        ]

    def _is_target(self, state: State, index: int) -> bool:
        return any(session.target == index for _, session in state.sessions)

    def meet(
        self, state: State, pair: tuple[int, int], keep: int | None
    ) -> State | None:
        """Shake hands; None: the nodes do not connect. *keep*: an operator's side."""
        one, other = pair if keep in (None, pair[0]) else pair[::-1]
        mine, theirs = side_of(state, one, other), side_of(state, other, one)
        if keep is None:
            plan = self.rules.decide(mine, theirs)
        else:
            plan = self.rules.resolve(mine, theirs)
        if plan.action is Action.STOP:
            return None
        for at, shown in ((one, theirs), (other, mine)):
            node = state.nodes[at]
            ids = self.rules.learn(NAMES[at], node.ids, shown.node, shown.identities)
            state = put(state, at, node._replace(ids=ids))
        for at in pair:  # a claim of a later primary ends the sessions of earlier ones
            if not state.nodes[at].primary:
                for leader in self._leaders(state, at):
                    state = self._end(state, ordered(at, leader))
        if plan.action is Action.IN_SYNC:
            return self._joined(state, pair, plan)
        return self._planned(state, pair, plan, by_operator=keep is not None)

    def _joined(self, state: State, pair: tuple[int, int], plan: Plan) -> State:
        if plan.epoch:
            first = NAMES.index(plan.source)
            node = state.nodes[first]._replace(epoch=plan.epoch, leader=first)
            state = put(state, first, node)
        epoch, leader = max(term(state.nodes[at]) for at in pair)
        story = max(
            (state.nodes[at].primary, term(state.nodes[at]), state.nodes[at].story)
            for at in pair
        )[-1]
        for at, other in (pair, pair[::-1]):
            node = state.nodes[at]
            line = self.rules.settle(node.line, NAMES[other], node.line.generation)
            node = node._replace(
                line=self.rules.share(line),
                asks=None,
                epoch=epoch,
                leader=leader,
                crash=node.crash if any(node.doubts) else Crash.NONE,
                behind=0 if node.behind == node.line.generation else node.behind,
                story=story,
                handed=-1 if state.nodes[other].primary else node.handed,
            )
            state = put(state, at, node)
        return self._follows(with_session(state, pair, SYNC), pair)

    def _follows(self, state: State, pair: tuple[int, int]) -> State:
        """End all sessions of a node that follows a primary, except that one."""
        for at, other in (pair, pair[::-1]):
            if state.nodes[other].primary:
                for third in others(state, at):
                    if third != other:
                        state = self._end(state, ordered(at, third))
        return state

    def _planned(
        self, state: State, pair: tuple[int, int], plan: Plan, *, by_operator: bool
    ) -> State:
        source, target = NAMES.index(plan.source), NAMES.index(plan.target)
        state = judged(state, source, target, by_operator=by_operator)
        giver = state.nodes[source]
        if plan.epoch:
            leader = source if giver.primary or plan.begins else giver.leader
            giver = giver._replace(epoch=plan.epoch, leader=leader)
        if term(giver) < term(state.nodes[target]):
            return state._replace(fault="an epoch goes back")
        state = put(state, source, giver)
        if plan.begins:
            state = self._begin(state, source, [NAMES[target]])
            state = self._told_apart(state, [source])
            giver = state.nodes[source]
        taker = state.nodes[target]
        if giver.line.generation == taker.line.generation:
            giver = giver._replace(line=self.rules.share(giver.line))
            taker = taker._replace(line=self.rules.share(taker.line))
            state = put(state, source, giver)
        state = put(state, source, giver._replace(asks=None))
        if taker.primary:
            under_way = taker.active
            taker = taker._replace(
                primary=False, flight=None, doubts=all_doubt(taker, target, under_way)
            )
        todo = frozenset(range(len(giver.disk)))
        if plan.extent is not Extent.DIFFERENT:
            todo = frozenset(
                self.rules.marked(
                    set(giver.dirty[target] | giver.doubts[target]),
                    set(taker.dirty[source] | taker.doubts[source]),
                )
            )
        taker = taker._replace(
            behind=giver.line.generation,
            handed=-1 if giver.primary else taker.handed,
            asks=None,
            story=giver.story,
            epoch=giver.epoch,
            leader=giver.leader,
            doubts=self._inherit(giver, taker, source, target, todo),
            ghost=(),
        )
        state = self._end_all(put(state, target, taker), target)
        state = with_session(state, pair, Session(source, target, todo))
        return self._follows(state, pair)

    def _resolutions(
        self, state: State, pair: tuple[int, int]
    ) -> Iterator[tuple[str, State]]:
        budget = state.budget._replace(forces=state.budget.forces - 1)
        for keep, other in (pair, pair[::-1]):
            mine, theirs = side_of(state, keep, other), side_of(state, other, keep)
            if self.rules.decide(mine, theirs).split:
                met = self.meet(state, pair, keep)
                if met is not None:
                    yield f"keep {NAMES[keep]}", met._replace(budget=budget)

    def _choices_stored(
        self, state: State, pair: tuple[int, int]
    ) -> Iterator[tuple[str, State]]:
        """Give the two stores of a resolved split brain, one at a time."""
        budget = state.budget._replace(forces=state.budget.forces - 1)
        for keep, other in (pair, pair[::-1]):
            mine, theirs = side_of(state, keep, other), side_of(state, other, keep)
            plan, why_not = why_not_resolved(mine, theirs)
            if why_not:
                continue
            if mine.term > theirs.term and mine.leader == mine.node:
                gone = self._given_up(state, other, keep)
                if gone is not None:
                    yield f"{NAMES[other]} gives up for {NAMES[keep]}", gone
            # Without forces left the kept node would wait for ever.
            node = state.nodes[keep]._replace(epoch=plan.epoch, leader=keep, handed=-1)
            line = self.rules.chosen(node.line, state.fresh + 1, NAMES[other])
            node = node._replace(line=line, token=None, asks=None)
            new = put(state, keep, node)._replace(fresh=state.fresh + 1)
            new = self._told_apart(new, [keep])
            if budget.forces:
                yield f"chosen {NAMES[keep]}", new._replace(budget=budget)

    def _given_up(self, state: State, loser: int, keep: int) -> State | None:
        """Have a node store that it goes back to a base of the kept one."""
        node, kept = state.nodes[loser], state.nodes[keep]
        back = self.rules.given_up(node.line, side_of(state, keep, loser))
        if back is None:
            return None
        state = judged(state, keep, loser, by_operator=True)
        doubtful = node.active if node.primary else frozenset[int]()
        if not back.exact:
            doubtful = frozenset(range(len(node.disk)))
        third = node.dirty[keep] | node.doubts[keep] | doubtful
        doubts = list(all_doubt(node, loser, third, but=keep))
        doubts[keep] |= doubtful
        node = node._replace(
            line=back.lineage,
            doubts=tuple(doubts),
            primary=False,
            flight=None,
            handed=-1,
            token=None,
            asks=None,
            epoch=kept.epoch,
            leader=kept.leader,
            story=kept.story,
            ghost=(),
        )
        budget = state.budget._replace(forces=state.budget.forces - 1)
        return self._end_all(put(state, loser, node), loser)._replace(budget=budget)
