# SPDX-License-Identifier: BSD-3-Clause
"""
How a node of the model becomes another node under its old name.

An operator gives it a new host and a new disk when another node has all its data. Or
its state is lost, and its disk is still there. In both cases an operator announces it
to the other nodes. That is an order of force if its disk may have the only copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import ge

from unit.nodes_model import (
    NAMES,
    Node,
    State,
    Story,
    empty,
    holds,
    others,
    put,
)

from nbd_mirror.rules.generation import NO_DATA
from nbd_mirror.rules.node_identity import NO_ID, Known, announce

__all__ = [
    "announcements",
    "first_chosen",
    "renamed",
    "replaced",
    "without_state",
]


def replaced(state: State, index: int) -> State | None:
    """
    Give a node a new disk and no state, and announce it where that is possible.

    None: it has the only copy of some data.
    """
    story = state.nodes[index].story
    if not _replaceable(state, index):
        return None
    new = empty(state, index)
    new = put(new, index, new.nodes[index]._replace(up=False, story=story))
    for at in others(new, index):
        node = new.nodes[at]
        if node.up and node.ids[index].id != NO_ID:
            ids = announce(node.ids, NAMES[index])
            new = put(new, at, node._replace(ids=ids))
    return new


def without_state(state: State, index: int) -> State | None:
    """
    Take a node's state away, and leave its disk.

    None: it has none, or no other node has an image of an instant. Then no rule helps.
    """
    node = state.nodes[index]
    left = any(_is_whole(state.nodes[at]) for at in others(state, index))
    if node.line.generation == NO_DATA or not left:
        return None
    held = (node.line.generation, *node.line.history)
    new = empty(state, index)
    bare = new.nodes[index]._replace(
        up=False, disk=node.disk, safe=node.safe, story=node.story, ghost=held
    )
    budget = state.budget._replace(losses=state.budget.losses - 1)
    return put(new, index, bare)._replace(budget=budget)


def _replaceable(state: State, index: int) -> bool:
    """Tell whether another node holds all data that a node holds and that count."""
    node = state.nodes[index]
    story = state.stories[node.story]
    for at in others(state, index):
        there = state.nodes[at]
        whole = there.story == node.story and holds(there, node.line.generation)
        whole = whole and not (there.behind or there.inconsistent or there.ghost)
        whole = whole and all(map(ge, there.disk, story.need))
        if whole and all(map(ge, there.safe, story.kept)):
            return True
    return False


def _is_whole(node: Node) -> bool:
    has_data = node.line.generation != NO_DATA
    return has_data and not (node.inconsistent or node.behind)


def announcements(state: State, index: int) -> Iterator[tuple[str, State]]:
    """Give each announcement that an operator may make at a node."""
    node = state.nodes[index]
    for at in others(state, index):
        there = state.nodes[at]
        known, shown = node.ids[at], there.ids[at]
        if known.id in (NO_ID, shown.id):
            continue
        told = put(state, index, node._replace(ids=announce(node.ids, NAMES[at])))
        name = f"announce {NAMES[at]} at {NAMES[index]}"
        if not there.ghost:
            yield name, told
        elif state.budget.forces:
            budget = state.budget._replace(forces=state.budget.forces - 1)
            yield name, _given_up(told, at)._replace(budget=budget)


def first_chosen(state: State, index: int) -> State:
    """Promise what a node's disk holds: no node knows of data, and it is promoted."""
    node = state.nodes[index]
    stories = list(state.stories)
    stories[node.story] = stories[node.story]._replace(need=node.disk, kept=node.safe)
    return state._replace(stories=tuple(stories))


def renamed(state: State) -> State:
    """Give the nodes their first ids again if all agree: only differences count."""
    first, *rest = (node.ids for node in state.nodes)
    count = len(state.nodes)
    if state.hosts == count or any(ids != first for ids in rest):
        return state
    if any(known.id == NO_ID for known in first):
        return state
    ids = tuple(Known(NAMES[at], at + 1) for at in range(count))
    nodes = tuple(node._replace(ids=ids) for node in state.nodes)
    return state._replace(nodes=nodes, hosts=count)


def _given_up(state: State, index: int) -> State:
    """Promise no more of a story than the other nodes of it hold."""
    node = state.nodes[index]
    state = put(state, index, node._replace(ghost=()))
    left = [
        there
        for at, there in enumerate(state.nodes)
        if at != index and there.story == node.story and not there.ghost
    ]
    story = state.stories[node.story]
    if not left:
        return state
    need = tuple(
        min(value, max(there.disk[region] for there in left))
        for region, value in enumerate(story.need)
    )
    kept = tuple(map(min, story.kept, need))
    stories = list(state.stories)
    stories[node.story] = Story(need, kept, story.apart)
    return state._replace(stories=tuple(stories))
