# SPDX-License-Identifier: BSD-3-Clause
"""An open volume."""

from __future__ import annotations

import errno
import os
from typing import Any

from ...base.errors import NotRunningError
from ...rules.pace import Latency, Plan
from ..model import (
    LOCAL,
    Batch,
    Disk,
    Extent,
    NodeMap,
    Params,
    RemoteStatus,
    Verdict,
    VolumeStatus,
    remote_status,
    volume_status,
)
from ..node_record import NodeRecord, fill_node, node_record
from .boundary import (
    FOREVER_MS,
    POLICIES,
    Buffer,
    c_reason,
    check,
    error_of,
    ffi,
    lib,
    make_params,
    text_of,
    whole_ms,
)

FUA: int = lib.NBDM_FUA
MAY_TRIM: int = lib.NBDM_MAY_TRIM
FAST_ZERO: int = lib.NBDM_FAST_ZERO
MAX_ACTIVE = 4096  # limit of extents per call; the log holds fewer


class Engine:
    """
    An open volume.

    Every method except `close` may be called from any thread. The owner calls `close`
    only when all other calls have returned.
    """

    def __init__(self, params: Params) -> None:
        """
        Lock the volume and its local disk, load the logs and recover.

        Starts no thread, so that the process may still fork.

        Raises:
            BusyError: another process has the volume or its disk. MissingError: no
            state or no disk. WrongDiskError: the local disk is another one than before.
            FormatError, ConfigError, SpaceError.
        """
        c_params, _alive = make_params(params)
        out = ffi.new("struct nbdm **")
        check(lib.nbdm_open(c_params, out), "open")
        self._volume: Any = out[0]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        """The C handle, for the direct door, which passes no request through here."""
        if self._volume == ffi.NULL:
            raise NotRunningError("the volume is closed")
        return self._volume

    # --- life ---

    def start(self) -> None:
        """Start the engine's own threads. Call it after any fork."""
        check(lib.nbdm_start(self.handle), "start")

    def stop(self) -> None:
        """
        Stop cleanly: refuse new requests, finish those under way, flush, persist.

        Blocks, bounded by the deadlines. Calling it again has no effect. Raises
        MirrorIOError if something was not persisted: the next start then recovers.
        """
        check(lib.nbdm_stop(self.handle), "stop")

    def wake(self) -> None:
        """End every `wait`, present and future, so that the policy threads can end."""
        lib.nbdm_wake(self.handle)

    def close(self) -> None:
        """
        Free the volume; without `stop` before it, as if the process was killed.

        No other call may be under way. Calling it again has no effect.
        """
        volume, self._volume = self._volume, ffi.NULL
        if volume != ffi.NULL:
            lib.nbdm_close(volume)

    # --- requests ---

    def pread(self, buf: Buffer, offset: int) -> None:
        """
        Fill *buf* from *offset* (bytes). Blocks.

        Args:
            buf: writable, contiguous, up to MAX_REQUEST bytes.

        Raises:
            MirrorIOError: no disk that has the range could be read.
        """
        # const does not protect the buffer: without require_writable CFFI would write
        # through a read-only one.
        out = ffi.from_buffer("uint8_t[]", buf, require_writable=True)
        check(lib.nbdm_pread(self.handle, out, len(out), offset), "read")

    def pwrite(self, buf: Buffer, offset: int, flags: int = 0) -> None:
        """
        Write *buf* to all legs, and return when the write may be answered. Blocks.

        The loss of a remote degrades the mirror and is no error.

        Args:
            buf: contiguous, up to MAX_REQUEST bytes; not kept.
            offset: bytes.
            flags: FUA or 0.

        Raises:
            MirrorIOError: local medium, fenced, or metadata failed. SpaceError.
        """
        data = ffi.from_buffer("uint8_t[]", buf)
        check(lib.nbdm_pwrite(self.handle, data, len(data), offset, flags), "write")

    def trim(self, count: int, offset: int, flags: int = 0) -> None:
        """Discard *count* bytes at *offset* on all legs; *flags*: FUA. Blocks."""
        check(lib.nbdm_trim(self.handle, count, offset, flags), "trim")

    def zero(self, count: int, offset: int, flags: int = 0) -> None:
        """
        Zero *count* bytes at *offset* on all legs. Blocks.

        With FAST_ZERO in *flags* it raises UnsupportedError if it would be slow.
        """
        check(lib.nbdm_zero(self.handle, count, offset, flags), "zero")

    def flush(self) -> None:
        """Make every answered write durable on all in-sync legs. Blocks."""
        check(lib.nbdm_flush(self.handle), "flush")

    def node_flush(self) -> None:
        """Flush the disks in use, whatever the policy says of a missing node."""
        check(lib.nbdm_node_flush(self.handle), "flush")

    def cache(self, count: int, offset: int) -> None:
        """Ask the kernel to read ahead *count* bytes at *offset*."""
        check(lib.nbdm_cache(self.handle, count, offset), "cache")

    def extents(self, count: int, offset: int, limit: int = 256) -> list[Extent]:
        """List the local disk's runs from *offset*, at most *limit* of them."""
        found = ffi.new("struct nbdm_extent[]", limit)
        nr = check(
            lib.nbdm_extents(self.handle, count, offset, found, limit), "extents"
        )
        return [Extent(e.offset, e.length, e.type) for e in found[0:nr]]

    @property
    def min_block(self) -> int:
        """The bytes that a request's offset and length should be a multiple of."""
        return int(lib.nbdm_min_block(self.handle))

    def chain(self) -> str:
        """Describe the export: which volumes a client reaches through it."""
        words = ffi.new("char[]", lib.NBDM_CHAIN_LEN)
        lib.nbdm_chain(self.handle, words, len(words))
        return text_of(words)

    def count_client(self, change: int) -> int:
        """Count a client in (+1) or out (-1), or ask (0); return how many there are."""
        return int(lib.nbdm_count_client(self.handle, change))

    # --- any disk ---

    def admit(self, disk: Disk) -> None:
        """From now on use the connection, or the attached local disk."""
        check(lib.nbdm_disk_admit(self.handle, disk), "admit")

    def drop(self, disk: Disk, reason: str) -> None:
        """
        Drop the connection, or close the attached local disk again.

        *reason* becomes the reason of the state. Never fails for a remote.
        """
        check(lib.nbdm_disk_drop(self.handle, disk, c_reason(reason)), "drop")

    def resync(
        self, disk: Disk, first: int, max_bytes: int, max_s: float, plan: Plan
    ) -> Batch:
        """
        Copy to the disk what it misses, flush it, clear the bits.

        Blocks until the last region is copied, or a limit is reached. A pause, a lost
        connection and `wake` also end it. If nothing is dirty, it ends the resync.

        Args:
            first: the first region to look at; the call goes upwards.
            max_bytes: stop after about this much.
            max_s: stop after this time; 0: no limit.
            plan: the pace to begin with.

        Returns:
            What was done. Its *error* is not raised, because earlier regions may be
            clean now. The errno is ENOTCONN if the remote was lost, or if no connected
            remote has what the local disk misses.
        """
        batch = _make_batch(first, max_bytes, max_s, plan)
        return _done(batch, lib.nbdm_disk_resync(self.handle, disk, batch))

    def resync_pace(self, disk: Disk, plan: Plan) -> None:
        """Change the pace of the `resync` that is under way."""
        pace = _set_pace(ffi.new("struct nbdm_pace *"), plan)
        check(lib.nbdm_disk_resync_pace(self.handle, disk, pace), "pace")

    def wait(self, disk: Disk, seen: int, timeout_s: float | None) -> int:
        """
        Block until the disk's serial differs from *seen*, or the time is over.

        Returns the serial. With *timeout_s* None there is no time limit.
        """
        timeout_ms = FOREVER_MS if timeout_s is None else whole_ms(timeout_s)
        return int(lib.nbdm_disk_wait(self.handle, disk, seen, timeout_ms))

    # --- remotes alone: LOCAL is refused ---

    def connect(self, disk: Disk, uri: str, timeout_s: float) -> None:
        """
        Connect, and check size and flags. The connection is not used until admitted.

        Blocks up to *timeout_s*.

        Raises:
            MirrorError: of any class; the message has the remote's answer.
        """
        words = uri.encode()
        rc = lib.nbdm_remote_connect(self.handle, disk, words, whole_ms(timeout_s))
        check(rc, f"connect to {uri}")

    def compare(self, disk: Disk, region: int) -> int:
        """Compare a region on local and the connected remote: a `Verdict`. Blocks."""
        rc = int(lib.nbdm_remote_compare(self.handle, disk, region))
        if rc in (Verdict.BUSY, Verdict.DIRTY, Verdict.UNREADABLE):
            return rc
        return check(rc, f"compare region {region}")

    def comparable(self, disk: Disk, region: int) -> int | None:
        """Return the first region from *region* on that is dirty on neither side."""
        found = int(lib.nbdm_remote_comparable(self.handle, disk, region))
        status = self.status()
        return found if found < -(-status.size // status.region_size) else None

    def explain(self, disk: Disk, reason: str) -> None:
        """Set the reason of a remote that is not connected."""
        rc = lib.nbdm_remote_explain(self.handle, disk, c_reason(reason))
        check(rc, "explain")

    def fail(self, disk: Disk, reason: str) -> None:
        """Make it failed, durably: no connection until it is reset or invalidated."""
        check(lib.nbdm_remote_fail(self.handle, disk, c_reason(reason)), "fail")

    def reset(self, disk: Disk) -> None:
        """End the failed state, durably, and keep the dirty map; else no effect."""
        check(lib.nbdm_remote_reset(self.handle, disk), "reset")

    def pause(self, disk: Disk, *, paused: bool) -> None:
        """Set or lift the operator's pause of resync, durably."""
        check(lib.nbdm_remote_pause(self.handle, disk, int(paused)), "pause")

    def invalidate(self, disk: Disk) -> None:
        """Make every region dirty, durably."""
        check(lib.nbdm_remote_invalidate(self.handle, disk), "invalidate")

    def release_late(self, disk: Disk) -> None:
        """End the late-write window: late regions become plain dirty ones."""
        check(lib.nbdm_remote_release_late(self.handle, disk), "release late")

    def set_policy(self, policy: str, fenced_reads: str) -> None:
        """
        Change the policy while requests run; the next start uses its own.

        Args:
            policy: "degrade" lifts a fence; "stop" fences at once, durably, if a
                remote is behind.
            fenced_reads: "serve" or "fail".

        Raises:
            MirrorIOError: the volume has failed, or fails now.
        """
        fail = int(fenced_reads == "fail")
        rc = lib.nbdm_set_policy(self.handle, POLICIES[policy], fail)
        check(rc, f"policy {policy}")

    def cool(self, idle_s: float) -> None:
        """Let extents idle for *idle_s* go cold: flushes and persists first."""
        check(lib.nbdm_cool(self.handle, whole_ms(idle_s)), "cool")

    # --- the local disk ---

    def local_sample(self, least: int) -> int:
        """
        Take samples of its content, if fewer than *least* could be compared now.

        Blocks while up to 64 blocks are read. Returns how many were taken.
        """
        return check(lib.nbdm_local_sample(self.handle, least), "sample local")

    # --- the same, after it failed ---

    def local_attach(self, path: str, *, replaced: bool) -> None:
        """
        Open the local disk again. It is not used until admitted.

        Args:
            replaced: it is another disk than the one that failed: every region
                becomes dirty on it, durably.

        Raises:
            BusyError: it has not failed, or the disk is in use. WrongDiskError: it
            is another disk than before, or too small. MissingError, MirrorIOError.
        """
        rc = lib.nbdm_local_attach(self.handle, os.fsencode(path), int(replaced))
        check(rc, f"attach {path}")

    # --- nodes: csrc/nbdm.h says what the engine does by itself ---

    def node_get(self) -> NodeRecord:
        """
        Return the record as it is now.

        Raises:
            ConfigError: the volume has no nodes.
        """
        node = ffi.new("struct nbdm_node *")
        check(lib.nbdm_node_get(self.handle, node), "get the record of nodes")
        record = node_record(node, text_of)
        assert record is not None
        return record

    def node_store(self, before: NodeRecord, after: NodeRecord) -> bool:
        """
        Replace the record, durably, if it is still *before*.

        Returns False if it is not: the engine began a generation, or another thread
        stored. Then the caller gets it and applies its rule again. If *after* counts a
        connected node of which nothing is dirty, that node is in sync now.

        Raises:
            ConfigError: *after* is of other nodes, or of an earlier promotion.
            MirrorIOError: the volume has failed. NotRunningError: it is stopping.
        """
        both = ffi.new("struct nbdm_node[]", 2)
        fill_node(both[0], before)
        fill_node(both[1], after)
        rc = lib.nbdm_node_store(self.handle, ffi.addressof(both, 0), both + 1)
        if rc == -errno.EAGAIN:
            return False
        check(rc, "store the record of nodes")
        return True

    def node_map(self, disk: Disk, which: NodeMap) -> bytes:
        """Return a map towards a node: bit r % 8 of byte r // 8 is region r."""
        bits = ffi.new("uint8_t[]", self._map_bytes())
        rc = lib.nbdm_node_map(self.handle, disk, which, bits, len(bits))
        check(rc, "read a map")
        return bytes(ffi.buffer(bits))

    def node_mark(self, disk: Disk, which: NodeMap, bits: Buffer) -> None:
        """Add regions to the dirty map or the doubts towards a node, durably."""
        data = ffi.from_buffer("uint8_t[]", bits)
        rc = lib.nbdm_node_mark(self.handle, disk, which, data, len(data))
        check(rc, "mark regions")

    def node_clear(self, disk: Disk) -> None:
        """Empty both maps towards a node, durably: its generation was adopted."""
        check(lib.nbdm_node_clear(self.handle, disk), "clear the maps")

    def node_admit(self, disk: Disk) -> None:
        """As `admit`, of a node that lacks nothing; raises MirrorError if it does."""
        check(lib.nbdm_node_admit(self.handle, disk), "admit")

    def node_whole(self, disk: Disk) -> bool:
        """
        Tell whether a node lacks nothing. If so, its connection ends once it does.

        Call it before the node is told that nothing is copied to it any more.
        """
        return bool(lib.nbdm_node_whole(self.handle, disk) == 0)

    def node_session_lost(self) -> None:
        """
        Doubt, durably, all that may have been under way in the primary's session.

        A secondary calls it after a session that was not closed cleanly, once none of
        its requests is under way. After a clean close it calls `cool(0)` instead.
        """
        check(lib.nbdm_node_session_lost(self.handle), "session lost")

    def _map_bytes(self) -> int:
        status = self.status()
        regions = -(-status.size // status.region_size)
        return -(-regions // 8)

    # --- looking at it ---

    def status(self) -> VolumeStatus:
        """Report the volume."""
        status = ffi.new("struct nbdm_status *")
        lib.nbdm_get_status(self.handle, status)
        return volume_status(status, self._disk_status(LOCAL), text_of)

    def remote_status(self, disk: Disk) -> RemoteStatus:
        """Report a remote; raises ValueError for LOCAL, which `status` reports."""
        if disk == LOCAL:
            raise ValueError("the local disk is no remote")
        return remote_status(self._disk_status(disk), text_of)

    def _disk_status(self, disk: Disk) -> Any:
        status = ffi.new("struct nbdm_disk_status *")
        check(lib.nbdm_get_disk_status(self.handle, disk, status), "status")
        return status

    def latency(self) -> Latency:
        """Report how long clients' requests took, since the start."""
        found = ffi.new("struct nbdm_latency *")
        lib.nbdm_get_latency(self.handle, found)
        return Latency(_by_kind(found.quiet), _by_kind(found.disturbed))

    def active_extents(self) -> list[int]:
        """List the active extents' indexes, latest used first."""
        found = ffi.new("uint64_t[]", MAX_ACTIVE)
        rc = lib.nbdm_get_active_extents(self.handle, found, MAX_ACTIVE)
        return list(found[0 : check(rc, "active extents")])

    def recent_regions(self, limit: int) -> list[int]:
        """List the regions of the latest writes, at most *limit*, latest first."""
        found = ffi.new("uint64_t[]", limit)
        rc = lib.nbdm_get_recent_regions(self.handle, found, limit)
        return list(found[0 : check(rc, "recent regions")])


def _make_batch(first: int, max_bytes: int, max_s: float, plan: Plan) -> Any:
    batch = ffi.new("struct nbdm_resync *")
    batch.first_region, batch.max_bytes = first, max_bytes
    batch.max_ms = whole_ms(max_s)
    _set_pace(batch.pace, plan)
    return batch


def _set_pace(pace: Any, plan: Plan) -> Any:
    pace.depth, pace.copy_bytes = plan.depth, plan.copy_bytes
    pace.burst_us, pace.rest_us = int(plan.burst_s * 1e6), int(plan.rest_s * 1e6)
    return pace


def _done(batch: Any, rc: int) -> Batch:
    """Return what a call of resync did; must follow it at once, as `check`."""
    error = error_of(rc, "resync") if rc < 0 else None
    return Batch(batch.next_region, batch.copied_bytes, batch.zero_bytes, error)


def _by_kind(counts: Any) -> list[list[int]]:
    nr: int = lib.NBDM_LATENCY_BUCKETS
    flat = ffi.unpack(counts, lib.NBDM_LATENCY_KINDS * nr)
    return [flat[at : at + nr] for at in range(0, len(flat), nr)]
