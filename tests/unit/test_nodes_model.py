# SPDX-License-Identifier: BSD-3-Clause
"""
The rules of two and three nodes keep their promises in every state of the model.

Each rule is then left out once: the exploration has to find what it is for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from unit.explore_nodes import Found, explore, walk
from unit.nodes_machine import Machine
from unit.nodes_model import Budget, faults, start
from unit.nodes_rules import Rules

from nbd_mirror.rules import promotion
from nbd_mirror.rules.generation import Lineage
from nbd_mirror.rules.node_handshake import decide, resolve
from nbd_mirror.rules.node_side import Crash, Plan, Role, Side
from nbd_mirror.rules.promotion import Answer, Standing, Verdict

pytestmark = pytest.mark.slow

SMALL = Budget(writes=1, cuts=1, crashes=1, orders=1, forces=1)


@pytest.mark.parametrize(
    ("nodes", "regions", "budget"),
    [
        (2, 1, Budget(writes=2, cuts=1, crashes=1, orders=1, forces=1)),
        (2, 2, Budget(writes=2, cuts=1, crashes=1, orders=0, forces=0)),
        (2, 1, Budget(writes=1, cuts=1, crashes=0, orders=2, forces=2)),
        (3, 1, Budget(writes=1, cuts=0, crashes=1, orders=0, forces=0)),
    ],
)
def test_every_state(nodes: int, regions: int, budget: Budget) -> None:
    """No order of steps and failures breaks a promise, up to the bound."""
    found, states = explore(Machine(), start(nodes, regions, budget), limit=400_000)
    assert found is None, found
    assert states < 400_000, "the bound is too low to see every state"


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("forces", [0, 2])
def test_random_walks_heal(nodes: int, forces: int) -> None:
    """Far beyond the bound; and whatever happened, nodes that are left alone settle."""
    seed = random.SystemRandom().getrandbits(32)
    rng = random.Random(seed)
    budget = Budget(writes=5, cuts=4, crashes=4, orders=3, forces=forces)
    first = start(nodes, 2, budget)
    for _ in range(600):
        found = walk(Machine(), first, rng)
        assert found is None, f"seed {seed}: {found}"


# -- one rule left out at a time


def _never_begins(lineage: Lineage, missing: object) -> bool:
    del lineage, missing
    return False


def _offers_unrecorded(lineage: Lineage, node: str) -> Lineage:
    del node
    return lineage


def _adopts_with_old_bases(target: Lineage, source: Lineage) -> Lineage:
    return replace(target, generation=source.generation, history=source.history)


def _changed(
    change: Callable[[Side], Side],
) -> Callable[[Side, Side], Plan]:
    """Decide as if both sides were as *change* makes them."""
    return lambda mine, other: decide(change(mine), change(other))


def _without_vetoes(mine: Side, other: Side) -> Plan:
    """Settle a split brain without an operator: the later primary counts."""
    plan = decide(mine, other)
    if not plan.split:
        return plan
    keep, lose = (mine, other) if mine.epoch >= other.epoch else (other, mine)
    return resolve(keep, lose)


def _without_epochs(mine: Side, other: Side) -> Plan:
    return replace(decide(mine, other), epoch=0)


def _resolves_in_place(keep: Side, other: Side) -> Plan:
    return replace(resolve(keep, other), begins=False)


def _believes_images(
    rule: Callable[[Side, Side], Plan],
) -> Callable[[Side, Side], Plan]:
    return lambda mine, other: rule(
        replace(mine, inconsistent=False), replace(other, inconsistent=False)
    )


def _only_the_source(source: set[int], target: set[int]) -> set[int]:
    del target
    return source


def _nothing(copied: set[int], dirty: set[int], doubts: set[int]) -> set[int]:
    del copied, dirty, doubts
    return set()


def _forces_freely(node: Standing) -> Verdict:
    verdict = promotion.may_promote(node)
    return (
        replace(verdict, answer=Answer.YES)
        if verdict.answer is Answer.FORCE
        else verdict
    )


ONE, TWO = Budget(2, 1, 1, 1, 1), Budget(2, 2, 2, 1, 1)
LEFT_OUT = {
    "a new generation": (2, ONE, Rules(must_begin=_never_begins)),
    "offers are recorded": (2, ONE, Rules(offer=_offers_unrecorded)),
    "doubts are no sync": (
        2,
        ONE,
        Rules(decide=_changed(lambda s: replace(s, doubts=0))),
    ),
    "maps of both sides": (2, ONE, Rules(marked=_only_the_source)),
    "the better copy": (
        2,
        ONE,
        Rules(decide=_changed(lambda s: replace(s, crash=Crash.NONE))),
    ),
    "a killed server keeps its writes": (
        2,
        Budget(1, 0, 2, 0, 0),
        Rules(
            decide=_changed(
                lambda s: replace(
                    s, crash=Crash.HOST if s.crash is Crash.PROCESS else s.crash
                )
            )
        ),
    ),
    "the primary is the source": (
        2,
        ONE,
        Rules(decide=_changed(lambda s: replace(s, role=Role.SECONDARY))),
    ),
    "a split brain stops": (2, ONE, Rules(decide=_without_vetoes)),
    "a later epoch is overruled aloud": (2, SMALL, Rules(decide=_without_epochs)),
    "no promotion without proof": (2, ONE, Rules(may_promote=_forces_freely)),
    "doubts are contagious": (
        3,
        Budget(1, 1, 1, 0, 1),
        Rules(inherited=_nothing),
    ),
    "a generation is confirmed": (3, Budget(1, 2, 1, 0, 1), Rules(confirms=False)),
    "a secondary keeps what is active": (3, SMALL, Rules(keeps_active=False)),
    "a source is flushed": (2, Budget(1, 0, 2, 0, 0), Rules(flushes_source=False)),
    "flush, then promote": (2, Budget(2, 1, 2, 1, 0), Rules(flushes_first=False)),
    "a promotion settles doubts": (
        2,
        Budget(1, 0, 2, 0, 1),
        Rules(counts_doubts=False),
    ),
    "the log comes first": (2, ONE, Rules(logs_first=False)),
}


@pytest.mark.parametrize("rule", LEFT_OUT)
def test_without_a_rule(rule: str) -> None:
    """What the rule is for: the shortest way to a broken promise without it."""
    nodes, budget, rules = LEFT_OUT[rule]
    found, states = explore(Machine(rules), start(nodes, 1, budget), limit=400_000)
    assert found is not None, f"{states} states, and nothing was found"


SPLIT = (
    "cut ab, force b, b write 0, b write at b, b begin, b mark, b answer,"
    " a write 0, a write at a, a begin, a mark, a answer, join ab, keep a, a>b copy 0"
)
MANY = Budget(writes=9, cuts=9, crashes=9, orders=9, forces=9)
# Too deep to be explored in a test: random walks found the way once.
RECORDED = {
    "adoption ends old bases": (
        2,
        Rules(adopt=_adopts_with_old_bases),
        f"{SPLIT}, a>b offer, a>b adopt, a>b settle, a flush, cut ab, force b,"
        " b write 0, b write at b, b mark, b answer, a write 0, a write at a, a begin,"
        " a mark, a answer, join ab, meet ab",
        "a decision discards answered writes",
    ),
    "no inconsistent source": (
        2,
        Rules(decide=_believes_images(decide), resolve=_believes_images(resolve)),
        f"{SPLIT}, cut ab, join ab, keep b",
        "a source is of no instant",
    ),
    "resolving begins a generation": (
        3,
        Rules(resolve=_resolves_in_place),
        "a write 0, a write at b, cut ab, kill c, kill b, cut bc, a write at a,"
        " a begin, cut ac, join bc, start c, force c, c write 0, join ac, c write at c,"
        " meet ac, force c, keep c, keep a, start b, join ab, meet ab, a>c copy 0,"
        " a>c offer, a>c adopt, a>b copy 0, a>b offer, a>b adopt, a>b settle,"
        " a>c settle, meet bc, promote c",
        "a primary lacks the answered write 2",
    ),
}


@pytest.mark.parametrize("rule", RECORDED)
def test_without_a_rule_as_recorded(rule: str) -> None:
    """What the rule is for; with it, one of the steps cannot be taken."""
    nodes, rules, steps, fault = RECORDED[rule]
    assert _replay(Machine(rules), nodes, steps) == fault
    assert _replay(Machine(), nodes, steps) != fault


def _replay(machine: Machine, nodes: int, steps: str) -> str:
    """Give the first broken promise, or the step that could not be taken."""
    state = start(nodes, 1, MANY)
    for step in steps.split(", "):
        reached = dict(machine.steps(state))
        if step not in reached:
            return f"no step {step}"
        state = reached[step]
        if fault := faults(state):
            return fault
    return ""


def test_without_settling_third_nodes() -> None:
    """Three nodes without a primary then copy one region in turns for ever."""
    rng = random.Random(1)
    machine = Machine(Rules(settles_thirds=False))
    first = start(3, 1, Budget(writes=3, cuts=3, crashes=3, orders=2, forces=0))
    found: Found | None = None
    for _ in range(100):
        found = found or walk(machine, first, rng)
    assert found is not None
    assert found.fault == "the nodes do not settle"
