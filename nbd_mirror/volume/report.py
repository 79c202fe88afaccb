# SPDX-License-Identifier: BSD-3-Clause
"""
Build a volume's status from facts, in the same way with and without a server.

This module only arranges the facts of the keepers or the logs; the rules judge them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..base.units import iso_time
from ..rules.progress import Progress
from ..rules.reasons import describe, describe_local, describe_stored
from ..rules.state import Facts, LocalFacts, LocalState, RemoteState, volume_state
from .config import VolumeConfig
from .model import LocalStatus, RemoteStatus, VolumeStatus
from .status import Disk, Local, NodeStatus, Persists, Remote, Resync, Status

__all__ = ["LocalView", "RemoteView", "Server", "report"]

SILENT = "silent"  # replaces the local disk's state: requests wait for it


@dataclass(frozen=True, slots=True)
class RemoteView:
    """A remote at one moment."""

    facts: Facts
    status: RemoteStatus
    uri: str
    progress: Progress | None = None
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class LocalView:
    """The local disk at one moment."""

    facts: LocalFacts
    status: LocalStatus
    path: str
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Server:
    """The process that serves the volume."""

    door: str
    pid: int
    max_clients: int | None
    log_lines_lost: int
    log_lines_left_out: int


def report(
    config: VolumeConfig,
    volume: VolumeStatus,
    local_view: LocalView,
    views: Sequence[RemoteView],
    *,
    server: Server | None = None,
    node: NodeStatus | None = None,
    verdict: tuple[str, str, str] = ("", "", ""),
) -> Status:
    """
    Return the status of a volume.

    Args:
        config, volume, local_view, views: of one moment.
        server: the process that serves it.
        node: this node of a volume of nodes. A secondary has no *views*.
        verdict: without a server, the volume's state, reason and hint.
    """
    local = _local(local_view)
    remotes = tuple(_remote(one, volume, served=server is not None) for one in views)
    if node is not None:
        remotes = tuple(_with_hint(one, node) for one in remotes)
    if server is not None:
        word = _word(volume, local_view, views)
        verdict = word, *_explain(volume, word, config.state, (local, *remotes))
        if node and node.role != "primary" and word == RemoteState.IN_SYNC.value:
            verdict = _of_secondary(node)
    state, reason, hint = verdict
    return Status(
        volume=config.name,
        uuid=volume.uuid,
        size=volume.size,
        state=state,
        reason=reason,
        hint=hint,
        local=local,
        door=server and server.door,
        pid=server and server.pid,
        clients=volume.clients,
        max_clients=server and server.max_clients,
        inflight=volume.inflight,
        active_extents=volume.active_extents,
        persists=Persists(
            activity=volume.activity_persists,
            superblock=volume.superblock_persists,
            dirty=volume.dirty_persists,
        ),
        policy=volume.policy,
        fenced_reads=volume.fenced_reads,
        region_size=volume.region_size,
        generation=volume.generation,
        log_lines_lost=server.log_lines_lost if server else 0,
        log_lines_left_out=server.log_lines_left_out if server else 0,
        clean_stop=None if server else volume.clean,
        node=node,
        remotes=remotes,
    )


def _with_hint(remote: Remote, node: NodeStatus) -> Remote:
    """Say what helps against the reason of another node: `resume` only tries again."""
    other = any(peer.name == remote.name for peer in node.peers)
    if other and node.hint and not remote.connected:
        return remote.model_copy(update={"hint": node.hint})
    return remote


def _word(
    volume: VolumeStatus, local_view: LocalView, views: Sequence[RemoteView]
) -> str:
    """Return the state of a volume that is served."""
    return volume_state(
        [one.facts.state for one in views],
        failed=volume.failed,
        fenced=volume.fenced,
        local=volume.local.state,
        silent=local_view.facts.silent,
    )


def _of_secondary(node: NodeStatus) -> tuple[str, str, str]:
    """Return the state of a secondary whose own disk is ok, in a remote's words."""
    state = _NODE_STATES.get(node.state, RemoteState.OUT_OF_SYNC)
    return state.value, node.why, node.hint


_NODE_STATES = {
    "in_sync": RemoteState.IN_SYNC,
    "inconsistent": RemoteState.RESYNCING,  # its image is of no instant yet
}


def _explain(
    volume: VolumeStatus, word: str, state_dir: str, disks: Sequence[Disk]
) -> tuple[str, str]:
    """Return the reason of a served volume: its own, or its worst disk's."""
    if volume.failed:
        reason = f"{volume.reason}; writes get EIO until it is served again"
        repair = f"repair the disk of {state_dir}, then nbd-mirror stop CONFIG"
        return reason, f"{repair} and nbd-mirror serve CONFIG"
    # found by recovery, at the start
    found = f"{volume.reason}; " if volume.reason else ""
    refused = "reads and writes" if volume.fenced_reads == "fail" else "writes"
    fence = f"policy stop: {refused} get EIO until it is in_sync; "
    found += fence if volume.fenced else ""
    for one in disks:
        if one.state in (word, SILENT) and one.reason:
            name = "local" if isinstance(one, Local) else f"remote {one.name}"
            return f"{found}{name}: {one.reason}", one.hint
    return (fence + "a disk is behind" if volume.fenced else volume.reason), ""


def _local(view: LocalView) -> Local:
    facts, status = view.facts, view.status
    reason, hint = describe_local(facts)
    moving = facts.state is LocalState.RESYNCING and facts.sources > 0
    return Local(
        path=view.path,
        state=SILENT if facts.silent else facts.state.value,
        reason=reason,
        hint=hint,
        dirty_bytes=facts.dirty_bytes,
        silent_s=round(status.silent_s, 1),
        errors=status.errors,
        repaired_regions=status.repaired,
        copied_bytes=status.copied_bytes,
        resync=_resync(view.progress, moving=moving),
        # While it is ok, the engine keeps its last error there.
        last_error=status.reason if facts.state is LocalState.OK else "",
        since=iso_time(status.since),
    )


def _remote(view: RemoteView, volume: VolumeStatus, *, served: bool) -> Remote:
    facts, status = view.facts, view.status
    reason, hint = describe(facts) if served else describe_stored(facts)
    # While it is paused, or waits for late writes, nothing moves.
    moving = facts.state is RemoteState.RESYNCING and not (
        0 < facts.dirty_bytes <= facts.late_bytes and facts.late_s > 0
    )
    return Remote(
        name=status.name,
        uri=view.uri,
        state=status.state.value,
        reason=reason,
        hint=hint,
        connected=status.admitted,
        dirty_bytes=facts.dirty_bytes,
        late_bytes=facts.late_bytes,
        unflushed_bytes=volume.bytes_of(status.unflushed_regions),
        flush_bound_bytes=status.flush_bound if served else None,
        assumed=status.assumed,
        paused=status.paused,
        resync=_resync(view.progress, moving=moving),
        last_error=view.last_error,
        since=iso_time(status.since),
    )


def _resync(progress: Progress | None, *, moving: bool) -> Resync | None:
    if progress is None:
        return None
    return Resync(
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        bytes_per_s=round(progress.bytes_per_s) if moving else 0,
        eta_s=progress.eta_s if moving else None,
        growing=progress.growing,
    )
