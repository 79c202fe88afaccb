# SPDX-License-Identifier: BSD-3-Clause
"""
The rows about resync: its speed, a long link, the bytes sent, clients' latency.

The progress of a resync is read from the dirty map's file, which costs the server
nothing. The bytes that a remote received come from its server's log filter.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nbd_mirror.volume.mapview import DirtyMaps

from .images import random_data
from .link import Link, ceiling
from .load import Figures, Workload, measure, scatter
from .mirror import Mirror
from .model import GIB, KIB, MIB, BenchError, Context, Measured, rotated
from .servers import NbdkitFile, environment_of, uri_of, wait_until

__all__ = [
    "first_sync_sparse",
    "resync_full",
    "resync_link",
    "resync_p99",
    "resync_scattered",
    "written_bytes",
]

POLL_S = 0.002
RESYNC_TIMEOUT_S = 300.0
NO_WINDOW = {"late_write_window": "0s"}  # only the copying is measured
MIXED = Workload("randrw", 4 * KIB, 4)
RATE, ROUND_TRIP_S = 125e6, 0.050  # 1 Gbit/s


def resync_s(mirror: Mirror, begin: str, maps: DirtyMaps) -> float:
    """Send the command *begin*; return the seconds until nothing is dirty."""
    if begin == "resume" and not maps.dirty_regions:
        raise BenchError(f"{mirror.title}: nothing is dirty to resync")
    started = time.monotonic()
    mirror.command(begin)
    if begin == "invalidate" and not maps.dirty_regions:
        raise BenchError(f"{mirror.title}: nothing is dirty after {begin}")
    wait_until(
        lambda: maps.dirty_regions == 0,
        lambda: f"the end of a resync; {maps.dirty_regions} regions are dirty",
        timeout_s=RESYNC_TIMEOUT_S,
        interval_s=POLL_S,
    )
    elapsed = time.monotonic() - started
    mirror.wait()
    return elapsed


def _filled_mirror(ctx: Context, size: int) -> Mirror:
    """Return a mirror that is not started, whose local image holds random data."""
    mirror = Mirror(ctx.folder, size, keys=NO_WINDOW)
    ctx.stack.callback(mirror.stop)
    mirror.prepare()
    random_data(mirror.images[0], [(0, size)])
    return mirror


def _equal(mirror: Mirror) -> None:
    mirror.stop()
    if not mirror.images_equal():
        raise BenchError(f"{mirror.title}: its images differ after a resync")


# --- all dirty, between two servers of this machine ----------------------


def _nbdcopy_s(source: str | Path, target: str) -> float:
    """Copy a server or a file to a server; return the seconds."""
    started = time.monotonic()
    done = subprocess.run(
        ["nbdcopy", "--flush", source, target],
        env=environment_of({}),
        capture_output=True,
        text=True,
        check=False,
        timeout=RESYNC_TIMEOUT_S,
    )
    if done.returncode != 0:
        raise BenchError(f"nbdcopy: {done.stderr.strip()}")
    return time.monotonic() - started


def resync_full(ctx: Context) -> Measured:
    """Copy an image that is dirty all over, against nbdcopy of the same image."""
    ctx.say("making an image of random data")
    mirror = _filled_mirror(ctx, ctx.size)
    mirror.start_servers()
    # nbdcopy reads the same image, and also writes one that exists already.
    source = ctx.folder / "copy-source.sock"
    image = mirror.images[0]
    copy = NbdkitFile(ctx.folder, ctx.size, key="copy_target")
    ctx.stack.callback(copy.stop)
    copy.start()
    copy.nbdkit_file(image, source)
    _nbdcopy_s(uri_of(source), copy.uri)
    measured = Measured()
    with mirror.maps() as maps:
        runs: dict[str, Callable[[], float]] = {
            "nbdcopy": lambda: _nbdcopy_s(uri_of(source), copy.uri),
            "ours": lambda: resync_s(mirror, "invalidate", maps),
            "file": lambda: _nbdcopy_s(image, copy.uri),
        }
        for number in range(ctx.rounds):
            # Back and forth: ours always runs next to both that it is compared with.
            order = list(runs)[:: -1 if number % 2 else 1]
            took = {who: runs[who]() for who in order}
            for peer in ("nbdcopy", "file"):
                measured.add(peer, took[peer] / took["ours"])
            measured.add("rate", ctx.size / took["ours"] / 1e6)
            measured.rounds.append(took)
            ctx.say(
                f"{number + 1}/{ctx.rounds}  ours {took['ours']:.3f} s, "
                f"nbdcopy {took['nbdcopy']:.3f} s, from the file {took['file']:.3f} s"
            )
    measured.notes.append(
        f"{ctx.size // MIB} MiB; nbdcopy with its defaults: 4 connections, 64 requests "
        "of 256 KiB, and a flush at its end, as resync makes one; from the file itself "
        "it reads without a server, as resync does"
    )
    _equal(mirror)
    return measured


# --- over a long link ----------------------------------------------------


def resync_link(ctx: Context) -> Measured:
    """Copy over a link of 1 Gbit/s and 50 ms; measure its used share."""
    size = ctx.size // 2
    near = ctx.folder / "near.sock"
    mirror = Mirror(ctx.folder, size, keys=NO_WINDOW, far_socket=near)
    ctx.stack.callback(mirror.stop)
    mirror.prepare()
    random_data(mirror.images[0], [(0, size)])
    link = Link(near, mirror.far_listens, rate=RATE, round_trip_s=ROUND_TRIP_S)
    ctx.stack.callback(link.close)
    ctx.say("first sync")
    mirror.start_servers()
    measured = Measured()
    with mirror.maps() as maps:
        for number in range(ctx.rounds):
            carries = ceiling(ctx.folder, rate=RATE, round_trip_s=ROUND_TRIP_S)
            rate = size / resync_s(mirror, "invalidate", maps)
            measured.add("share", rate / carries)
            measured.rounds.append({"link": carries, "resync": rate})
            ctx.say(
                f"{number + 1}/{ctx.rounds}  link {carries / 1e6:.1f} MB/s, "
                f"resync {rate / 1e6:.1f} MB/s"
            )
    measured.notes.append(
        f"{size // MIB} MiB a round; the link is what a plain bulk transfer through "
        "the same proxy reached in the same round"
    )
    _equal(mirror)
    return measured


# --- how much is sent ----------------------------------------------------


def written_bytes(log: Path) -> int:
    """Return the payload of all writes in a log of nbdkit's log filter."""
    pattern = re.compile(r" Write id=\d+ offset=\w+ count=(0x[0-9a-f]+)")
    return sum(int(one, 16) for one in pattern.findall(log.read_text()))


