# SPDX-License-Identifier: BSD-3-Clause
"""The choices of one episode of the soak, all drawn from its seed."""

from __future__ import annotations

import random

__all__ = ["HOLD_S", "LATE_S", "Plan"]

# "volatile" loses unflushed data when it is killed; "slow-disk" has a slow disk behind
# a cache.
KINDS = ("nbdkit", "qemu-nbd", "nbd-server", "volatile", "slow-disk")
HOLD_S, LATE_S = 0.5, 1.5
SLOWEST, FASTEST = 4e6, 16e6  # bytes a second that a slow disk writes


class Plan:
    """The choices of one episode."""

    def __init__(self, seed: int, episode: int, doors: list[str]) -> None:
        self.name = f"seed {seed} episode {episode}"
        self.random = random.Random(self.name)
        draw = self.random
        self.run = draw.getrandbits(63)
        self.door = doors[episode % len(doors)]
        self.kinds = [KINDS[episode % len(KINDS)]]
        if draw.random() < 0.4:
            self.kinds.append(draw.choice(KINDS))
        self.policy = draw.choice(("degrade", "degrade", "stop"))
        self.region_size = draw.choice(("4KiB", "16KiB", "64KiB"))
        self.acts = draw.randint(4, 8)
        self.deadline_s = draw.choice((1.0, 1.0, 1.0, 1.0, 4.0))
        # Whether links lead through the kernel's network, which needs root. A lost
        # packet may silence it for a second.
        self.network = draw.random() < 0.6 and self.deadline_s > 1
        # Whether local is on a file system that can be frozen, which needs root.
        self.freezes = draw.random() < 0.25
        self.disk_rate = round(draw.uniform(SLOWEST, FASTEST))

    def __str__(self) -> str:
        return (
            f"{self.name}: door {self.door}, {' and '.join(self.kinds)}, "
            f"policy {self.policy}, regions of {self.region_size}, "
            f"deadline {self.deadline_s:g} s"
        )
