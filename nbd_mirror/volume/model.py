# SPDX-License-Identifier: BSD-3-Clause
"""
The engine's parameters and reports, as plain values.

They mirror the structs of csrc/nbdm.h, in Python's units: seconds and bytes. They are
separate from core so that rules and tests run without the C code.
"""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NewType

from ..base.errors import MirrorError
from ..rules.node_side import Role
from ..rules.state import LocalState, RemoteState
from .node_record import ROLES, NodeRecord

__all__ = [
    "LOCAL",
    "Batch",
    "Disk",
    "Extent",
    "LocalStatus",
    "NodeMap",
    "Params",
    "Peek",
    "RemoteParams",
    "RemoteStatus",
    "TlsFiles",
    "Verdict",
    "VolumeStatus",
    "disk_of",
    "remote_status",
    "volume_status",
]

POLICY_NAMES = ("", "degrade", "stop")  # by enum nbdm_policy

Disk = NewType("Disk", int)  # a disk's number, not a remote's index
LOCAL = Disk(0)  # NBDM_LOCAL

HOLE = 3  # NBDM_EXTENT_HOLE: a hole that reads as zeroes


def disk_of(remote: int) -> Disk:
    """Return the number of the remote with this index in the configuration."""
    return Disk(1 + remote)


@dataclass(frozen=True, slots=True)
class RemoteParams:
    """
    A remote, for create and open.

    *deadline_ms* limits each command to it; *is_node*: another node of the volume.
    """

    name: str
    deadline_ms: int
    assume_in_sync: bool = False
    is_node: bool = False


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """
    The paths of the files with which a server proves itself, and checks its clients.

    Either *psk*, a file of shared keys, or the other three, of X.509.
    """

    psk: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    ca: str | None = None


@dataclass(frozen=True, slots=True)
class Params:
    """
    A volume, for create and open.

    *size* is in bytes, 0 uses the local disk's own; *region_size* in bytes; *policy* is
    "degrade" or "stop", *fenced_reads* "serve" or "fail".
    """

    name: str
    local: str
    state_dir: str
    size: int
    region_size: int
    policy: str
    hold_ms: int
    remotes: tuple[RemoteParams, ...]
    fenced_reads: str = "serve"
    local_deadline_ms: int = 0  # 0: local may keep a request forever
    local_choice: str = ""  # the operator's, at a start: "forced" or "lost"
    node: str = ""  # this node's name; "": the volume has no nodes
    primary: bool = False  # of a node, at a start: be primary in `epoch`
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class LocalStatus:
    """
    The engine's report of the local disk; counts are since the start.

    *dirty_regions* is what it misses, *repaired* the regions rewritten from a remote
    after a read failed; *serial* is for `Engine.wait`; *silent_s* is the age of the
    oldest request without an answer.
    """

    state: LocalState
    attached: bool  # failed, and open again: not used until admitted
    dirty_regions: int
    errors: int
    repaired: int
    copied_bytes: int
    since: int
    serial: int
    reason: str
    silent_s: float = 0.0
    unproven: bool = False  # attached; another device, and nothing was compared
    note: str = ""  # how it has changed since then, or why no cache was trusted


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """The engine's report of the volume; times are seconds."""

    uuid: str
    size: int
    region_size: int
    generation: int
    session: int
    nr_remotes: int
    local: LocalStatus
    failed: bool
    fenced: bool
    policy: str  # in force now; "" from a peek
    fenced_reads: str
    stopping: bool
    clean: bool  # from a peek: stopped cleanly
    clients: int
    inflight: int
    active_extents: int
    extent_size: int
    reads: int
    writes: int
    flushes: int
    write_s: float
    activity_persists: int
    superblock_persists: int
    dirty_persists: int
    reason: str
    role: Role | None = None  # as opened; None: no nodes, or from a peek

    def bytes_of(self, regions: int) -> int:
        """Return the bytes of so many regions; the last one may be shorter."""
        return min(regions * self.region_size, self.size)


@dataclass(frozen=True, slots=True)
class RemoteStatus:
    """
    The engine's report of a remote.

    *since* is in seconds since 1970; *serial* is for `Engine.wait`.
    """

    name: str
    state: RemoteState
    paused: bool
    assumed: bool
    connected: bool
    admitted: bool
    dirty_regions: int
    late_regions: int
    unflushed_regions: int
    flush_bound: int  # measured limit of unflushed bytes
    outstanding: int
    remote_size: int
    commands: int
    copied_bytes: int
    answered_bytes: int  # the same, clean or not yet
    answered_zero_bytes: int  # of these, sent as zeroes
    answer_s: float  # shortest time of a copy of data in the last call; 0: none
    since: int
    serial: int
    reason: str
    is_node: bool = False  # another node of the volume
    doubts: int = 0  # of a node: regions of which neither copy is newer


