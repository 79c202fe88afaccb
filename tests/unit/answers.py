# SPDX-License-Identifier: BSD-3-Clause
"""What a server answers about a volume, for commands that are shown it."""

from __future__ import annotations

from typing import Any


def a_remote(**changes: Any) -> dict[str, Any]:
    """Return a remote's part: in sync, with *changes*."""
    remote = {
        "name": "dr",
        "uri": "nbd://h/x",
        "state": "in_sync",
        "reason": "",
        "hint": "",
        "connected": True,
        "dirty_bytes": 0,
        "late_bytes": 0,
        "unflushed_bytes": 0,
        "flush_bound_bytes": 64 << 20,
        "assumed": False,
        "paused": False,
        "resync": None,
        "last_error": "",
        "since": "2024-01-01T00:00:00+00:00",
    }
    return {**remote, **changes}


def a_local(**changes: Any) -> dict[str, Any]:
    """Return the local disk's part: ok, with *changes*."""
    local = {
        "path": "/d.img",
        "state": "ok",
        "reason": "",
        "hint": "",
        "dirty_bytes": 0,
        "errors": 0,
        "repaired_regions": 0,
        "copied_bytes": 0,
        "resync": None,
        "last_error": "",
        "since": "",
    }
    return {**local, **changes}


def a_status(*remotes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a volume's status with these remotes, and *changes*."""
    status = {
        "volume": "v",
        "uuid": "u",
        "size": 1 << 20,
        "state": remotes[0]["state"] if remotes else "in_sync",
        "reason": "",
        "hint": "",
        "local": a_local(),
        "door": "direct",
        "pid": 1,
        "clients": 1,
        "inflight": 0,
        "active_extents": 0,
        "policy": "degrade",
        "fenced_reads": "serve",
        "region_size": 65536,
        "generation": 1,
        "remotes": list(remotes),
    }
    return {**status, **changes}


def a_node(**changes: Any) -> dict[str, Any]:
    """Return a node's part: a secondary in sync with its primary, with *changes*."""
    node = {
        "name": "beta",
        "role": "secondary",
        "epoch": 3,
        "leader": "alpha",
        "generation": "00000000000000ab",
        "state": "in_sync",
        "peers": [a_peer()],
        "promotable": {"answer": "yes", "command": "nbd-mirror promote CONFIG"},
    }
    return {**node, **changes}


def a_peer(**changes: Any) -> dict[str, Any]:
    """Return what a node sees of another one: its primary, with *changes*."""
    peer = {
        "name": "alpha",
        "address": "10.0.0.1:10810",
        "connected": True,
        "role": "primary",
        "in_sync": True,
        "since": "2024-01-01T00:00:00+00:00",
    }
    return {**peer, **changes}
