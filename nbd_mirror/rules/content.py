# SPDX-License-Identifier: BSD-3-Clause
"""
The block size that a disk's content needs: pure functions over its bytes.

A file system made with small sectors cannot be mounted from a device with larger
blocks. A partition table counts in the sectors that it was made with; with others each
partition is cut or moved. Unknown content gets the smallest blocks, which suit all
content except a partition table of larger sectors.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["BLOCK_SIZES", "Choice", "Need", "Read", "choose", "need_of"]

BLOCK_SIZES = (4096, 2048, 1024, 512)  # those of the kernel's nbd, best first
SMALLEST, LARGEST = BLOCK_SIZES[-1], BLOCK_SIZES[0]
HEAD = 128 << 10  # the superblocks that this looks for are in here
TAIL = 64 << 10  # the copy of a partition table is in here
MBR_TYPES_EXTENDED = (0x05, 0x0F, 0x85)
MBR_TYPE_GPT = 0xEE
GPT_SIGNATURE = b"EFI PART"
GPT_HEADER = 92  # bytes, at least; a disk may end before

Read = Callable[[int, int], bytes]  # offset and length; shorter at the disk's end


@dataclass(frozen=True, slots=True)
class Need:
    """The need of some content: blocks of *block* bytes, or smaller unless *exact*."""

    block: int
    what: str
    exact: bool = False
    known: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """A block size, its reason, and a warning if it does not suit."""

    block: int
    why: str
    warning: str = ""


# --- the choice ----------------------------------------------------------


def choose(
    size: int,
    smallest: int,
    need: Need | None,
    *,
    asked: int | None = None,
    before: int | None = None,
) -> Choice:
    """
    Choose a device's block size.

    Args:
        size: of the volume, in bytes.
        smallest: the smallest block that the server takes.
        need: of the content; None: the disk is empty.
        asked: by the operator, now or earlier.
        before: the choice for an earlier attachment.
    Raises:
        ValueError: *asked* cannot be used, or the content and the server need
            different sizes; the text says why.
    """
    if asked is not None:
        return _asked(size, smallest, need, asked)
    if need is None:
        return Choice(_fitting(size, LARGEST, smallest), "nothing is on the disk yet")
    if before not in BLOCK_SIZES or before < smallest or size % before:
        before = None
    if not need.known and before is not None:
        return Choice(before, "as it was attached before")
    # A table of larger sectors cannot describe an end inside a sector.
    block = need.block if need.exact else _fitting(size, need.block, smallest)
    if block < smallest:
        raise ValueError(
            f"the volume holds {need.what}, which needs blocks of {need.block} bytes, "
            f"and its server takes none smaller than {smallest}"
        )
    return Choice(block, need.what)


def _asked(size: int, smallest: int, need: Need | None, asked: int) -> Choice:
    if asked not in BLOCK_SIZES:
        allowed = ", ".join(map(str, reversed(BLOCK_SIZES)))
        raise ValueError(f"the kernel takes no blocks of {asked} bytes, only {allowed}")
    if asked < smallest:
        raise ValueError(
            f"the volume's server takes no blocks smaller than {smallest} bytes"
        )
    suits = need is not None and need.exact and need.block == asked
    if size % asked and not suits:
        raise ValueError(
            f"blocks of {asked} bytes would cut off the volume's last "
            f"{size % asked} bytes"
        )
    return Choice(asked, "as asked for", _warning(need, asked))


def _warning(need: Need | None, block: int) -> str:
    if need is None or not need.known or need.block == block:
        return ""
    if need.exact:
        return f"it holds {need.what}: its partitions are wrong in {block}-byte blocks"
    if need.block < block:
        return f"it holds {need.what}, which {block}-byte blocks cannot be mounted with"
    return ""


def _fitting(size: int, most: int, smallest: int) -> int:
    """Return the largest block that does not cut off the volume's end."""
    fitting = (block for block in BLOCK_SIZES if block <= most and size % block == 0)
    return max(next(fitting, SMALLEST), min(smallest, most))


# --- the content ---------------------------------------------------------


def need_of(read: Read, size: int) -> Need | None:
    """
    Return the need of the content of a disk of *size* bytes; None: it is empty.

    Args:
        read: reads from the disk.
    """
    head = read(0, min(HEAD, size))
    whole = file_system(head)
    table = partition_table(head, read, size)
    if whole and table:
        return min(whole, table, key=lambda need: need.block)
    if whole or table:
        return whole or table
    if not any(head) and not any(read(max(0, size - TAIL), min(TAIL, size))):
        return None
    return Need(SMALLEST, "content of an unknown kind", known=False)


def file_system(head: bytes) -> Need | None:
    """Recognise a file system, swap space, LVM or LUKS by a disk's first bytes."""
    for probe in _PROBES:
        found = probe(head)
        if found is not None:
            return found
    return None


def _sectors(what: str, size: int) -> Need | None:
    """Return the need of *what*, made with sectors of *size* bytes."""
    if size < SMALLEST or size & (size - 1):
        return None
    return Need(min(size, LARGEST), f"{what} of {size}-byte sectors")


def _number(form: str, head: bytes, at: int) -> int:
    length = struct.calcsize(form)
    return int(struct.unpack(form, head[at : at + length].ljust(length, b"\0"))[0])


def _xfs(head: bytes) -> Need | None:
    if head[:4] != b"XFSB":
        return None
    return _sectors("an XFS", _number(">H", head, 102))


def _ext(head: bytes) -> Need | None:
    log = _number("<I", head, 1024 + 24)
    if head[1024 + 56 : 1024 + 58] != b"\x53\xef" or log > 6:
        return None
    block = 1024 << log
    return Need(min(block, LARGEST), f"an ext file system of {block}-byte blocks")


