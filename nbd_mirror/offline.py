# SPDX-License-Identifier: BSD-3-Clause
"""
What the logs say of a volume that no server runs.

It has the form of a server's status, so that whatever shows or reads one need
not know the difference, but says "stopped" and never more than is stored: after
a crash the dirty bytes on disk are a lower bound, and the reason says so.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .config import VolumeConfig
from .errors import FormatError, MirrorError, MissingError, UnsupportedError
from .mapview import DirtyMaps, open_map
from .model import Peek, RemoteStatus, VolumeStatus
from .state import LocalFacts, LocalState, RemoteState, describe_local

__all__ = ["load_core", "map_paths", "read_superblock", "stopped_status"]


def load_core() -> Any:
    """
    Import the engine's wrapper, which needs the compiled C code.

    Raises:
        UnsupportedError: it was not built for this Python.
    """
    try:
        from . import core
    except ImportError as error:
        raise UnsupportedError(
            f"the engine's C code cannot be loaded: {error}", "scripts/setup"
        ) from None
    return core


def map_paths(config: VolumeConfig) -> list[Path]:
    """Return the files of the dirty maps: local's first, then the remotes'."""
    paths = [_map_path(config, remote.name) for remote in config.remotes]
    local = _map_path(config, "local")
    # A volume that an earlier version made has none before it is served again.
    return [local, *paths] if local.exists() else paths


def _map_path(config: VolumeConfig, disk: str) -> Path:
    return config.state_dir / f"dirty.{disk}"


def read_superblock(config: VolumeConfig) -> Peek:
    """
    Read the volume's superblock, without a lock.

    Raises:
        MissingError: it was not created. FormatError: the superblock is garbled,
        or of another volume.
    """
    try:
        peek: Peek = load_core().peek(config.state)
    except MissingError:
        raise MissingError(
            f"volume {config.name} has no state in {config.state}: "
            "it was not created yet",
            "nbd-mirror create CONFIG",
        ) from None
    if peek.name != config.name:
        raise FormatError(
            f"{config.state} is the state of volume {peek.name}, not of {config.name}",
            "correct `state` or `name` in the configuration",
        )
    return peek


def stopped_status(config: VolumeConfig) -> dict[str, Any]:
    """
    Return the status of a volume without a server, from its superblock and maps.

    Raises:
        MissingError, FormatError: see read_superblock.
    """
    peek = read_superblock(config)
    clean = peek.volume.clean
    reason = "no server runs for this volume"
    if not clean:
        reason += (
            "; the last one did not stop cleanly: the next one recovers, "
            "and may find more dirty than is shown"
        )
    return {
        "volume": config.name,
        "uuid": peek.volume.uuid,
        "size": peek.volume.size,
        "state": "stopped",
        "reason": reason,
        "hint": "nbd-mirror serve CONFIG",
        "local": _local(config, peek.volume),
        "door": None,
        "pid": None,
        "clients": 0,
        "inflight": 0,
        "active_extents": 0,
        "persists": {"activity": 0, "superblock": 0, "dirty": 0},
        "policy": config.policy,
        "fenced_reads": config.fenced_reads,
        "region_size": peek.volume.region_size,
        "generation": peek.volume.generation,
        "clean_stop": clean,
        "remotes": [
            _remote(config, remote, peek.volume.size) for remote in peek.remotes
        ],
    }


def _local(config: VolumeConfig, volume: VolumeStatus) -> dict[str, Any]:
    dirty, reason, hint = 0, "", ""
    status = volume.local
    if status.state is not LocalState.OK:
        try:
            with open_map(_map_path(config, "local")) as maps:
                dirty = maps.bytes_of(maps.dirty_regions, volume.size)
        except MirrorError as error:
            dirty, reason = volume.size, f"{error}; the next start takes all as missed"
        # As if a remote was there: without a server nobody knows.
        facts = LocalFacts(status.state, dirty, sources=1, reason=status.reason)
        why, hint = describe_local(facts)
        reason = reason or why
    return {
        "path": config.local,
        "state": status.state.value,
        "reason": reason,
        "hint": hint,
        "dirty_bytes": dirty,
        "errors": 0,
        "repaired_regions": 0,
        "copied_bytes": 0,
        "resync": None,
        "last_error": "",
        "since": "",
    }


def _remote(
    config: VolumeConfig, remote: RemoteStatus, volume_size: int
) -> dict[str, Any]:
    reason, hint = remote.reason, ""
    counts = {"dirty_bytes": 0, "late_bytes": 0, "unflushed_bytes": 0}
    try:
        with open_map(_map_path(config, remote.name)) as maps:
            counts = _counts(maps, volume_size)
    except MirrorError as error:
        # Rule 9: a map that cannot be trusted means all dirty, and saying so.
        counts["dirty_bytes"] = volume_size
        reason = f"{error}; the next start takes all of it as dirty"
    if remote.state is RemoteState.IN_SYNC and remote.assumed:
        reason = "assumed: in sync on the operator's word, no full resync has proven it"
        hint = f"nbd-mirror invalidate CONFIG {remote.name} (copies it all)"
    uri = ""
    with contextlib.suppress(MirrorError):
        uri = config.remote(remote.name).uri
    return {
        "name": remote.name,
        "uri": uri,
        "state": remote.state.value,
        "reason": reason,
        "hint": hint,
        "connected": False,
        **counts,
        "assumed": remote.assumed,
        "paused": remote.paused,
        "resync": None,
        "last_error": "",
        "since": datetime.fromtimestamp(remote.since, UTC).isoformat(),
    }


def _counts(maps: DirtyMaps, size: int) -> dict[str, int]:
    return {
        "dirty_bytes": maps.bytes_of(maps.dirty_regions, size),
        "late_bytes": maps.bytes_of(maps.late_regions, size),
        "unflushed_bytes": maps.bytes_of(maps.unflushed_regions, size),
    }
