# SPDX-License-Identifier: BSD-3-Clause
"""
What can happen to two or three nodes next: the transitions of nodes_model.py's state.

The nodes decide by the product's own rules (nbd_mirror/rules). `Rules` holds these
functions, so that a test can leave one out and see that the exploration finds it. Each
durable step is a transition of its own, so every order of steps and failures is met:
kills, power loss, cut links, and an operator who promotes, demotes, hands the role
over, forces and resolves.
"""

from __future__ import annotations

from collections.abc import Iterator

from unit.nodes_model import (
    NAMES,
    SYNC,
    Flight,
    Node,
    Session,
    State,
    Story,
    all_doubt,
    cleared,
    connected,
    forgotten,
    holds,
    judged,
    ordered,
    others,
    pairs,
    put,
    renewed,
    replaced,
    session_of,
    side_of,
    standing_of,
    subsets,
    term,
    token,
    with_session,
    with_value,
)
from unit.nodes_rules import Rules

from nbd_mirror.rules.generation import NO_DATA, create
from nbd_mirror.rules.node_side import Action, Crash, Extent, Plan
from nbd_mirror.rules.promotion import Answer


class Machine:
    """The transitions of a state, under given rules."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """Give every transition: its name, and the state it leads to."""
        for name, reached in self._steps(state):
            yield name, renewed(reached)

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
            if state.budget.crashes:
                yield from self._crashes(state, index)
        for pair in pairs(state):
            yield from self._pair(state, pair)

    # -- a primary's writes

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
        """Give what brings a write nearer to its answer."""
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
        """Let the activity log forget what is flushed everywhere."""
        node = state.nodes[index]
        active = node.active - node.forgets
        return put(state, index, node._replace(active=active, forgets=frozenset()))

    # -- crashes, starts, links

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
        """Doubt, towards all others, what was active when the node ended."""
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
        """End a session; doubt what a secondary had under way."""
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

    # -- two nodes

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
        elif session != SYNC:
            yield from self._resync(state, pair, session)

    def _may_meet(self, state: State, pair: tuple[int, int]) -> bool:
        """Both are up, and neither follows a primary that the other is not."""
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
        )
        state = self._end_all(put(state, target, taker), target)
        state = with_session(state, pair, Session(source, target, todo))
        return self._follows(state, pair)

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

    # -- an operator

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
        """Tell whether the last primary has met all others, none promoted since."""
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
            state = state._replace(fresh=state.fresh + 1)
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
        """Count on what a promoted node holds: its clients may read it at once."""
        node = state.nodes[index]
        stories = list(state.stories)
        story = stories[node.story]
        need = tuple(map(max, story.need, node.disk))
        stories[node.story] = story._replace(need=need)
        return state._replace(stories=tuple(stories))

    def _counts(self, state: State, index: int) -> State:
        """Let what is in doubt count as this node has it: clients will read it."""
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

    def _told_apart(self, state: State, nodes: list[int]) -> State:
        """Begin a story by an order of force: what the node holds counts."""
        first = state.nodes[nodes[0]]
        for at in nodes:
            state = put(state, at, state.nodes[at]._replace(story=len(state.stories)))
        stories = (*state.stories, Story(first.disk, first.safe))
        return state._replace(stories=stories, forced=True)

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
