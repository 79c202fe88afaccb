# SPDX-License-Identifier: BSD-3-Clause
"""
A promotion in steps of its own keeps the promises of the model, whatever comes between.

test_nodes_model.py takes it for few steps. Here the product's checks between them are
left out one at a time, and the exploration must find the promise that each one keeps.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from unit.explore_nodes import explore, walk
from unit.nodes_model import Budget, State, fresh, start
from unit.nodes_promotions import SplitMachine
from unit.nodes_rules import Rules

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LIMIT = 100_000
Begins = Callable[[int, int, Budget], State]


@pytest.mark.parametrize(
    ("begins", "nodes", "budget"),
    [
        (start, 2, Budget(writes=0, cuts=1, crashes=0, orders=4, forces=0)),
        (start, 2, Budget(writes=0, cuts=1, crashes=1, orders=2, forces=0)),
        (start, 2, Budget(writes=1, cuts=1, crashes=0, orders=2, forces=1)),
        (fresh, 2, Budget(writes=0, cuts=1, crashes=0, orders=3, forces=0)),
        (start, 3, Budget(writes=0, cuts=0, crashes=0, orders=2, forces=0)),
    ],
)
def test_every_state(begins: Begins, nodes: int, budget: Budget) -> None:
    """No order of steps, of two promotions at once and of failures breaks a promise."""
    found, states = explore(SplitMachine(), begins(nodes, 1, budget), limit=LIMIT)
    assert found is None, found
    assert states < LIMIT, "the bound is too low to see every state"


@pytest.mark.parametrize("begins", [start, fresh])
@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("forces", [0, 2])
def test_random_walks_heal(nodes: int, forces: int, begins: Begins) -> None:
    """Far beyond the bound: nodes that no failure disturbs any more always settle."""
    seed = random.SystemRandom().getrandbits(32)
    rng = random.Random(seed)
    budget = Budget(writes=5, cuts=4, crashes=4, orders=3, forces=forces, losses=2)
    first = begins(nodes, 2, budget)
    for _ in range(60):
        found = walk(SplitMachine(), first, rng)
        assert found is None, f"seed {seed}: {found}"


LEFT_OUT: dict[str, tuple[Begins, Budget, Rules, str]] = {
    "what was judged is what is promoted": (
        start,
        Budget(writes=0, cuts=1, crashes=0, orders=4, forces=0),
        Rules(compares=False),
        "two nodes serve, and nobody forced one",
    ),
    "each node that was met consents": (
        start,
        Budget(writes=0, cuts=0, crashes=1, orders=1, forces=0),
        Rules(consents=False),
        "two nodes serve, and nobody forced one",
    ),
    "the answer is asked for again": (
        fresh,
        Budget(writes=0, cuts=0, crashes=0, orders=3, forces=0),
        Rules(asks_again=False),
        "two nodes hold unrelated data",
    ),
    "a start compares its grant with the record": (
        start,
        Budget(writes=0, cuts=0, crashes=1, orders=1, forces=0),
        Rules(grants=False),
        "a serves, and knows a later primary",
    ),
}


@pytest.mark.parametrize("rule", LEFT_OUT)
def test_without_a_check(rule: str) -> None:
    """Without the check a promise breaks; the steps are the shortest way there."""
    begins, budget, rules, fault = LEFT_OUT[rule]
    found, states = explore(SplitMachine(rules), begins(2, 1, budget), limit=LIMIT)
    assert found is not None, f"{states} states, and nothing was found"
    assert found.fault == fault


def test_a_consent_makes_an_own_promotion_void_twice() -> None:
    """It clears `asks`, and changes what was judged: each of the two is enough."""
    first = start(2, 1, Budget(writes=0, cuts=1, crashes=0, orders=4, forces=0))
    found, states = explore(SplitMachine(Rules(asks_void=False)), first, limit=LIMIT)
    assert found is None, found
    assert states < LIMIT
