# SPDX-License-Identifier: BSD-3-Clause
"""
Is the disk behind a new connection the one that was left?

A plain NBD server has no identity, so on every connection a few clean regions are
compared with local before anything is trusted or written. Chosen are the places where a
wrong disk would show: the first and the last region and the one where a first partition
begins (partition tables, superblocks, which change at each mount), recently written
ones (an old backup differs there, and where the backup is local's what is written again
and again has changed on the remote since), and random ones where local holds data, as
holes are alike everywhere. Dirty regions prove nothing and are passed over; with every
region dirty there is nothing to prove, all of it is copied. Sectors that local cannot
read are passed over too: the remote is needed to write them anew.

Where time is over, because the link is slow or local hangs meanwhile, what was compared
has to do: it may be one region. The remote is what requests wait for then, and with a
hanging local it is the only disk that can take its place.

A sample that compared nothing proves nothing. As long as any region is clean one is
compared, or the disk is not used: where requests hold all of them, it is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base.errors import BusyError, MirrorError, MirrorIOError
from ..volume.model import HOLE, Verdict, VolumeStatus, disk_of

if TYPE_CHECKING:
    from ..volume.core import Engine

__all__ = ["Sample", "take_sample"]

ENOUGH = 48  # regions compared
MAX_TRIES = 256  # regions asked for; a dirty one costs no I/O
RECENT_REGIONS = 20  # written last: an old backup differs there, if anywhere
ACTIVE_EXTENTS = 6  # of the latest used ones, a region each
FIRST_PARTITION = 1 << 20  # where today's partitioning programs have it begin
BUSY_S = 0.05  # until a region that requests hold is tried again


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
    ending: Callable[[], bool],
) -> Sample:
    """
    Compare regions until enough are the same, one differs, or time is over.

    Blocks; each comparison is bounded by the remote's deadline, over a slow link by
    two seconds or what a part of a region takes. With time over, what
    was compared has to do, but one clean region is if there is any.

    Args:
        random: gives numbers in [0, 1).
        clock: gives seconds.
        ending: says that the volume stops; once woken, `Engine.wait` waits no
            more.

    Returns:
        With 0 the same and none that differs every region is dirty.

    Raises:
        BusyError: all that time requests held every region that could tell, or the
            volume stops.
        MirrorError: the remote could not be read, or the local disk nowhere.
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
    """What comparisons said so far."""

    def __init__(self, engine: Engine, remote: int, ending: Callable[[], bool]) -> None:
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
    """Compare one region, any that is clean, however few of them there are."""
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
                "same disks: tried again by itself"
            )
        else:
            serial = engine.remote_status(tally.remote).serial
            engine.wait(disk_of(tally.remote), serial, BUSY_S)
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
