# SPDX-License-Identifier: BSD-3-Clause
"""
The status of a volume without a server, from its logs.

It is made of the same facts as a server's. Its state is "stopped", and it never says
more than is stored: after a crash the dirty bytes on disk are a lower bound, and the
reason says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base import processes, strangers, unix
from ..base.errors import (
    BusyError,
    FormatError,
    MirrorError,
    MissingError,
    UnsupportedError,
)
from ..base.files import is_there, read_plain
from ..base.hints import quote
from ..base.listen import Listen
from ..rules.state import Facts, LocalFacts, LocalState, RemoteState
from .config import VolumeConfig
from .control import peer
from .mapview import DirtyMaps, open_map
from .model import Peek, RemoteStatus, VolumeStatus
from .node_stopped import stopped_node
from .report import LocalView, RemoteView, report
from .status import Status

__all__ = [
    "check_not_served",
    "load_core",
    "lock_holder",
    "mapped_disks",
    "open_disk_map",
    "read_superblock",
    "silent_server",
    "stopped_status",
]

LOCKS = Path("/proc/locks")
CONNECT_S = 1.0
_ALL = 1 << 64  # more regions than any volume has
_MADE_ANEW = "nbd-mirror serve CONFIG (makes a new one, all dirty)"


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


def lock_holder(state_dir: Path) -> int | None:
    """
    Return the process that holds the volume's lock, or None.

    The kernel is asked, because an attempt to take the lock might keep a server from
    starting.
    """
    try:
        content, _ = read_plain(state_dir, "lock", 32)
        pid, lock = int(content), (state_dir / "lock").lstat()
        lines = LOCKS.read_text().splitlines()
    except (OSError, ValueError):
        return None
    # Do not compare device numbers: some file systems show another one there. Do not
    # rely on the file's content alone: its owner may try to mislead root.
    held = any(
        fields[1] == "FLOCK"
        and fields[4] == str(pid)
        and fields[5].rpartition(":")[2] == str(lock.st_ino)
        for fields in map(str.split, lines)
        if len(fields) > 5
    )
    return pid if held and _has_open(pid, lock) else None


def _has_open(pid: int, lock: os.stat_result) -> bool:
    """
    Return whether the process has the lock's file open.

    It may hold a lock on a file with the same number in another file system.
    """
    try:
        return (lock.st_dev, lock.st_ino) in _open_locks(pid)
    except PermissionError:
        return True  # another user's, which this user cannot kill either
    except OSError:
        return False  # it has ended


def _open_locks(pid: int) -> set[tuple[int, int]]:
    """Return device and number of each file `lock` that the process has open."""
    # After its first thread has ended, that has no files, though another may hang.
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    return {found for task in tasks for found in _open_locks_of(task)}


def _open_locks_of(task: Path) -> Iterator[tuple[int, int]]:
    fds: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # it may just end
        fds = list((task / "fd").iterdir())
    for fd in fds:
        with contextlib.suppress(FileNotFoundError):  # it may just be closed
            # Do not look at other files: a disk may hang.
            if fd.readlink().name.removesuffix(" (deleted)") == "lock":
                found = fd.stat()
                yield found.st_dev, found.st_ino


def silent_server(config: VolumeConfig) -> tuple[str, str] | None:
    """Return why a server that has the volume may not answer, and what helps."""
    pid = lock_holder(config.state_dir)
    if pid is None:
        return _server_of_another_state(config)
    return (
        f"process {pid} holds the volume, but does not answer on {config.state}/"
        "control: it starts or ends just now, hangs, or the socket was removed",
        f"wait a moment; if it stays so, kill -TERM {pid} (a clean stop), then "
        "nbd-mirror serve CONFIG",
    )


def _server_of_another_state(config: VolumeConfig) -> tuple[str, str] | None:
    """Return the same for a server whose state directory was replaced or removed."""
    pid = _listening(config.listen)
    if not pid or not _may_serve(pid, config):
        return None
    ours = None
    with contextlib.suppress(OSError):
        lock = (config.state_dir / "lock").lstat()
        ours = lock.st_dev, lock.st_ino
    try:
        locks = _open_locks(pid)
    except OSError:
        return None
    if not locks or ours in locks:
        return None  # it starts, or ends
    return (
        f"process {pid} listens on {config.listen}, but has another state directory "
        f"than {config.state}: if it is the volume's server, the directory was "
        "replaced or removed under it, and only this process knows what the disks miss",
        "if so, put back the directory that it was started with\n"
        f"or, if it is lost, {_make_anew(config, f'kill -TERM {pid}', ' --force')}",
    )


def _may_serve(pid: int, config: VolumeConfig) -> bool:
    """
    Return whether the volume's server may be the process that listens.

    Any user may take a TCP port while no server does. A unix socket is in a folder that
    its owner protects.
    """
    if config.listen.path is not None:
        return True
    users = {0, os.geteuid()}
    with contextlib.suppress(OSError):  # removed, which is why we are asked
        users.add(config.state_dir.stat().st_uid)
    try:
        return processes.real_user(pid) in users
    except OSError:
        return False  # it has ended


def mapped_disks(config: VolumeConfig) -> list[str]:
    """Return the disks that have a dirty map: local first, then the copies."""
    copies = [copy.name for copy in config.copies]
    # A volume of an earlier version has none before it is served again.
    return ["local", *copies] if is_there(_map_path(config, "local")) else copies


def _map_path(config: VolumeConfig, disk: str) -> Path:
    return config.state_dir / f"dirty.{disk}"


def read_superblock(config: VolumeConfig) -> Peek:
    """
    Read the volume's superblock, without a lock.

    Raises:
        MissingError: it was not created. FormatError: the superblock is garbled,
        or of another volume or node.
    """
    try:
        peek: Peek = load_core().peek(config.state)
    except MissingError:
        raise _no_state(config) from None
    if peek.name != config.name:
        raise FormatError(
            f"{config.state} is the state of volume {peek.name}, not of {config.name}",
            "correct `state` or `name` in the configuration",
        )
    _check_node(config, peek)
    return peek


def _check_node(config: VolumeConfig, peek: Peek) -> None:
    """Check that a state is this node's."""
    found = peek.node.node if peek.node else ""
    if found == config.node:
        return
    if not found:
        raise FormatError(
            f"{config.state} is the state of a volume without nodes, and its remotes "
            "cannot become nodes",
            "another `state` for the volume with nodes",
        )
    if not config.node:
        raise FormatError(
            f"{config.state} is the state of node {found}, and the configuration has "
            "no [[node]] tables",
            "put the tables back, or give this volume another `state`",
        )
    raise FormatError(
        f"{config.state} is the state of node {found}, not of {config.node}",
        f"nbd-mirror nodes CONFIG (which node is this host?); or correct `state` of "
        f"node {config.node}",
    )


