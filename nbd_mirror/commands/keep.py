# SPDX-License-Identifier: BSD-3-Clause
"""
The keep files of a volume: what is there, and how one is read or removed.

They are files of this node alone, so no server is asked, and none has to run.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ..base.errors import ConfigError, MirrorError, MissingError, from_errno
from ..base.files import check_private
from ..base.units import iso_time
from ..volume import offline
from ..volume.config import VolumeConfig
from ..volume.keep_file import FOLDER, KeepHeader, KeepReader, keep_names
from ..volume.keep_image import KeepImage, was_written_since
from .keep_server import serve_image

__all__ = ["Kept", "delete", "kept_files", "open_image"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A keep file; without a *header* it cannot be read: *why*."""

    id: str
    bytes: int
    header: KeepHeader | None
    why: str = ""
    lost: int = 0  # records that cannot be found

    def dump(self) -> dict[str, object]:
        """Return it as JSON has it."""
        found: dict[str, object] = {"id": self.id, "bytes": self.bytes}
        if self.header is None:
            return found | {"error": self.why}
        header = self.header
        return found | {
            "node": header.node,
            "kept": header.kept,
            "time": iso_time(header.time),
            "generation": header.generation,
            "base": header.base,
            "regions": header.regions,
            "region_size": header.region_size,
            "reason": header.reason,
            "lost": self.lost,
        }


def kept_files(config: VolumeConfig) -> Iterator[Kept]:
    """Yield each keep file of this node, the oldest first; raises MirrorError."""
    for name in keep_names(config.state_dir):
        path = config.state_dir / FOLDER / name
        try:
            with KeepReader(path) as reader:
                yield Kept(name, reader.bytes, reader.header, lost=reader.lost)
        except MirrorError as error:
            size = path.stat().st_size if path.is_file() else 0
            yield Kept(name, size, None, error.message)


def _path(config: VolumeConfig, name: str) -> Path:
    names = keep_names(config.state_dir)
    if name not in names:
        there = f"there are {', '.join(names)}" if names else "there is none"
        raise MissingError(
            f"{config.name} has no keep file {name} here; {there}",
            "nbd-mirror keep CONFIG",
        )
    return config.state_dir / FOLDER / name


def delete(config: VolumeConfig, name: str) -> None:
    """
    Remove a keep file; what only it holds is lost.

    Raises:
        MissingError: there is none of that name. AccessError: another user's.
    """
    check_private(config.state_dir, "keep")
    path = _path(config, name)
    try:
        path.unlink()
    except OSError as error:
        raise from_errno(
            error.errno or errno.EIO, f"{path}: {error.strerror}"
        ) from None


def open_image(
    config: VolumeConfig,
    name: str,
    socket: Path,
    ready: Callable[[str], object],
    warn: Callable[[str], object],
) -> None:
    """
    Serve the disk as the losing side had it, read-only, until Ctrl-C.

    Args:
        ready: gets the URI once clients may connect.
        warn: gets each line about what is not as it was.
    """
    path = _path(config, name)
    with KeepReader(path) as reader:
        header = reader.header
        if header.volume != config.name:
            raise ConfigError(f"{path} is of volume {header.volume}")
        _warn_of(config, reader, warn)
        # Its errors are told here, and not by the program that serves it.
        KeepImage(reader, config.local, warn).close()
    uri = f"nbd+unix:///?socket={quote(str(socket))}"
    serve_image(path, config.local, socket, lambda: ready(uri))


def _warn_of(
    config: VolumeConfig, reader: KeepReader, warn: Callable[[str], object]
) -> None:
    record = offline.read_superblock(config).node
    if was_written_since(reader, record):
        warn(
            "this disk was written to since: the regions that were kept are as they "
            "were, the others are as they are now, so the whole is of no one instant"
        )
    if reader.lost:
        warn(
            f"the index is broken, and {reader.lost} regions are lost: reads of all "
            "regions that are not found fail"
        )
    elif reader.broken_index:
        warn("the index is broken; all regions were found without it")
