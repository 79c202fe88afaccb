# SPDX-License-Identifier: BSD-3-Clause
"""
From raw figures to ratios, tables and JSON.

Absolute figures drift from one minute to the next, so only ratios taken in the
same round, of measurements that follow each other, are compared; what is reported
is their median over the rounds, and how far they spread.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load import Figures, Workload
from rich.console import Console
from rich.table import Table
from servers import KINDS

import nbd_mirror

__all__ = [
    "TARGETS",
    "Spread",
    "Target",
    "as_json",
    "machine",
    "ratios",
    "show",
    "verdicts",
]

# rounds[i][workload key][set-up key]
Rounds = Sequence[Mapping[str, Mapping[str, Figures]]]

PAIRS = (
    ("native", "qemu"),
    ("python", "qemu"),
    ("native", "one_copy"),
    ("python", "one_copy"),
    ("qemu", "one_copy"),
)


@dataclass(frozen=True, slots=True)
class Spread:
    """A ratio over the rounds; *q1* and *q3* bound its middle half."""

    median: float
    least: float
    most: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up *values*, of which there is at least one."""
        q1 = q3 = values[0]
        if len(values) > 1:
            q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), min(values), max(values), q1, q3)


@dataclass(frozen=True, slots=True)
class Target:
    """The median of *native* over *qemu* shall be at least *least*."""

    workload: str
    least: float


TARGETS = (
    Target("write_4k_qd16", 1.0),
    Target("write_1m_qd8", 1.0),
    Target("write_4k_qd1", 0.9),
)


def ratios(
    rounds: Rounds, workloads: Sequence[Workload]
) -> dict[str, dict[str, Spread]]:
    """Return, by workload and by "a/b", the spread of the ratios of throughput."""
    return {
        work.key: {
            f"{ours}/{base}": Spread.of(
                [one[work.key][ours].iops / one[work.key][base].iops for one in rounds]
            )
            for ours, base in PAIRS
        }
        for work in workloads
    }


def verdicts(found: Mapping[str, Mapping[str, Spread]]) -> list[tuple[Target, float]]:
    """Return each target with the median it is judged by."""
    return [
        (target, found[target.workload]["native/qemu"].median) for target in TARGETS
    ]


# --- the machine ---------------------------------------------------------


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"unknown: {error.strerror}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    """Describe what was measured on: a figure without this means nothing."""
    root = str(Path(__file__).resolve().parent.parent)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
        "nbd_mirror": nbd_mirror.__version__,
        "commit": _first_line("git", "-C", root, "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "nbdkit": _first_line("nbdkit", "--version"),
        "libnbd": _first_line("nbdinfo", "--version"),
        "qemu": _first_line("qemu-storage-daemon", "--version"),
        "fio": _first_line("fio", "--version"),
    }


# --- tables --------------------------------------------------------------


def _rate(figures: Sequence[Figures], workload: Workload) -> str:
    if workload.block_size >= 1 << 20:
        rate = statistics.median(one.bytes_per_s for one in figures)
        return f"{rate / 1e9:.2f} GB/s"
    return f"{statistics.median(one.iops for one in figures):,.0f}/s"


def _figures_table(rounds: Rounds, workloads: Sequence[Workload]) -> Table:
    table = Table(title="Median of the rounds, and median p99 latency")
    table.add_column("workload")
    for kind in KINDS:
        table.add_column(kind.key, justify="right")
    for work in workloads:
        cells = []
        for kind in KINDS:
            figures = [one[work.key][kind.key] for one in rounds]
            p99 = statistics.median(one.p99_us for one in figures)
            cells.append(f"{_rate(figures, work)}\n{p99:,.0f} µs")
        table.add_row(work.title, *cells)
    return table


def _ratios_table(
    found: Mapping[str, Mapping[str, Spread]],
    workloads: Sequence[Workload],
    base: str,
    title: str,
) -> Table:
    pairs = [pair for pair in PAIRS if pair[1] == base]
    table = Table(title=title)
    table.add_column("workload")
    for ours, _ in pairs:
        table.add_column(ours, justify="right")
    for work in workloads:
        cells = []
        for pair in pairs:
            one = found[work.key]["/".join(pair)]
            cells.append(
                f"[bold]{one.median:.2f}[/]  {one.least:.2f}..{one.most:.2f}\n"
                f"{one.q1:.2f}..{one.q3:.2f}"
            )
        table.add_row(work.title, *cells)
    return table


NOTES = (
    "4K: 4 KiB at random places; 1M: 1 MiB in sequence; fsync: one after every 32 "
    "writes; QD: how many requests the client keeps under way.",
    "Throughput of one client (fio's nbd engine, one connection), unix sockets, "
    "images on tmpfs, already written once; every mirror's remote is a plain nbdkit "
    "file on the same machine.",
    "So what is measured is the software's own cost. No disk, no network and no "
    "durability is in it: an fsync to tmpfs is free.",
    "A set-up's ratio is taken within a round, between measurements that follow each "
    "other in an order that rotates. Client and servers share the cores.",
    "After each measurement both kinds of mirror were asked whether they still "
    "mirror, and at the end their images were compared byte for byte.",
)


def show(
    console: Console,
    rounds: Rounds,
    workloads: Sequence[Workload],
    about: Mapping[str, Any],
) -> None:
    """Print tables, targets and how it was measured."""
    found = ratios(rounds, workloads)
    console.print(_figures_table(rounds, workloads))
    spread = "median  least..most\nand the middle half of the rounds"
    console.print(
        _ratios_table(found, workloads, "qemu", f"Ratio to qemu's mirror: {spread}")
    )
    console.print(
        _ratios_table(found, workloads, "one_copy", f"Ratio to one copy: {spread}")
    )
    titles = {work.key: work.title for work in workloads}
    console.print(
        "Targets, native door over qemu's mirror, by the median:", style="bold"
    )
    for target, median in verdicts(found):
        met = median >= target.least
        word = "[green]met[/]" if met else "[bold red]MISSED[/]"
        title = titles[target.workload]
        console.print(f"  {title}: {median:.2f}, wanted {target.least:.1f}: {word}")
    console.print()
    console.print(
        f"{about['cpu']}, {about['cores']} cores, kernel {about['kernel']}; "
        f"{about['nbdkit']}, libnbd {about['libnbd']}, {about['fio']}, {about['qemu']}"
    )
    for note in NOTES:
        console.print(f"- {note}")


def as_json(
    rounds: Rounds, workloads: Sequence[Workload], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything, raw figures included, for the file."""
    found = ratios(rounds, workloads)
    return {
        "machine": dict(about),
        "notes": list(NOTES),
        "workloads": [asdict(work) for work in workloads],
        "set_ups": {kind.key: kind.title for kind in KINDS},
        "rounds": [
            {
                work: {key: figures.as_dict() for key, figures in by_set_up.items()}
                for work, by_set_up in one.items()
            }
            for one in rounds
        ],
        "ratios": {
            work: {pair: asdict(spread) for pair, spread in pairs.items()}
            for work, pairs in found.items()
        },
        "targets": [
            {
                "workload": target.workload,
                "pair": "native/qemu",
                "least": target.least,
                "median": median,
                "met": median >= target.least,
            }
            for target, median in verdicts(found)
        ],
    }
