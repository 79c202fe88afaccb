# SPDX-License-Identifier: BSD-3-Clause
"""
Two or three nodes of a volume at one instant, and the promises that they keep.

The model has disks of a few regions with a volatile cache, the durable maps, the
activity log, one write under way per primary, and sessions. nodes_machine.py has the
transitions. `faults` returns the promise that a state breaks:

- Two nodes in sync hold the same data, except for the write under way.
- A primary that no operator forced holds each answered write. An answered write that
  was not flushed may be lost only if every node of that generation lost power.
- Two nodes serve clients at once only if an operator forced one of them.
- All data of a volume go back to one first generation.
- Only an operator's decision discards a write that the target answered after the two
  histories parted. A node that lost its state still has them on its disk.

The model has no delays within a session. A session ends for both sides at once, and no
message of it arrives later. Claims ensure that, and have a model of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nbd_mirror.rules.generation import NO_DATA, Lineage, Peer
from nbd_mirror.rules.node_identity import NO_ID, Known
from nbd_mirror.rules.node_side import Crash, Role, Side
from nbd_mirror.rules.promotion import Contact, Standing

NAMES = "abc"


class Flight(NamedTuple):
    """A primary's write that is not answered: *at* are the nodes that have it."""

    region: int
    value: int
    at: frozenset[int]


class Session(NamedTuple):
    """
    Two connected nodes; *todo*: what is left to copy.

    *stage* of a resync: 0 copies, 1 has offered the generation, 2 is adopted.
    """

    source: int = -1  # -1: in sync
    target: int = -1
    todo: frozenset[int] = frozenset()
    stage: int = 0


SYNC = Session()


class Look(NamedTuple):
    """What a node that is to be promoted has seen, maybe a while ago."""

    forced: bool
    resumes: bool
    content: tuple[int, int, int]  # its own generation and latest promotion
    token: bool = False  # it had one that was good for that
    epoch: int = 0  # of the promotion; 0: it has not met the others yet
    met: tuple[Contact, ...] = ()
    asked: bool = False  # it has set `asks`


class Node(NamedTuple):
    """A node: durable state, then what a restart forgets, then the test's own."""

    line: Lineage
    dirty: tuple[frozenset[int], ...]
    doubts: tuple[frozenset[int], ...]
    active: frozenset[int]  # the activity log
    disk: tuple[int, ...]  # as it reads
    safe: tuple[int, ...]  # as it reads after power loss
    epoch: int = 1
    leader: int = 0
    crash: Crash = Crash.NONE
    behind: int = 0  # the generation that a source had, or 0
    inconsistent: bool = False
    demoted: bool = False
    token: tuple[int, int, int] | None = None  # the generation and term it is good for
    handed: int = -1  # the node that has this one's token
    ids: tuple[Known, ...] = ()  # what it knows of each node's identity, and its own
    up: bool = True
    primary: bool = False
    flight: Flight | None = None
    # A promotion that waits: its epoch, whether it is forced, the nodes to consent.
    asks: tuple[int, bool, frozenset[int]] | None = None
    # The same in steps of its own (nodes_promotions.py).
    look: Look | None = None
    stored: int = 0  # the epoch of a promotion that is stored, and opens its door next
    unopened: int = 0  # the same, and its door did not open
    forgets: frozenset[int] = frozenset()  # active and flushed everywhere
    story: int = 0  # which of the parted histories its data belongs to
    ghost: tuple[int, ...] = ()  # generations that its disk holds, and no state tells


class Story(NamedTuple):
    """One history of answered writes: a forced promotion begins another one."""

    need: tuple[int, ...]  # the latest answered value a region
    kept: tuple[int, ...]  # the latest flushed one
    # Stories without a write that was answered in this one, and its generation.
    apart: frozenset[tuple[int, int]] = frozenset()


class Budget(NamedTuple):
    """How much may still happen."""

    writes: int = 2
    cuts: int = 1
    crashes: int = 1
    orders: int = 1  # promote, demote, hand over without force
    forces: int = 1  # forced promotions, resolved split brains, data given up
    losses: int = 0  # of a node's state


class State(NamedTuple):
    """Everything at one instant."""

    nodes: tuple[Node, ...]
    links: frozenset[tuple[int, int]]  # pairs that can reach each other
    sessions: tuple[tuple[tuple[int, int], Session], ...]
    stories: tuple[Story, ...]
    budget: Budget
    last: int = 0  # the latest value written
    fresh: int = 1  # the latest generation
    hosts: int = 0  # the latest id of a node
    forced: bool = False
    fault: str = ""


