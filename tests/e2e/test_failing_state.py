# SPDX-License-Identifier: BSD-3-Clause
"""
A state directory whose disk really fails: fsync and msync answer EIO.

ext4 over a loop device over nbdfuse, and nbdkit's error filter below it: from the
moment a file appears no write reaches the disk. The volume is failed and stays so; a
start on the unmended disk does not serve as if nothing had happened; mended, the
start recovers as after lost power and both sides become equal.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.lib.clients import dirty_set, error_of
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]


class FailingDisk:
    """A file system at *point*, on a disk whose writes fail on demand."""

    def __init__(self, folder: Path, processes: support.Processes) -> None:
        support.requires_program("nbdfuse", "mkfs.ext4", "losetup", "fusermount3")
        support.requires(os.geteuid() == 0, "mounting needs root")
        support.requires(Path("/dev/loop-control").exists(), "no loop devices")
        self.point = folder / "mnt"
        self._switch = folder / "fail"
        self._window = folder / "window"
        self._loop = ""
        self._processes = processes
        disk, sock = folder / "disk", folder / "disk.sock"
        with disk.open("wb") as file:
            file.truncate(24 * MIB)
        self._run("mkfs.ext4", "-q", "-F", disk)
        words: list[str | Path] = ["nbdkit", "-f", "-U", sock]
        words += ["--filter=error", "file", disk]
        errors = ["pwrite=EIO", "pwrite-rate=1", f"pwrite-file={self._switch}"]
        processes.start([*words, *(f"error-{word}" for word in errors)])
        support.wait_listening(sock, "the failing disk")
        self.point.mkdir()
        self._window.touch()
        processes.start(["nbdfuse", self._window, f"nbd+unix:///?socket={sock}"])
        support.wait_until(lambda: self._window.stat().st_size, "nbdfuse")
        processes.on_exit(self._close)
        self.mount()

    def _run(self, *command: str | Path, check: bool = True) -> str:
        return self._processes.run(command, check=check).stdout.strip()

    def mount(self) -> None:
        """Mount it; what a failure left in its journal is mended."""
        self._loop = self._run("losetup", "-f", "--show", self._window)
        self._run("fsck.ext4", "-p", self._loop, check=False)
        self._run("mount", self._loop, self.point)

    def unmount(self) -> None:
        """Unmount it; what could not be written is lost with the page cache."""
        subprocess.run(["umount", self.point], check=False, timeout=30)
        if self._loop:
            self._run("losetup", "-d", self._loop)
        self._loop = ""

    def _close(self) -> None:
        self.mend()
        self.unmount()
        self._run("fusermount3", "-u", self._window)

    def break_(self) -> None:
        """From now on no write reaches it."""
        self._switch.touch()

    def mend(self) -> None:
        """Let writes reach it again."""
        self._switch.unlink(missing_ok=True)


@pytest.mark.parametrize("log", ["activity", "dirty map"])
def test_state_disk_fails_and_volume_stays_failed(
    new_site: Sites, run_dir: Path, processes: support.Processes, log: str
) -> None:
    """A failed fsync or msync is final: EIO, no bit cleared, and said after a start."""
    disk = FailingDisk(run_dir, processes)
    site = new_site(state=str(disk.point / "state"))
    (disk.point / "state").mkdir()
    site.state = disk.point / "state"
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    handle.flush()
    handle.pwrite(b"b" * 4096, MIB)  # unflushed, in an extent that is active

    disk.break_()
    where = 24 * MIB  # a new extent has to be made durable
    if log == "dirty map":
        site.dr.kill()  # what it missed has to be
        where = 2 * MIB
    assert errno.EIO == error_of(handle.pwrite, b"c" * 4096, where)
    assert errno.EIO == error_of(handle.pwrite, b"c" * 4096, 28 * MIB)
    status = site.status()
    assert status["state"] == "failed"
    assert "durable" in status["reason"] or "Input/output" in status["reason"]
    assert handle.pread(4096, 0) == b"a" * 4096
    before = dirty_set(site.map_path())
    if log == "dirty map":
        site.dr.start()  # back again: nothing may be copied and called clean
        support.wait_until(site.dr.answers, "the secondary")
    disk.mend()  # too late: what was dropped is not written by a second fsync
    assert errno.EIO == error_of(handle.pwrite, b"c" * 4096, where)
    assert before <= dirty_set(site.map_path())
    assert site.status()["state"] == "failed"

    site.kill()
    disk.break_()
    done = site.cli("serve", str(site.config), check=False)
    assert done.returncode not in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    disk.unmount()
    disk.mend()
    disk.mount()
    site.dr.kill()
    site.serve()
    site.assert_covered()
    assert site.region_size * len(dirty_set(site.map_path())) >= 4 * MIB
    site.dr.start()
    site.wait_in_sync()
    site.client().pwrite(b"d" * 4096, 24 * MIB)
    site.stop()
    site.assert_equal()
