# SPDX-License-Identifier: BSD-3-Clause
"""
Where what lies on the logged device, for the guest that uses it and for the judge.

One device under all disks, cut into slices: one log then orders the writes of the
local disk, of the state directory, of the remote, and the client's own record of what
it was answered.
"""

from __future__ import annotations

MIB = 1 << 20
EXTENT = 4 * MIB

# More extents than the activity log holds (1024), so that some go cold.
NR_EXTENTS = 1152
LOCAL_SIZE = NR_EXTENTS * EXTENT
FS_SIZE = 48 * MIB  # of the file system on the volume; behind it raw blocks
STATE_SIZE = 24 * MIB
ANSWERS_SIZE = 8 * MIB

# Small, so that what differs is not covered by chance, and resync copies little.
REGION = 16384

# name -> (start, size)
SLICES = {
    "local": (0, LOCAL_SIZE),
    "far": (LOCAL_SIZE, LOCAL_SIZE),
    "state": (2 * LOCAL_SIZE, STATE_SIZE),
    "answers": (2 * LOCAL_SIZE + STATE_SIZE, ANSWERS_SIZE),
}
BASE_SIZE = 2 * LOCAL_SIZE + STATE_SIZE + ANSWERS_SIZE
LOG_SIZE = 1 << 30  # sparse

# Stands for "file" where a raw block of an extent was answered for.
RAW = 999


def raw_offset(extent: int) -> int:
    """Return where in an extent its raw block lies: somewhere, always the same."""
    return extent * EXTENT + extent * 7 % 64 * 65536
