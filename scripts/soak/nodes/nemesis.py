# SPDX-License-Identifier: BSD-3-Clause
"""
The faults of a volume of nodes, and the operator's commands amid them.

Each act breaks one thing, lets time pass, perhaps with a promotion, and repairs it. All
choices come from the episode's seed alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from e2e.lib.pair import Node

from ..load import ViolationError
from .volume import Volume

__all__ = ["Nemesis", "heal", "settle"]

PATIENCE_S = 25.0  # for what the nodes do without an operator
HEALED_S = 120.0  # limit until all is in sync again
LONGEST_S = 14.0  # of a fault: a silent connection is given up within 10 s


class Nemesis:
    """The acts of one episode."""

    def __init__(
        self,
        volume: Volume,
        told: Callable[[str], None],
        acts: list[str] | None = None,
    ) -> None:
        self._volume, self._told = volume, told
        self._draw = volume.plan.random
        self._acts = [
            (4, self._kill),
            (3, self._freeze),
            (3, self._cut),
            (3, self._deafen),
            (3, self._switchover),
            (2, self._demote),
            (2, self._stop),
            (2, self._kill_all),
        ]
        if acts:
            self._acts = [
                (1, act) for _, act in self._acts if act.__name__.lstrip("_") in acts
            ]

    def play(self) -> None:
        """Run the acts; after each, all nodes must become equal again."""
        volume = self._volume
        for _ in range(volume.plan.acts):
            volume.rest(self._draw.uniform(0.1, 0.6))
            weights = [weight for weight, _ in self._acts]
            ((_, act),) = self._draw.choices(self._acts, weights)
            act(self._draw.choice(volume.nodes))
            if self._draw.random() < 0.7:
                self._say("heal, in sync, compare")
                settle(volume)
        self._say("heal, in sync, compare at the end")
        settle(volume)

    def _say(self, text: str) -> None:
        self._volume.note(text)
        self._told(text)

    def _meanwhile(self, broken: Node) -> None:
        """Let time pass while a node is broken; perhaps promote another one."""
        volume, draw = self._volume, self._draw
        length = draw.choice((draw.uniform(0.2, 2.0), draw.uniform(2.0, LONGEST_S)))
        first = draw.uniform(0.0, length)
        what = draw.choice(("nothing", "nothing", "promote", "force", "force"))
        others = [one for one in volume.nodes if one is not broken]
        heir = draw.choice(others)
        volume.rest(first)
        if what != "nothing" and heir.alive and heir.name not in volume.frozen:
            self._say(f"  {what} {heir.name}")
            volume.promote(heir, force=what == "force")
        volume.rest(length - first)

    def _kill(self, node: Node) -> None:
        self._say(f"kill {node.name}")
        self._volume.kill(node)
        self._meanwhile(node)
        self._volume.serve(node)

    def _kill_all(self, node: Node) -> None:
        self._say("kill all nodes")
        for one in self._volume.nodes:
            self._volume.kill(one)
        self._volume.serve(node)
        self._meanwhile(self._draw.choice(self._volume.nodes))
        for one in self._volume.nodes:
            self._volume.serve(one)

    def _freeze(self, node: Node) -> None:
        self._say(f"freeze {node.name}")
        self._volume.freeze(node)
        self._meanwhile(node)
        self._volume.thaw(node)

    def _cut(self, node: Node) -> None:
        self._say(f"cut {node.name} off")
        number = self._volume.nodes.index(node)
        self._volume.network.cut(number)
        self._meanwhile(node)
        self._volume.network.mend(number)

    def _deafen(self, node: Node) -> None:
        other = self._draw.choice([x for x in self._volume.nodes if x is not node])
        self._say(f"nothing of {node.name} reaches {other.name}")
        numbers = [self._volume.nodes.index(one) for one in (node, other)]
        self._volume.network.deafen(*numbers)
        self._meanwhile(self._draw.choice((node, other)))
        self._volume.network.undeafen(*numbers)

    def _switchover(self, node: Node) -> None:
        volume = self._volume
        leaders = [one for one in volume.primaries() if one is not node]
        if not leaders:
            return
        leader = leaders[0]
        self._say(f"switch over from {leader.name} to {node.name}")
        if volume.command(leader, "switchover", node.name):
            volume.ended(leader, f"gave the role to {node.name}")
            volume.branches[node.name] = volume.branches[leader.name]
            volume.serves(node)

    def _demote(self, node: Node) -> None:
        volume = self._volume
        for leader in volume.primaries()[:1]:
            self._say(f"demote {leader.name}, then promote {node.name}")
            if volume.command(leader, "demote", "--force"):
                volume.ended(leader, "was demoted")
                volume.rest(self._draw.uniform(0.0, 3.0))
                volume.promote(node, force=False)

    def _stop(self, node: Node) -> None:
        self._say(f"stop {node.name}")
        self._volume.stop(node)
        self._meanwhile(node)
        self._volume.serve(node)


def heal(volume: Volume) -> None:
    """Return once all nodes are in sync; nothing may be broken."""
    for node in volume.nodes:
        volume.thaw(node)
        volume.serve(node)
    began = time.monotonic()
    resolved = began
    while not volume.settled():
        volume.watch()
        now = time.monotonic()
        if now - began > HEALED_S + PATIENCE_S:
            raise ViolationError(
                f"not in sync {HEALED_S:g} s after all was healed\n{_words(volume)}"
            )
        if now - resolved > PATIENCE_S:
            _decide(volume)
            resolved = time.monotonic()
        elif not volume.primaries():
            _promote_any(volume, "yes")
        time.sleep(0.2)


def _promote_any(volume: Volume, answer: str) -> bool:
    for node in volume.nodes:
        found = volume.status(node).get("promotable", {})
        if found.get("answer") == answer:
            return volume.promote(node, force=answer == "force")
    return False


def _decide(volume: Volume) -> None:
    """Resolve a split brain as the manual says; there must have been an order."""
    if not volume.forced:
        if volume.primaries() or _promote_any(volume, "yes"):
            return  # a resync may take longer
        raise ViolationError(
            f"no node serves, though none was forced\n{_words(volume)}"
        )
    leaders = volume.primaries()
    if not leaders and not _promote_any(volume, "force"):
        raise ViolationError(f"no node can be promoted\n{_words(volume)}")
    keep = volume.plan.random.choice(leaders or volume.primaries())
    for node in volume.nodes:
        if node is not keep:
            volume.note(f"the operator keeps {keep.name} and gives up {node.name}")
            volume.kill(node)
            if volume.command(node, "create", "--force"):
                volume.serve(node)
                volume.command(keep, "replace", node.name)
    volume.counts["split brains resolved"] += 1
    volume.serves(keep)


def settle(volume: Volume) -> None:
    """Heal, let the clients rest, and compare all images."""
    heal(volume)
    leader = volume.primaries()[:1]
    if leader:
        volume.serves(leader[0])
    volume.load.pause(volume.watch)
    heal(volume)
    volume.compare("when quiet")
    volume.load.go_on()


def _words(volume: Volume) -> str:
    lines = []
    for node in volume.nodes:
        lines += [f"{node.name}: {volume.status(node)}", node.log[-1500:]]
    return "\n".join(lines)