def _btrfs(head: bytes) -> Need | None:
    if head[0x10040:0x10048] != b"_BHRfS_M":
        return None
    return _sectors("a btrfs", _number("<I", head, 0x10090))


def _swap(head: bytes) -> Need | None:
    for page in (4096, 8192, 16384, 65536):
        if head[page - 10 : page] in (b"SWAPSPACE2", b"SWAP-SPACE"):
            return Need(LARGEST, "swap space")
    return None


def _lvm(head: bytes) -> Need | None:
    for at in range(0, 2048, 512):
        if head[at : at + 8] == b"LABELONE" and head[at + 24 : at + 28] == b"LVM2":
            return Need(SMALLEST, "LVM, with volumes of any kind in it")
    return None


def _luks(head: bytes) -> Need | None:
    if head[:6] != b"LUKS\xba\xbe":
        return None
    sizes = [int(n) for n in re.findall(rb'"sector_size":\s*(\d{3,5})\b', head)]
    if _number(">H", head, 6) == 1 or not sizes:
        sizes = [SMALLEST]
    return _sectors("LUKS", min(sizes))


def _fat(head: bytes) -> Need | None:
    """Recognise FAT, exFAT and NTFS by the first sector, a PC boot sector."""
    if head[510:512] != b"\x55\xaa" or head[:1] not in (b"\xeb", b"\xe9"):
        return None
    if head[3:11] == b"EXFAT   ":
        return _sectors("an exFAT", 1 << min(head[108], 31))
    bytes_per_sector = _number("<H", head, 11)
    if head[3:11] == b"NTFS    ":
        return _sectors("an NTFS", bytes_per_sector)
    if head[54:57] == b"FAT" or head[82:85] == b"FAT":
        return _sectors("a FAT file system", bytes_per_sector)
    return None


def _iso(head: bytes) -> Need | None:
    if head[32769:32774] != b"CD001":
        return None
    return _sectors("an ISO 9660", _number("<H", head, 32768 + 128))


_PROBES = (_xfs, _ext, _btrfs, _swap, _lvm, _luks, _fat, _iso)


# --- partition tables ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: int
    first: int  # sector
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


def _entries(head: bytes) -> list[_Entry]:
    """Return the entries of the MBR; none if it is no partition table."""
    if head[510:512] != b"\x55\xaa" or _fat(head) is not None:
        return []
    entries = []
    for at in range(446, 510, 16):
        active, kind, first, count = struct.unpack("<B3xB3xII", head[at : at + 16])
        if active not in (0x00, 0x80):
            return []
        if kind and count:
            entries.append(_Entry(kind, first, count))
    return entries


def partition_table(head: bytes, read: Read, size: int) -> Need | None:
    """Recognise a partition table, and the sector size that it counts in."""
    entries = _entries(head)
    if not entries:
        return None
    guard = next((one for one in entries if one.kind == MBR_TYPE_GPT), None)
    if guard is not None:
        sector = _gpt_sector(head, read, size, guard)
        return Need(sector, f"a GPT of {sector}-byte sectors", exact=True)
    sector = _mbr_sector(entries, read, size)
    return Need(sector, f"an MBR of {sector}-byte sectors", exact=True)


def _gpt_sector(head: bytes, read: Read, size: int, guard: _Entry) -> int:
    """Return the sector size of the GPT that suits the disk best."""
    found = [*_gpt_headers(head, read, size)]
    # A table made over another may leave tables of several sizes.
    for sector, alternate in found:
        if alternate == size // sector - 1 and guard.end in (size // sector, 1 << 32):
            return sector
    for sector, alternate in found:
        if (alternate + 1) * sector <= size:
            return sector
    if found:
        return found[0][0]
    guarded = (s for s in reversed(BLOCK_SIZES) if guard.end == size // s)
    return next(guarded, SMALLEST)


def _gpt_headers(head: bytes, read: Read, size: int) -> Iterator[tuple[int, int]]:
    """Yield the sector size, and the last sector, of each valid GPT header."""
    for sector in reversed(BLOCK_SIZES):
        alternate = _gpt_header(head[sector : 2 * sector], 1)
        if alternate is not None:
            yield sector, alternate
    for sector in reversed(BLOCK_SIZES):
        last = size // sector - 1
        copy = read(last * sector, sector) if last > 1 else b""
        if _gpt_header(copy, last) is not None:
            yield sector, last


def _gpt_header(sector: bytes, where: int) -> int | None:
    """Return the other copy's sector if *sector* is a valid header at *where*."""
    if sector[:8] != GPT_SIGNATURE or len(sector) < GPT_HEADER:
        return None
    length, crc, mine, alternate = struct.unpack_from("<II4xQQ", sector, 12)
    if mine != where or not GPT_HEADER <= length <= len(sector):
        return None
    summed = sector[:16] + bytes(4) + sector[20:length]
    return int(alternate) if crc == zlib.crc32(summed) else None


def _mbr_sector(entries: list[_Entry], read: Read, size: int) -> int:
    """
    Return the sector size of an MBR, which does not record it.

    512, unless known content begins at the partitions' starts only with 4096.
    """
    if any(one.end * LARGEST > size for one in entries):
        return SMALLEST
    small = sum(_begins(one, one.first * SMALLEST, read) for one in entries)
    large = sum(_begins(one, one.first * LARGEST, read) for one in entries)
    return LARGEST if large > small else SMALLEST


def _begins(entry: _Entry, offset: int, read: Read) -> bool:
    """Return whether known content begins at *offset*."""
    head = read(offset, HEAD)
    if entry.kind in MBR_TYPES_EXTENDED:
        return head[510:512] == b"\x55\xaa"
    return file_system(head) is not None
