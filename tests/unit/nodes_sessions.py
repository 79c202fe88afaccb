# SPDX-License-Identifier: BSD-3-Clause
"""Sessions of two or three nodes: copies of a resync, and how sessions end."""

from __future__ import annotations

from collections.abc import Iterator

from unit.nodes_model import (
    NAMES,
    SYNC,
    Node,
    Session,
    State,
    Story,
    all_doubt,
    cleared,
    forgotten,
    holds,
    others,
    put,
    session_of,
    subsets,
    term,
    with_session,
    with_value,
)
from unit.nodes_replaced import replaced, without_state
from unit.nodes_rules import Rules

from nbd_mirror.rules.generation import NO_DATA
from nbd_mirror.rules.node_side import Crash


class Sessions:
    """What happens within a session, and at its end."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()

    def _crashes(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        budget = state.budget._replace(crashes=state.budget.crashes - 1)
        state = state._replace(budget=budget)
        name, node = NAMES[index], state.nodes[index]
        yield f"kill {name}", self._down(state, index, node, Crash.PROCESS)
        reverted = [r for r, safe in enumerate(node.safe) if safe != node.disk[r]]
        for lost in subsets(reverted):
            disk = node.disk
            for region in lost:
                disk = with_value(disk, region, node.safe[region])
            down = node._replace(disk=disk, safe=disk)
            after = self._down(state, index, down, Crash.HOST)
            yield f"power {name} {lost}", forgotten(after, index)
        after = self._down(state, index, node, Crash.PROCESS)
        if (new := replaced(after, index)) is not None:
            yield f"replace {name}", new

    def _losses(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        after = self._down(state, index, state.nodes[index], Crash.PROCESS)
        if (new := without_state(after, index)) is not None:
            yield f"lose {NAMES[index]}", new

    def _down(self, state: State, index: int, node: Node, crash: Crash) -> State:
        crash = max(node.crash, crash, key=lambda crash: crash.value)
        down = node._replace(
            up=False,
            primary=False,
            flight=None,
            crash=crash,
            asks=None,
            forgets=frozenset(),
        )
        state = put(state, index, down)
        for other in others(state, index):
            state = self._drop(state, (index, other))
        return self._end_all(state, index)

    def _start(self, state: State, index: int) -> State:
        """Doubt, towards all others, the regions that were active at the node's end."""
        node = state.nodes[index]
        doubts = all_doubt(node, index, node.active)
        crash = node.crash if any(doubts) else Crash.NONE
        node = node._replace(up=True, doubts=doubts, active=frozenset(), crash=crash)
        return put(state, index, node)

    def _drop(self, state: State, pair: tuple[int, int]) -> State:
        """Give up promotions that wait for the answer of a node without data."""
        for at in pair:
            node = state.nodes[at]
            if node.line.generation == NO_DATA:
                state = put(state, at, node._replace(asks=None))
        return state

    def _end_all(self, state: State, index: int) -> State:
        for pair, _ in state.sessions:
            if index in pair:
                state = self._end(state, pair)
        return state

    def _end(self, state: State, pair: tuple[int, int]) -> State:
        """End a session; a secondary doubts the regions that it had under way."""
        sessions = tuple(item for item in state.sessions if item[0] != pair)
        state = state._replace(sessions=sessions)
        for index, other in (pair, pair[::-1]):
            node = state.nodes[index]._replace(asks=None)
            state = put(state, index, node)
            if node.flight:
                flight = node.flight._replace(at=node.flight.at - {other})
                state = put(state, index, node._replace(flight=flight))
            if node.up and not node.primary and node.active:
                crash = max(node.crash, Crash.SESSION, key=lambda crash: crash.value)
                doubts = all_doubt(node, index, node.active)
                node = node._replace(
                    doubts=doubts,
                    active=frozenset(),
                    forgets=frozenset(),
                    crash=crash,
                )
                state = self._end_all(put(state, index, node), index)
        return state

    def _resync(
        self, state: State, pair: tuple[int, int], session: Session
    ) -> Iterator[tuple[str, State]]:
        source, target = session.source, session.target
        name = f"{NAMES[source]}>{NAMES[target]}"
        giver = state.nodes[source]
        for region in session.todo:
            if giver.flight is None or giver.flight.region != region:
                yield f"{name} copy {region}", self._copy(state, pair, session, region)
        if session.todo:
            return
        if session.stage == 0:
            line = self.rules.offer(giver.line, NAMES[target])
            offered = put(state, source, giver._replace(line=line))
            yield (
                f"{name} offer",
                with_session(offered, pair, session._replace(stage=1)),
            )
        elif session.stage == 1:
            adopted = put(state, target, self._adopted(state, source, target))
            yield (
                f"{name} adopt",
                with_session(adopted, pair, session._replace(stage=2)),
            )
        else:
            held = state.nodes[target].line.generation
            line = self.rules.settle(giver.line, NAMES[target], held)
            crash = giver.crash if any(giver.doubts) else Crash.NONE
            settled = put(state, source, giver._replace(line=line, crash=crash))
            yield f"{name} settle", with_session(settled, pair, SYNC)

    def _copy(
        self, state: State, pair: tuple[int, int], session: Session, region: int
    ) -> State:
        """Copy a region; it is durable on both disks before a bit is cleared."""
        source, target = session.source, session.target
        giver, taker = state.nodes[source], state.nodes[target]
        value = giver.disk[region]
        if self.rules.flushes_source:
            giver = giver._replace(safe=with_value(giver.safe, region, value))
        giver = cleared(giver, target, region)
        taker = cleared(taker, source, region)._replace(
            inconsistent=True,
            disk=with_value(taker.disk, region, value),
            safe=with_value(taker.safe, region, value),
        )
        state = put(put(state, source, giver), target, taker)
        left = session._replace(todo=session.todo - {region})
        return with_session(state, pair, left)

    def _adopted(self, state: State, source: int, target: int) -> Node:
        """Give the target as it stores the source's generation."""
        giver, taker = state.nodes[source], state.nodes[target]
        doubts = list(self._inherit(giver, taker, source, target, frozenset()))
        dirty = list(taker.dirty)
        for third in range(len(doubts)):
            if third in (source, target):
                continue
            doubts[third] |= dirty[third]
            dirty[third] = frozenset()
            if self.rules.settles_thirds and session_of(state, source, third) == SYNC:
                doubts[third] = frozenset()
        return taker._replace(
            line=self.rules.adopt(taker.line, giver.line),
            dirty=tuple(dirty),
            doubts=tuple(doubts),
            behind=0 if holds(giver, taker.behind) else taker.behind,
            inconsistent=False,
            epoch=max(term(giver), term(taker))[0],
            leader=max(term(giver), term(taker))[1],
            crash=giver.crash if any(doubts) else Crash.NONE,
            story=giver.story,
        )

    def _inherit(
        self, giver: Node, taker: Node, source: int, target: int, todo: frozenset[int]
    ) -> tuple[frozenset[int], ...]:
        doubts = list(taker.doubts)
        for third in range(len(doubts)):
            if third not in (source, target):
                doubts[third] |= self.rules.inherited(
                    set(todo), set(giver.dirty[third]), set(giver.doubts[third])
                )
        return tuple(doubts)

    def _told_apart(self, state: State, nodes: list[int]) -> State:
        """Begin a story by a forced order: the node's data count from now on."""
        first = state.nodes[nodes[0]]
        for at in nodes:
            state = put(state, at, state.nodes[at]._replace(story=len(state.stories)))
        stories = (*state.stories, Story(first.disk, first.safe))
        return state._replace(stories=stories, forced=True)
