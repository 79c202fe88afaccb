# SPDX-License-Identifier: BSD-3-Clause
"""
The demonstration: a real file system on a mirrored disk whose secondary is killed.

It is also a test: it checks each claim that it prints. Exit status: 0 all checks
passed; 1 one failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disk import Disk, choose_disk
from stage import DemoError, Stage, interruptible

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.base.units import format_size
from nbd_mirror.volume import control

STEPS = 9
SIZE = "640MiB"
# The trees to copy: they exist after scripts/setup, and are not too large.
TREES = ("/usr/lib/gcc", "/usr/include", "/usr/lib/python3", "/usr/share/doc")
MORE_TREES = ("/usr/lib/python3.11", "/usr/share/perl", "/usr/share/locale")
MIB = 1 << 20
NEEDED = 2048 * MIB  # in the temporary folder: three images, and copies of the trees
KILL_AFTER = 16 * MIB  # bytes that have reached the secondary
PROGRAMS = (
    "nbdkit",
    "nbdcopy",
    "nbdfuse",
    "mke2fs",
    "e2fsck",
    "debugfs",
    "cmp",
    "sha256sum",
)

CONFIG = """\
name = "demo"
size = "{size}"
local = "{folder}/local.img"
state = "{folder}/state"
listen = "unix:{folder}/demo.sock"
late_write_window = "5s"