def start(nodes: int, regions: int, budget: Budget) -> State:
    """All nodes in sync, the first one primary."""
    empty = (frozenset[int](),) * nodes
    zero = (0,) * regions
    made = []
    for index in range(nodes):
        peers = tuple(
            Peer(NAMES[other], shared=True) for other in range(nodes) if other != index
        )
        line = Lineage(1, (), peers)
        node = Node(line, empty, empty, frozenset(), zero, zero, primary=index == 0)
        ids = tuple(Known(NAMES[at], at + 1) for at in range(nodes))
        made.append(node._replace(ids=ids))
    pairs = [(i, j) for i in range(nodes) for j in range(i + 1, nodes)]
    return State(
        tuple(made),
        frozenset(pairs),
        tuple((pair, SYNC) for pair in pairs if pair[0] == 0),
        (Story(zero, zero),),
        budget,
        hosts=nodes,
    )


def fresh(nodes: int, regions: int, budget: Budget) -> State:
    """No node has data, and none was ever primary."""
    state = start(nodes, regions, budget)
    for index in range(nodes):
        state = empty(state, index)
    return state._replace(sessions=())


def empty(state: State, index: int) -> State:
    """Give a node a new disk and a new state, and so a new id."""
    node = state.nodes[index]
    zero, none = (0,) * len(node.disk), (frozenset[int](),) * len(state.nodes)
    line = Lineage(peers=tuple(Peer(peer.node) for peer in node.line.peers))
    host = state.hosts + 1
    ids = tuple(
        Known(name, host if at == index else NO_ID)
        for at, name in enumerate(NAMES[: len(state.nodes)])
    )
    new = Node(line, none, none, frozenset(), zero, zero, epoch=0, leader=-1, ids=ids)
    return put(state, index, new)._replace(hosts=host)


def faults(state: State) -> str:
    """Say which promise a state breaks; "" if none."""
    fault = state.fault or _serving_fault(state) or _sync_fault(state)
    return fault or _kinship_fault(state)


def _serving_fault(state: State) -> str:
    serving = [node for node in state.nodes if node.primary]
    if len(serving) > 1 and not state.forced:
        return "two nodes serve, and nobody forced one"
    for index, node in enumerate(state.nodes):
        if node.primary and node.leader != index:
            return f"{NAMES[index]} serves, and knows a later primary"
    for node in serving:
        need = state.stories[node.story].need
        for region, value in enumerate(node.disk):
            if value < need[region]:
                return f"a primary lacks the answered write {need[region]}"
    return ""


def _sync_fault(state: State) -> str:
    """Compare nodes in sync; the writes under way may differ."""
    under_way = {node.flight.region for node in state.nodes if node.flight is not None}
    for (one, other), session in state.sessions:
        if session != SYNC and session.stage < 2:
            continue
        both = zip(state.nodes[one].disk, state.nodes[other].disk, strict=True)
        for region, (first, second) in enumerate(both):
            if first != second and region not in under_way:
                return f"{NAMES[one]} and {NAMES[other]} are in sync and differ"
    return ""


def _kinship_fault(state: State) -> str:
    """All data go back to one first generation."""
    lines = (node.line for node in state.nodes)
    held = [line for line in lines if line.generation != NO_DATA]
    first = {(line.generation, *line.history)[-1] for line in held}
    return "two nodes hold unrelated data" if len(first) > 1 else ""


def judged(state: State, source: int, target: int, *, by_operator: bool) -> State:
    """Note a wrong decision: it copies from no image, or discards answered writes."""
    giver, taker = state.nodes[source], state.nodes[target]
    if giver.inconsistent:
        return state._replace(fault="a source is of no instant")
    if by_operator:
        return state
    for other, generation in state.stories[taker.story].apart:
        if other == giver.story and holds(taker, generation):
            return state._replace(fault="a decision discards answered writes")
    return state


def forgotten(state: State, index: int) -> State:
    """Allow, after power loss, that all nodes have lost an unflushed write."""
    generation = state.nodes[index].line.generation
    if generation == NO_DATA:
        return state
    stories = list(state.stories)
    counting = (there for there in state.nodes if not there.behind)
    for told in {there.story for there in counting if holds(there, generation)}:
        need = list(stories[told].need)
        for region in range(len(need)):
            held = max(
                there.disk[region]
                for at, there in enumerate(state.nodes)
                if holds(there, generation) and (at == index or not there.inconsistent)
            )
            if held < stories[told].kept[region]:
                return state._replace(fault=f"the flushed write {need[region]} is gone")
            need[region] = min(held, need[region])
        stories[told] = stories[told]._replace(need=tuple(need))
    return state._replace(stories=tuple(stories))


def renewed(state: State) -> State:
    """Restore all promises once the forced orders of an operator are healed."""
    serving = [at for at, node in enumerate(state.nodes) if node.primary]
    if not state.forced or len(serving) != 1:
        return state
    first = state.nodes[serving[0]]
    for at in others(state, serving[0]):
        node = state.nodes[at]
        equal = node.line.generation == first.line.generation
        equal = equal and term(node) == term(first) and not node.behind
        if not equal or session_of(state, serving[0], at) != SYNC:
            return state
    nodes = tuple(node._replace(story=0) for node in state.nodes)
    story = state.stories[first.story]._replace(apart=frozenset())
    return state._replace(nodes=nodes, stories=(story,), forced=False)


