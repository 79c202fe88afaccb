# SPDX-License-Identifier: BSD-3-Clause
"""
The row over the kernel's nbd: ours against md RAID1 and DRBD, in a virtual machine.

md and DRBD need a kernel that has their modules, so vm_guest.py measures all of them
there, in one boot. The machine is the one of tests/vm: Debian's kernel on this
machine's root file system, with an emulated CPU. The tools of mdadm and DRBD are
unpacked beside the kernel and not installed: an installation pulls in udev, writes
their configuration and starts services, and a benchmark must do none of these to a
host.

The fifth, a relay, is no mirror: one copy, with socat in between, a process that passes
on whatever arrives. Any server in user space whose disk is elsewhere loses what the
relay loses against one copy; ours is such a server.

The others differ in what they write down, all of it in memory here, so that no sync
costs anything in itself:

- ours: the activity extents, by fdatasync, when a new one is written to, and a slot
  of the ring for each write; the state directory is on tmpfs.
- md: the write-intent bitmap's page, to both members, before the first write of a
  chunk, and cleared again some seconds after the last.
- DRBD: the activity log's block when a new extent is written to.
- one copy: nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .model import MIB, BenchError, Context, Measured

__all__ = ["PEERS", "gather", "parse", "run_vm"]

ROOT = Path(__file__).resolve().parent.parent
GUEST = Path(__file__).with_name("vm_guest.py")
SET_UPS = ("ours", "md", "drbd", "one_copy", "relay")
PEERS = SET_UPS[1:]
DEPTHS = (1, 16)
# Limit of each disk: six of them are in the guest's memory.
SIZE = 64 * MIB
# The emulator's own threads share the two cores with the guest, so a single round says
# little: use more rounds.
ROUNDS_FACTOR = 4
BOOT_S = 180.0
EACH_S = 15.0  # limit of a measurement in addition to its own time, on a busy machine


def run_vm(ctx: Context) -> Measured:
    """
    Boot the machine, measure, and return ours against each peer at each depth.

    Raises:
        BenchError: something that the machine needs is missing, or it did not
        finish; then the message has its output.
    """
    rounds = ctx.rounds * ROUNDS_FACTOR
    measurements = rounds * len(DEPTHS) * len(SET_UPS)
    timeout_s = BOOT_S + measurements * (ctx.seconds + EACH_S)
    options = {
        "rounds": rounds,
        "seconds": ctx.seconds,
        "size": min(ctx.size, SIZE),
        "depths": DEPTHS,
        "set_ups": SET_UPS,
    }
    ctx.say(f"booting; {measurements} measurements of {ctx.seconds:g} s in one boot")
    measured = gather(parse(_boot(options, timeout_s)), rounds)
    for number, figures in enumerate(measured.rounds):
        rates = (f"{key} {one['iops']:,.0f}/s" for key, one in figures.items())
        ctx.say(f"{number + 1}/{rounds}  {', '.join(rates)}")
    return measured


def _boot(options: Mapping[str, Any], timeout_s: float) -> str:
    # The machine is the tests', and skips if something is not possible.
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    import pytest
    from vm.kernel import unpacked
    from vm.vm import run_in_vm

    ram_disks = f"brd rd_nr=3 rd_size={options['size'] >> 10}"
    try:
        tools = {name: str(unpacked(name)) for name in ("mdadm", "drbd-utils")}
        done = run_in_vm(
            GUEST,
            timeout_s,
            [json.dumps({**options, "tools": tools})],
            modules=["nbd", "raid1", "drbd", ram_disks],
            cpus=2,
        )
    except pytest.skip.Exception as error:
        raise BenchError(str(error)) from None
    if done.returncode != 0:
        raise BenchError(
            f"the virtual machine's run ended with {done.returncode}:\n"
            f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
        )
    output: str = done.stdout
    return output


def parse(output: str) -> list[dict[str, Any]]:
    """Return the guest's measurements, in their order."""
    prefix = "measured "
    found: list[dict[str, Any]] = [
        json.loads(line.removeprefix(prefix))
        for line in output.splitlines()
        if line.startswith(prefix)
    ]
    return found


def gather(found: Sequence[Mapping[str, Any]], rounds: int) -> Measured:
    """
    Turn measurements into ratios, one value per round and depth.

    Raises:
        BenchError: one of them is missing.
    """
    measured = Measured()
    by_place = {(one["round"], one["depth"], one["set_up"]): one for one in found}
    for number in range(rounds):
        figures: dict[str, Any] = {}
        for depth in DEPTHS:
            for key in SET_UPS:
                one = by_place.get((number, depth, key))
                if one is None:
                    raise BenchError(
                        f"{key} QD{depth} of round {number + 1} is missing"
                    )
                figures[f"{key} QD{depth}"] = dict(one)
            ours = figures[f"ours QD{depth}"]["iops"]
            for peer in PEERS:
                value = ours / figures[f"{peer} QD{depth}"]["iops"]
                measured.add(f"qd{depth}_{peer}", value)
        measured.rounds.append(figures)
    measured.notes += [_medians(measured.rounds, depth) for depth in DEPTHS]
    measured.notes.append(
        "an emulated CPU, 2 of them, everything in the guest's memory: only the ratios "
        "mean something; context switches and CPU time are the whole guest's, fio "
        "included"
    )
    return measured


def _medians(rounds: Sequence[Mapping[str, Any]], depth: int) -> str:
    """Return each set-up's rate at this depth, and the cost of a request."""
    parts = []
    for key in SET_UPS:
        figures = [one[f"{key} QD{depth}"] for one in rounds]

        used = [one["used"] for one in figures]
        iops = statistics.median(one["iops"] for one in figures)
        switches = statistics.median(one["switches"] for one in used)
        cpu_us = statistics.median(one["machine"] for one in used)
        parts.append(
            f"{key} {iops:,.0f}/s with {switches:.1f} context switches and "
            f"{cpu_us:,.0f} µs of CPU a request"
        )
    return f"QD{depth}, medians: " + "; ".join(parts)
