# SPDX-License-Identifier: BSD-3-Clause
"""A primary's write, from its issue to its flush, one durable step at a time."""

from __future__ import annotations

from collections.abc import Iterator

from unit.nodes_model import (
    NAMES,
    SYNC,
    Flight,
    State,
    all_doubt,
    others,
    put,
    session_of,
    with_value,
)
from unit.nodes_sessions import Sessions


class Writes(Sessions):
    """A write of a primary."""

    def _serving(self, state: State, index: int) -> Iterator[tuple[str, State]]:
        name, node = NAMES[index], state.nodes[index]
        flight = node.flight
        if flight is None:
            if state.budget.writes:
                for region in range(len(node.disk)):
                    yield f"{name} write {region}", self._issue(state, index, region)
            if node.active - node.forgets:
                yield f"{name} flush", self._flush(state, index)
            return
        for at in range(len(state.nodes)):
            if at not in flight.at and self._reaches(state, index, at, flight.region):
                yield f"{name} write at {NAMES[at]}", self._land(state, index, at)
        if index in flight.at:
            yield from self._answering(state, index, flight)

    def _answering(
        self, state: State, index: int, flight: Flight
    ) -> Iterator[tuple[str, State]]:
        """Give the steps that bring a write nearer to its answer."""
        name, node = NAMES[index], state.nodes[index]
        missing = self._missing(state, index, flight)
        names = [NAMES[at] for at in missing]
        with_it = [at for at in others(state, index) if at not in missing]
        waits = [at for at in with_it if not self._confirmed(state, index, at)]
        if missing and self.rules.must_begin(node.line, names):
            yield f"{name} begin", self._begin(state, index, names)
        elif any(flight.region not in node.dirty[at] for at in missing):
            yield f"{name} mark", self._mark(state, index, missing, flight.region)
        elif not waits:
            yield f"{name} answer", self._answer(state, index, flight)
        for at in waits:
            if self._open_offer(state, index, at):
                yield f"{name} tell {NAMES[at]}", self._tell(state, index, at)

    def _reaches(self, state: State, index: int, at: int, region: int) -> bool:
        """Whether the primary sends this write to the node *at*."""
        if at == index:
            return True
        session = session_of(state, index, at)
        if session is None:
            return False
        return session == SYNC or (
            session.source == index and region not in session.todo
        )

    def _missing(self, state: State, index: int, flight: Flight) -> list[int]:
        """Give the nodes that will not have the write: no session carries it."""
        return [
            at
            for at in others(state, index)
            if not self._reaches(state, index, at, flight.region)
        ]

    def _confirmed(self, state: State, index: int, at: int) -> bool:
        """Whether *at* has the write, and no generation of the primary is open."""
        flight = state.nodes[index].flight
        assert flight is not None
        waits = self.rules.confirms and self._open_offer(state, index, at)
        return at in flight.at and not waits

    def _open_offer(self, state: State, index: int, at: int) -> bool:
        peer = state.nodes[index].line.peer(NAMES[at])
        return peer.shared and bool(peer.bases)

    def _issue(self, state: State, index: int, region: int) -> State:
        node = state.nodes[index]
        value = state.last + 1
        node = node._replace(
            active=node.active | {region},
            forgets=node.forgets - {region},
            flight=Flight(region, value, frozenset()),
        )
        budget = state.budget._replace(writes=state.budget.writes - 1)
        return put(state, index, node)._replace(budget=budget, last=value)

    def _land(self, state: State, index: int, at: int) -> State:
        """Put the write on a disk, whose activity log has its region first."""
        flight = state.nodes[index].flight
        assert flight is not None
        there = state.nodes[at]
        active = there.active
        if self.rules.logs_first:
            active = active | {flight.region}
        disk = with_value(there.disk, flight.region, flight.value)
        forgets = there.forgets - {flight.region}
        there = there._replace(disk=disk, active=active, forgets=forgets)
        state = put(state, at, there)
        flight = flight._replace(at=flight.at | {at})
        return put(state, index, state.nodes[index]._replace(flight=flight))

    def _begin(self, state: State, index: int, missing: list[str]) -> State:
        node = state.nodes[index]
        line = self.rules.begin(node.line, state.fresh + 1, missing)
        state = put(state, index, node._replace(line=line, token=None))
        return state._replace(fresh=state.fresh + 1)

    def _mark(self, state: State, index: int, missing: list[int], region: int) -> State:
        node = state.nodes[index]
        dirty = tuple(
            bits | {region} if at in missing else bits
            for at, bits in enumerate(node.dirty)
        )
        return put(state, index, node._replace(dirty=dirty))

    def _tell(self, state: State, index: int, at: int) -> State:
        """Have a counted node store the new generation, then the primary its answer."""
        node, there = state.nodes[index], state.nodes[at]
        if there.line.generation != node.line.generation:
            return put(state, at, self._adopted(state, index, at))
        if at not in (node.flight.at if node.flight else ()):
            return state
        line = self.rules.settle(node.line, NAMES[at], there.line.generation)
        return put(state, index, node._replace(line=line))

    def _answer(self, state: State, index: int, flight: Flight) -> State:
        node = state.nodes[index]
        story = state.stories[node.story]
        need = with_value(story.need, flight.region, flight.value)
        stories = list(state.stories)
        with_it = {state.nodes[at].story for at in flight.at}
        apart = story.apart | {
            (other, node.line.generation)
            for other in range(len(stories))
            if other not in with_it
        }
        stories[node.story] = story._replace(need=need, apart=apart)
        state = put(state, index, node._replace(flight=None))
        return state._replace(stories=tuple(stories))

    def _flush(self, state: State, index: int) -> State:
        """All connected disks are flushed; their activity logs may forget regions."""
        node = state.nodes[index]
        story = state.stories[node.story]
        stories = list(state.stories)
        stories[node.story] = story._replace(kept=story.need)
        for at in (index, *others(state, index)):
            there = state.nodes[at]
            session = session_of(state, index, at)
            if at != index and session is None:
                continue
            if session and session.target == at:  # third nodes learn nothing of it
                doubts = all_doubt(there, at, there.active, but=index)
                there = there._replace(doubts=doubts)
            there = there._replace(safe=there.disk, forgets=there.active)
            state = put(state, at, there)
        return state._replace(stories=tuple(stories))

    def _forget(self, state: State, index: int) -> State:
        """Let the activity log forget the regions that are flushed everywhere."""
        node = state.nodes[index]
        active = node.active - node.forgets
        return put(state, index, node._replace(active=active, forgets=frozenset()))
