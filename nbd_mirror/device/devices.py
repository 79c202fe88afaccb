# SPDX-License-Identifier: BSD-3-Clause
"""The devices of the kernel's nbd driver, as /sys/block shows them."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from ..base.errors import BusyError, MissingError

__all__ = [
    "check_free",
    "first_free",
    "is_free",
    "name_of",
    "pid_of",
    "set_limits",
    "size_of",
    "user_of",
]

SYS_BLOCK = Path("/sys/block")
MOUNTINFO = Path("/proc/self/mountinfo")
SWAPS = Path("/proc/swaps")

MAX_SECTORS_KB = 1024  # longest read or write the kernel sends, KiB
# Longest trim, bytes: one of the kernel's own 4 GiB may take a slow disk longer than
# the time-out.
MAX_TRIM = 32 << 20
_DEVICE = re.compile(r"(?:/dev/)?(nbd[0-9]{1,4})", re.ASCII)


def size_of(name: str) -> int:
    """Return the size in sectors; 0: the device has no connection."""
    try:
        return int((SYS_BLOCK / name / "size").read_text())
    except (OSError, ValueError):
        return 0


def is_free(name: str) -> bool:
    """Return whether the device has no connection and is getting none."""
    return size_of(name) == 0 and not (SYS_BLOCK / name / "pid").exists()


def first_free() -> str:
    """
    Return the name of the first free device.

    Raises:
        BusyError: there is none.
    """
    names = [
        path.name for path in SYS_BLOCK.glob("nbd*") if _DEVICE.fullmatch(path.name)
    ]
    for name in sorted(names, key=lambda name: int(name[3:])):
        if is_free(name):
            return name
    raise BusyError(
        f"all {len(names)} nbd devices are in use",
        "detach one, or load the driver with more: modprobe nbd nbds_max=64",
    )


def check_free(device: str) -> str:
    """
    Return the name of *device*, which must be free.

    Raises:
        MissingError: there is no such device. BusyError: it is in use.
    """
    name = name_of(device)
    if not (SYS_BLOCK / name).exists():
        raise MissingError(f"there is no device /dev/{name}")
    if not is_free(name):
        raise BusyError(
            f"/dev/{name} is in use", "nbd-mirror attach CONFIG (picks one)"
        )
    return name


def name_of(device: str) -> str:
    """
    Return nbdN for /dev/nbdN.

    Raises:
        MissingError: it is no name of a whole nbd device.
    """
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise MissingError(f"{device} is no nbd device; they are called /dev/nbdN")
    return match[1]


def pid_of(name: str) -> str:
    """Return the process that connected the device, as the kernel reports it, or ""."""
    try:
        return (SYS_BLOCK / name / "pid").read_text().strip()
    except OSError:
        return ""  # the device is no longer connected


def set_limits(name: str) -> None:
    """Limit the longest request that the kernel sends."""
    queue = SYS_BLOCK / name / "queue"
    for limit, hardware, wanted in (
        ("max_sectors_kb", "max_hw_sectors_kb", MAX_SECTORS_KB),
        ("discard_max_bytes", "discard_max_hw_bytes", MAX_TRIM),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int((queue / hardware).read_text())
            (queue / limit).write_text(str(min(wanted, most)))


def user_of(name: str) -> str:
    """Return what uses the device or a partition: a mount, swap, md, LVM; or ""."""
    block = SYS_BLOCK / name
    parts = [block, *(path.parent for path in block.glob(f"{name}p*/dev"))]
    numbers = {(path / "dev").read_bytes().strip() for path in parts}
    for fields in _table(MOUNTINFO):
        if fields[2] in numbers:
            return f"it is mounted on {_unescaped(fields[4])}"
    for fields in _table(SWAPS)[1:]:
        with contextlib.suppress(OSError):
            status = Path(_unescaped(fields[0])).stat()
            number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            if stat.S_ISBLK(status.st_mode) and number.encode() in numbers:
                return "it is used as swap"
    for part in parts:
        for holder in sorted((part / "holders").glob("*")):
            return f"{holder.name} is built on it"
    return ""


def _table(path: Path) -> list[list[bytes]]:
    """
    Return the fields of each line of a table of the kernel's.

    Names in it are any user's. The kernel escapes spaces, tabs and line feeds; the
    other ends of lines and blanks that a text can have stand there as they are, and so
    do bytes that are no UTF-8.
    """
    lines = path.read_bytes().split(b"\n")
    return [line.replace(b"\t", b" ").split(b" ") for line in lines if line]


def _unescaped(name: bytes) -> str:
    return os.fsdecode(
        re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 0xFF]), name)
    )
