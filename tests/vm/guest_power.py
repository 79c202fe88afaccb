# SPDX-License-Identifier: BSD-3-Clause
"""
usage: guest_power.py SEED STEPS        (inside the virtual machine, as root)

A workload on a mirror whose disks all lie on one dm-log-writes device: /dev/vda, the
log on /dev/vdb. A client writes files and fsyncs; raw blocks all over the volume make
extents go cold; the secondary is away for a while and is caught up. What the disks
would hold if power was lost at any instant is judged afterwards, from the log.
"""

from __future__ import annotations

import os
import random
import sys
import traceback
from pathlib import Path

from vm.checked import Answered, Recorder, Writer, make_block
from vm.inside import Mirror, note, result, run, wait_until
from vm.power_layout import (
    BASE_SIZE,
    EXTENT,
    FS_SIZE,
    NR_EXTENTS,
    RAW,
    REGION,
    SLICES,
    raw_offset,
)

BASE, LOG = "/dev/vda", "/dev/vdb"
WORK = Path("/run/vm-power")
LOGGED = "vmlog"
AT_ONCE = 100  # raw blocks a record: it has 4 KiB

os.environ["DM_DISABLE_UDEV"] = "1"  # there is none: make the nodes yourself


def disk(name: str) -> Path:
    """Return the device of a slice."""
    return Path(f"/dev/mapper/vm{name}")


def make_disks() -> None:
    """Make the logged device and its slices."""
    table = f"0 {BASE_SIZE // 512} log-writes {BASE} {LOG}"
    run("dmsetup", "create", LOGGED, "--table", table)
    for name, (start, size) in SLICES.items():
        table = f"0 {size // 512} linear /dev/mapper/{LOGGED} {start // 512}"
        run("dmsetup", "create", f"vm{name}", "--table", table)


def remove_disks() -> None:
    """Remove them; the log is complete then."""
    for name in SLICES:
        run("dmsetup", "remove", f"vm{name}")
    run("dmsetup", "remove", LOGGED)


def mark(words: str) -> None:
    """Put a mark into the log."""
    note(words)
    run("dmsetup", "message", LOGGED, "0", f"mark {words}")


class Client:
    """All that writes to the volume."""

    def __init__(self, mirror: Mirror, seed: int) -> None:
        self.recorder = Recorder(disk("answers"))
        self.files = Writer(mirror.point, self.recorder, seed)
        self._device = mirror.device
        self._stamp = 0

    def raw(self, first: int, last: int) -> None:
        """Write and fsync a block in each of the extents from *first* to *last*."""
        self._stamp += 1
        covered: Answered = {}
        fd = os.open(self._device, os.O_WRONLY)
        try:
            for extent in range(first, last):
                content = make_block(RAW, extent, self._stamp)
                os.pwrite(fd, content, raw_offset(extent))
                covered[RAW, extent] = self._stamp
            os.fsync(fd)
        finally:
            os.close(fd)
        items = list(covered.items())
        for begin in range(0, len(items), AT_ONCE):
            self.recorder.add(dict(items[begin : begin + AT_ONCE]))


def work(mirror: Mirror, client: Client, steps: int) -> None:
    """Do everything that a mirror's disks are written for."""
    first = FS_SIZE // EXTENT
    client.files.run(steps)
    client.raw(first, NR_EXTENTS // 2)
    client.files.run(steps)
    # Now more are active than there is room for.
    client.raw(NR_EXTENTS // 2, NR_EXTENTS)
    client.raw(first, first + 40)
    client.files.run(steps)

    mark("outage")
    mirror.kill_secondary()
    mirror.wait_for("out_of_sync")
    client.files.run(steps)
    # The first ones go cold while they are dirty: then only the map knows.
    client.raw(first, first + 60)
    client.raw(first + 60, NR_EXTENTS)
    client.files.run(steps)
    mirror.start_secondary()

    def caught_up() -> bool:
        client.files.step()
        mirror.revive_secondary()
        return bool(mirror.remote()["state"] == "in_sync")

    # Without a rest: each look is a write that the resync is to meet.
    wait_until(caught_up, "the remote to be caught up", rest=0)
    mark("in_sync")
    client.files.run(steps)
    client.raw(first, first + 20)


def main() -> None:
    """Run it all, and leave the log."""
    seed, steps = int(sys.argv[1]), int(sys.argv[2])
    random.seed(seed)
    note("disks")
    make_disks()
    run(
        "mkfs.ext4",
        "-q",
        "-b",
        "4096",
        "-J",
        "size=4",
        "-E",
        "nodiscard",
        disk("state"),
    )
    state = WORK / "state"
    state.mkdir(parents=True)
    run("mount", disk("state"), state)
    mirror = Mirror(
        *(WORK / "v", disk("local"), disk("far"), "/dev/nbd0"),
        state=state / "v",
        region_size=f"{REGION}B",
    )
    try:
        mirror.start_secondary()
        mirror.create("far")
        mark("created")
        mirror.serve()
        mirror.wait_served()
        mirror.wait_for("in_sync")
        mirror.attach()
        note("mkfs")
        run(
            *("mkfs.ext4", "-q", "-b", "4096", "-J", "size=4"),
            *("-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"),
            *(mirror.device, str(FS_SIZE // 4096)),
        )
        mirror.mount()
        mark("mounted")
        client = Client(mirror, seed)
        work(mirror, client, steps)
        client.recorder.close()
        note("stop")
        mirror.unmount()
        mirror.detach()
        mirror.stop()
        mirror.kill_secondary()
        mark("stopped")
        run("umount", state)
        remove_disks()
        print(mirror.logs())
        result("done", "yes")
    except Exception:
        traceback.print_exc()
        print(mirror.logs(), flush=True)
        raise SystemExit(1) from None
    note("done")


if __name__ == "__main__":
    main()
