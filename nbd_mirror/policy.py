# SPDX-License-Identifier: BSD-3-Clause
"""
What clients get when a remote is lost, shown and switched while they run.

The engine makes the switch (csrc/policy.c). A server that was told so keeps to it until
it ends; what is written in the configuration is for the next start, and whoever is
shown a policy is told when the two differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .config import VolumeConfig
from .errors import ConfigError
from .model import VolumeStatus
from .process import log

if TYPE_CHECKING:  # the command line works without the C code
    from .core import Engine

__all__ = ["describe_policy", "fence_words", "switch_policy"]

_ALLOWED = {"policy": ("degrade", "stop"), "fenced_reads": ("serve", "fail")}


def switch_policy(
    engine: Engine, args: Mapping[str, Any], volume: str
) -> dict[str, Any]:
    """
    Change what *args* names, and return what is in force then.

    Args:
        engine: the running volume's.
        args: "policy" and "fenced_reads", each may be left out.
        volume: its name, for the log.
    Raises:
        ConfigError: such a policy is not known. MirrorIOError: the volume has failed.
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


def describe_policy(answer: Mapping[str, Any], config: VolumeConfig) -> Iterator[str]:
    """
    Give the lines for an operator: what is in force, and what the next start takes.

    Args:
        answer: of switch_policy.
        config: the file as it is now.
    """
    reads = {"serve": "fenced reads are served", "fail": "fenced reads get EIO"}
    yield f"policy {answer['policy']}, {reads[answer['fenced_reads']]}"
    if answer["fenced"]:
        yield "  fenced: a remote is out of sync, writes get EIO until it is in_sync"
    for key in _ALLOWED:
        configured = getattr(config, key)
        if configured != answer[key]:
            yield (
                f'  until the server ends: the configuration has {key} = "{configured}"'
            )


def fence_words(volume: VolumeStatus) -> str:
    """Say what a fenced volume's clients get, as the begin of a reason."""
    what = "reads and writes" if volume.fenced_reads == "fail" else "writes"
    return f"policy stop: {what} get EIO until it is in_sync; "
