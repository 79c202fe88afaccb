# SPDX-License-Identifier: BSD-3-Clause
"""
Resolve a split brain: ask this node's server, and follow what the losing node does.

The losing node may be the other one, and its server may start again as a secondary at
the end. So an answer may be missing for a while. What counts is what the losing node
says of the job, which it knows by its keep file also after a start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..base.errors import (
    ConfigError,
    FormatError,
    MirrorError,
    NotRunningError,
    RemoteError,
    WaitTimeoutError,
)
from ..volume.client import ask
from ..volume.config import VolumeConfig

__all__ = ["Resolved", "resolve"]

ASK_S = 30.0
POLL_S = 0.2
SILENT_S = 15.0  # without an answer about a job that has begun


@dataclass(frozen=True, slots=True)
class Resolved:
    """What was done, or would be: sizes in bytes."""

    id: str
    loser: str
    keep: str
    regions: int
    bytes: int
    keep_bytes: int


def resolve(
    config: VolumeConfig,
    keep: str,
    *,
    dry_run: bool,
    tell: Callable[[int, int], object],
) -> Resolved:
    """
    Resolve a split brain in favour of the node *keep*.

    Args:
        dry_run: only find what would be done.
        tell: gets the regions that are saved, and how many will be.
    Raises:
        RoleError: the nodes are no split brain, or clients use the losing one.
        SpaceError: the keep file has no room. MirrorError: it cannot be done.
    """
    names = [one.name for one in config.nodes]
    if not names:
        raise ConfigError(f"volume {config.name} has no [[node]] tables")
    if keep not in names:
        raise ConfigError(
            f"volume {config.name} has these nodes: {', '.join(names)}; none is called "
            f'"{keep}"'
        )
    found = _read(ask(config, "resolve", ASK_S, keep=keep, dry_run=dry_run))
    job, best, heard = found["id"], dict(found), time.monotonic()
    while found["state"] not in ("done", "dry_run"):
        time.sleep(POLL_S)
        try:
            found = _read(ask(config, "resolve", ASK_S, keep=keep, job=job))
        except (NotRunningError, RemoteError, WaitTimeoutError) as error:
            if _is_final(error):
                raise
            if time.monotonic() - heard > SILENT_S:
                raise WaitTimeoutError(
                    f"it is not known how far {best['loser']} has come: {error}; "
                    "without its keep file it has given up nothing",
                    f"nbd-mirror resolve CONFIG --keep {keep}, once both servers run",
                ) from None
            continue
        heard = time.monotonic()
        best |= found
        tell(int(found.get("done", 0)), int(found.get("regions", 0)))
    numbers = {key: int(best.get(key, 0)) for key in ("regions", "bytes", "keep_bytes")}
    return Resolved(str(job), str(best["loser"]), str(best["keep"]), **numbers)


def _is_final(error: MirrorError) -> bool:
    """Tell whether the losing node has said how the job ended."""
    return "nothing was" in error.message


def _read(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict) or not isinstance(answer.get("state"), str):
        raise FormatError("the server answered something else than it was asked")
    return answer
