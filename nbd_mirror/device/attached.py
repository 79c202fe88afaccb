# SPDX-License-Identifier: BSD-3-Clause
"""
What `attach` remembers in the state directory, in the file `attached`.

The block size outlives a detach, so that the next attach, by systemd too, takes the
one that an operator asked for. What names the device holds for one boot and one
connection of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import MirrorIOError
from ..base.files import read_plain, replace_file

__all__ = ["Attached", "load", "process_identity", "save"]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAME = "attached"
MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Attached:
    """The block size, and of an attached device what tells it from any later one."""

    block_size: int = 0  # 0: never attached
    asked: bool = False  # whether an operator asked for this block size
    device: str = ""  # as nbdN; empty: detached
    boot_id: str = ""
    pid: str = ""  # of the process that connected it, as the kernel has it
    server: str = ""  # the process that serves it, as process_identity() gives it
    connections: int = 1

    def detached(self) -> Attached:
        """Return what is remembered once the device is gone."""
        return Attached(self.block_size, self.asked)


def boot_id() -> str:
    """Return a name of this boot."""
    return BOOT_ID.read_text().strip()


def process_identity(pid: int) -> str:
    """Return what tells process *pid* from all others of this boot; "" if it ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return f"{pid}/{stat.rpartition(')')[2].split()[19]}"


def load(state_dir: Path) -> Attached:
    """Return what is remembered; of a file that is missing or garbled nothing."""
    try:
        content, owner = read_plain(state_dir, NAME, MAX_BYTES)
        if owner not in (0, os.geteuid()):
            return Attached()  # another's words would have root detach any device
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
    Remember *what*, whole or not at all.

    Raises:
        MirrorIOError: it cannot be written.
    """
    path = state_dir / NAME
    text = json.dumps(dataclasses.asdict(what)) + "\n"
    try:
        replace_file(state_dir, NAME, text.encode())
    except OSError as error:
        raise MirrorIOError(f"{path} cannot be written: {error.strerror}") from None