def _no_state(config: VolumeConfig) -> MissingError:
    """Return the error for a state that is not there, or not any more."""
    try:
        check_not_served(config)
    except BusyError as error:
        return MissingError(error.message, error.hint)
    return MissingError(
        f"volume {config.name} has no state in {config.state}: it was not created yet",
        "nbd-mirror create CONFIG",
    )


def check_not_served(config: VolumeConfig) -> None:
    """
    Check that no process listens for a volume whose state is not there.

    Raises:
        BusyError: one does. The state may have been removed under the volume's server,
        which still knows which disk has the newest data; a new state would not.
    """
    pid = _listening(config.listen)
    if pid is None:
        return
    who, kill = f"process {pid}", f"kill -TERM {pid}"
    if pid <= 0:
        who, kill = "a process", "end that process"
    raise BusyError(
        f"volume {config.name} has no state in {config.state}, but {who} listens on "
        f"{config.listen}: if it is the volume's server, the state was removed under "
        "it, and no start will know what the remotes miss, nor what `local` misses",
        f"if so, {_make_anew(config, kill)}",
    )


def _make_anew(config: VolumeConfig, kill: str, option: str = "") -> str:
    """Return how to make a volume anew whose server knows more than its state."""
    return (
        f"and `local` had not failed: {kill}, then nbd-mirror create CONFIG{option} "
        "(copies all of `local`)\n"
        "or, if it had, or to be sure: unmount, copy the volume to a new disk while it "
        f"is served (nbdcopy {quote(config.listen.uri)} NEW), then {kill}, set `local` "
        f"to NEW, and nbd-mirror create CONFIG{option}"
    )


