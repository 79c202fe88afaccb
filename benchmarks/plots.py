# SPDX-License-Identifier: BSD-3-Clause
"""
The plots: latency by load, throughput by block size, and a resync.

The plots judge nothing: they show where a row's single figure comes from. Points are
medians of the rounds; the band around a line is their minimum and maximum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .fio_rows import begin, finish
from .images import random_data
from .load import LATENCY_LOG, Figures, Fio, Workload, measure
from .mirror import KINDS, Mirror
from .model import KIB, MIB, BenchError, Context, Measured, rotated
from .servers import SetUp, wait_until

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Timeline",
    "binned",
    "draw_latency",
    "draw_resync",
    "draw_throughput",
    "plot_latency",
    "plot_resync",
    "plot_throughput",
    "read_latencies",
]

SET_UPS = ("direct", "two_copies", "qemu")
LABELS = {"direct": "nbd_mirror", "two_copies": "two copies", "qemu": "qemu"}
# By Okabe and Ito, distinct for all eyes; the markers are distinct in print as well.
COLOURS = {"direct": "#0072B2", "two_copies": "#009E73", "qemu": "#D55E00"}
MARKERS = {"direct": "o", "two_copies": "s", "qemu": "^"}
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
BLOCK_SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)
MAX_ROUNDS = 3  # a curve needs fewer rounds than a verdict
MAX_SECONDS = 1.0

# By round, point and set-up.
Rounds: TypeAlias = Sequence[Mapping[int, Mapping[str, Figures]]]

# Of the plot of a resync.
SAMPLE_S = 0.02
BIN_S = 0.1
CALM_S = 2.0  # before and after it
CLIENT = Workload("randrw", 4 * KIB, 4)


# --- drawing -------------------------------------------------------------


def _figure(title: str, height: float, subtitle: str) -> Figure:
    # Not pyplot: it keeps every figure, and needs a display.
    from matplotlib.figure import Figure as Made

    figure = Made(figsize=(9, height), layout="constrained")
    figure.suptitle(f"{title}\n", fontsize=13)
    under = 1 - 0.34 / height  # inches, below the title whatever the height
    figure.text(0.5, under, subtitle, ha="center", va="top", fontsize=8.5, color="#555")
    return figure


def _tidy(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, which="major", color="#ddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _log_axis(axes: Axes) -> None:
    """Make the y axis logarithmic, with numbers that need no counting of zeroes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _curves(
    axes: Axes,
    points: Sequence[int],
    rounds: Rounds,
    value: Callable[[Figures], float],
) -> None:
    """Draw a line for each set-up: medians, between minimum and maximum."""
    for key in SET_UPS:
        columns = [[value(one[point][key]) for one in rounds] for point in points]
        style = {"color": COLOURS[key], "marker": MARKERS[key], "markersize": 5}
        medians = [statistics.median(column) for column in columns]
        axes.plot(points, medians, label=LABELS[key], **style)  # type: ignore[arg-type]
        least, most = [min(one) for one in columns], [max(one) for one in columns]
        axes.fill_between(points, least, most, color=COLOURS[key], alpha=0.15, lw=0)


