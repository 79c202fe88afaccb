# SPDX-License-Identifier: BSD-3-Clause
"""
Send commands to a volume's server, after checking that it is this volume's.

A control socket is found through `state`. With a wrong `state` in the file, a command
would reach another volume. So nothing is done before the server has sent its volume's
name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..base.errors import FormatError, NotRunningError, WaitTimeoutError
from . import control
from .answers import Ping, Policy, read
from .config import VolumeConfig
from .offline import silent_server
from .status import Status

__all__ = ["Process", "ask", "ask_policy", "ask_process", "ask_status", "serving_pid"]


class Process(NamedTuple):
    """A server's process id, and whether the kernel or the server reports it."""

    pid: int
    seen: bool


def ask(
    config: VolumeConfig, command: str, timeout_s: float = 10.0, **args: Any
) -> Any:
    """
    Send a command to the volume's server and return its answer.

    Args:
        config: of the volume.
        command: "pause", "resume", "invalidate", "policy" or "stop".
        timeout_s: seconds to wait.
        args: the command's own.
    Raises:
        FormatError: the server is another volume's. WaitTimeoutError: it is at work
        on the command. Others: see control.call.
    """
    ask_process(config, timeout_s)
    try:
        return _call(config, command, timeout_s, args)[0]
    except WaitTimeoutError:
        # It has just answered the ping, so it does not hang: the command does.
        raise WaitTimeoutError(
            f'"{command}" is not done after {timeout_s:g}s; the server goes on with it',
            "nbd-mirror status CONFIG",
        ) from None


def ask_policy(config: VolumeConfig, timeout_s: float = 30.0, **args: Any) -> Policy:
    """Switch the policy as *args* say; return what is in force. Raises as `ask`."""
    return read(Policy, ask(config, "policy", timeout_s, **args))


def ask_status(config: VolumeConfig, timeout_s: float = 10.0) -> Status:
    """Return the server's status; raises as `ask`."""
    status = read(Status, _call(config, "status", timeout_s, {})[0])
    _check_name(config, status.volume)
    return status


def ask_process(config: VolumeConfig, timeout_s: float = 5.0) -> Process:
    """Return the server's process, as the kernel reports it if it does."""
    answer, pid = _call(config, "ping", timeout_s, {})
    ping = read(Ping, answer)
    _check_name(config, ping.volume)
    return Process(pid or ping.pid, seen=pid > 0)


def serving_pid(config: VolumeConfig) -> int | None:
    """Return the process id of the server that answers, or None."""
    try:
        return ask_process(config).pid
    except NotRunningError:
        return None


def _call(
    config: VolumeConfig, command: str, timeout_s: float, args: dict[str, Any]
) -> tuple[Any, int]:
    try:
        return control.exchange(config.state_dir, command, timeout_s, args)
    except (NotRunningError, WaitTimeoutError) as error:
        raise type(error)(
            *(silent_server(config) or (error.message, error.hint))
        ) from None


def _check_name(config: VolumeConfig, name: str) -> None:
    if name != config.name:
        raise FormatError(
            f"{config.state} is the state of volume {name}, not of {config.name}",
            "correct `state` or `name` in the configuration",
        )