def _lose(mirror: Mirror, maps: DirtyMaps) -> None:
    """Kill the remote's server at a moment without unanswered commands."""
    wait_until(lambda: maps.unflushed_regions == 0, lambda: "the far side's flush")
    mirror.stop_far(kill=True)
    mirror.wait("out_of_sync")


def resync_scattered(ctx: Context) -> Measured:
    """Dirty one random region in a hundred; compare bytes sent with bytes dirty."""
    mirror = _filled_mirror(ctx, ctx.size)
    log = mirror.folder / "far.log"
    mirror.start_servers()
    measured = Measured()
    with mirror.maps() as maps:
        regions = mirror.size // maps.region_size // 100
        for number in range(ctx.rounds):
            _lose(mirror, maps)
            scatter(mirror.uri, mirror.folder, mirror.size, regions, maps.region_size)
            dirty = maps.bytes_of(maps.dirty_regions, mirror.size)
            mirror.start_far(f"logfile={log}", filters=("log",))
            took = resync_s(mirror, "resume", maps)
            sent = written_bytes(log)
            measured.add("sent", sent / dirty)
            measured.rounds.append({"dirty": dirty, "sent": sent, "seconds": took})
            ctx.say(
                f"{number + 1}/{ctx.rounds}  dirty {dirty / MIB:.2f} MiB, "
                f"sent {sent / MIB:.2f} MiB in {took:.3f} s"
            )
    measured.notes.append(
        f"{regions} regions of {ctx.size // MIB} MiB; what was sent is what the "
        "remote's server wrote down of writes"
    )
    _equal(mirror)
    return measured


def _first_sync(mirror: Mirror) -> tuple[float, int]:
    """Sync with a new, empty remote; return seconds and bytes sent."""
    log = mirror.folder / "far.log"
    with mirror.images[1].open("wb") as file:
        file.truncate(mirror.size)
    mirror.create("--force")
    mirror.serve()
    mirror.status()  # it serves, and has no remote to copy to
    mirror.start_far(f"logfile={log}", filters=("log",))
    with mirror.maps() as maps:
        took = resync_s(mirror, "resume", maps)
    mirror.stop()
    return took, written_bytes(log)


