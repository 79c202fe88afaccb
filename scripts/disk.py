# SPDX-License-Identifier: BSD-3-Clause
"""
The ways in which the demonstration uses the served volume as a disk.

It uses the kernel's own nbd if there is one; otherwise FUSE and a loop device, which
need no nbd in the kernel; and for users other than root nbdcopy and the ext4 tools,
which read and write a file system without mounting it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from stage import DemoError, Stage

from nbd_mirror.device import attach
from nbd_mirror.volume.config import load

__all__ = ["Disk", "choose_disk"]


class Disk(ABC):
    """How to format the volume, fill it, and read it back from an image."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    @abstractmethod
    def make_file_system(self) -> None:
        """Attach the volume and make a file system on it, ready for copies."""

    def prepare(self, tree: str, name: str) -> None:  # noqa: B027  mounts need none
        """Prepare the copy of *tree* to *name*."""

    @abstractmethod
    def copy_command(self, tree: str, name: str) -> str:
        """Return the command that copies *tree* to *name* and makes it durable."""

    @abstractmethod
    def unmount(self) -> None:
        """Unmount and detach."""

    @abstractmethod
    def read_image(self, image: str) -> None:
        """Make the file system on *image* readable below `back`."""

    def read_back_at(self, name: str) -> str:
        """Return the folder in which the copy *name* can be read back."""
        return f"back/{name}"

    def release_image(self) -> None:  # noqa: B027  what keeps nothing mounted
        """Undo read_image."""


class Mounted(Disk):
    """With a mount; a subclass decides what is mounted."""

    def copy_command(self, tree: str, name: str) -> str:
        """Copy, then wait for the disk."""
        return f"cp -a {tree} mnt/{name} && sync -f mnt"

    def read_image(self, image: str) -> None:
        """Mount *image* read-only."""
        stage = self._stage
        stage.on_exit(lambda: stage.unmount("back"))
        stage.run(f"mkdir back && mount -o ro,loop {image} back")

    def release_image(self) -> None:
        """Unmount it."""
        self._stage.run("umount back")

    def _mount(self, device: str, options: str = "") -> None:
        stage = self._stage
        stage.run(f"mkfs.ext4 -q -F {device}")
        stage.on_exit(lambda: stage.unmount("mnt"))
        stage.run(f"mkdir mnt && mount {options}{device} mnt")


class KernelDisk(Mounted):
    """The kernel's own nbd: /dev/nbdN."""

    _attached = False

    def make_file_system(self) -> None:
        """Attach, format, mount."""
        stage = self._stage
        stage.on_exit(self._detach)
        self._attached = True
        stage.run("nbd-mirror attach demo.toml")
        device = attach.attached_device(load(str(stage.folder / "demo.toml")))
        if not device:
            raise DemoError("attached, but no device was noted")
        self._mount(device)

    def unmount(self) -> None:
        """Unmount, detach."""
        self._stage.run("umount mnt")
        self._stage.run("nbd-mirror detach demo.toml")
        self._attached = False

    def _detach(self) -> None:
        if self._attached:
            self._stage.quietly("nbd-mirror detach demo.toml")


class FuseDisk(Mounted):
    """nbdfuse makes a file of the volume, a loop device makes a disk of the file."""

    def make_file_system(self) -> None:
        """Start nbdfuse, format, mount."""
        stage = self._stage
        stage.say(
            "This kernel has no nbd driver: FUSE and a loop device do it as well."
        )
        self._start_fuse()
        self._mount("disk/nbd", "-o loop ")

    def unmount(self) -> None:
        """Unmount both."""
        self._stage.run("umount mnt")
        self._stage.run("umount disk   # ends nbdfuse")

    def _start_fuse(self) -> None:
        """Show the volume as a file, disk/nbd."""
        stage = self._stage
        (stage.folder / "disk").mkdir()
        uri = stage.uri("demo.sock")
        process = stage.start(f"nbdfuse disk '{uri}'")
        stage.on_exit(lambda: stage.unmount("disk"))
        stage.wait_until(
            lambda: (
                process.poll() is not None or (stage.folder / "disk" / "nbd").exists()
            ),
            "nbdfuse",
        )
        if process.poll() is not None:
            raise DemoError("nbdfuse ended: without FUSE there is no way to mount here")


class UnmountedDisk(Disk):
    """ext4's own tools fill and read images, nbdcopy writes them to the volume."""

    def make_file_system(self) -> None:
        """Say what is different; mke2fs makes and fills the file system in one step."""
        self._stage.say(
            "Not mounting: mke2fs and debugfs fill a file system in a file,"
        )
        self._stage.say("and nbdcopy writes it to the volume.")

    def prepare(self, tree: str, name: str) -> None:
        """Give the first tree to mke2fs, and add the second with debugfs."""
        if name == "first":
            self._stage.run(f"mke2fs -q -t ext4 -d {tree} fs.img 640M")
            return
        script = self._stage.folder / "second.debugfs"
        script.write_text(debugfs_script(tree, name))
        self._stage.run("debugfs -w -f second.debugfs fs.img >second.log 2>&1")

    def copy_command(self, tree: str, name: str) -> str:  # noqa: ARG002
        """Write the image, which already contains *tree*."""
        uri = self._stage.uri("demo.sock")
        # The new volume is zero: holes of the image need no write.
        options = "--flush --destination-is-zero" if name == "first" else "--flush"
        return f"nbdcopy {options} fs.img '{uri}'"

    def unmount(self) -> None:
        """Do nothing: nbdcopy has ended."""

    def read_image(self, image: str) -> None:
        """Copy the files out of *image*."""
        self._stage.run(
            f"mkdir back && debugfs -R 'rdump / back' {image} >back.log 2>&1"
        )

    def read_back_at(self, name: str) -> str:
        """Return the folder; the first tree became the root."""
        return "back" if name == "first" else f"back/{name}"


def debugfs_script(tree: str, name: str) -> str:
    """Return debugfs commands that write the files of *tree* below /*name*."""
    lines = []
    for folder, _, files in os.walk(tree):
        where = Path("/", name, os.path.relpath(folder, tree))
        lines += [f'mkdir "{where}"', f'cd "{where}"']
        for file in files:
            source = Path(folder, file)
            if source.is_file() and not source.is_symlink():
                lines.append(f'write "{source}" "{file}"')
    return "\n".join(lines) + "\n"


def choose_disk(stage: Stage, *, mount: bool) -> Disk:
    """Return the best way for this machine and user."""
    if not mount:
        return UnmountedDisk(stage)
    if os.geteuid() != 0:
        raise DemoError("mounting needs root: use sudo, or --no-mount")
    if Path("/sys/block/nbd0").exists() or stage.quietly("modprobe nbd"):
        return KernelDisk(stage)
    return FuseDisk(stage)