[[remote]]
name = "far"
uri = "{uri}"
"""


class Demo:
    """The steps of the demonstration, one or two per method, on *disk*."""

    def __init__(self, stage: Stage, disk: Disk) -> None:
        self._stage = stage
        self._disk = disk
        self._tree = pick_tree(TREES, 40, 220)
        self._more = pick_tree(MORE_TREES, 10, 100)

    def play(self) -> None:
        """Run all steps."""
        self.start_secondary()
        self.create_volume()
        self.serve()
        self.make_file_system()
        self.lose_secondary()
        self.write_on()
        self.catch_up()
        self.stop()
        self.prove()

    # --- the set-up ---

    def start_secondary(self) -> None:
        """Step: a plain NBD server with an image file, as on another host."""
        stage = self._stage
        stage.step('A secondary, "far": a plain nbdkit with an image file')
        stage.run("truncate -s 640M local.img far.img")
        self._start_nbdkit("nbdkit -f -P far.pid -U far.sock file", "")

    def _start_nbdkit(self, command: str, options: str) -> None:
        stage = self._stage
        pid_file = stage.folder / "far.pid"
        pid_file.unlink(missing_ok=True)
        process = stage.start(f"{command} far.img{options}", log="far.log")
        stage.wait_until(
            lambda: process.poll() is not None or bool(read(pid_file)),
            "the secondary's pid file",
        )
        if process.poll() is not None:
            raise DemoError(f"nbdkit ended: {read(stage.folder / 'far.log')}")

    def create_volume(self) -> None:
        """Step: the configuration, and the logs."""
        stage = self._stage
        stage.step("A volume: one TOML file, demo.toml")
        config = stage.folder / "demo.toml"
        uri = stage.uri("far.sock")
        config.write_text(CONFIG.format(size=SIZE, folder=stage.folder, uri=uri))
        stage.show_file(config)
        stage.say(
            "late_write_window: what was under way when a connection died might still "
            "reach the secondary's disk later, so it stays dirty for this long after a "
            "reconnect and is copied again. Here the server is dead for certain: 5s "
            "instead of 30s only shortens the demo."
        )
        stage.run("nbd-mirror create demo.toml")

    def serve(self) -> None:
        """Step: the server, in sync."""
        stage = self._stage
        stage.step("Serve it; the first resync makes both disks equal")
        stage.on_exit(self._stop_server)
        stage.run("nbd-mirror serve demo.toml")
        stage.run("nbd-mirror wait demo.toml --for in_sync --timeout 30s")

    def make_file_system(self) -> None:
        """Step: mkfs, mount."""
        self._stage.step("Use it as a disk: ext4 on it")
        self._disk.make_file_system()

    # --- the outage ---

    def lose_secondary(self) -> None:
        """Step: kill the secondary while files are written."""
        stage = self._stage
        stage.step("Copy files, and kill the secondary meanwhile")
        stage.say(f"{self._tree} is {describe_tree(self._tree)}.")
        self._sum(self._tree, "first.sums")
        self._disk.prepare(self._tree, "first")
        self._kill_while_copying(self._disk.copy_command(self._tree, "first"))
        stage.run("nbd-mirror wait demo.toml --for out_of_sync --timeout 10s")
        stage.run("nbd-mirror status demo.toml")
        dirty = self._remote()["dirty_bytes"]
        stage.check(
            dirty > 0,
            f"{format_size(dirty)} may differ: all it missed or had not flushed",
            "nothing is dirty, though the secondary missed writes",
        )

    def _kill_while_copying(self, command: str) -> None:
        stage = self._stage
        image = stage.folder / "far.img"
        before = image.stat().st_blocks * 512
        copy = stage.start(command)
        stage.wait_until(
            lambda: (
                copy.poll() is not None
                or image.stat().st_blocks * 512 - before > KILL_AFTER
            ),
            "the first files to reach the secondary",
            timeout_s=60,
        )
        busy = copy.poll() is None
        stage.run("kill -9 $(cat far.pid)")
        stage.say("Writes are held for 2 s, in case it comes back; then they go on.")
        stage.finish(copy, command, timeout_s=90)
        stage.check(
            busy,
            "the copy went on and ended without an error",
            "the copy ended before the secondary could be killed",
        )

    def write_on(self) -> None:
        """Step: use the disk without its secondary."""
        stage = self._stage
        stage.step("Go on writing: the disk works, the map remembers")
        before = self._remote()["dirty_bytes"]
        self._sum(self._more, "second.sums")
        self._disk.prepare(self._more, "second")
        stage.run(self._disk.copy_command(self._more, "second"), timeout_s=90)
        stage.run("nbd-mirror inspect demo.toml")
        after = self._remote()["dirty_bytes"]
        stage.check(
            after > before,
            f"dirty grew from {format_size(before)} to {format_size(after)}",
            "the dirty map did not grow, though more was written",
        )

    def catch_up(self) -> None:
        """Step: the secondary is back, over a slow link."""
        stage = self._stage
        stage.step("The secondary is back: only what it missed is copied")
        stage.say("Its link is slow now, so that there is something to see.")
        dirty = self._remote()["dirty_bytes"]
        # This takes about six seconds, because nbdkit lets the first two pass at once.
        megabits = min(max(dirty // MIB, 40), 180)
        stage.run("rm far.sock   # the killed server left it behind")
        self._start_nbdkit(
            "nbdkit -f -P far.pid -U far.sock --filter=rate file",
            f" rate={megabits}M",
        )
        stage.run("nbd-mirror watch demo.toml --until in_sync", timeout_s=60)
        stage.run("grep resync_done state/serve.log | tail -n 1")
        copied = resynced_bytes(read(stage.folder / "state" / "serve.log"))
        # Clients may have written a little more since: ext4's own maintenance.
        stage.check(
            self._remote()["dirty_bytes"] == 0 and copied <= dirty + 32 * MIB,
            f"in_sync: {format_size(copied)} were copied, of {SIZE}",
            f"{copied} bytes were copied, {dirty} were dirty; or some still are",
        )

    # --- the end ---

    def stop(self) -> None:
        """Step: unmount and stop everything."""
        stage = self._stage
        stage.step("Unmount, and stop cleanly")
        self._disk.unmount()
        stage.run("nbd-mirror stop demo.toml")
        stage.run("kill $(cat far.pid)")

    def prove(self) -> None:
        """Step: the secondary's image is the disk."""
        stage = self._stage
        stage.step("The proof: what is on the secondary's image?")
        stage.run("cmp local.img far.img")
        size = (stage.folder / "local.img").stat().st_size
        stage.proven(f"both images are equal, byte for byte: {size:,} bytes")
        stage.run("e2fsck -fn far.img")
        stage.proven("its file system is sound")
        self._disk.read_image("far.img")
        for name, source in (("first", self._tree), ("second", self._more)):
            where = self._disk.read_back_at(name)
            stage.run(f"(cd {where} && sha256sum --quiet -c) < {name}.sums")
            count = len(read(stage.folder / f"{name}.sums").splitlines())
            stage.proven(f"{count:,} files are those of {source}")
        self._disk.release_image()

    # --- helpers ---

    def _sum(self, tree: str, name: str) -> None:
        self._stage.run(
            f"(cd {tree} && find . -type f -exec sha256sum {{}} +) > {name}"
        )

    def _remote(self) -> dict[str, Any]:
        status = control.call(self._stage.folder / "state", "status")
        remote: dict[str, Any] = status["remotes"][0]
        return remote

    def _stop_server(self) -> None:
        try:
            pid = int(control.call(self._stage.folder / "state", "ping", 2.0)["pid"])
        except MirrorError:
            return  # stopped, as it should be, or never started
        if not self._stage.quietly("nbd-mirror stop demo.toml"):
            os.kill(pid, 9)


