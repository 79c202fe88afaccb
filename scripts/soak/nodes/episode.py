# SPDX-License-Identifier: BSD-3-Clause
"""One episode with nodes, from the first start to the comparison of stopped disks."""

from __future__ import annotations

from collections.abc import Callable

from ..load import ViolationError
from .nemesis import Nemesis, heal
from .sabotage import NODE_SABOTAGES
from .volume import Volume

__all__ = ["play"]


def play(
    volume: Volume,
    told: Callable[[str], None],
    acts: list[str] | None,
    sabotage: str | None,
) -> None:
    """Play it."""
    volume.bring_up()
    if sabotage:
        NODE_SABOTAGES[sabotage](volume)
    else:
        Nemesis(volume, told, acts).play()
    volume.load.pause(volume.watch)
    heal(volume)
    leaders = volume.primaries()
    if len(leaders) != 1:
        raise ViolationError(f"{len(leaders)} primaries at the end")
    for node in sorted(volume.nodes, key=lambda one: one is not leaders[0]):
        volume.stop(node)
    volume.compare("after a clean stop")