@dataclass(frozen=True, slots=True)
class Peek:
    """The content of a superblock, without a server; *node*: of a volume of nodes."""

    name: str
    volume: VolumeStatus
    remotes: tuple[RemoteStatus, ...]
    node: NodeRecord | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """
    The result of one resync call.

    *next_region* is where the next call continues; *copied_bytes* were made clean,
    *zero_bytes* of them sent as zeroes; *error* is what ended it early.
    """

    next_region: int
    copied_bytes: int
    zero_bytes: int
    error: MirrorError | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of the local disk, in bytes; *type* is NBD's own number."""

    offset: int
    length: int
    type: int


class NodeMap(IntEnum):
    """A map towards another node; only the first two can be marked."""

    DIRTY = 0  # what the node misses, as far as this one knows
    DOUBTS = 1  # may differ, and neither copy is known to be newer
    MISSED = 2  # what the local disk misses; all, if it failed


class Verdict:
    """The result of comparing a region; the last ones mean: take another region."""

    SAME = 0
    DIFFERENT = 1
    BUSY = -errno.EBUSY  # a request holds it
    DIRTY = -errno.EAGAIN
    UNREADABLE = -errno.ENODATA  # by local


def volume_status(c: Any, local: Any, text: Callable[[Any], str]) -> VolumeStatus:
    """Translate struct nbdm_status and local's nbdm_disk_status; *text* decodes."""
    return VolumeStatus(
        uuid=str(uuid.UUID(bytes=bytes(c.uuid))),
        size=c.size,
        region_size=c.region_size,
        generation=c.generation,
        session=c.session,
        nr_remotes=c.nr_remotes,
        local=_local_status(local, text),
        failed=bool(c.failed),
        fenced=bool(c.fenced),
        policy=POLICY_NAMES[c.policy],
        fenced_reads="fail" if c.fail_fenced_reads else "serve",
        stopping=bool(c.stopping),
        clean=bool(c.clean),
        clients=c.clients,
        inflight=c.inflight,
        active_extents=c.active_extents,
        extent_size=c.extent_size,
        reads=c.reads,
        writes=c.writes,
        flushes=c.flushes,
        write_s=c.write_ns / 1e9,
        activity_persists=c.activity_persists,
        superblock_persists=c.superblock_persists,
        dirty_persists=c.dirty_persists,
        reason=text(c.reason),
        role=ROLES.get(c.role),
    )


def _local_status(c: Any, text: Callable[[Any], str]) -> LocalStatus:
    return LocalStatus(
        state=LocalState.from_c(c.state),
        attached=bool(c.local.attached),
        dirty_regions=c.dirty_regions,
        errors=c.local.errors,
        repaired=c.local.repaired,
        copied_bytes=c.copied_bytes,
        since=c.since,
        serial=c.serial,
        reason=text(c.reason),
        silent_s=c.local.silent_ms / 1e3,
        unproven=bool(c.local.unproven),
        note=text(c.local.note),
    )


def remote_status(c: Any, text: Callable[[Any], str]) -> RemoteStatus:
    """Translate a remote's struct nbdm_disk_status; *text* decodes a C string."""
    return RemoteStatus(
        name=text(c.name),
        state=RemoteState.from_c(c.state),
        paused=bool(c.remote.paused),
        assumed=bool(c.remote.assumed),
        connected=bool(c.remote.connected),
        admitted=bool(c.remote.admitted),
        dirty_regions=c.dirty_regions,
        late_regions=c.remote.late_regions,
        unflushed_regions=c.remote.unflushed_regions,
        flush_bound=c.remote.flush_bound,
        outstanding=c.remote.outstanding,
        remote_size=c.remote.remote_size,
        commands=c.remote.commands,
        copied_bytes=c.copied_bytes,
        answered_bytes=c.remote.answered_bytes,
        answered_zero_bytes=c.remote.answered_zero_bytes,
        answer_s=c.remote.answer_ns / 1e9,
        since=c.since,
        serial=c.serial,
        reason=text(c.reason),
        is_node=bool(c.remote.is_node),
        doubts=c.remote.doubts,
    )