def holds(node: Node, generation: int) -> bool:
    """Tell whether the data of a node are of *generation*, or later."""
    return generation in (node.line.generation, *node.line.history, *node.ghost)


def all_doubt(
    node: Node, index: int, regions: frozenset[int], but: int = -1
) -> tuple[frozenset[int], ...]:
    """Add regions to a node's doubts towards all others, *but* one."""
    return tuple(
        bits if at in (index, but) else bits | regions
        for at, bits in enumerate(node.doubts)
    )


def cleared(node: Node, other: int, region: int) -> Node:
    """Clear a region towards another node: it is copied."""
    dirty, doubts = list(node.dirty), list(node.doubts)
    dirty[other] -= {region}
    doubts[other] -= {region}
    return node._replace(dirty=tuple(dirty), doubts=tuple(doubts))


def term(node: Node) -> tuple[int, int]:
    """Give the latest promotion that a node knows."""
    return node.epoch, node.leader


def token(node: Node) -> tuple[int, int, int]:
    """Return the generation and term for which a token of the node is good."""
    return node.line.generation, *term(node)


def subsets(regions: list[int]) -> Iterator[tuple[int, ...]]:
    """Give every set of some of the regions."""
    for bits in range(1, 1 << len(regions)):
        yield tuple(region for at, region in enumerate(regions) if bits >> at & 1)


def with_value(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    """Replace one value."""
    return (*values[:index], value, *values[index + 1 :])


def put(state: State, index: int, node: Node) -> State:
    """Replace one node."""
    nodes = (*state.nodes[:index], node, *state.nodes[index + 1 :])
    return state._replace(nodes=nodes)


def pairs(state: State) -> Iterator[tuple[int, int]]:
    """Give each pair of nodes once."""
    for one in range(len(state.nodes)):
        for other in range(one + 1, len(state.nodes)):
            yield one, other


def ordered(one: int, other: int) -> tuple[int, int]:
    """Give a pair as sessions and links name it."""
    return (one, other) if one < other else (other, one)


def session_of(state: State, one: int, other: int) -> Session | None:
    """Find the session of two nodes."""
    pair = ordered(one, other)
    for key, session in state.sessions:
        if key == pair:
            return session
    return None


def with_session(state: State, pair: tuple[int, int], session: Session) -> State:
    """Begin or change a session."""
    others = [item for item in state.sessions if item[0] != pair]
    return state._replace(sessions=tuple(sorted([*others, (pair, session)])))


def others(state: State, index: int) -> list[int]:
    """Give all nodes but one."""
    return [at for at in range(len(state.nodes)) if at != index]


def connected(state: State, one: int, other: int) -> bool:
    """Tell whether two nodes have a session, or wait for their first data."""
    there = (state.nodes[one], state.nodes[other])
    empty = all(node.up and node.line.generation == NO_DATA for node in there)
    waits = empty and ordered(one, other) in state.links
    return waits or session_of(state, one, other) is not None


def side_of(state: State, index: int, other: int) -> Side:
    """Return a node's state as it shows it to another one."""
    node = state.nodes[index]
    return Side(
        volume="v",
        node=NAMES[index],
        size=len(node.disk),
        generation=node.line.generation,
        history=node.line.history,
        bases=node.line.peer(NAMES[other]).bases,
        dirty=len(node.dirty[other]),
        doubts=len(node.doubts[other] | (frozenset() if node.primary else node.active)),
        crash=node.crash,
        inconsistent=node.inconsistent,
        role=Role.PRIMARY if node.primary else Role.SECONDARY,
        epoch=node.epoch,
        leader=NAMES[node.leader] if node.leader >= 0 else "",
        handed=NAMES[node.handed] if node.handed >= 0 else "",
        identities=node.ids,
    )


def standing_of(state: State, index: int) -> Standing:
    """Return a node's state as `may_promote` judges it."""
    node = state.nodes[index]
    contacts = []
    for at in others(state, index):
        there = state.nodes[at]
        role = Role.PRIMARY if there.primary else Role.SECONDARY
        contacts.append(
            Contact(
                NAMES[at],
                connected=connected(state, index, at),
                role=role,
                has_data=there.line.generation != NO_DATA,
            )
        )
    return Standing(
        has_data=node.line.generation != NO_DATA,
        behind=node.behind > 0,
        inconsistent=node.inconsistent,
        lost_power=node.crash is Crash.HOST and any(node.doubts),
        token=node.token == token(node),
        others=tuple(contacts),
    )
