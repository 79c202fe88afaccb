# SPDX-License-Identifier: BSD-3-Clause
"""
The engine as Python sees it: the only importer of *ffi* and *lib*.

One method is one C call; CFFI releases the GIL around each. No policy and no state
of its own live here, but for the handle. Strings go to C as UTF-8 and are copied
there before the call returns; buffers are borrowed for the call and never copied.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

# Under nbdkit's Python plugin and in the command line this is the extension module
# _core. Inside the native door nbd_mirror/server/native.py puts the embedded module
# _nbdm_native into sys.modules under this name before it imports anything of ours,
# so that this same code drives the engine that lives in the plugin's own .so: two
# copies of the C code in one process would not know each other's volume.
from nbd_mirror._core import ffi, lib

from ..base.errors import MirrorError, NotRunningError, from_errno
from ..rules.pace import Latency, Plan
from .model import (
    LOCAL,
    Batch,
    Disk,
    Extent,
    Params,
    Peek,
    RemoteParams,
    RemoteStatus,
    Verdict,
    VolumeStatus,
    disk_of,
    remote_status,
    volume_status,
)

__all__ = [
    "MAX_REQUEST",
    "PREFERRED_BLOCK",
    "Buffer",
    "Engine",
    "Params",
    "RemoteParams",
    "Server",
    "bound_log",
    "create",
    "fault_points",
    "flush_log",
    "log_counts",
    "peek",
    "peek_map",
    "start_log",
    "write_log",
    "write_text",
]

Buffer = bytes | bytearray | memoryview

MAX_REMOTES: int = lib.NBDM_MAX_REMOTES
MAX_REQUEST: int = lib.NBDM_MAX_REQUEST  # bytes
PREFERRED_BLOCK: int = lib.NBDM_PREFERRED_BLOCK  # bytes
FUA: int = lib.NBDM_FUA
MAY_TRIM: int = lib.NBDM_MAY_TRIM
FAST_ZERO: int = lib.NBDM_FAST_ZERO
FOREVER_MS = 0xFFFF_FFFF
MAX_ACTIVE = 4096  # extents asked for at once; the log holds fewer

_LOCAL_CHOICES = {
    "": lib.NBDM_LOCAL_CHECKED,
    "forced": lib.NBDM_LOCAL_FORCED,
    "lost": lib.NBDM_LOCAL_LOST,
}
_POLICIES = {"degrade": lib.NBDM_DEGRADE, "stop": lib.NBDM_STOP}


def check(rc: int, what: str) -> int:
    """
    Return *rc* unless it is -errno.

    Must follow the C call at once: its message is the thread's last one.

    Raises:
        MirrorError: of the class that fits the errno, with C's own words, or *what*
            where C had none; its `errno` is the positive number.
    """
    if rc < 0:
        raise _error(rc, what)
    return rc


def _error(rc: int, what: str) -> MirrorError:
    words = _text(lib.nbdm_last_error())
    return from_errno(rc, words or f"{what}: {os.strerror(-rc)}")


def create(params: Params, *, force: bool = False) -> None:
    """
    Format the state directory; no byte of the local disk is touched.

    Blocks while the logs are allocated and synced.

    Raises:
        ExistsError: it holds a volume and *force* is not given. BusyError: in use.
        SpaceError: no room for the logs. ConfigError: the parameters do not fit.
    """
    c_params, _alive = _make_params(params)
    check(lib.nbdm_create(c_params, int(force)), "create")


def peek(state_dir: str) -> Peek:
    """
    Read a superblock without locking or changing anything, also beside a server.

    Raises:
        MissingError: there is none. FormatError: it is garbled.
    """
    name = ffi.new("char[]", lib.NBDM_NAME_LEN)
    status = ffi.new("struct nbdm_status *")
    disks = ffi.new("struct nbdm_disk_status[]", lib.NBDM_MAX_DISKS)
    check(lib.nbdm_peek(os.fsencode(state_dir), name, status, disks), "peek")
    volume = volume_status(status, disks[LOCAL], _text)
    nr: int = status.nr_remotes
    remotes = tuple(remote_status(disks[disk_of(i)], _text) for i in range(nr))
    return Peek(_text(name), volume, remotes)


def peek_map(state_dir: str, disk: str) -> None:
    """
    Check a disk's dirty map as a start does; see `peek`.

    Raises:
        MissingError: there is none. FormatError: a start would not believe it.
    """
    rc = lib.nbdm_peek_map(os.fsencode(state_dir), os.fsencode(disk))
    check(rc, f"dirty.{disk}")


def fault_points() -> dict[str, bool]:
    """Name every point that NBDM_FAULT knows; whether it can be made to fail."""
    fails = ffi.new("int *")
    found: dict[str, bool] = {}
    while (name := lib.nbdm_fault_point(len(found), fails)) != ffi.NULL:
        found[_text(name)] = bool(fails[0])
    return found


# --- the log ---


def start_log() -> None:
    """
    Let no line of the log block from now on, also none on standard output and error.

    To be called after any fork, and before signals are blocked. Again: no effect.

    Raises:
        MirrorError: no thread, or no descriptor.
    """
    check(lib.nbdm_log_start(), "start the log")


def bound_log(state_dir: str) -> None:
    """Bound the size of the directory's serve.log, if the output goes there."""
    check(lib.nbdm_log_rotate(os.fsencode(state_dir)), "the log")


