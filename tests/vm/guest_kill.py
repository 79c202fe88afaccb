# SPDX-License-Identifier: BSD-3-Clause
"""
usage: guest_kill.py SEED ROUNDS        (inside the virtual machine, as root)

The server is killed under a mounted ext4 and a mounted xfs while a client writes.
After each kill it is served again, the device attached afresh and mounted, and then
every fsync that was answered must have lasted, and fsck must find nothing. At the end
both sides are compared. Both volumes take their turns at the same time.

A kill hits at a random instant while requests are under way. In some rounds the
secondary dies with the server and is away when it is served again; in others the
server dies while it resyncs.
"""

from __future__ import annotations

import os
import random
import sys
import time
import traceback
from pathlib import Path

from vm.checked import Answered, Recorder, Writer, damage, merge, records
from vm.inside import Mirror, note, result, run, wait_until

WORK = Path("/run/vm-kill")
SIZES = {"ext4": "64M", "xfs": "320M"}  # mkfs.xfs makes none below 300 MB
FSCK = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n")}


class Victim:
    """A volume with a file system, its writer, and what the writer was answered."""

    def __init__(self, fs: str, number: int, choose: random.Random) -> None:
        folder = WORK / fs
        folder.mkdir(parents=True)
        local, far = folder / "local.img", folder / "far.img"
        self.fs = fs
        self.mirror = Mirror(folder, local, far, f"/dev/nbd{number}")
        self.answers = folder / "answers"
        self.answers.touch()
        self.answered: Answered = {}
        self.stamp = 0
        self.kills = 0
        self._choose = choose
        self._writer = 0
        self._merged = 0
        run("truncate", "-s", SIZES[fs], local)
        # The blocks of the file system are to be those of the device.
        if fs == "ext4":
            run("mkfs.ext4", "-q", "-b", "4096", "-J", "size=4", local)
        else:
            run("mkfs.xfs", "-q", "-s", "size=4096", local)
        run("cp", "--sparse=always", local, far)
        self.mirror.start_secondary()
        self.mirror.create("far")

    # --- the writer ---

    def start_writer(self) -> None:
        """Start the client in a process of its own: an I/O that hangs hangs it."""
        self.stamp += 1_000_000
        seed = self._choose.getrandbits(32)
        self._writer = os.fork()
        if self._writer == 0:
            try:
                Writer(
                    self.mirror.point, Recorder(self.answers), seed, self.stamp
                ).run()
            except OSError:
                os._exit(0)
            os._exit(1)

    def nr_answered(self) -> int:
        """Return how many fsyncs were answered so far."""
        return sum(1 for _ in records(self.answers))

    def writer_ended(self) -> bool:
        """Tell whether the writer has seen the server's death."""
        pid, status = os.waitpid(self._writer, os.WNOHANG)
        if pid and status:
            raise RuntimeError(f"the writer ended with status {status}")
        return pid != 0

    # --- a round ---

    def come_up(self) -> None:
        """Attach and mount once served, and check all that was ever answered."""
        self.mirror.wait_served()
        self.mirror.attach()
        self.mirror.mount()
        self.check_answers()
        # The log is replayed, so fsck may judge what is there.
        self.mirror.unmount()
        note(f"{self.fs}: {self._merged} answers lasted")
        self.fsck(Path(self.mirror.device))
        note(f"{self.fs}: fsck found nothing")

    def check_answers(self) -> None:
        """Fail unless every answered fsync lasted."""
        lines = list(records(self.answers))
        for line in lines[self._merged :]:
            merge(self.answered, line)
        self._merged = len(lines)
        wrong = list(damage(self.mirror.point, self.answered))
        if wrong:
            raise RuntimeError(f"{self.fs}: answered and lost: {wrong[:5]}")

    def fsck(self, disk: Path) -> None:
        """Fail unless fsck finds nothing, and changes nothing."""
        run(*FSCK[self.fs], disk)

    def kill(self, *, secondary: bool) -> None:
        """Kill the server at a random instant, once the writer is well under way."""
        more = self.nr_answered() + self._choose.randint(5, 40)
        wait_until(lambda: self.nr_answered() >= more, "the writer to get on")
        # At any instant: a state to wait for would always be the same one.
        time.sleep(self._choose.random() * 0.05)
        self.mirror.kill()
        self.kills += 1
        note(f"{self.fs}: killed after {self.nr_answered()} answers")
        if secondary:
            self.mirror.kill_secondary()

    def go_down(self) -> None:
        """After the kill: the client gets its error, everything is let go."""
        # What was under way waits for the device's time limit, more than a minute,
        # unless the device is told; `nbd-mirror detach` refuses while it is mounted.
        run("nbd-client", "-d", self.mirror.device)
        wait_until(self.writer_ended, "the writer to be told")
        note(f"{self.fs}: the writer knows")
        self.mirror.unmount()


def serve(victims: list[Victim], *, secondary: bool) -> None:
    """Serve all, attach, check."""
    for one in victims:
        if secondary:
            one.mirror.revive_secondary()
        # All at once: a start is many seconds of an emulated CPU.
        one.mirror.serve()
    for one in victims:
        one.come_up()


def one_round(victims: list[Victim], kind: str) -> None:
    """Serve, check, write, kill."""
    serve(victims, secondary=kind != "resync")
    for one in victims:
        one.mirror.mount()
        one.start_writer()
    for one in victims:
        if kind == "resync":
            # It was away since the last kill: now it comes back, and the server
            # is killed in, or soon after, the resync.
            one.mirror.start_secondary()
        one.kill(secondary=kind == "both")
    for one in victims:
        one.go_down()


def finish(victim: Victim) -> None:
    """Let it catch up, stop cleanly, and compare the sides."""
    victim.mirror.wait_for("in_sync")
    dirty = victim.mirror.remote()["dirty_bytes"]
    victim.mirror.detach()
    victim.mirror.stop()
    victim.mirror.kill_secondary()
    run("cmp", victim.mirror.local, victim.mirror.far)
    victim.fsck(victim.mirror.far)
    result(f"{victim.fs}_dirty", dirty)
    result(f"{victim.fs}_kills", victim.kills)
    result(f"{victim.fs}_answered", victim.nr_answered())
    result(f"{victim.fs}_equal", "yes")


def main() -> None:
    """Run all rounds."""
    seed, rounds = int(sys.argv[1]), int(sys.argv[2])
    choose = random.Random(seed)
    victims = [Victim(fs, i, choose) for i, fs in enumerate(FSCK)]
    try:
        for number in range(rounds):
            kind = ("server", "both", "resync")[number % 3]
            note(f"round {number}: {kind}")
            one_round(victims, kind)
        note("the last start")
        serve(victims, secondary=True)
        for one in victims:
            finish(one)
        result("done", "yes")
    except Exception:
        traceback.print_exc()
        for one in victims:
            print(one.mirror.logs(), flush=True)
        raise SystemExit(1) from None
    note("done")


if __name__ == "__main__":
    main()
