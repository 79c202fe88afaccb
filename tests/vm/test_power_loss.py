# SPDX-License-Identifier: BSD-3-Clause
"""
Power is lost at every flush: dm-log-writes under all disks, in a virtual machine.

guest_power.py works on a mirror and leaves the log; here the disks are made anew for
the instants before and after flushes, each as if its own cache had been lost, kept, or
lost in part, and judged:

- every region that differs between local and remote is dirty once the state directory
  was recovered;
- the file system on the local disk is whole, and what fsync answered for is there;
- the same on the remote's disk while it was in sync: a flush was for both.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitarray import bitarray
from vm.checked import Answered, merge
from vm.judge import DamageError, Judge, differing
from vm.log_writes import BLOCK, Content, Disk, Entry, in_order, read_log
from vm.power_layout import BASE_SIZE, LOG_SIZE, SLICES
from vm.vm import run_in_vm

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vm")]

GUEST = Path(__file__).with_name("guest_power.py")
DEADLINE_S = 900
STEPS = 25
# The kernel's own last mark, when the device is removed.
END = "dm-log-writes-end"
# So many are judged within the budget of a minute or two, others in each run;
# NBDM_VM_INSTANTS=0 judges every flush and FUA write, which takes half an hour.
MAX_INSTANTS = int(os.environ.get("NBDM_VM_INSTANTS", "60"))


def disk_at(offset: int) -> str:
    """Name the disk that lies at an offset of the logged device."""
    return next(
        name for name, (start, size) in SLICES.items() if start <= offset < start + size
    )


def sampled(entries: list[Entry], seed: str) -> set[int]:
    """Return the entries to judge at: flushes and FUA writes, evenly spread."""
    marks = [i for i, entry in enumerate(entries) if entry.mark == "created"]
    assert marks, "the guest never came to create the volume"
    points = [
        i
        for i, entry in enumerate(entries)
        if i > marks[0] and (entry.flush or entry.fua)
    ]
    step = max(1, len(points) // MAX_INSTANTS) if MAX_INSTANTS else 1
    first = random.Random(f"instants {seed}").randrange(step)
    print(
        f"{len(entries)} entries, {len(points)} flushes and FUA writes, "
        f"each {step}. from {first}"
    )
    return set(points[first::step])


class Replay:
    """All the disks, carried from entry to entry, and judged."""

    def __init__(self, folder: Path, seed: str) -> None:
        self.judge = Judge(folder)
        self.disks = {
            name: Disk(name, start, size) for name, (start, size) in SLICES.items()
        }
        self.answered: Answered = {}
        self.phase = ""
        self.compared = 0
        self.differed = 0
        self._choose = random.Random(seed)
        self._least: tuple[int, bitarray] | None = None

    def apply(self, entry: Entry) -> None:
        """Carry out an entry."""
        if entry.mark:
            self.phase = entry.mark
            return
        for disk in self.disks.values():
            if disk.holds(entry):
                disk.apply(entry)
                if disk.name == "answers" and entry.data:
                    merge(self.answered, entry.data.rstrip(b"\0"))

    def judge_now(self) -> None:
        """Fail if power must not be lost now."""
        local, far = self.disks["local"], self.disks["far"]
        for dirty in self._dirty_sets():
            for one, other in self._pairs(local, far):
                differ = differing(one, other)
                self.compared += 1
                self.differed += bool(differ)
                missed = sorted(region for region in differ if not dirty[region])
                if missed:
                    raise DamageError(f"regions differ, not dirty: {missed[:9]}")
        if self.phase in ("created", ""):
            return  # no file system yet
        disks = [local] if self.phase == "outage" else [local, far]
        for disk in disks:
            for content in (disk.least, disk.most, disk.some(self._choose)):
                self.judge.check_raw(content, self.answered)
            self.judge.check_files(
                self._choose.choice((disk.least, disk.some(self._choose))),
                self.answered,
            )

    def _dirty_sets(self) -> Iterator[bitarray]:
        """Yield what recovery finds dirty: the least, and one other way to lose it."""
        state = self.disks["state"]
        if self._least is None or self._least[0] != state.flushes:
            self._least = state.flushes, self.judge.recover(state.least)
        yield self._least[1]
        yield self.judge.recover(
            self._choose.choice((state.most, state.some(self._choose)))
        )

    def _pairs(self, local: Disk, far: Disk) -> Iterator[tuple[Content, Content]]:
        """Yield what the two sides may hold, the most different first."""
        yield local.most, far.least
        yield local.least, far.most
        yield local.least, far.least
        yield local.some(self._choose), far.some(self._choose)


def check_replay(replay: Replay, base: Path) -> None:
    """Fail unless replaying all of the log gives what the device holds."""
    with base.open("rb") as device:
        for disk in replay.disks.values():
            for number, data in disk.most.items():
                device.seek(disk.start + number * BLOCK)
                assert data == device.read(BLOCK), f"{disk.name}, block {number}"


def judge_log(log: Path, folder: Path, seed: str) -> Replay:
    """Replay a log and judge it at the sampled instants; raises DamageError."""
    entries = in_order(read_log(log), disk_at)
    instants = sampled(entries, seed)
    replay = Replay(folder, seed)
    for i, entry in enumerate(entries):
        try:
            if i in instants:
                replay.judge_now()  # as it was under way
            replay.apply(entry)
            if i in instants:
                replay.judge_now()  # as it was done
        except DamageError as error:
            raise AssertionError(
                f"power lost at entry {i} of {len(entries)}, after mark "
                f'"{replay.phase}": {error}'
            ) from error
    return replay


@pytest.mark.timeout(DEADLINE_S + 300)
def test_power_lost_at_any_flush_leaves_nothing_unknown(tmp_path: Path) -> None:
    """At each instant every difference is dirty, and nothing answered is lost."""
    seed = os.environ.get("NBDM_VM_SEED", str(random.getrandbits(32)))
    print(f"NBDM_VM_SEED={seed}")
    base, log = tmp_path / "base.img", tmp_path / "log.img"
    for path, size in ((base, BASE_SIZE), (log, LOG_SIZE)):
        with path.open("wb") as image:
            image.truncate(size)
    done = run_in_vm(
        GUEST,
        DEADLINE_S,
        [seed, str(STEPS)],
        modules=["nbd", "virtio_blk", "dm-log-writes"],
        disks=[base, log],
        cpus=2,
    )
    print(done.stdout)
    print(done.stderr[-4000:])
    results = dict(re.findall(r"^RESULT (\S+) (.*)$", done.stdout, re.MULTILINE))
    assert done.returncode == 0
    assert results["done"] == "yes"

    replay = judge_log(log, tmp_path, seed)
    print(
        f"{replay.judge.recoveries} recoveries, {replay.compared} pairs of disks "
        f"({replay.differed} differed), {replay.judge.checks} file systems, "
        f"{len(replay.answered)} blocks answered for"
    )
    assert replay.phase == END
    check_replay(replay, base)
    assert replay.differed, "local and remote were never caught apart"
