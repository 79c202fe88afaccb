# SPDX-License-Identifier: BSD-3-Clause
"""The choices of one episode with nodes, all drawn from its seed."""

from __future__ import annotations

import random

__all__ = ["NodesPlan"]


class NodesPlan:
    """The choices of one episode."""

    def __init__(self, seed: int, episode: int, nodes: int) -> None:
        self.name = f"seed {seed} episode {episode}"
        self.nodes = nodes
        self.random = random.Random(f"{self.name}, {nodes} nodes")
        draw = self.random
        self.run = draw.getrandbits(63)
        self.policy = draw.choice(("degrade", "degrade", "stop"))
        self.region_size = draw.choice(("4KiB", "16KiB", "64KiB"))
        self.acts = draw.randint(2, 3)
        # A plain remote beside the nodes: only the primary writes to it.
        self.plain = draw.random() < 0.3

    def __str__(self) -> str:
        beside = ", a plain remote beside them" if self.plain else ""
        return (
            f"{self.name}: {self.nodes} nodes{beside}, policy {self.policy}, "
            f"regions of {self.region_size}"
        )
