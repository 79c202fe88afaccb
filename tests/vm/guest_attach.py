# SPDX-License-Identifier: BSD-3-Clause
"""
usage: guest_attach.py SEED        (inside the virtual machine, as root)

Adopted disks whose content was made with sectors of 512 bytes: an XFS, which only a
kernel refuses to mount from larger blocks, and a table of partitions, which only a
kernel cuts. Then the server is stopped and started, and killed and started, under the
mounted XFS, while a client writes: the client may see no error.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from vm.checked import Answered, Recorder, Writer, damage, merge, records
from vm.inside import Mirror, note, result, run, wait_until

WORK = Path("/run/vm-attach")
SECTORS = Path("/sys/block")


def block_size(mirror: Mirror) -> int:
    """Return the size of the device's blocks, as the kernel has it."""
    name = Path(mirror.device).name
    return int((SECTORS / name / "queue" / "logical_block_size").read_text())


def make(name: str, size: str, number: int) -> Mirror:
    """Make a volume whose disks are still empty."""
    folder = WORK / name
    folder.mkdir(parents=True)
    local, far = folder / "local.img", folder / "far.img"
    run("truncate", "-s", size, local)
    # The shortest time-out that the kernel is given: what is under way when the
    # server is killed is sent again only then.
    return Mirror(folder, local, far, f"/dev/nbd{number}", deadline="2s")


def bring_up(mirror: Mirror) -> None:
    """Serve a volume, its content being on both disks."""
    run("cp", "--sparse=always", mirror.local, mirror.far)
    mirror.start_secondary()
    mirror.create("far")
    mirror.serve()


def partitions(mirror: Mirror) -> str:
    """Attach a disk with a GPT; return the sizes of its partitions, in sectors."""
    mirror.wait_served()
    result("gpt_chosen", mirror.attach().block)
    result("gpt_block_size", block_size(mirror))
    folders = sorted((SECTORS / Path(mirror.device).name).glob("nbd*p*/size"))
    found = ",".join(path.read_text().strip() for path in folders)
    mirror.detach()
    mirror.stop()
    return found


def blocks_of_xfs(mirror: Mirror) -> None:
    """Attach it in every way; it can be mounted but with 4096-byte blocks."""
    mirror.wait_served()
    choice = mirror.attach("4096")
    result("warning", bool(choice.warning))
    result("asked_block_size", block_size(mirror))
    mirror.detach()
    result("remembered_block_size", mirror.attach().block)
    try:
        mirror.mount()
        mirror.unmount()
        result("mounts_with_4096", "yes")
    except RuntimeError:
        result("mounts_with_4096", "no")
    mirror.detach()
    result("xfs_chosen", mirror.attach("auto").block)
    result("xfs_block_size", block_size(mirror))
    mirror.mount()


class Client:
    """A process that writes and records every answered fsync."""

    def __init__(self, mirror: Mirror, seed: int) -> None:
        self._mirror = mirror
        self._answers = WORK / "answers"
        self._answers.touch()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                Writer(mirror.point, Recorder(self._answers), seed, 0).run()
            except OSError as error:
                note(f"the writer was told: {error}")
            os._exit(1)

    def answered(self) -> int:
        """Return how many fsyncs were answered."""
        return sum(1 for _ in records(self._answers))

    def get_on(self, count: int) -> None:
        """Return once so many more are answered; fail if the writer has ended."""
        more = self.answered() + count

        def reached() -> bool:
            pid, _ = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                raise RuntimeError("the writer got an error")
            return self.answered() >= more

        wait_until(reached, "the writer to get on")

    def end(self) -> None:
        """End it, and fail unless every answer lasted."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        answered: Answered = {}
        for line in records(self._answers):
            merge(answered, line)
        wrong = list(damage(self._mirror.point, answered))
        if wrong:
            raise RuntimeError(f"answered and lost: {wrong[:5]}")


def restarts(mirror: Mirror, choose: random.Random) -> None:
    """Restart the server under the mounted file system, planned and not."""
    client = Client(mirror, choose.getrandbits(32))
    for how in ("stop", "stop", "kill"):
        client.get_on(choose.randint(5, 30))
        # At any instant: a state to wait for would always be the same one.
        time.sleep(choose.random() * 0.05)
        begun = time.monotonic()
        if how == "stop":
            mirror.stop()
        else:
            mirror.kill()
        note(f"{how}: the server is gone after {client.answered()} answers")
        mirror.serve()
        mirror.wait_served()
        client.get_on(5)
        note(f"{how}: the writer gets on after {time.monotonic() - begun:.1f} s")
        result(f"survived_{how}", "yes")
    client.end()
    result("answered", client.answered())


def main() -> None:
    """Do it all."""
    choose = random.Random(int(sys.argv[1]))
    xfs, gpt = make("xfs", "320M", 0), make("gpt", "16M", 1)
    try:
        run("mkfs.xfs", "-q", "-s", "size=512", xfs.local)
        words = "label: gpt\n,4M\n,1M\n,\n"
        (WORK / "table").write_text(words)
        run("sh", "-c", f"sfdisk -q {gpt.local} <{WORK}/table")
        bring_up(xfs)
        bring_up(gpt)
        result("partitions", partitions(gpt))
        blocks_of_xfs(xfs)
        restarts(xfs, choose)
        xfs.unmount()
        run("xfs_repair", "-n", xfs.device)
        xfs.wait_for("in_sync")
        xfs.detach()
        xfs.stop()
        xfs.kill_secondary()
        run("cmp", xfs.local, xfs.far)
        result("done", "yes")
    except Exception:
        traceback.print_exc()
        print(xfs.logs(), gpt.logs(), flush=True)
        raise SystemExit(1) from None
    note("done")


if __name__ == "__main__":
    main()
