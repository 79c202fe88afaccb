# SPDX-License-Identifier: BSD-3-Clause
"""
Judges what the disks of a mirror hold after lost power.

Recovery is the real one: the state directory is taken out of its file system, after
the journal was replayed, and the engine opens it as another boot of the machine would.
Nothing is mounted: e2fsck and debugfs read the images.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bitarray import bitarray
from e2e.lib.oracle import PAGE, crc32c
from vm.checked import Answered, damage, stamp_of
from vm.log_writes import BLOCK, Content, save
from vm.power_layout import FS_SIZE, LOCAL_SIZE, RAW, REGION, STATE_SIZE, raw_offset

from nbd_mirror.volume import config
from nbd_mirror.volume.config import to_params
from nbd_mirror.volume.core import Engine
from nbd_mirror.volume.mapview import open_map

__all__ = ["DamageError", "Judge", "differing"]

ZEROES = bytes(BLOCK)
IDENTITY_SESSION = 2560  # its offset in a slot: docs/FORMAT.md


class DamageError(AssertionError):
    """What may never be found after lost power."""


def differing(left: Content, right: Content) -> set[int]:
    """Return the regions in which two disks differ."""
    return {
        number * BLOCK // REGION
        for number in left.keys() | right.keys()
        if left.get(number, ZEROES) != right.get(number, ZEROES)
    }


def run(*words: str | Path, ok: tuple[int, ...] = (0,)) -> None:
    """Run a tool of e2fsprogs; any other exit code is damage."""
    done = subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    )
    if done.returncode not in ok:
        raise DamageError(
            f"{words[0]}: exit code {done.returncode}\n{done.stdout[-2000:]}"
        )


def strange(superblock: Path) -> None:
    """
    Make a superblock forget which local disk is its own.

    The maps are judged here, whatever the disk holds that the engine is given. A
    slot that is torn stays so.
    """
    content = bytearray(superblock.read_bytes())
    for at in (0, PAGE):
        page = content[at : at + PAGE]
        crc = page[12:16]
        page[12:16] = bytes(4)
        if crc != crc32c(bytes(page)).to_bytes(4, "little"):
            continue
        page[IDENTITY_SESSION : IDENTITY_SESSION + 8] = bytes(8)
        page[12:16] = crc32c(bytes(page)).to_bytes(4, "little")
        content[at : at + PAGE] = page
    superblock.write_bytes(content)


class Judge:
    """
    Looks at disks in *folder*, which should be a fast place.

    Attributes:
        recoveries: how many times a state directory was recovered.
        checks: how many file systems were checked.
    """

    def __init__(self, folder: Path) -> None:
        self.recoveries = 0
        self.checks = 0
        self._folder = folder
        self._image = folder / "image"
        self._files = folder / "files"
        # Nothing of it is read but samples, and these are not believed: `strange`.
        self._local = folder / "local.img"
        with self._local.open("wb") as local:
            local.truncate(LOCAL_SIZE)
        path = folder / "v.toml"
        path.write_text(
            f'name = "v"\nsize = "adopt"\nlocal = "{self._local}"\n'
            f'region_size = "{REGION}B"\nstate = "{self._files / "v"}"\n'
            f'listen = "unix:{folder}/v.sock"\n'
            '[[remote]]\nname = "far"\nuri = "nbd+unix:///?socket=/none"\n'
        )
        self._config = config.load(path)

    def _take_out(self, content: Content, size: int) -> Path:
        """
        Replay the journal of a file system, check it, and return its files.

        DamageError: the journal cannot be replayed, or fsck finds something.
        """
        save(content, self._image, size)
        # Preening replays the journal and drops orphans, as a mount does, and says
        # 4 to anything more. What it left must be without fault.
        run("e2fsck", "-p", self._image, ok=(0, 1))
        run("e2fsck", "-fn", self._image)
        shutil.rmtree(self._files, ignore_errors=True)
        self._files.mkdir()
        run("debugfs", "-R", f"rdump / {self._files}", self._image)
        return self._files

    def recover(self, state: Content) -> bitarray:
        """Return the dirty map after a start on this state."""
        self.recoveries += 1
        folder = self._take_out(state, STATE_SIZE)
        strange(folder / "v" / "superblock")
        with Engine(to_params(self._config)):
            pass
        with open_map(folder / "v" / "dirty.far") as maps:
            return maps.dirty.copy()

    def check_files(self, disk: Content, answered: Answered) -> None:
        """Fail unless the volume's file system is whole and has what was answered."""
        self.checks += 1
        inside = {n: data for n, data in disk.items() if n < FS_SIZE // BLOCK}
        folder = self._take_out(inside, FS_SIZE)
        files = {key: stamp for key, stamp in answered.items() if key[0] != RAW}
        wrong = list(damage(folder, files))
        if wrong:
            raise DamageError(f"answered and lost: {wrong[:5]}")

    @staticmethod
    def check_raw(disk: Content, answered: Answered) -> None:
        """Fail unless the disk has every raw block that was answered for."""
        wrong = list(lost_raw(disk, answered))
        if wrong:
            raise DamageError(f"answered and lost: {wrong[:5]}")


def lost_raw(disk: Content, answered: Answered) -> Iterator[str]:
    """Yield the raw blocks that a disk has lost."""
    for (file, extent), stamp in answered.items():
        if file == RAW:
            content = disk.get(raw_offset(extent) // BLOCK, ZEROES)
            found = stamp_of(content, RAW, extent)
            if found is None or found < stamp:
                yield f"raw block of extent {extent}: answered {stamp}, found {found}"
