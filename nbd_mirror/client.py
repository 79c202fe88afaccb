# SPDX-License-Identifier: BSD-3-Clause
"""
Ask a volume's server, and make sure that it is this volume's.

A control socket is found through `state`; with a wrong `state` in the file a
command would reach another volume.  Nothing is done before the server has said
its name.
"""

from __future__ import annotations

from typing import Any

from . import control
from .config import VolumeConfig
from .errors import FormatError, NotRunningError

__all__ = ["ask", "serving_pid"]


def ask(
    config: VolumeConfig, command: str, timeout_s: float = 10.0, **args: Any
) -> dict[str, Any]:
    """
    Send a command to the volume's server and return its answer.

    Args:
        config: of the volume.
        command: "ping", "status", "pause", "resume", "invalidate",
            "policy" or "stop".
        timeout_s: seconds to wait.
        args: the command's own.
    Raises:
        FormatError: the server is another volume's. Others: see control.call.
    """
    if command not in ("ping", "status"):
        ask(config, "ping", timeout_s)
    answer: dict[str, Any] = control.call(config.state_dir, command, timeout_s, **args)
    if command in ("ping", "status") and answer["volume"] != config.name:
        raise FormatError(
            f"{config.state} is the state of volume {answer['volume']}, "
            f"not of {config.name}",
            "correct `state` or `name` in the configuration",
        )
    return answer


def serving_pid(config: VolumeConfig) -> int | None:
    """Return the process id of the server that answers, or None."""
    try:
        return int(ask(config, "ping", 5.0)["pid"])
    except NotRunningError:
        return None