def read(path: Path) -> str:
    """Return the file's text; "" if there is none."""
    return path.read_text(errors="replace") if path.exists() else ""


def resynced_bytes(log: str) -> int:
    """Return how many bytes the last resync made clean, from the server's log."""
    found = re.findall(r"resync_done: (\d+) bytes", log)
    if not found:
        raise DemoError("the server's log has no resync_done")
    return int(found[-1])


def files_of(tree: str) -> Iterator[os.stat_result]:
    """Yield the stat result of each regular file below *tree*."""
    for folder, _, names in os.walk(tree):
        for name in names:
            facts = Path(folder, name).lstat()
            if stat.S_ISREG(facts.st_mode):
                yield facts


def pick_tree(candidates: tuple[str, ...], least: int, most: int) -> str:
    """Return the first tree of *least* to *most* MiB; raise DemoError if none is."""
    for tree in candidates:
        if least * MIB <= sum(one.st_size for one in files_of(tree)) <= most * MIB:
            return tree
    raise DemoError(
        f"none of {', '.join(candidates)} has {least} to {most} MiB of files to copy"
    )


def describe_tree(tree: str) -> str:
    """Return how many files and bytes *tree* has."""
    sizes = [one.st_size for one in files_of(tree)]
    return f"{len(sizes):,} files, {format_size(sum(sizes))}"


def check_programs() -> None:
    """Raise DemoError if a program is missing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        raise DemoError(f"not installed: {', '.join(missing)}; scripts/setup says why")


def say_room() -> None:
    """Say if there may be too little room; what was made is removed by now."""
    folder = tempfile.gettempdir()
    room = shutil.disk_usage(folder).free
    if room < NEEDED:
        text = f"  try: it needs up to {format_size(NEEDED)} in {folder}, which has"
        more = f"{format_size(room)} of room; TMPDIR names another folder"
        print(text, more, file=sys.stderr)


def main() -> int:
    """Play the demonstration."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--no-mount", action="store_true", help="fill the file system unmounted"
    )
    options = parser.parse_args()
    interruptible()
    try:
        check_programs()
        with Stage(STEPS) as stage:
            stage.say("A disk that survives the loss of its secondary.")
            stage.say(f"All happens in {stage.folder}, which is removed at the end.")
            Demo(stage, choose_disk(stage, mount=not options.no_mount)).play()
            stage.say("")
            stage.proven(f"all as it should be, in {stage.elapsed_s:.0f} s")
    except (DemoError, MirrorError, OSError) as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        say_room()
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; all is cleaned up", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
