# SPDX-License-Identifier: BSD-3-Clause
"""
Local disks that fail for real: the engine gets the kernel's own error.

A `FuseDisk` is a file that nbdfuse makes of an nbdkit of ours (failing_disk.py), so
reads, writes and flushes fail when told to, sectors go bad, and the disk can be pulled
out, or hangs. A `FrozenDisk` is a file of a file system that is frozen when told to. A
`small_disk` is a tmpfs that is too small.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
from e2e.lib.clients import Load
from e2e.lib.harness import Site, copying

__all__ = [
    "FrozenDisk",
    "FuseDisk",
    "assert_whole",
    "local_of",
    "read_all",
    "resync_back",
    "small_disk",
    "take_over",
    "wait_local",
]

PLUGIN = Path(__file__).with_name("failing_disk.py")


class FuseDisk:
    """
    The local disk of *site*: its image, behind a disk that can fail.

    The image stays what the test compares; the volume gets the file in front of it.
    """

    def __init__(self, site: Site) -> None:
        support.requires_program("nbdkit", "nbdfuse", "fusermount3")
        support.requires(Path("/dev/fuse").exists(), "there is no /dev/fuse")
        self._site = site
        self._processes = site.processes
        self._socket = site.folder / "disk.sock"
        self._switch = site.folder / "switch"
        self._mount = site.folder / "disk"
        self.path = self._mount / "nbd"
        self._mount.mkdir()
        self._switch.mkdir()
        self._nbdkit: subprocess.Popen[bytes] | None = None
        self._nbdfuse: subprocess.Popen[bytes] | None = None
        self._processes.on_exit(self.unplug)
        site.keys["local"] = str(self.path)
        site.write_config()
        self.plug()

    def plug(self, image: Path | None = None) -> None:
        """Put a disk in: the site's image, or another *image* in its place."""
        assert self._nbdkit is None
        if image is not None:
            self._site.local = image
        self._socket.unlink(missing_ok=True)
        words: list[str | Path] = ["nbdkit", "-f", "-U", self._socket]
        words += ["python", PLUGIN, f"image={self._site.local}"]
        self._nbdkit = self._processes.start([*words, f"switch={self._switch}"])
        support.wait_listening(self._socket, "the disk's nbdkit")
        uri = f"nbd+unix:///?socket={self._socket}"
        self._nbdfuse = self._processes.start(["nbdfuse", self._mount, uri])
        support.wait_until(self.path.exists, "nbdfuse's file")

    def unplug(self) -> None:
        """Pull the disk out: what is under way on it fails, and the file is gone."""
        if self._nbdkit is None or self._nbdfuse is None:
            return
        self._processes.kill(self._nbdkit)
        self._processes.kill(self._nbdfuse)
        self._nbdkit = self._nbdfuse = None
        self._processes.run(["fusermount3", "-uz", self._mount], check=False)
        support.wait_until(lambda: not self._mounted(), "the unmount")

    def _mounted(self) -> bool:
        return f" {self._mount} " in Path("/proc/self/mounts").read_text()

    def fail(self, *kinds: str, error: str = "EIO") -> None:
        """Have every read, write or flush fail, as *kinds* say."""
        for kind in kinds:
            (self._switch / f".{kind}").write_text(error)
            (self._switch / f".{kind}").rename(self._switch / kind)
        self.forget()

    def mend(self) -> None:
        """Have the disk work again."""
        for one in self._switch.iterdir():
            one.unlink()

    def spoil(self, offset: int, length: int = 512) -> None:
        """Make a sector bad: it cannot be read before it was written again."""
        with (self._switch / "bad").open("a") as file:
            file.write(f"{offset} {length}\n")
        self.forget()

    @property
    def bad(self) -> str:
        """The sectors that are bad."""
        path = self._switch / "bad"
        return path.read_text() if path.exists() else ""

    def forget(self) -> None:
        """Drop what the page cache holds, so that the next read asks the disk."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def hang(self) -> None:
        """Have it answer nothing; a process that waits for it can be killed."""
        assert self._nbdfuse is not None
        support.freeze(self._nbdfuse.pid)

    def go_on(self) -> None:
        """Have it carry out the requests that came while it hung."""
        assert self._nbdfuse is not None
        self._nbdfuse.send_signal(signal.SIGCONT)


class FrozenDisk:
    """
    The local disk of *site*: a file of an ext4 of its own, on a loop device.

    While it is frozen, the kernel keeps any thread that writes, and no signal ends
    that.
    """

    def __init__(self, site: Site) -> None:
        support.requires(os.geteuid() == 0, "only root may mount a file system")
        support.requires_program("mkfs.ext4", "fsfreeze", "losetup")
        self._processes = site.processes
        self._mount = site.folder / "disk"
        self._mount.mkdir()
        image = site.folder / "disk.ext4"
        with image.open("wb") as file:
            file.truncate(2 * site.size + (16 << 20))
        self._run("mkfs.ext4", "-q", "-F", image)
        self._run("mount", "-o", "loop", image, self._mount)
        self._processes.on_exit(self._remove)
        self._frozen = False
        site.local = self._mount / "local.img"
        with site.local.open("wb") as file:
            file.truncate(site.size)
        site.keys["local"] = str(site.local)
        site.write_config()

    def _run(self, *command: str | Path) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self._processes.run(command, env={"PATH": path})

    def freeze(self) -> None:
        """Have every write wait."""
        self._run("fsfreeze", "-f", self._mount)
        self._frozen = True

    def thaw(self) -> None:
        """Let them go on."""
        self._run("fsfreeze", "-u", self._mount)
        self._frozen = False

    def _remove(self) -> None:
        if self._frozen:
            self.thaw()
        self._run("umount", "-l", self._mount)


def small_disk(site: Site, mib: int) -> Callable[[int], None]:
    """
    Put the local image on a tmpfs of *mib* MiB, too small for all of it.

    Returns:
        A function that gives it another size, in MiB.
    """
    support.requires(os.geteuid() == 0, "only root may mount a tmpfs")
    small = site.folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    site.processes.run([*mount, f"size={mib}m", "nbdm-test", small])
    site.processes.on_exit(lambda: site.processes.run(["umount", "-l", small]))
    site.local = small / "local.img"
    with site.local.open("wb") as file:
        file.truncate(site.size)
    site.keys["local"] = str(site.local)
    site.write_config()

    def resize(mib: int) -> None:
        site.processes.run([*mount, f"remount,size={mib}m", "nbdm-test", small])

    return resize


def local_of(site: Site) -> dict[str, Any]:
    """Return the local disk's part of the status."""
    found: dict[str, Any] = site.status()["local"]
    return found