def first_sync_sparse(ctx: Context) -> Measured:
    """Sync 100 times --size that holds only --size, and a full image of --size."""
    pieces = 64
    length, stride = ctx.size // pieces, 100 * ctx.size // pieces
    runs = {
        "sparse": [(number * stride, length) for number in range(pieces)],
        "full": [(0, ctx.size)],
    }
    mirrors = {}
    for key, size in (("sparse", 100 * ctx.size), ("full", ctx.size)):
        mirrors[key] = Mirror(ctx.folder, size, keys=NO_WINDOW, key=key)
        ctx.stack.callback(mirrors[key].stop)
        mirrors[key].prepare()
        random_data(mirrors[key].images[0], runs[key])
    measured = Measured()
    for number in range(ctx.rounds):
        found = {}
        for key in rotated(list(mirrors), number):
            found[key] = _first_sync(mirrors[key])
            if not mirrors[key].images_equal():
                raise BenchError(f"the {key} image differs after its first sync")
        (sparse_s, sent), (full_s, _) = found["sparse"], found["full"]
        # As if it held 1 GiB, whatever --size is.
        measured.add("sent", sent / ctx.size)
        measured.add("time", sparse_s / full_s)
        measured.rounds.append(
            {key: {"seconds": a, "sent": b} for key, (a, b) in found.items()}
        )
        ctx.say(
            f"{number + 1}/{ctx.rounds}  sparse {sparse_s:.3f} s, sent "
            f"{sent / ctx.size:.4f} of its data; full {full_s:.3f} s"
        )
    measured.notes.append(
        f"{100 * ctx.size / GIB:g} GiB with {ctx.size / GIB:g} GiB of data in {pieces} "
        "pieces; the time is from the connection to no dirty region"
    )
    return measured


# --- what clients feel ---------------------------------------------------


class Endless(threading.Thread):
    """
    Keeps a resync going: makes all dirty again whenever little is left.

    It counts copied regions by the decrease of the dirty map.
    """

    def __init__(self, mirror: Mirror, maps: DirtyMaps) -> None:
        super().__init__(daemon=True)
        self._mirror = mirror
        self._maps = maps
        self._over = threading.Event()
        self.copied = 0  # regions
        self.again = 0  # how often it made all dirty
        self.least = mirror.size // maps.region_size
        self.seconds = 0.0

    def run(self) -> None:
        """Check 100 times a second."""
        whole = self._mirror.size // self._maps.region_size
        started, last = time.monotonic(), whole
        while not self._over.wait(0.01):
            now = self._maps.dirty_regions
            self.copied += max(last - now, 0)
            self.least = min(self.least, now)
            last = now
            if now < whole // 2:
                self.again += 1
                self._mirror.command("invalidate")
                last = whole
        self.seconds = time.monotonic() - started

    def begin(self) -> None:
        """Make all dirty, and keep it so."""
        self._mirror.command("invalidate")
        self.start()

    def end(self) -> float:
        """End it; return the rate of the resync, bytes per second."""
        self._over.set()
        self.join(10)
        if self.least == 0 or not self.seconds:
            raise BenchError("the resync ended before the measurement")
        return self.copied * self._maps.region_size / self.seconds


def resync_p99(ctx: Context) -> Measured:
    """Measure clients' latency while a resync runs, against in sync."""
    size = 2 * ctx.size
    ctx.say("making an image of random data")
    mirror = _filled_mirror(ctx, size)
    mirror.start_servers()

    def client() -> Figures:
        return measure([mirror.uri], mirror.folder, MIXED, size, ctx.seconds)

    measured = Measured()
    with mirror.maps() as maps:
        for number in range(ctx.rounds):
            mirror.wait()
            mirror.mark()
            calm = client()
            mirror.check()
            resync = Endless(mirror, maps)
            resync.begin()
            try:
                busy = client()
            finally:
                rate = resync.end()
            measured.add("p99", busy.p99_us / calm.p99_us)
            measured.add("rate", rate / 1e6)
            measured.add("iops", busy.iops / calm.iops)
            measured.rounds.append(
                {
                    "in_sync": calm.as_dict(),
                    "resyncing": busy.as_dict(),
                    "resync_bytes_per_s": rate,
                    "invalidated_again": resync.again,
                }
            )
            ctx.say(
                f"{number + 1}/{ctx.rounds}  p99 {calm.p99_us:,.0f} -> "
                f"{busy.p99_us:,.0f} µs, {calm.iops:,.0f} -> {busy.iops:,.0f}/s, "
                f"resync {rate / 1e6:,.0f} MB/s"
            )
    mirror.wait()
    again = sum(one["invalidated_again"] for one in measured.rounds)
    measured.notes.append(
        f"of {size // MIB} MiB; made all dirty again when half was done, so that it "
        f"lasts: {again} times in {ctx.rounds} rounds"
    )
    _equal(mirror)
    return measured
