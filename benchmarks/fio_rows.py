# SPDX-License-Identifier: BSD-3-Clause
"""
The rows that compare request rates: the same load on several set-ups, in turn.

In each round every set-up is measured once, in a rotating order, so that other work of
the machine affects all of them alike. Two claims need set-ups of their own: a mirror
that has lost its remote, and one whose logs are on a real disk, compared with the same
mirror built without an activity log.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from .load import RAMP_S, Figures, Workload, fill, measure
from .machine import disk_folder
from .mirror import KINDS, Mirror
from .model import MIB, BenchError, Context, Measured, rotated
from .no_activity import build_without_activity
from .servers import ROOT, SetUp
from .usage import cpu_us, switches

__all__ = [
    "activity_log",
    "against",
    "begin",
    "closely",
    "compare",
    "degraded",
    "finish",
]


def begin(ctx: Context, set_up: SetUp, *, fill_size: int | None = None) -> None:
    """Start *set_up*, fill it, and bring it into the state to measure."""
    ctx.say(f"starting {set_up.title}")
    ctx.stack.callback(set_up.stop)
    set_up.start()
    for number, uri in enumerate(set_up.uris):
        fill(uri, set_up.folder / f"fill{number}", fill_size or set_up.size)
    set_up.ready()
    set_up.mark()
    set_up.check()


def finish(set_up: SetUp) -> None:
    """Stop *set_up* and compare its images: a broken mirror gets no figure."""
    set_up.settle()
    set_up.stop()
    if not set_up.images_equal():
        raise BenchError(f"{set_up.title}: its images differ: no mirror")
    for image in set_up.images:
        image.unlink()


def _rate(figures: Figures, workload: Workload) -> str:
    if workload.block_size >= MIB:
        return f"{figures.bytes_per_s / 1e9:.2f} GB/s"
    return f"{figures.iops:,.0f}/s"


def compare(
    ctx: Context,
    workload: Workload,
    set_ups: Sequence[SetUp],
    *,
    size: int | None = None,
) -> Measured:
    """
    Measure *workload* on every set-up in every round, as often as *ctx* says.

    Returns:
        For each key but the first, the first's rate over its own, one value per round.
    """
    measured = Measured()
    ours, *peers = set_ups
    for number in range(ctx.rounds):
        figures: dict[str, Figures] = {}
        used: dict[str, dict[str, float]] = {}
        for set_up in rotated(set_ups, number):
            set_up.mark()
            before = cpu_us(set_up.pids), switches()
            figures[set_up.key] = measure(
                set_up.uris, set_up.folder, workload, size or set_up.size, ctx.seconds
            )
            # The ramp's requests are not counted, but cost as much.
            requests = figures[set_up.key].iops * (ctx.seconds + RAMP_S)
            used[set_up.key] = {
                "cpu_us": (cpu_us(set_up.pids) - before[0]) / requests,
                "switches": (switches() - before[1]) / requests,
            }
            set_up.check()
        for peer in peers:
            measured.add(peer.key, figures[ours.key].iops / figures[peer.key].iops)
        measured.rounds.append(
            {key: {**one.as_dict(), **used[key]} for key, one in figures.items()}
        )
        rates = (f"{one.key} {_rate(figures[one.key], workload)}" for one in set_ups)
        ctx.say(f"{number + 1}/{ctx.rounds}  {', '.join(rates)}")
    measured.notes.append(_medians(measured, set_ups, workload))
    return measured


def closely(ctx: Context) -> Context:
    """Return *ctx* with four times its rounds, to resolve a few per cent."""
    return dataclasses.replace(ctx, rounds=4 * ctx.rounds)


def _medians(measured: Measured, set_ups: Sequence[SetUp], workload: Workload) -> str:
    """Return the absolute figures, which do not compare with another day's."""
    name, unit, scale = "iops", "/s", 1.0
    if workload.block_size >= MIB:
        name, unit, scale = "bytes_per_s", " MB/s", 1e6
    found = []
    for set_up in set_ups:
        rate = statistics.median(one[set_up.key][name] for one in measured.rounds)
        p99 = statistics.median(one[set_up.key]["p99_us"] for one in measured.rounds)
        cpu = statistics.median(one[set_up.key]["cpu_us"] for one in measured.rounds)
        times = statistics.median(
            one[set_up.key]["switches"] for one in measured.rounds
        )
        found.append(
            f"{set_up.key} {rate / scale:,.0f}{unit}, p99 {p99:,.0f} µs, "
            f"{cpu:,.0f} µs of its servers' CPU, {times:.1f} switches"
        )
    return "medians, CPU and context switches a request: " + "; ".join(found)


