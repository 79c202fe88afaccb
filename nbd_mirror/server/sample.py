# SPDX-License-Identifier: BSD-3-Clause
"""
Is the disk behind a new connection the same as before?

A plain NBD server has no identity. So on every connection this module compares a few
clean regions with local before anything is trusted or written. It chooses places where
a wrong disk would show: the first and the last region and the one where a first
partition begins (partition tables, and superblocks, which change at each mount);
recently written regions (an old backup of the remote differs there; and if local was
restored from a backup, blocks that are written again and again have changed on the
remote since); and random regions where local holds data, because holes are the same
everywhere. Dirty regions prove nothing and are skipped; if every region is dirty, no
proof is needed, because all of it is copied. Sectors that local cannot read are skipped
too: the remote is needed to rewrite them.

If time runs out, because the link is slow or local hangs, the regions compared so far
suffice, even a single one: requests are waiting for the remote, and if local hangs, it
is the only disk that can take its place.

A sample that compared nothing proves nothing. As long as any region is clean, one must
be compared before the disk is used; if requests hold all of them, this tries again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base.errors import BusyError, MirrorError, MirrorIOError
from ..volume.model import HOLE, Disk, Verdict, VolumeStatus

if TYPE_CHECKING:
    from ..volume.core import Engine

__all__ = ["Sample", "take_sample"]

ENOUGH = 48  # regions compared
MAX_TRIES = 256  # regions asked for; a dirty one costs no I/O
RECENT_REGIONS = 20  # latest writes: an old backup differs there, if anywhere
ACTIVE_EXTENTS = 6  # of the latest used extents, one region each
FIRST_PARTITION = 1 << 20  # where current partitioning programs let it begin
BUSY_S = 0.05  # until it tries a region again that requests hold


@dataclass(frozen=True, slots=True)
class Sample:
    """How many regions were the same, and the one that *differs*, if any."""

    same: int
    differs: int | None


def take_sample(
    engine: Engine,
    remote: Disk,
    *,
    random: Callable[[], float],
    clock: Callable[[], float],
    budget_s: float,
    ending: Callable[[], bool],
) -> Sample:
    """
    Compare regions until enough are the same, one differs, or time is over.

    Blocks. The remote's deadline limits each comparison; over a slow link the limit is
    two seconds, or the time for a part of a region. If time is over, the regions
    compared so far suffice, but at least one clean region is compared if there is any.

    Args:
        random: gives numbers in [0, 1).
        clock: gives seconds.
        ending: returns true once the volume stops; after `wake`, `Engine.wait` does
            not wait any more.

    Returns:
        The sample. With 0 the same and none that differs, every region is dirty.

    Raises:
        BusyError: requests held every region that could tell, all that time, or
            the volume stops.
        MirrorError: the remote could not be read, or no part of the local disk.
    """
    end = clock() + budget_s
    seen: set[int] = set()
    tally = _Tally(engine, remote, ending)
    for region in _candidates(engine, random):
        done = tally.same + tally.unreadable
        if done >= ENOUGH or (done and clock() >= end):
            break
        if region in seen:
            continue
        verdict = tally.compare(region)
        if verdict == Verdict.DIFFERENT:
            return Sample(tally.same, region)
        if verdict != Verdict.BUSY:
            seen.add(region)
    if tally.same:
        return Sample(tally.same, None)
    return _first_that_tells(engine, tally, lambda: end - clock())


class _Tally:
    """The results of the comparisons so far."""

    def __init__(
        self, engine: Engine, remote: Disk, ending: Callable[[], bool]
    ) -> None:
        self.engine, self.remote, self.ending = engine, remote, ending
        self.same = self.unreadable = 0

    def compare(self, region: int) -> int:
        if self.ending():
            raise BusyError("the volume is stopping")
        verdict = self.engine.compare(self.remote, region)
        self.same += verdict == Verdict.SAME
        self.unreadable += verdict == Verdict.UNREADABLE
        return verdict


def _first_that_tells(
    engine: Engine, tally: _Tally, left_s: Callable[[], float]
) -> Sample:
    """Compare one clean region, however few of them there are."""
    region = 0
    busy = False
    while tally.unreadable < ENOUGH:
        found = engine.comparable(tally.remote, region)
        if found is not None:
            verdict = tally.compare(found)
            if verdict in (Verdict.SAME, Verdict.DIFFERENT):
                differs = found if verdict == Verdict.DIFFERENT else None
                return Sample(tally.same, differs)
            busy = busy or verdict == Verdict.BUSY
            region = found + 1
        elif not busy:
            break
        elif left_s() <= 0:
            raise BusyError(
                "requests hold every region that could tell whether these are the "
                "same disks: the server tries again"
            )
        else:
            serial = engine.remote_status(tally.remote).serial
            engine.wait(tally.remote, serial, BUSY_S)
            region, busy = 0, False
    if tally.unreadable:
        raise MirrorIOError(
            f"the local disk cannot read any of {tally.unreadable} regions: nothing "
            "tells whether these are the same disks"
        )
    return Sample(0, None)


def _candidates(engine: Engine, random: Callable[[], float]) -> Iterator[int]:
    status = engine.status()
    nr_regions = -(-status.size // status.region_size)
    yield 0
    yield nr_regions - 1
    yield min(FIRST_PARTITION // status.region_size, nr_regions - 1)
    yield from engine.recent_regions(RECENT_REGIONS)
    per_extent = status.extent_size // status.region_size
    for extent in engine.active_extents()[:ACTIVE_EXTENTS]:
        yield min(extent * per_extent + int(random() * per_extent), nr_regions - 1)
    for _ in range(MAX_TRIES):
        yield _data_region(engine, status, int(random() * nr_regions), random)


def _data_region(
    engine: Engine, status: VolumeStatus, region: int, random: Callable[[], float]
) -> int:
    """Return a region in the first run of data from *region* on, else *region*."""
    offset = region * status.region_size
    try:
        runs = engine.extents(status.size - offset, offset, 8)
    except MirrorError:
        # the disk reports no holes; the comparison shows if it is readable
        return region
    for run in runs:
        if run.type != HOLE:
            picked = run.offset + int(random() * run.length)
            return picked // status.region_size
    return region