def write_log(level: str, text: str) -> None:
    """Write a line; never raises, and never blocks once the log is started."""
    lib.nbdm_log(lib.NBDM_LOG_OWN, level.encode(), _c_text(text))


def write_text(text: str) -> None:
    """Write whole lines as they are; as `write_log`."""
    lib.nbdm_log_raw(_c_text(text))


def flush_log(timeout_s: float) -> None:
    """Wait until all lines were written, but no longer than *timeout_s*."""
    lib.nbdm_log_flush(_ms(timeout_s))


def log_counts() -> tuple[int, int]:
    """Count the lines that could not be written, and those there were too many of."""
    lost, left_out = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    lib.nbdm_log_counts(lost, left_out)
    return int(lost[0]), int(left_out[0])


def _c_text(text: str) -> bytes:
    return text.encode(errors="replace").replace(b"\0", b"?")


class Engine:
    """
    An open volume.

    Every method but `close` may be called from any thread. `close` wants all others
    to have returned; the owner sees to that.
    """

    def __init__(self, params: Params) -> None:
        """
        Lock the volume and its local disk, load the logs and recover.

        Starts no thread, so that the process may still fork.

        Raises:
            BusyError: another process has the volume or its disk. MissingError: no
            state or no disk. WrongDiskError: the local disk is not the one that was
            left. FormatError, ConfigError, SpaceError.
        """
        c_params, _alive = _make_params(params)
        out = ffi.new("struct nbdm **")
        check(lib.nbdm_open(c_params, out), "open")
        self._volume: Any = out[0]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        """The C handle: for the native door, whose requests do not pass here."""
        if self._volume == ffi.NULL:
            raise NotRunningError("the volume is closed")
        return self._volume

    # --- life ---

    def start(self) -> None:
        """Start the engine's own thread; after any fork."""
        check(lib.nbdm_start(self.handle), "start")

    def stop(self) -> None:
        """
        Stop cleanly: refuse new requests, finish those under way, flush, persist.

        Blocks, bounded by the deadlines; again: no effect. Raises MirrorIOError if
        something was not persisted: the next start recovers.
        """
        check(lib.nbdm_stop(self.handle), "stop")

    def wake(self) -> None:
        """End every `wait`, present and future: policy threads shall end."""
        lib.nbdm_wake(self.handle)

    def close(self) -> None:
        """
        Free the volume; without `stop` before it as if the process was killed.

        No other call may be under way. Again: no effect.
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
        # const does not protect: without require_writable CFFI would write through
        # a read-only buffer.
        out = ffi.from_buffer("uint8_t[]", buf, require_writable=True)
        check(lib.nbdm_pread(self.handle, out, len(out), offset), "read")

    def pwrite(self, buf: Buffer, offset: int, flags: int = 0) -> None:
        """
        Write *buf* to all legs; returns when the write may be answered. Blocks.

        Losing a remote degrades the mirror and is not an error.

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
        """Give up *count* bytes at *offset* on all legs; *flags*: FUA. Blocks."""
        check(lib.nbdm_trim(self.handle, count, offset, flags), "trim")

    def zero(self, count: int, offset: int, flags: int = 0) -> None:
        """
        Zero *count* bytes at *offset* on all legs. Blocks.

        With FAST_ZERO in *flags* raises UnsupportedError where it would be slow.
        """
        check(lib.nbdm_zero(self.handle, count, offset, flags), "zero")

    def flush(self) -> None:
        """Make every answered write durable on all in-sync legs. Blocks."""
        check(lib.nbdm_flush(self.handle), "flush")

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
        """Bytes that a request's offset and length should be a multiple of."""
        return int(lib.nbdm_min_block(self.handle))

    def chain(self) -> str:
        """Describe the export: which volumes a client reaches through it."""
        words = ffi.new("char[]", lib.NBDM_CHAIN_LEN)
        lib.nbdm_chain(self.handle, words, len(words))
        return _text(words)

    def count_client(self, change: int) -> int:
        """Count a client in (+1) or out (-1), or only ask (0); returns how many."""
        return int(lib.nbdm_count_client(self.handle, change))

    # --- any disk ---

    def admit(self, disk: Disk) -> None:
        """Use the connection, or the attached local disk, from now on."""
        check(lib.nbdm_disk_admit(self.handle, disk), "admit")

    def drop(self, disk: Disk, reason: str) -> None:
        """
        Drop the connection, or close the attached local disk again.

        *reason* becomes the state's. Never fails for a remote.
        """
        check(lib.nbdm_disk_drop(self.handle, disk, _reason(reason)), "drop")

    def resync(
        self, disk: Disk, first: int, max_bytes: int, max_s: float, plan: Plan
    ) -> Batch:
        """
        Copy what the disk misses to it, flush it, clear the bits.

        Blocks until the last region is copied, or it is told to stop; a pause, a lost
        connection and `wake` end it too. Also ends the resync if nothing is dirty.

        Args:
            first: the region to look from, upwards.
            max_bytes: stop after about this much.
            max_s: and after so many seconds; 0: however long it takes.
            plan: the pace to begin at.

        Returns:
            What was done; its *error*, not raised because regions before it may be
            clean now. Its errno is ENOTCONN where the remote was lost, or none that
            has what the local disk misses is connected.
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

        Returns the serial; with *timeout_s* None there is no time limit.
        """
        timeout_ms = FOREVER_MS if timeout_s is None else _ms(timeout_s)
        return int(lib.nbdm_disk_wait(self.handle, disk, seen, timeout_ms))

    # --- remotes, by their index in the configuration ---

    def connect(self, remote: int, uri: str, timeout_s: float) -> None:
        """
        Connect and check size and flags; not used for anything until admitted.

        Blocks up to *timeout_s*.

        Raises:
            MirrorError: of any class; the words say what the far side said.
        """
        words = uri.encode()
        rc = lib.nbdm_remote_connect(self.handle, remote, words, _ms(timeout_s))
        check(rc, f"connect to {uri}")

    def compare(self, remote: int, region: int) -> int:
        """Compare a region on local and the connected remote: a `Verdict`. Blocks."""
        rc = int(lib.nbdm_remote_compare(self.handle, remote, region))
        if rc in (Verdict.BUSY, Verdict.DIRTY, Verdict.UNREADABLE):
            return rc
        return check(rc, f"compare region {region}")

    def comparable(self, remote: int, region: int) -> int | None:
        """Find the first region from *region* on that is dirty on neither side."""
        found = int(lib.nbdm_remote_comparable(self.handle, remote, region))
        status = self.status()
        return found if found < -(-status.size // status.region_size) else None

    def explain(self, remote: int, reason: str) -> None:
        """Say why a remote that is not connected is out of sync."""
        rc = lib.nbdm_remote_explain(self.handle, remote, _reason(reason))
        check(rc, "explain")

    def fail(self, remote: int, reason: str) -> None:
        """Make it failed, durably: not connected until reset or invalidated."""
        check(lib.nbdm_remote_fail(self.handle, remote, _reason(reason)), "fail")

    def reset(self, remote: int) -> None:
        """Take it out of failed, durably, the dirty map kept; else no effect."""
        check(lib.nbdm_remote_reset(self.handle, remote), "reset")

    def pause(self, remote: int, *, paused: bool) -> None:
        """Set or lift the operator's pause of resync, durably."""
        check(lib.nbdm_remote_pause(self.handle, remote, int(paused)), "pause")

    def invalidate(self, remote: int) -> None:
        """Make every region dirty, durably."""
        check(lib.nbdm_remote_invalidate(self.handle, remote), "invalidate")

    def release_late(self, remote: int) -> None:
        """End the late-write window: late regions become plain dirty ones."""
        check(lib.nbdm_remote_release_late(self.handle, remote), "release late")

    def set_policy(self, policy: str, fenced_reads: str) -> None:
        """
        Change the policy while requests run; the next start takes its own.

        Args:
            policy: "degrade" lifts a fence; "stop" fences at once, durably, if a
                remote is behind.
            fenced_reads: "serve" or "fail".

        Raises:
            MirrorIOError: the volume has failed, or does so now.
        """
        fail = int(fenced_reads == "fail")
        rc = lib.nbdm_set_policy(self.handle, _POLICIES[policy], fail)
        check(rc, f"policy {policy}")

    def cool(self, idle_s: float) -> None:
        """Let extents idle for *idle_s* go cold: flushes and persists first."""
        check(lib.nbdm_cool(self.handle, _ms(idle_s)), "cool")

    # --- the local disk ---

    def local_sample(self, least: int) -> int:
        """
        Take samples of what it holds, if fewer than *least* could be compared now.

        Blocks while up to 64 blocks are read. Returns how many were taken.
        """
        return check(lib.nbdm_local_sample(self.handle, least), "sample local")

    # --- the same, after it failed ---

    def local_attach(self, path: str, *, replaced: bool) -> None:
        """
        Open the local disk again; not used for anything until admitted.

        Args:
            replaced: it is another disk than the one that failed: every region
                becomes dirty on it, durably.

        Raises:
            BusyError: it has not failed, or the disk is in use. WrongDiskError: it
            is not the one that was left, or too small. MissingError, MirrorIOError.
        """
        rc = lib.nbdm_local_attach(self.handle, os.fsencode(path), int(replaced))
        check(rc, f"attach {path}")

    # --- looking at it ---

    def status(self) -> VolumeStatus:
        """Report the volume."""
        status = ffi.new("struct nbdm_status *")
        lib.nbdm_get_status(self.handle, status)
        return volume_status(status, self._disk_status(LOCAL), _text)

    def remote_status(self, remote: int) -> RemoteStatus:
        """Report a remote, by its index in the configuration."""
        return remote_status(self._disk_status(disk_of(remote)), _text)

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
        """List at most *limit* regions written last, latest first."""
        found = ffi.new("uint64_t[]", limit)
        rc = lib.nbdm_get_recent_regions(self.handle, found, limit)
        return list(found[0 : check(rc, "recent regions")])


def _make_batch(first: int, max_bytes: int, max_s: float, plan: Plan) -> Any:
    batch = ffi.new("struct nbdm_resync *")
    batch.first_region, batch.max_bytes = first, max_bytes
    batch.max_ms = _ms(max_s)
    _set_pace(batch.pace, plan)
    return batch


def _set_pace(pace: Any, plan: Plan) -> Any:
    pace.depth, pace.copy_bytes = plan.depth, plan.copy_bytes
    pace.burst_us, pace.rest_us = int(plan.burst_s * 1e6), int(plan.rest_s * 1e6)
    return pace


def _done(batch: Any, rc: int) -> Batch:
    """Say what a call of resync did; must follow it at once, as `check`."""
    error = _error(rc, "resync") if rc < 0 else None
    return Batch(batch.next_region, batch.copied_bytes, batch.zero_bytes, error)


def _by_kind(counts: Any) -> list[list[int]]:
    nr: int = lib.NBDM_LATENCY_BUCKETS
    flat = ffi.unpack(counts, lib.NBDM_LATENCY_KINDS * nr)
    return [flat[at : at + nr] for at in range(0, len(flat), nr)]


def _make_params(params: Params) -> tuple[Any, list[Any]]:
    """Make struct nbdm_params; the list keeps its strings alive for the call."""
    if len(params.remotes) > MAX_REMOTES:
        raise from_errno(-errno.EINVAL, f"more than {MAX_REMOTES} remotes")
    alive = [ffi.new("char[]", params.name.encode())]
    alive.append(ffi.new("char[]", os.fsencode(params.local)))
    alive.append(ffi.new("char[]", os.fsencode(params.state_dir)))
    out = ffi.new("struct nbdm_params *")
    out.name, out.local, out.state_dir = alive
    out.size, out.region_size = params.size, params.region_size
    out.policy = _POLICIES[params.policy]
    out.fail_fenced_reads = int(params.fenced_reads == "fail")
    out.local_choice = _LOCAL_CHOICES[params.local_choice]
    out.hold_ms = params.hold_ms
    out.local_deadline_ms = params.local_deadline_ms
    out.nr_remotes = len(params.remotes)
    for entry, remote in zip(out.remotes, params.remotes, strict=False):
        alive.append(ffi.new("char[]", remote.name.encode()))
        entry.name = alive[-1]
        entry.deadline_ms = remote.deadline_ms
        entry.assume_in_sync = int(remote.assume_in_sync)
    return out, alive


def _text(words: Any) -> str:
    """Decode C's UTF-8; a message cut in the middle of a character stays readable."""
    return bytes(ffi.string(words)).decode(errors="replace")


def _reason(words: str) -> bytes:
    """Encode a reason so that it fits its field without cutting a character."""
    room: int = lib.NBDM_REASON_LEN - 1
    return words.encode()[:room].decode(errors="ignore").encode()


def _ms(seconds: float) -> int:
    """Whole milliseconds, rounded up: a wait of a little must not become a spin."""
    return min(max(-int(-seconds * 1000 // 1), 0), FOREVER_MS - 1)


class Server:
    """
    The direct door: serves an engine to the clients of listening sockets.

    Args:
        engine: must be open for as long as this is.
        listen_fds: stay the caller's.
        max_clients: as far as there are descriptors for them.
        max_memory: bytes that requests of all clients may take together; 0: the usual.
    Raises:
        MirrorError: no memory, or no descriptor.
    """

    def __init__(
        self,
        engine: Engine,
        listen_fds: Sequence[int],
        *,
        max_clients: int = 0,
        max_memory: int = 0,
    ) -> None:
        """Accept no client yet."""
        server = ffi.new("struct direct_server **")
        fds = ffi.new("int[]", list(listen_fds))
        limits = ffi.new("struct nbdm_limits *")
        limits.max_clients, limits.max_memory = max_clients, max_memory
        rc = lib.nbdm_server_open(engine.handle, fds, len(fds), limits, server)
        check(rc, "serve")
        self._handle = server[0]

    @property
    def max_clients(self) -> int:
        """How many clients there may be: as many as there are descriptors for."""
        return int(lib.nbdm_server_max_clients(self._handle))

    def run(self) -> None:
        """
        Serve; blocks until `end`, and what was under way then is answered.

        Raises:
            MirrorError: no thread could be made.
        """
        check(lib.nbdm_server_run(self._handle), "serve")

    def end(self) -> None:
        """Have `run` return; from any thread, as often as one likes."""
        lib.nbdm_server_end(self._handle)

    def drain(self, timeout_s: float) -> bool:
        """
        Do as `end`, and wait for what is under way to be answered.

        Blocks up to *timeout_s*.

        Returns:
            Whether all clients are answered and disconnected.
        """
        return bool(lib.nbdm_server_drain(self._handle, _ms(timeout_s)) == 0)

    def close(self) -> None:
        """Free it, once `run` has returned and no `end` can come any more."""
        lib.nbdm_server_close(self._handle)