def against(
    workload: Workload, *peers: str, ours: str = "direct"
) -> Callable[[Context], Measured]:
    """
    Return a row's run: *ours* against *peers*, all keys of KINDS.

    Two copies are close to the mirror's rate, so they are compared closely.
    """

    def run(ctx: Context) -> Measured:
        set_ups = [KINDS[key](ctx.folder, ctx.size) for key in (ours, *peers)]
        for set_up in set_ups:
            begin(ctx, set_up)
        close = closely(ctx) if "two_copies" in peers else ctx
        measured = compare(close, workload, set_ups)
        for set_up in set_ups:
            finish(set_up)
        return measured

    return run


# --- the remote lost -----------------------------------------------------


class DegradedMirror(Mirror):
    """Our mirror after it has lost its remote."""

    key = "degraded"
    title = "nbd_mirror, remote lost"

    def __init__(self, folder: Path, size: int) -> None:
        # At its end the remote comes back; no command of the load was under way.
        keys = {"hold": "100ms", "late_write_window": "0s"}
        super().__init__(folder, size, keys=keys)

    def ready(self) -> None:
        """Kill the remote's server."""
        self.stop_far(kill=True)
        self.wait("out_of_sync")

    def check(self) -> None:
        """Check that the remote is still away."""
        if self.remote()["state"] != "out_of_sync":
            raise BenchError(f"{self.title} is {self._words()}")

    def settle(self) -> None:
        """Bring the remote back: the log must have recorded all that it missed."""
        self.start_far()
        self.command("resume")
        self.wait()


def degraded(workload: Workload) -> Callable[[Context], Measured]:
    """Return a row's run: without the remote against one copy."""

    def run(ctx: Context) -> Measured:
        set_ups = [
            DegradedMirror(ctx.folder, ctx.size),
            KINDS["one_copy"](ctx.folder, ctx.size),
        ]
        for set_up in set_ups:
            begin(ctx, set_up)
        measured = compare(ctx, workload, set_ups)
        for set_up in set_ups:
            finish(set_up)
        return measured

    return run


# --- the activity log ----------------------------------------------------


class WarmMirror(Mirror):
    """Our mirror with its logs on a disk, and its whole range active already."""

    persists = 0

    def mark(self) -> None:
        """Store how often the log was made durable."""
        super().mark()
        self.persists = self._persists()

    def check(self) -> None:
        """Check that the log was not written: that would be a cold set."""
        super().check()
        grown = self._persists() - self.persists
        if grown:
            raise BenchError(
                f"{self.title}: the activity log was made durable {grown} times in "
                "the measured window: its hot set was not warm"
            )

    def ready(self) -> None:
        """Check that filling it has written the log."""
        if self._persists() == 0:
            raise BenchError(f"{self.title} never wrote its activity log")

    def _persists(self) -> int:
        return int(self.status()["persists"]["activity"])


class OffMirror(WarmMirror):
    """The same, built without an activity log: unsafe, and only for this row."""

    def ready(self) -> None:
        """Check that the log is really off."""
        status = self.status()
        if status["persists"]["activity"] or status["active_extents"]:
            raise BenchError(f"{self.title} has an activity log after all")


def activity_log(workload: Workload) -> Callable[[Context], Measured]:
    """Return a row's run: with the activity log on a real disk against without."""

    def run(ctx: Context) -> Measured:
        ctx.say("building without an activity log")
        folder, kind = disk_folder(ctx.stack)
        makers: list[tuple[type[WarmMirror], str, Path]] = [
            (WarmMirror, "on", ROOT),
            (OffMirror, "off", build_without_activity()),
        ]
        set_ups: list[SetUp] = []
        for maker, key, package in makers:
            state = folder / key
            set_up = maker(ctx.folder, ctx.size, key=key, state=state, package=package)
            set_up.title = f"nbd_mirror, activity log {key}"
            set_ups.append(set_up)
            begin(ctx, set_up)
        measured = compare(closely(ctx), workload, set_ups)
        measured.notes.append(f"the logs of both lay on {kind}")
        for one in set_ups:
            finish(one)
        return measured

    return run
