# SPDX-License-Identifier: BSD-3-Clause
"""
The file `attached` in the state directory, in which `attach` remembers the device.

The block size survives a detach, so that the next attach, even by systemd, uses the one
that an operator asked for. The other entries identify the device for one boot and one
connection.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..base import processes
from ..base.errors import MirrorIOError
from ..base.files import read_plain, replace_file

__all__ = ["Attached", "load", "process_identity", "save"]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAME = "attached"
MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Attached:
    """The block size, and what identifies an attached device among later ones."""

    block_size: int = 0  # 0: never attached
    asked: bool = False  # whether an operator asked for this block size
    device: str = ""  # as nbdN; empty: detached
    boot_id: str = ""
    pid: str = ""  # of the process that connected it, as the kernel reports it
    server: str = ""  # the process that serves it, from process_identity()
    connections: int = 1

    def detached(self) -> Attached:
        """Return what is remembered once the device is gone."""
        return Attached(self.block_size, self.asked)


def boot_id() -> str:
    """Return an identifier of this boot."""
    return BOOT_ID.read_text().strip()


def process_identity(pid: int) -> str:
    """Return what identifies process *pid* in this boot; "" if it has ended."""
    try:
        return f"{pid}/{processes.stat_fields(pid)[processes.START_TIME]}"
    except OSError:
        return ""


def load(state_dir: Path) -> Attached:
    """Return what is remembered; nothing if the file is missing or garbled."""
    try:
        content, owner = read_plain(state_dir, NAME, MAX_BYTES)
        if owner not in (0, os.geteuid()):
            return Attached()  # another user's file could make root detach any device
        found = json.loads(content)
        known = {
            field.name: found[field.name] for field in dataclasses.fields(Attached)
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Attached()
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Attached)}
    if any(type(value) is not kinds[name] for name, value in known.items()):
        return Attached()
    return Attached(**known)


def save(state_dir: Path, what: Attached) -> None:
    """
    Remember *what*, completely or not at all.

    Raises:
        MirrorIOError: it cannot be written.
    """
    path = state_dir / NAME
    text = json.dumps(dataclasses.asdict(what)) + "\n"
    try:
        replace_file(state_dir, NAME, text.encode())
    except OSError as error:
        raise MirrorIOError(f"{path} cannot be written: {error.strerror}") from None
