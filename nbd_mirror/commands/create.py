# SPDX-License-Identifier: BSD-3-Clause
"""
Make a volume's state directory.

The engine formats the logs and holds the lock that excludes a second process. This
module first checks for users' mistakes: no local disk, a folder of another program, a
volume that is being served.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
from collections.abc import Collection
from pathlib import Path

from ..base.errors import (
    BusyError,
    ConfigError,
    ExistsError,
    FormatError,
    MirrorError,
    MissingError,
    from_errno,
)
from ..base.files import check_private, is_there
from ..base.hints import quote
from ..base.units import format_size
from ..rules.state import LocalState
from ..volume.client import serving_pid
from ..volume.config import STATE_FILES, VolumeConfig, check_links, to_params
from ..volume.loops import check_remotes
from ..volume.offline import check_not_served, load_core, read_superblock

__all__ = ["create_volume"]

_OURS = (*STATE_FILES, ".*")  # in the directory, also of an interrupted create


def create_volume(
    config: VolumeConfig, assume: Collection[str], *, force: bool
) -> None:
    """
    Format the state directory; the local disk is not changed.

    Each node of a volume has a state of its own, without data until one is promoted.

    Args:
        config: of the volume.
        assume: names of remotes that are copies already, as the operator says.
        force: overwrite an existing state.
    Raises:
        ExistsError: there is a state, or something else in the directory.
        BusyError: the volume is served. MissingError: no local disk.
        ConfigError: it has another size, or *assume* names no remote.
        UnsupportedError: it has more than two nodes.
    """
    params = to_params(config, assume)
    core = load_core()
    check_links(config)
    check_remotes(config)
    if is_there(config.state_dir / "superblock"):
        _check_local_is_whole(config)
    else:
        check_not_served(config)
    _check_local(config)
    made = _make_folder(config, force)
    superblock = config.state_dir / "superblock"
    replaces = superblock.exists()
    try:
        core.create(params, force=force)
    except MirrorError as error:
        if replaces and not superblock.exists():
            error.message += (
                "; the state that was there is given up already, and the local disk "
                "was not touched: until a create succeeds there is no volume"
            )
        if made:
            with contextlib.suppress(OSError):
                config.state_dir.rmdir()  # fails, rightly, if it is not empty
        if isinstance(error, ExistsError):
            # With force, create refuses if local has failed since the check.
            error.hint = _bring_back(config) if force else _force(config)
        raise


def _force(config: VolumeConfig) -> str:
    forgets = "forgets what the remotes miss: all dirty"
    if config.nodes:
        forgets = (
            "it has no data then, and the other node takes it only after `replace`"
        )
    return f"nbd-mirror create CONFIG --force ({forgets})"


def _check_local_is_whole(config: VolumeConfig) -> None:
    """
    Check that local misses no answered write, even with force.

    A new volume takes local as the source, so data that only the remotes have would be
    lost.
    """
    try:
        peek = read_superblock(config)
    except MirrorError:
        return  # no volume, or an unreadable one: other checks handle that
    if peek.volume.local.state is not LocalState.OK:
        raise ExistsError(
            f"refuses to make {config.local} the source: it misses writes that were "
            "answered while it had failed, and that only the remotes have",
            _bring_back(config),
        )


def _bring_back(config: VolumeConfig) -> str:
    return (
        "nbd-mirror serve CONFIG, then nbd-mirror resume CONFIG local or "
        "nbd-mirror invalidate CONFIG local\n"
        "or, to throw those writes away: "
        f"rm {quote(f'{config.state}/superblock')}"
    )


def _check_local(config: VolumeConfig) -> None:
    local, quoted = Path(config.local), quote(config.local)
    try:
        status = local.stat()
    except (FileNotFoundError, NotADirectoryError):
        size = config.size and format_size(config.size, exact=True).removesuffix("iB")
        hint = f"truncate -s {size.removesuffix('B')} {quoted}" if size else ""
        if is_there(config.state_dir / "superblock") and config.nodes:
            hint = "bring the disk back: the state of this node is that disk's"
        elif is_there(config.state_dir / "superblock"):
            uri = quote(config.remotes[0].uri)
            hint = (
                f"if it was lost, copy it back first: nbdcopy {uri} {quoted}, then "
                "nbd-mirror create CONFIG --force"
            )
        raise MissingError(f"the local disk {local} does not exist", hint) from None
    except OSError as error:
        raise from_errno(error.errno or 0, f"{local}: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"the local disk {local} is a folder")
    is_file = stat.S_ISREG(status.st_mode)
    if not is_file and not stat.S_ISBLK(status.st_mode):
        raise ConfigError(
            f"the local disk {local} is neither a file nor a block device"
        )
    if is_file and status.st_size < max(config.size, 1):
        raise ConfigError(
            f"the local disk {local} has {status.st_size} bytes, "
            f"the volume needs {max(config.size, 1)}",
            f"truncate -s {config.size} {quoted}" if config.size else "",
        )


def _make_folder(config: VolumeConfig, force: bool) -> bool:
    """Make the directory, 0700, or check an existing one; return whether it is new."""
    folder = config.state_dir
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise from_errno(
            error.errno or 0,
            f"the state directory {folder} cannot be made: {error.strerror}",
        ) from None
    else:
        return True
    if not os.path.isdir(folder):  # noqa: PTH112  is_dir raises where we may not look
        raise ExistsError(f"the state directory's path {folder} is no folder")
    check_private(folder, "create")
    pid = serving_pid(config)
    if pid is not None:
        raise BusyError(
            f"volume {config.name} is served by process {pid}; its state is in use",
            "nbd-mirror stop CONFIG",
        )
    _check_owner(config)
    if not force:
        _check_contents(config)
    return False


def _check_owner(config: VolumeConfig) -> None:
    """Refuse to overwrite the state of another volume or node, even with force."""
    try:
        read_superblock(config)
    except FormatError as error:
        if "is the state of " in error.message:
            raise
    except MirrorError:
        pass  # none, or an unreadable one: --force is for that


def _check_contents(config: VolumeConfig) -> None:
    folder = config.state_dir
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise from_errno(error.errno or 0, f"{folder}: {error.strerror}") from None
    if "superblock" in names:
        raise ExistsError(
            f"refuses to overwrite the volume in {folder} without --force",
            _force(config),
        )
    foreign = [
        name for name in names if not any(fnmatch.fnmatch(name, ours) for ours in _OURS)
    ]
    if foreign:
        raise ExistsError(
            f"refuses to use {folder} without --force: "
            f"it holds other files, such as {sorted(foreign)[0]}",
            "an empty folder for `state`, or --force (leaves those files alone)",
        )
