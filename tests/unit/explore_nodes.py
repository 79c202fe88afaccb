# SPDX-License-Identifier: BSD-3-Clause
"""
Explore the machine of nodes_machine.py: exhaustively, and by random walks.

As a program it goes on for as long as it is let:

    python tests/unit/explore_nodes.py --nodes 3 --minutes 30
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from dataclasses import dataclass

from unit.nodes_machine import Machine
from unit.nodes_model import (
    NAMES,
    SYNC,
    Budget,
    State,
    faults,
    fresh,
    standing_of,
    start,
)
from unit.nodes_promotions import SplitMachine

from nbd_mirror.rules.promotion import Answer

HEALED = 600  # steps within which nodes that nothing disturbs have settled
RESOLVED = 20  # split brains that an operator resolves in the end


@dataclass(frozen=True)
class Found:
    """A broken promise, and the steps that lead to it."""

    fault: str
    steps: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.fault}: {', '.join(self.steps)}"


def explore(machine: Machine, first: State, limit: int) -> tuple[Found | None, int]:
    """
    Visit every state, shortest paths first, up to *limit* of them.

    Returns:
        The first broken promise, and how many states were seen.
    """
    came_from: dict[State, tuple[str, State] | None] = {first: None}
    queue = deque([first])
    while queue:
        state = queue.popleft()
        fault = faults(state)
        if fault:
            return Found(fault, _path(came_from, state)), len(came_from)
        if len(came_from) >= limit:
            continue
        for name, reached in machine.steps(state):
            if reached not in came_from:
                came_from[reached] = (name, state)
                queue.append(reached)
    return None, len(came_from)


def walk(machine: Machine, first: State, rng: random.Random) -> Found | None:
    """Take random steps, then let everything heal; judge each state."""
    steps: list[str] = []
    found, state = _wander(machine, first, rng, rng.randint(5, 70), steps)
    if found:
        return found
    steps.append("heals")
    state = state._replace(budget=Budget(0, 0, 0, 0, 0, 0))
    for _ in range(RESOLVED):
        found, state = _wander(machine, state, rng, HEALED, steps)
        if found:
            return found
        if _moves(machine, state):
            return Found("the nodes do not settle", tuple(steps))
        choices = _choices(machine, state)
        if not choices:
            break
        name, state = rng.choice(choices)
        steps.append(name)
    fault = unhealed(machine, state)
    return Found(fault, tuple(steps)) if fault else None


def _choices(machine: Machine, state: State) -> list[tuple[str, State]]:
    """Give what an operator may do about nodes that do not connect."""
    asked = state._replace(budget=state.budget._replace(forces=2))
    return [
        (name, reached._replace(budget=state.budget))
        for name, reached in machine.steps(asked)
        if name.startswith(("keep ", "chosen ", "announce ")) or " gives up " in name
    ]


def _wander(
    machine: Machine, state: State, rng: random.Random, count: int, steps: list[str]
) -> tuple[Found | None, State]:
    """Take up to *count* steps, and add their names to *steps*."""
    for _ in range(count):
        moves = _moves(machine, state)
        if not moves:
            break
        name, state = rng.choice(moves)
        steps.append(name)
        if fault := faults(state):
            return Found(fault, tuple(steps)), state
    return None, state


def _moves(machine: Machine, state: State) -> list[tuple[str, State]]:
    return [step for step in machine.steps(state) if step[1] != state]


def unhealed(machine: Machine, state: State) -> str:
    """Say what is wrong with nodes that all run, are connected and have settled."""
    if any(node.flight for node in state.nodes):
        return "a write is never answered"
    primaries = [at for at, node in enumerate(state.nodes) if node.primary]
    if len(primaries) > 1:
        return "two nodes go on to serve"
    for at in range(len(state.nodes)):
        verdict = machine.rules.may_promote(standing_of(state, at))
        if not primaries and verdict.answer is Answer.YES:
            return ""
    if not primaries:
        return "no node may be promoted without force"
    for pair, session in state.sessions:
        if primaries[0] in pair and session != SYNC:
            return "a node does not get in sync"
    followers = [pair for pair, _ in state.sessions if primaries[0] in pair]
    return "" if len(followers) == len(state.nodes) - 1 else "a node does not connect"


def _path(
    came_from: dict[State, tuple[str, State] | None], state: State
) -> tuple[str, ...]:
    steps = []
    while (step := came_from[state]) is not None:
        name, state = step
        steps.append(name)
    return tuple(reversed(steps))


def main() -> None:
    """Walk until the time is over; print what is found, with the seed."""
    parser = argparse.ArgumentParser(description="Explore two or three nodes.")
    parser.add_argument(
        "--nodes", type=int, default=2, choices=range(2, len(NAMES) + 1)
    )
    parser.add_argument("--regions", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--forces", type=int, default=2)
    parser.add_argument(
        "--split", action="store_true", help="each step of a promotion apart"
    )
    parser.add_argument("--fresh", action="store_true", help="no node has data yet")
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().getrandbits(32)
    )
    options = parser.parse_args()
    budget = Budget(5, 4, 4, 3, options.forces, losses=2)
    begins = fresh if options.fresh else start
    first = begins(options.nodes, options.regions, budget)
    machine = SplitMachine() if options.split else Machine()
    rng = random.Random(options.seed)
    ends, walks = time.monotonic() + 60 * options.minutes, 0
    while time.monotonic() < ends:
        walks += 1
        if found := walk(machine, first, rng):
            raise SystemExit(f"seed {options.seed}, walk {walks}: {found}")
    print(f"seed {options.seed}: {walks} walks, nothing found")


if __name__ == "__main__":
    main()
