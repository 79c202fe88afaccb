# SPDX-License-Identifier: BSD-3-Clause
"""
What a volume's files say, read from their bytes as FORMAT.md describes them.

It uses no line of the engine, because it judges the engine's recovery. Sizes are those
of the volumes of these tests.
"""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = [
    "ALL",
    "EXTENT",
    "REGION",
    "SIZE",
    "active_regions",
    "lose_power",
    "open_slots",
    "page_cache_lived",
    "span",
    "stopped_cleanly",
]

SIZE = 9 << 20  # two activity extents and a short one
REGION = 64 << 10
EXTENT = 4 << 20
PAGE = 4096
ALL = frozenset(range(SIZE // REGION))
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SUPERBLOCK_CLEAN = 1


def span(offset: int, length: int, unit: int = REGION) -> set[int]:
    """Return the regions that a range touches."""
    return set(range(offset // unit, (offset + length - 1) // unit + 1))


# --- what the files say ------------------------------------------------------


def superblock(state: Path) -> bytes:
    """Return the newer slot of the superblock; both are whole after a kill."""
    content = (state / "superblock").read_bytes()
    slots = content[:PAGE], content[PAGE : 2 * PAGE]
    return max(slots, key=lambda slot: struct.unpack_from("<Q", slot, 16)[0])


def stopped_cleanly(state: Path) -> bool:
    """Tell whether the superblock says so."""
    flags: int = struct.unpack_from("<I", superblock(state), 204)[0]
    return bool(flags & SUPERBLOCK_CLEAN)


def page_cache_lived(state: Path) -> bool:
    """Tell whether the slots may be believed: this boot, and no failed store."""
    boot = bytes.fromhex(BOOT_ID.read_text().strip().replace("-", ""))
    return superblock(state)[208:224] == boot and not (state / "distrust").exists()


def open_slots(state: Path) -> set[int]:
    """Return the regions of the in-flight log's open slots."""
    content = (state / "inflight").read_bytes()[PAGE:]
    found: set[int] = set()
    for at in range(0, len(content) - 63, 64):
        word, _, offset, length = struct.unpack_from("<4Q", content, at)
        if word:
            found |= span(offset, length)
    return found


def active_regions(state: Path) -> set[int]:
    """Return the regions of the activity log's extents."""
    content = (state / "activity").read_bytes()[PAGE:]
    found: set[int] = set()
    for at in range(0, len(content) - 511, 512):
        for entry in struct.unpack_from("<62Q", content, at + 16):
            if entry:
                found |= span((entry - 1) * EXTENT, EXTENT)
    return found


def lose_power(state: Path) -> None:
    """Have the superblock be of another boot: both slots, with their CRC."""
    path = state / "superblock"
    content = bytearray(path.read_bytes())
    for at in (0, PAGE):
        page = content[at : at + PAGE]
        page[208:224] = bytes(16)
        page[12:16] = bytes(4)
        page[12:16] = crc32c(bytes(page)).to_bytes(4, "little")
        content[at : at + PAGE] = page
    path.write_bytes(content)


def _crc_of(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


_TABLE = [_crc_of(value) for value in range(256)]


def crc32c(data: bytes) -> int:
    """Return the CRC32C (Castagnoli) of *data*."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
