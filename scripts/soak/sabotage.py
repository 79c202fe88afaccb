# SPDX-License-Identifier: BSD-3-Clause
"""
Sabotage: proof that the soak finds what it must find.

Each way spoils something behind the mirror's back, as a bug that loses a write would,
and then lets the episode end like any other. If the episode ends well, the checker is
blind.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import support

from .field import BLOCKS, Field
from .register import BLOCK, encode

__all__ = ["SABOTAGES", "sabotage"]

MAP_HEADER = 4096  # bytes; see docs/FORMAT.md
AT = BLOCKS // 2


def write(field: Field, count: int = 1) -> int:
    """Write blocks from AT on, answered and durable; return the write's number."""
    op = field.checker.begin_write("write", AT, count, fua=True)
    handle = field.site.client()
    handle.pwrite(field.checker.content(op), AT * BLOCK, 1)
    handle.shutdown()
    assert not field.checker.end_write(op, "ok")
    return op.seq


def spoil(image: Path, content: bytes) -> None:
    """Write *content* to block AT of an image."""
    with image.open("r+b") as file:
        file.seek(AT * BLOCK)
        file.write(content)


def quiet(field: Field) -> None:
    """Let the clients work a little, then stop them."""
    support.wait_until(lambda: field.checker.answered > 200, "some writes")
    field.load.pause(field.watch)


def old_block(field: Field) -> None:
    """Put back an earlier block on both disks, as if the newer write was lost."""
    quiet(field)
    old = encode(AT, write(field), field.plan.run)
    write(field)
    for image in (field.site.local, *(far.server.image for far in field.fars)):
        spoil(image, old)
    field.settle()


def torn_block(field: Field) -> None:
    """Mix two writes in one block of the local disk, then kill the server."""
    quiet(field)
    old = encode(AT, write(field), field.plan.run)
    new = encode(AT, write(field), field.plan.run)
    spoil(field.site.local, old[: BLOCK // 2] + new[BLOCK // 2 :])
    field.kill_primary()


def copy(field: Field) -> None:
    """Lose a write only on a secondary."""
    quiet(field)
    old = encode(AT, write(field), field.plan.run)
    write(field)
    spoil(field.fars[0].server.image, old)
    field.settle()


def dirty_map(field: Field) -> None:
    """Clear a dirty map: then what the remote missed is never copied."""
    quiet(field)
    far = field.fars[0]
    far.broken += 1
    far.signal(signal.SIGKILL)
    far.kill()
    field.load.go_on()
    support.wait_until(
        lambda: field.site.remote(far.name)["state"] == "out_of_sync", "its loss"
    )
    before = field.checker.answered
    support.wait_until(lambda: field.checker.answered > before + 200, "more writes")
    field.load.pause(field.watch)
    # A clean stop would write a checksum over the map, and the start would reject it.
    field.kill_primary()
    path = field.site.map_path(far.name)
    with path.open("r+b") as file:
        file.seek(MAP_HEADER)
        file.write(bytes(path.stat().st_size - MAP_HEADER))
    far.start()
    far.broken -= 1
    field.serve()
    field.tell("resume", far)
    field.settle()


SABOTAGES: dict[str, Callable[[Field], None]] = {
    "old-block": old_block,
    "torn-block": torn_block,
    "copy": copy,
    "dirty-map": dirty_map,
}


def sabotage(name: str, field: Field) -> None:
    """Spoil something, and check as every episode does."""
    SABOTAGES[name](field)
