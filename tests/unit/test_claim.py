# SPDX-License-Identifier: BSD-3-Clause
"""
Claims: one at a time, and in a machine of two primaries and one node, in every order.

The machine has the cases that claims are for: a network that delays requests, a node
that notices a lost connection late or never, requests that are under way at the disk
when their connection ends, and a primary that continues after another was promoted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_mirror.rules.claim import (
    NONCE_DIGITS,
    NUMBER_MAX,
    SESSIONS_AHEAD,
    Claim,
    Judgement,
    format_claim,
    judge,
    next_session,
    parse_claim,
    why_refused,
)

NONCE = "0" * NONCE_DIGITS
CLAIM = Claim(7, "alpha", 3, NONCE)


# -- one claim

JUDGED = {
    "the first": (CLAIM, None, Judgement.FENCE),
    "a later epoch": (replace(CLAIM, epoch=8, session=1), CLAIM, Judgement.FENCE),
    "an earlier epoch": (replace(CLAIM, epoch=6, session=9), CLAIM, Judgement.REFUSE),
    "the same epoch, forced on two nodes": (
        replace(CLAIM, node="beta", session=1),
        CLAIM,
        Judgement.FENCE,
    ),
    "a reconnect": (replace(CLAIM, session=4), CLAIM, Judgement.FENCE),
    "a session that no primary comes to": (
        replace(CLAIM, session=CLAIM.session + SESSIONS_AHEAD + 1),
        CLAIM,
        Judgement.REFUSE,
    ),
    "the last session that one may come to": (
        replace(CLAIM, session=CLAIM.session + SESSIONS_AHEAD),
        CLAIM,
        Judgement.FENCE,
    ),
    "a later epoch, in a session that no primary comes to": (
        replace(CLAIM, epoch=8, session=SESSIONS_AHEAD + 1),
        replace(CLAIM, session=SESSIONS_AHEAD),
        Judgement.REFUSE,
    ),
    "an old connection": (replace(CLAIM, session=2), CLAIM, Judgement.REFUSE),
    "another connection of it": (CLAIM, CLAIM, Judgement.JOIN),
    "the same session of a copy": (
        replace(CLAIM, nonce="f" * NONCE_DIGITS),
        CLAIM,
        Judgement.REFUSE,
    ),
}


@pytest.mark.parametrize("case", JUDGED)
def test_judgement(case: str) -> None:
    """The table of claims; a primary refuses each, with the reason."""
    claim, in_force, expected = JUDGED[case]
    known = in_force.term if in_force else (0, "")
    for primary in (False, True):
        judged = judge(claim, in_force, term=known, whole=True, primary=primary)
        assert judged is (Judgement.REFUSE if primary else expected)
    reason = why_refused(claim, in_force, term=known, primary=True)
    assert f"session {claim.session}" in reason
    if expected is Judgement.REFUSE:
        assert in_force is not None
        reason = why_refused(claim, in_force, term=known, primary=False)
        assert f"epoch {in_force.epoch}" in reason


@pytest.mark.parametrize("in_force", [None, CLAIM])
def test_a_node_that_was_promoted_refuses_what_came_before(
    in_force: Claim | None,
) -> None:
    """It is secondary again, and no primary has claimed its disk since."""
    claim = replace(CLAIM, session=4)
    for term, expected in (
        ((7, "alpha"), Judgement.FENCE),
        ((7, "beta"), Judgement.REFUSE),
        ((8, "alpha"), Judgement.REFUSE),
    ):
        judged = judge(claim, in_force, term=term, whole=True, primary=False)
        assert judged is expected
    reason = why_refused(claim, in_force, term=(8, "beta"), primary=False)
    assert reason.startswith(
        "beta was promoted in epoch 8, which is later than epoch 7"
    )


def test_a_primary_goes_on_behind_a_session_claimed_in_its_name() -> None:
    """It fences that one at once; a lie of the other node costs it no number."""
    told = CLAIM.session + SESSIONS_AHEAD
    forged = replace(CLAIM, session=told, nonce="f" * NONCE_DIGITS)
    own = replace(CLAIM, session=next_session(CLAIM.session, told))
    judged = judge(own, forged, term=CLAIM.term, whole=True, primary=False)
    assert judged is Judgement.FENCE
    assert next_session(CLAIM.session, told + 1) == CLAIM.session + 1
    assert next_session(CLAIM.session, 0) == CLAIM.session + 1


def test_a_session_with_a_lost_connection_takes_no_other() -> None:
    """What was on the lost one may still land."""
    judged = judge(CLAIM, CLAIM, term=CLAIM.term, whole=False, primary=False)
    assert judged is Judgement.REFUSE


numbers = st.integers(0, NUMBER_MAX)
names = st.text(st.characters(exclude_characters="@"), min_size=1, max_size=64)


@given(
    st.text(min_size=1), numbers, names, numbers, st.integers(0, 16**NONCE_DIGITS - 1)
)
def test_a_claim_is_read_as_it_was_written(
    volume: str, epoch: int, node: str, session: int, nonce: int
) -> None:
    """Dots in a node's name and signs in a volume's name change nothing."""
    claim = Claim(epoch, node, session, f"{nonce:0{NONCE_DIGITS}x}")
    assert parse_claim(format_claim(volume, claim)) == (volume, claim)


@given(st.text())
def test_no_text_is_an_error(text: str) -> None:
    """A hostile client names what it likes."""
    parse_claim(text)
    parse_claim(f"pg@{text}")


@pytest.mark.parametrize(
    "export",
    [
        "pg",
        "",
        "@1.a.1." + NONCE,
        "pg@1.a.1",
        "pg@1.a.1." + NONCE[1:],
        "pg@1.a.1." + NONCE + "0",
        "pg@-1.a.1." + NONCE,
        "pg@1..1." + NONCE,
        f"pg@{NUMBER_MAX + 1}.a.1.{NONCE}",
        "pg@\u0661.a.1." + NONCE,
        "pg@1.a.1." + NONCE.replace("0", "G"),
    ],
)
def test_what_is_no_claim(export: str) -> None:
    """A plain name, and what only resembles a claim."""
    assert parse_claim(export) is None


# -- in every order


class Link(NamedTuple):
    """A connection: the primary's end, the node's end, and what is between."""

    claim: Claim
    sent: tuple[int, ...] = ()  # requests that the node has not taken yet
    under_way: frozenset[int] = frozenset()  # at the node's disk
    replies: tuple[int, ...] = ()
    granted: bool = False
    here: bool = True  # as the primary sees it
    there: bool = True  # as the node sees it


class Primary(NamedTuple):
    """A promoted node that writes one value after the other."""

    claim: Claim
    links: tuple[Link, ...] = ()
    value: int = 0  # that it has issued and that is not answered, or 0


class World(NamedTuple):
    """Two primaries and the node that both claim."""

    primaries: tuple[Primary, Primary]
    in_force: Claim | None = None
    stored: Claim | None = None
    whole: bool = False
    disk: int = 0
    answered: int = 0  # the latest write that either primary answered
    last: int = 0
    losses: int = 1
    kills: int = 1
    promotions: int = 1  # of the node itself
    term: tuple[int, str] = (0, "")  # the latest promotion that the node knows
    serves: bool = False
    fault: str = ""


@dataclass(frozen=True)
class Order:
    """What the node and the primary do besides `judge`; a test leaves one out."""

    judge: Callable[..., Judgement] = judge
    drains: bool = True
    cuts: bool = True
    stores: bool = True
    raises_session: bool = True


FIRST = World(
    (Primary(Claim(1, "a", 0, NONCE)), Primary(Claim(1, "b", 0, NONCE))),
)
WRITES = 2
LINKS = 2  # of a primary, over all its sessions


def steps(world: World, order: Order) -> Iterator[World]:
    """Give each world that may come next."""
    for index, primary in enumerate(world.primaries):
        yield from _primary_steps(world, order, index, primary)
        for at, link in enumerate(primary.links):
            for changed, after in _link_steps(world, order, link):
                yield _with_link(after, index, at, changed)
    if world.kills:
        yield _killed(world)
    if world.serves:
        yield world._replace(serves=False)
    elif world.promotions:
        yield _promoted(world)


def _primary_steps(
    world: World, order: Order, index: int, primary: Primary
) -> Iterator[World]:
    live = [link for link in primary.links if link.here]
    if not live and len(primary.links) < LINKS:
        raised = order.raises_session or not primary.links
        session = primary.claim.session + (1 if raised else 0)
        claim = replace(primary.claim, session=session)
        links = (*primary.links, Link(claim))
        # What was issued and not answered is sent again by the new session.
        yield _with(world, index, Primary(claim, links, primary.value))
    if live and live[0].granted and len(live) < 2 and len(primary.links) < LINKS:
        links = (*primary.links, Link(primary.claim))
        yield _with(world, index, primary._replace(links=links))
    if (
        primary.value == 0
        and world.last < WRITES
        and any(link.granted for link in live)
    ):
        value = world.last + 1
        yield _with(world, index, primary._replace(value=value))._replace(last=value)
    if live and world.losses:
        # One lost connection ends the session: what it carried is sent again.
        kept = tuple(link._replace(here=False) for link in primary.links)
        lost = _with(world, index, primary._replace(links=kept))
        yield lost._replace(losses=world.losses - 1)
    sent_by_any = {
        value for link in live for value in (*link.sent, *link.under_way, *link.replies)
    }
    for at, link in enumerate(primary.links):
        if not link.here or not primary.value:
            continue
        if primary.value in link.replies:
            answered = max(world.answered, primary.value)
            done = _with(world, index, primary._replace(value=0))
            yield done._replace(answered=answered)
        elif link.granted and primary.value not in sent_by_any:
            sent = link._replace(sent=(*link.sent, primary.value))
            yield _with_link(world, index, at, sent)


def _link_steps(world: World, order: Order, link: Link) -> Iterator[tuple[Link, World]]:
    if not link.here and link.there:  # the node notices, some day
        whole = world.whole and link.claim != world.in_force
        dead = link._replace(there=False, sent=())
        yield dead, world._replace(whole=whole)
    if link.there and not link.granted:
        yield from _claimed(world, order, link)
    if link.there and link.granted and link.sent:
        taken = link._replace(
            sent=link.sent[1:], under_way=link.under_way | {link.sent[0]}
        )
        yield taken, world
    for value in link.under_way:
        done = link._replace(
            under_way=link.under_way - {value},
            replies=(*link.replies, value) if link.there and link.here else (),
        )
        yield done, _landed(world, link, value)


def _landed(world: World, link: Link, value: int) -> World:
    world = world._replace(disk=value)
    if world.serves or link.claim.term < world.term:
        return world._replace(fault="a write landed after a promotion")
    if world.in_force and link.claim.rank < world.in_force.rank:
        return world._replace(fault="a write of a lower claim landed")
    if value < world.answered:
        return world._replace(fault="an older write landed over an answered one")
    return world


def _claimed(world: World, order: Order, link: Link) -> Iterator[tuple[Link, World]]:
    judgement = order.judge(
        link.claim,
        world.in_force,
        term=world.term,
        whole=world.whole,
        primary=world.serves,
    )
    if judgement is Judgement.REFUSE:
        yield link._replace(there=False, here=False), world
    elif judgement is Judgement.JOIN:
        yield link._replace(granted=True), world
    else:
        cut = world
        if order.cuts:
            for index, each in enumerate(world.primaries):
                links = tuple(_cut(other, link) for other in each.links)
                cut = _with(cut, index, each._replace(links=links))
        busy = any(other.under_way for other in _links(cut) if other != link)
        if busy and order.drains:
            if cut != world:
                yield link, cut._replace(whole=False)
            return
        stored = link.claim if order.stores else world.stored
        granted = cut._replace(in_force=link.claim, whole=True, stored=stored)
        yield link._replace(granted=True), granted


def _cut(other: Link, link: Link) -> Link:
    if other.claim.rank < link.claim.rank:
        return other._replace(there=False, sent=())
    return other


def _promoted(world: World) -> World:
    """Cut and drain all connections; then the node answers a write of its own."""
    cut = world
    for index, each in enumerate(world.primaries):
        links = tuple(link._replace(there=False, sent=()) for link in each.links)
        cut = _with(cut, index, each._replace(links=links))
    cut = cut._replace(whole=False)
    if any(link.under_way for link in _links(cut)):
        return cut
    value = world.last + 1
    return cut._replace(
        promotions=world.promotions - 1,
        term=(2, "n"),
        serves=True,
        disk=value,
        answered=value,
        last=value,
    )


def _killed(world: World) -> World:
    """Kill the node: what is under way is gone, what it has stored stays."""
    for index, primary in enumerate(world.primaries):
        links = tuple(
            link._replace(there=False, here=False, sent=(), under_way=frozenset())
            for link in primary.links
        )
        world = _with(world, index, primary._replace(links=links))
    kills = world.kills - 1
    return world._replace(in_force=world.stored, whole=False, kills=kills, serves=False)


def _links(world: World) -> Iterator[Link]:
    for primary in world.primaries:
        yield from primary.links


def _with(world: World, index: int, primary: Primary) -> World:
    primaries = list(world.primaries)
    primaries[index] = primary
    return world._replace(primaries=(primaries[0], primaries[1]))


def _with_link(world: World, index: int, at: int, link: Link) -> World:
    primary = world.primaries[index]
    links = (*primary.links[:at], link, *primary.links[at + 1 :])
    return _with(world, index, primary._replace(links=links))


def explore(order: Order, limit: int) -> tuple[str, int]:
    """Visit every world; give the first fault, and how many were seen."""
    seen, queue = {FIRST}, deque([FIRST])
    while queue:
        world = queue.popleft()
        if world.fault:
            return world.fault, len(seen)
        for after in steps(world, order):
            if after not in seen and len(seen) < limit:
                seen.add(after)
                queue.append(after)
    return "", len(seen)


@pytest.mark.slow
def test_nothing_of_a_lower_claim_lands() -> None:
    """In every order of what the network, the node and both primaries do."""
    fault, worlds = explore(Order(), limit=600_000)
    assert fault == ""
    assert worlds < 600_000


def _joins_broken(claim: Claim, in_force: Claim | None, **known: Any) -> Judgement:
    return judge(claim, in_force, **(known | {"whole": True}))


def _without_terms(claim: Claim, in_force: Claim | None, **known: Any) -> Judgement:
    return judge(claim, in_force, **(known | {"term": (0, "")}))


def _without_nodes(claim: Claim, in_force: Claim | None, **known: Any) -> Judgement:
    claim = replace(claim, node="")
    in_force = in_force and replace(in_force, node="")
    return judge(claim, in_force, **known)


LEFT_OUT = {
    "the others are cut": Order(cuts=False),
    "the others are drained": Order(drains=False),
    "the claim is stored": Order(stores=False),
    # The primary raises its session, and the node does not rely on that.
    "a reconnect is another session": Order(judge=_joins_broken, raises_session=False),
    "a promotion ends earlier claims": Order(judge=_without_terms),
    "two nodes of one epoch have an order": Order(judge=_without_nodes),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", LEFT_OUT)
def test_without_a_rule(rule: str) -> None:
    """What each rule is for."""
    fault, worlds = explore(LEFT_OUT[rule], limit=600_000)
    assert fault, f"{worlds} worlds, and nothing was found"
