# SPDX-License-Identifier: BSD-3-Clause
"""
Switch what clients get when a remote is lost, while they run.

The engine makes the switch (csrc/volume/policy.c). The server keeps the new policy
until it ends; the next start uses the configuration's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..base.errors import ConfigError
from .process import log

if TYPE_CHECKING:
    from ..volume.core import Engine

__all__ = ["switch_policy"]

_ALLOWED = {"policy": ("degrade", "stop"), "fenced_reads": ("serve", "fail")}


def switch_policy(
    engine: Engine, args: Mapping[str, Any], volume: str
) -> dict[str, Any]:
    """
    Change the settings that *args* names, and return those in force afterwards.

    Args:
        engine: the running volume's.
        args: "policy" and "fenced_reads"; each may be missing.
        volume: its name, for the log.
    Raises:
        ConfigError: the policy is not known. MirrorIOError: the volume has failed.
    """
    status = engine.status()
    before = {"policy": status.policy, "fenced_reads": status.fenced_reads}
    wanted = {key: args.get(key) or value for key, value in before.items()}
    for key, value in wanted.items():
        if value not in _ALLOWED[key]:
            raise ConfigError(f"{key} must be one of {', '.join(_ALLOWED[key])}")
    if wanted != before:
        engine.set_policy(**wanted)
        status = engine.status()
        words = ", ".join(
            f"{key} {before[key]} -> {wanted[key]}"
            for key in wanted
            if wanted[key] != before[key]
        )
        fence = "; writes get EIO now" if status.fenced else ""
        log("warning", f"volume {volume}: an operator changed {words}{fence}")
    return {**wanted, "fenced": status.fenced}
