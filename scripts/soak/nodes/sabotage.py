# SPDX-License-Identifier: BSD-3-Clause
"""
Sabotage of nodes: proof that the soak finds what it must find.

Each way does behind the soak's back what a mirror would do that has a bug; then the
episode ends like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import support
from e2e.lib.clients import connect

from nbd_mirror.volume import control

from ..register import BLOCK, encode
from .nemesis import settle
from .volume import BLOCKS, Volume

__all__ = ["NODE_SABOTAGES"]

AT = BLOCKS // 2
FUA = 1


def write(volume: Volume) -> bytes:
    """Write block AT, answered and durable; return it."""
    checker = volume.load.checker
    op = checker.begin_write("write", AT, 1, fua=True)
    handle = connect(volume.load.target[0])
    handle.pwrite(checker.content(op), AT * BLOCK, FUA)
    handle.shutdown()
    assert not checker.end_write(op, "ok")
    return encode(AT, op.seq, volume.plan.run)


def spoil(image: Path, content: bytes) -> None:
    """Write *content* to block AT of an image."""
    with image.open("r+b") as file:
        file.seek(AT * BLOCK)
        file.write(content)


def two_writes(volume: Volume) -> bytes:
    """Let the clients rest, and write the block twice; return the older one."""
    checker = volume.load.checker
    support.wait_until(lambda: checker.answered > 100, "some writes")
    volume.load.pause(volume.watch)
    old = write(volume)
    write(volume)
    assert volume.settled()
    return old


def old_block(volume: Volume) -> None:
    """Put an earlier block back on all disks, as if the newer write was lost."""
    old = two_writes(volume)
    for node in volume.nodes:
        spoil(node.image, old)
    settle(volume)


def copy(volume: Volume) -> None:
    """Lose a write on one secondary alone."""
    spoil(volume.nodes[1].image, two_writes(volume))
    settle(volume)


def failover(volume: Volume) -> None:
    """Lose a write on the secondary, and then the primary's host."""
    spoil(volume.nodes[1].image, two_writes(volume))
    volume.kill(volume.nodes[0])
    support.wait_until(
        lambda: volume.promote(volume.nodes[1], force=True), "a forced promotion"
    )


def two_primaries(volume: Volume) -> None:
    """Have two nodes serve, without an order that the soak knows of."""
    volume.network.cut(1)
    support.wait_until(
        lambda: not volume.status(volume.nodes[1])["peers"][0]["connected"],
        "the loss of the primary",
        timeout_s=40,
    )
    control.call(volume.nodes[1].state, "promote", 30.0, force=True)
    volume.rest(5)


NODE_SABOTAGES: dict[str, Callable[[Volume], None]] = {
    "nodes-old-block": old_block,
    "nodes-copy": copy,
    "nodes-failover": failover,
    "nodes-two-primaries": two_primaries,
}