def wait_local(
    site: Site, state: str, timeout_s: float | None = None
) -> dict[str, Any]:
    """
    Wait for a state of the local disk; whatever the state, it has its reason.

    Args:
        site: whose disk it is.
        state: that it is to have.
        timeout_s: as of `Site.wait_remote`.
    """
    last: dict[str, Any] = {}

    def holds() -> object:
        for secondary in site.secondaries:
            secondary.revive()
        last.update(local_of(site))
        return last["state"] == state

    try:
        support.wait_until(holds, f"local to be {state}", **copying(last, timeout_s))
    except pytest.fail.Exception as error:
        raise AssertionError(f"{error}; last seen: {last}") from None
    assert state == "ok" or last["reason"], last
    return last


def resync_back(site: Site, command: str = "resume") -> dict[str, Any]:
    """Take the local disk into use again, and wait until it misses nothing."""
    site.tell(command, "local")
    found = wait_local(site, "ok")
    assert found["dirty_bytes"] == 0
    return found


def read_all(site: Site, load: Load) -> None:
    """Fail unless a client reads every answered block."""
    handle = site.client()
    load.check(lambda offset, length: bytes(handle.pread(length, offset)))
    handle.shutdown()


def assert_whole(site: Site, load: Load) -> None:
    """Stop; fail unless both images are equal and hold every answered block."""
    load.stop()
    assert load.errors == []
    site.stop()
    site.assert_equal()
    load.check_file(site.local)
    load.check_file(site.dr.image)


def take_over(site: Site, fail: Callable[[], object], **options: int) -> Load:
    """Have the local disk fail under load; return the load once clients went on."""
    load = site.load(flush_every=5, **options)
    load.wait_for(50)
    fail()
    wait_local(site, "failed")
    load.wait_for(load.count + 50, "writes without local")
    assert load.errors == []
    return load