def _listening(listen: Listen) -> int | None:
    """Return the process that listens there, 0 if it is not known which, or None."""
    try:
        if listen.path is None:
            address = listen.client_host, listen.port
            with socket.create_connection(address, CONNECT_S) as found:
                return processes.tcp_listener(*found.getpeername()[:2])
        with (
            unix.short_name(Path(listen.path)) as name,
            strangers.closing(unix.unix_socket()) as probe,
        ):
            probe.settimeout(CONNECT_S)
            probe.connect(name)
            return peer(probe)[0]
    except (OSError, ValueError):  # the latter for a name that can be none
        return None


def stopped_status(config: VolumeConfig) -> Status:
    """
    Return the status of a volume without a server, from its superblock and maps.

    Raises:
        MissingError, FormatError: see read_superblock.
    """
    peek = read_superblock(config)
    volume = dataclasses.replace(
        peek.volume, policy=config.policy, fenced_reads=config.fenced_reads
    )
    state, silent = "no_answer", silent_server(config)
    if silent is None:
        state, reason = "stopped", "no server runs for this volume"
        if not volume.clean:
            reason += (
                "; the last one did not stop cleanly: the next one recovers, "
                "and may find more dirty than is shown"
            )
        silent = reason, "nbd-mirror serve CONFIG"
    node = stopped_node(config, peek.node)
    copies = peek.remotes if node is None or node.role == "primary" else ()
    remotes = [_remote(config, one, volume) for one in copies]
    verdict = (state, *silent)
    return report(
        config, volume, _local(config, volume), remotes, node=node, verdict=verdict
    )


@contextlib.contextmanager
def open_disk_map(
    config: VolumeConfig, disk: str, volume: VolumeStatus
) -> Iterator[DirtyMaps]:
    """
    Open a disk's map.

    Raises:
        FormatError: a start would not believe it: it is of another volume, disk or
        session, or garbled. Others: see open_map.
    """
    with open_map(_map_path(config, disk)) as maps:
        regions = -(-volume.size // volume.region_size)
        found = (str(uuid.UUID(bytes=maps.uuid)), maps.remote)
        shape = (maps.nr_regions, maps.region_size)
        if found != (volume.uuid, disk) or shape != (regions, volume.region_size):
            raise FormatError(
                f"{maps.path} is the map of another volume or disk", _MADE_ANEW
            )
        try:
            load_core().peek_map(config.state, disk)
            # Without them a start takes all as dirty, whatever the maps say.
            load_core().peek_logs(config.state)
        except (FormatError, MissingError) as error:
            # Not the hint for a garbled superblock, which is to make a new volume.
            raise FormatError(f"{config.state}: {error}", _MADE_ANEW) from None
        yield maps


def _local(config: VolumeConfig, volume: VolumeStatus) -> LocalView:
    status = volume.local
    dirty, reason = 0, status.reason
    if status.state is not LocalState.OK:
        try:
            with open_disk_map(config, "local", volume) as maps:
                dirty = maps.dirty_regions
        except MirrorError as error:
            dirty, reason = _ALL, f"{error}; the next start treats all as missing"
    # As if a remote were connected: without a server this is not known.
    facts = LocalFacts(status.state, volume.bytes_of(dirty), sources=1, reason=reason)
    return LocalView(facts, status, config.local)


def _remote(
    config: VolumeConfig, remote: RemoteStatus, volume: VolumeStatus
) -> RemoteView:
    counts, reason = (_ALL, 0, 0), remote.reason
    try:
        with open_disk_map(config, remote.name, volume) as maps:
            counts = maps.dirty_regions, maps.late_regions, maps.unflushed_regions
    except MirrorError as error:
        # Rule 9: a map that cannot be trusted means all dirty, and the reason says so.
        reason = f"{error}; the next start takes all of it as dirty"
        remote = dataclasses.replace(remote, assumed=False)
        if remote.state is RemoteState.IN_SYNC:  # nothing proves it now
            remote = dataclasses.replace(remote, state=RemoteState.OUT_OF_SYNC)
    dirty, late, unflushed = counts
    facts = Facts(
        remote.name,
        remote.state,
        assumed=remote.assumed,
        dirty_bytes=volume.bytes_of(dirty),
        late_bytes=volume.bytes_of(late),
        reason=reason,
    )
    uri = ""
    with contextlib.suppress(MirrorError):
        uri = config.copy_called(remote.name).uri
    status = dataclasses.replace(remote, unflushed_regions=unflushed)
    return RemoteView(facts, status, uri)
