# SPDX-License-Identifier: BSD-3-Clause
"""
Is the disk behind a new connection the one that was left?

A plain NBD server has no identity, so on every connection a few clean regions are
compared with local before anything is trusted or written. Chosen are the places where
a wrong disk would show: the first and the last region (partition tables, superblocks),
recently written ones (an old backup differs there), and random ones where local holds
data, as holes are alike everywhere. Dirty regions prove nothing and are passed over;
with every region dirty there is nothing to prove, all of it is copied. Sectors that
local cannot read are passed over too: the remote is needed to write them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import MirrorError, MirrorIOError
from .model import HOLE, Verdict, VolumeStatus

if TYPE_CHECKING:
    from .core import Engine

__all__ = ["Sample", "take_sample"]

ENOUGH = 24  # regions compared
MAX_TRIES = 256  # regions asked for; a dirty one costs no I/O
RECENT_REGIONS = 12  # written last: an old backup differs there, if anywhere
ACTIVE_EXTENTS = 4  # of the latest used ones, a region each


@dataclass(frozen=True, slots=True)
class Sample:
    """How many regions were the same, and the one that *differs*, if any."""

    same: int
    differs: int | None


def take_sample(
    engine: Engine,
    remote: int,
    *,
    random: Callable[[], float],
    clock: Callable[[], float],
    budget_s: float,
) -> Sample:
    """
    Compare regions until enough are the same, one differs, or time is over.

    Blocks; each comparison is bounded by the remote's deadline. With time over, what
    was compared has to do, but at least one clean region is if there is one.

    Args:
        random: gives numbers in [0, 1).
        clock: gives seconds.

    Raises:
        MirrorError: the remote could not be read, or the local disk nowhere.
    """
    end = clock() + budget_s
    same = unreadable = 0
    seen: set[int] = set()
    for region in _candidates(engine, random):
        if same + unreadable >= ENOUGH or (same + unreadable and clock() >= end):
            break
        if region in seen:
            continue
        verdict = engine.compare(remote, region)
        if verdict == Verdict.DIFFERENT:
            return Sample(same, region)
        if verdict != Verdict.BUSY:
            seen.add(region)
        same += verdict == Verdict.SAME
        unreadable += verdict == Verdict.UNREADABLE
    if unreadable and not same:
        raise MirrorIOError(
            f"the local disk cannot read any of {unreadable} regions: nothing tells "
            "whether these are the same disks"
        )
    return Sample(same, None)


def _candidates(engine: Engine, random: Callable[[], float]) -> Iterator[int]:
    status = engine.status()
    nr_regions = -(-status.size // status.region_size)
    yield 0
    yield nr_regions - 1
    yield from engine.recent_regions(RECENT_REGIONS)
    per_extent = status.extent_size // status.region_size
    for extent in engine.active_extents()[:ACTIVE_EXTENTS]:
        yield min(extent * per_extent + int(random() * per_extent), nr_regions - 1)
    for _ in range(MAX_TRIES):
        yield _data_region(engine, status, int(random() * nr_regions), random)


def _data_region(
    engine: Engine, status: VolumeStatus, region: int, random: Callable[[], float]
) -> int:
    """Pick a region in the first run of data from *region* on, else *region*."""
    offset = region * status.region_size
    try:
        runs = engine.extents(status.size - offset, offset, 8)
    except MirrorError:
        return region  # the disk cannot tell; comparing says if it can be read
    for run in runs:
        if run.type != HOLE:
            picked = run.offset + int(random() * run.length)
            return picked // status.region_size
    return region
