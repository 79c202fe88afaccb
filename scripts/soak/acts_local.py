# SPDX-License-Identifier: BSD-3-Clause
"""Acts of the soak's nemesis on the local disk: another, a shorter, a hanging one."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .far import Far
from .load import ViolationError
from .plan import Plan
from .register import encode

if TYPE_CHECKING:
    from .nemesis import Nemesis

__all__ = ["LOCAL_ACTS", "frozen_mount", "unmount"]

Act = Callable[["Nemesis", Far], None]

SAID_S = 10.0  # until the status says that the local disk does not answer


def swap_local(n: Nemesis, _: Far) -> None:
    """Replace local by another disk while stopped: it must be refused."""
    field = n.field
    clean, seed = n.draw.random() < 0.5, n.draw.getrandbits(32)
    like_ours = n.draw.random() < 0.5
    if n.depth or not field.serving:
        return
    n.heal()
    n.say("another disk in the place of local")
    if clean:
        field.stop_primary()
    else:
        field.kill_primary()
    local = field.site.local
    ours = local.with_suffix(".ours")
    local.rename(ours)
    try:
        before = _make_foreign(local, ours.stat().st_size, seed, like_ours=like_ours)
        field.refused_start("with another local disk")
        if hashlib.sha256(local.read_bytes()).digest() != before:
            raise ViolationError(f"the foreign disk was written\n{field.tail()}")
    finally:
        ours.replace(local)
    field.counts["foreign disks refused"] += 1
    field.serve()


def _make_foreign(path: Path, size: int, seed: int, *, like_ours: bool) -> bytes:
    """Make a disk that is not the volume's; return its digest."""
    draw = random.Random(seed)
    content = bytearray(draw.randbytes(1 << 20) * (size >> 20))
    if like_ours:  # the blocks of another run of ours
        run = draw.getrandbits(63)
        for block in range(0, len(content) // 4096, 3):
            content[block * 4096 : (block + 1) * 4096] = encode(block, 7, run)
    path.write_bytes(content)
    return hashlib.sha256(content).digest()


def truncate_local(n: Nemesis, _: Far) -> None:
    """Cut local short while it is served: a remote replaces it, no zeroes are read."""
    field, draw = n.field, n.draw
    keep, seconds = draw.choice((0.0, 0.25, 0.5, 0.9)), draw.uniform(0.5, 2.0)
    restart = draw.random() < 0.3
    if n.depth or not field.serving:
        return
    n.heal()
    field.switch_policy("degrade")
    local = field.site.local
    size = local.stat().st_size
    kept = int(size * keep) // 4096 * 4096
    n.say(f"cut local to {kept} bytes")
    field.counts["local disks cut short"] += 1
    os.truncate(local, kept)
    field.rest(seconds)
    # Clients write and read everywhere, so one has reached the end by now.
    if field.local_state() == "ok":
        field.read_all()
    if field.local_state() == "ok":
        raise ViolationError(f"local lost its end and is ok\n{field.tail()}")
    if restart:
        n.restart()
    os.truncate(local, size)
    field.bring_local_back(replaced=True)


def freeze_local(n: Nemesis, _: Far) -> None:
    """Freeze the file system of local: the status must say so; then thaw it."""
    field = n.field
    if n.depth or not field.serving or field.plan.freezes is False:
        return
    n.heal()
    mount = field.site.local.parent
    n.say("freeze local")
    field.counts["local disks frozen"] += 1
    _run("fsfreeze", "-f", str(mount))
    try:
        _await_words(n)
    finally:
        _run("fsfreeze", "-u", str(mount))
    field.bring_local_back(replaced=False)


def _await_words(n: Nemesis) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < SAID_S:
        if n.field.local_reason():
            return
        n.field.rest(0.1)
    raise ViolationError(f"local hangs, and nothing is said for {SAID_S:g} s")


# --- a file system that can be frozen ------------------------------------


def frozen_mount(folder: Path, plan: Plan, size: int) -> Path | None:
    """Mount a separate file system for local, if planned and possible."""
    if not plan.freezes or os.geteuid() != 0:
        plan.freezes = False
        return None
    image, point = folder / "local.fs", folder / "local.mnt"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(2 * size + (16 << 20))
    try:
        _run("mkfs.ext4", "-q", "-F", str(image))
        _run("mount", "-o", "loop", str(image), str(point))
    except (OSError, subprocess.CalledProcessError):
        plan.freezes = False
        return None
    return point


def unmount(point: Path) -> None:
    """Undo frozen_mount(), once nothing uses it."""
    _run("umount", "-l", str(point))


def _run(*command: str) -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "PATH": path}
    )


LOCAL_ACTS: list[tuple[int, Act]] = [
    (1, swap_local),
    (2, truncate_local),
    (1, freeze_local),
]
