# SPDX-License-Identifier: BSD-3-Clause
"""
A served volume's status as the control socket gives it: words made of the views.

Only shapes and sentences: what is true was judged by state.py, and seen by the keepers.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .keeper import View
from .model import VolumeStatus
from .policy import fence_words
from .resync import Progress
from .state import LocalState, RemoteState, describe, describe_local

if TYPE_CHECKING:
    from .local_keeper import LocalView

__all__ = ["explain", "local_dict", "remote_dict"]


def explain(
    volume: VolumeStatus,
    word: str,
    state_dir: str,
    local: dict[str, Any],
    remotes: list[dict[str, Any]],
) -> tuple[str, str]:
    """
    Say why the volume is in its state: its own reason, or its worst disk's.

    Args:
        word: the volume's state.
        state_dir: the directory of its logs.
        local, remotes: as `local_dict` and `remote_dict` give them.

    Returns:
        The reason and the hint; either may be empty.
    """
    if volume.failed:
        reason = f"{volume.reason}; writes get EIO until it is served anew"
        repair = f"mend what holds {state_dir}, then nbd-mirror stop CONFIG"
        return reason, f"{repair} and nbd-mirror serve CONFIG"
    found = f"{volume.reason}; " if volume.reason else ""  # by recovery, at the start
    fence = fence_words(volume)
    found += fence if volume.fenced else ""
    for name, one in (
        ("local", local),
        *((f"remote {remote['name']}", remote) for remote in remotes),
    ):
        if one["state"] == word and one["reason"]:
            return f"{found}{name}: {one['reason']}", one["hint"]
    return (fence + "a disk is behind" if volume.fenced else volume.reason), ""


def local_dict(view: LocalView) -> dict[str, Any]:
    """Give the local disk's part of the status."""
    facts, status = view.facts, view.status
    reason, hint = describe_local(facts)
    moving = facts.state is LocalState.RESYNCING and facts.sources > 0
    return {
        "path": view.path,
        "state": facts.state.value,
        "reason": reason,
        "hint": hint,
        "dirty_bytes": facts.dirty_bytes,
        "errors": status.errors,
        "repaired_regions": status.repaired,
        "copied_bytes": status.copied_bytes,
        "resync": _resync(view.progress, moving=moving),
        # While it is ok the engine keeps there what it last could not do.
        "last_error": status.reason if facts.state is LocalState.OK else "",
        "since": _time(status.since),
    }


def remote_dict(view: View, volume: VolumeStatus) -> dict[str, Any]:
    """Give a remote's part of the status."""
    facts, status = view.facts, view.status
    reason, hint = describe(facts)
    # While it is paused, or waits for late writes, nothing moves.
    moving = facts.state is RemoteState.RESYNCING and not (
        0 < facts.dirty_bytes <= facts.late_bytes and facts.late_s > 0
    )
    unflushed = status.unflushed_regions * volume.region_size
    return {
        "name": status.name,
        "uri": view.uri,
        "state": status.state.value,
        "reason": reason,
        "hint": hint,
        "connected": status.admitted,
        "dirty_bytes": facts.dirty_bytes,
        "late_bytes": facts.late_bytes,
        "unflushed_bytes": min(unflushed, volume.size),
        "assumed": status.assumed,
        "paused": status.paused,
        "resync": _resync(view.progress, moving=moving),
        "last_error": view.last_error,
        "since": _time(status.since),
    }


def _resync(progress: Progress | None, *, moving: bool) -> dict[str, Any] | None:
    if progress is None:
        return None
    return {
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes,
        "bytes_per_s": round(progress.bytes_per_s) if moving else 0,
        "eta_s": progress.eta_s if moving else None,
        "growing": progress.growing,
    }


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat() if seconds else ""