def _points_axis(axes: Axes, points: Sequence[int], names: Sequence[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(points, names)
    axes.minorticks_off()


def _save(ctx: Context, measured: Measured, figure: Figure, name: str) -> None:
    ctx.output.mkdir(parents=True, exist_ok=True)
    path = ctx.output / f"{name}.png"
    figure.savefig(path, dpi=150)
    measured.files.append(path)


# --- curves over load and block size -------------------------------------


def _sweep(
    ctx: Context, points: Sequence[int], workload: Callable[[int], Workload]
) -> tuple[Measured, Rounds]:
    """Measure each set-up at each of *points*, in turn."""
    set_ups: list[SetUp] = [KINDS[key](ctx.folder, ctx.size) for key in SET_UPS]
    for set_up in set_ups:
        begin(ctx, set_up)
    seconds = min(ctx.seconds, MAX_SECONDS)
    rounds: list[dict[int, dict[str, Figures]]] = []
    count = min(ctx.rounds, MAX_ROUNDS)
    for number in range(count):
        found: dict[int, dict[str, Figures]] = {}
        for index, point in enumerate(points):
            found[point] = {}
            for one in rotated(set_ups, number + index):
                one.mark()
                found[point][one.key] = measure(
                    one.uris, one.folder, workload(point), one.size, seconds
                )
                one.check()
        rounds.append(found)
        ctx.say(f"{number + 1}/{count}  {len(points)} points, {len(set_ups)} set-ups")
    for set_up in set_ups:
        finish(set_up)
    measured = Measured()
    measured.rounds += [
        {
            str(point): {key: one.as_dict() for key, one in by_key.items()}
            for point, by_key in found.items()
        }
        for found in rounds
    ]
    return measured, rounds


def draw_latency(rounds: Rounds) -> Figure:
    """Draw p50 and p99 by queue depth."""
    figure = _figure(
        "Latency of 4 KiB random writes against load",
        5,
        f"median of {len(rounds)} rounds, band: least and most; images on tmpfs, "
        "unix sockets; less is better",
    )
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name, value in (
        (left, "p50", lambda one: one.p50_us),
        (right, "p99", lambda one: one.p99_us),
    ):
        _curves(axes, DEPTHS, rounds, value)
        _points_axis(axes, DEPTHS, [str(one) for one in DEPTHS])
        _log_axis(axes)
        _tidy(axes, "requests under way", f"{name} latency, \N{MICRO SIGN}s")
    left.legend(frameon=False)
    return figure


def plot_latency(ctx: Context) -> Measured:
    """Draw latency against the queue depth."""
    measured, rounds = _sweep(ctx, DEPTHS, Workload.writes)
    _save(ctx, measured, draw_latency(rounds), "latency")
    return measured


def draw_throughput(rounds: Rounds) -> Figure:
    """Draw bytes per second by block size."""
    figure = _figure(
        "Throughput of random writes against block size, QD16",
        5,
        f"median of {len(rounds)} rounds, band: least and most; images on tmpfs, "
        "unix sockets; more is better",
    )
    axes = figure.subplots()
    _curves(axes, BLOCK_SIZES, rounds, lambda one: one.bytes_per_s / 1e6)
    names = [f"{one // KIB} KiB" if one < MIB else "1 MiB" for one in BLOCK_SIZES]
    _points_axis(axes, BLOCK_SIZES, names)
    _log_axis(axes)
    _tidy(axes, "block size", "MB/s")
    axes.legend(frameon=False)
    return figure


def plot_throughput(ctx: Context) -> Measured:
    """Draw throughput against the block size."""
    base = Workload.writes(16)
    measured, rounds = _sweep(ctx, BLOCK_SIZES, lambda size: base.at(block_size=size))
    _save(ctx, measured, draw_throughput(rounds), "throughput")
    return measured


# --- a resync over time --------------------------------------------------


@dataclass(slots=True)
class Timeline:
    """A resync's progress: seconds by the wall clock, and the share that is clean."""

    seconds: list[float] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0


def read_latencies(log: Path) -> list[tuple[float, float]]:
    """Return time (seconds, wall clock) and latency (microseconds) of each request."""
    found = []
    for line in log.read_text().splitlines():
        milliseconds, nanoseconds, _ = line.split(",", 2)
        found.append((int(milliseconds) / 1000, int(nanoseconds) / 1000))
    return found


def binned(
    latencies: Sequence[tuple[float, float]], width_s: float
) -> list[tuple[float, float, float]]:
    """Return for each interval its middle, its p50 and its p99."""
    bins: dict[int, list[float]] = {}
    # as fio counts; seconds would be rounded at the edges
    width_ms = round(width_s * 1000)
    for when, latency in latencies:
        bins.setdefault(round(when * 1000) // width_ms, []).append(latency)
    found = []
    for number, values in sorted(bins.items()):
        values.sort()
        last = len(values) - 1
        p50, p99 = (values[min(len(values) * x // 100, last)] for x in (50, 99))
        found.append(((number + 0.5) * width_s, p50, p99))
    return found


def _watch(mirror: Mirror) -> Timeline:
    """Invalidate, and watch until all is clean, with calm time before and after."""
    line = Timeline()
    with mirror.maps() as maps:
        whole = mirror.size // maps.region_size

        def look(seconds: float, *, until_clean: bool = False) -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                dirty = maps.dirty_regions
                line.seconds.append(time.time())
                line.clean.append(1 - dirty / whole)
                if until_clean and dirty == 0:
                    return
                time.sleep(SAMPLE_S)
            if until_clean:
                raise BenchError(f"a resync did not end within {seconds:g} s")

        look(CALM_S)
        line.began = time.time()
        mirror.command("invalidate")
        look(120, until_clean=True)
        line.ended = time.time()
        look(CALM_S)
    return line


def draw_resync(
    line: Timeline, bins: Sequence[tuple[float, float, float]], size: int
) -> Figure:
    """Draw the clean part of *size* bytes, and the latency of a client below it."""
    took = line.ended - line.began
    figure = _figure(
        f"A resync of {size // MIB:,} MiB, and what a client feels of it",
        6,
        f"4 KiB, 70 % reads, QD4, all the time; dirty for {took:.1f} s: "
        f"{size / took / 1e6:,.0f} MB/s; latency in pieces of {BIN_S * 1000:.0f} ms",
    )
    upper, lower = figure.subplots(2, 1, sharex=True)
    at = [one - line.began for one in line.seconds]
    upper.plot(at, [100 * one for one in line.clean], color=COLOURS["direct"])
    _tidy(upper, "", "clean, %")
    upper.set_ylim(-3, 103)
    inside = [one for one in bins if line.seconds[0] <= one[0] <= line.seconds[-1]]
    if not inside:
        raise BenchError("the client's latencies and the resync do not overlap")
    times = [when - line.began for when, _, _ in inside]
    lower.plot(times, [one[2] for one in inside], color=COLOURS["qemu"], label="p99")
    lower.plot(times, [one[1] for one in inside], color=COLOURS["direct"], label="p50")
    _log_axis(lower)
    _tidy(lower, "seconds since everything became dirty", "latency, \N{MICRO SIGN}s")
    lower.legend(frameon=False)
    for axes in (upper, lower):
        axes.axvspan(0, took, color="#eee", zorder=0)
    return figure


def plot_resync(ctx: Context) -> Measured:
    """Draw a resync's progress, and the latency of a client below it."""
    ctx.say("making an image of random data")
    mirror = Mirror(ctx.folder, 2 * ctx.size, keys={"late_write_window": "0s"})
    ctx.stack.callback(mirror.stop)
    mirror.prepare()
    random_data(mirror.images[0], [(0, mirror.size)])
    mirror.start_servers()
    folder = ctx.folder / "client"
    fio = Fio(
        mirror.uri,
        folder,
        *CLIENT.options(),
        *(f"--size={mirror.size}", "--time_based", "--runtime=300"),
        latency_log=True,
    )
    ctx.stack.callback(fio.end)
    wait_until(
        lambda: int(mirror.status()["clients"]) > 0, lambda: "the client to connect"
    )
    line = _watch(mirror)
    fio.interrupt()
    bins = binned(read_latencies(folder / LATENCY_LOG), BIN_S)
    mirror.wait()
    finish(mirror)
    measured = Measured()
    measured.rounds.append(_resync_json(line, bins))
    _save(ctx, measured, draw_resync(line, bins, mirror.size), "resync")
    return measured


def _resync_json(
    line: Timeline, bins: Sequence[tuple[float, float, float]]
) -> dict[str, Any]:
    return {
        "began": line.began,
        "ended": line.ended,
        "progress": list(zip(line.seconds, line.clean, strict=True)),
        "latency_p50_p99_us": list(bins),
    }
