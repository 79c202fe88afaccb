# SPDX-License-Identifier: BSD-3-Clause
"""
Change which node is primary, and wait until the change has come about.

A role change is a start of the server: it stores the new role, stops cleanly and
executes itself again, as the same process. So the answer of the old server only says
that the change has begun, or its connection just ends. What counts is what the server
says once it answers again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from ..base import processes
from ..base.errors import (
    ConfigError,
    MirrorError,
    NotRunningError,
    RoleError,
    WaitTimeoutError,
)
from ..volume.client import ask, ask_process, ask_status
from ..volume.config import VolumeConfig
from ..volume.status import NodeStatus

__all__ = ["demote", "promote", "replace", "switchover"]

ASK_S = 60.0  # for the nodes to agree, with a deadline for each of their calls
POLL_S = 0.1
STATUS_S = 5.0
SETTLE_S = 30.0  # after the stop: the start, and what the nodes then agree on


def promote(config: VolumeConfig, *, force: bool) -> NodeStatus:
    """
    Make this node primary.

    Returns:
        What the node says of itself as primary.
    Raises:
        RoleError: it may not be, or only by force. NotRunningError: no server runs, or
        it ended. WaitTimeoutError: it is not primary in time. ConfigError: the volume
        has no nodes.
    """
    return _change(config, "promote", lambda node: node.role == "primary", force=force)


def demote(config: VolumeConfig, *, force: bool) -> NodeStatus:
    """Make this node secondary; as `promote`. No node is primary then."""
    return _change(config, "demote", lambda node: node.role != "primary", force=force)


def switchover(config: VolumeConfig, name: str | None, *, force: bool = False) -> str:
    """
    Give the role of primary to another node; as `promote`.

    Args:
        name: of the node, or None for the only other one.
        force: also if the hook `demoting` fails.
    Returns:
        Its name, once it is primary.
    """
    _check_nodes(config)
    names = [other.name for other in config.others]
    target = names[0] if name is None and len(names) == 1 else name
    if target not in names:
        asked = "name one" if name is None else f'none is called "{name}"'
        raise ConfigError(
            f"volume {config.name} has these other nodes: {', '.join(names)}; {asked}"
        )
    before = _node(config)
    if before.role != "primary":
        primary = [one.name for one in before.peers if one.role == "primary"]
        where = f"{primary[0]} is primary" if primary else "no node is primary"
        raise RoleError(
            f"{before.name} is secondary: {where}, and only a primary can give its "
            "role away",
            "nbd-mirror status CONFIG",
        )
    taken = _change(
        config,
        "switchover",
        lambda node: _serves(node, target) or node.role == "primary",
        both=lambda node: _serves(node, target),
        node=target,
        **({"force": True} if force else {}),
    )
    if not _serves(taken, target):
        raise RoleError(
            f"{target} did not take the role: {taken.name} is primary again, in epoch "
            f"{taken.epoch}",
            "nbd-mirror status CONFIG",
        )
    return target


def replace(config: VolumeConfig, name: str) -> None:
    """
    Announce that the node called *name* is a new host.

    Raises:
        RoleError: it is connected. ConfigError: there is no such node.
        NotRunningError: no server runs.
    """
    _check_nodes(config)
    names = [other.name for other in config.others]
    if name not in names:
        raise ConfigError(
            f"volume {config.name} has these other nodes: {', '.join(names)}; "
            f'none is called "{name}"'
        )
    ask(config, "replace", ASK_S, node=name)


def _serves(node: NodeStatus, name: str) -> bool:
    """Tell whether *node* sees the node called *name* as primary."""
    return any(one.name == name and one.role == "primary" for one in node.peers)


def _check_nodes(config: VolumeConfig) -> None:
    if not config.nodes:
        raise ConfigError(
            f"volume {config.name} has no [[node]] tables, so it has no roles"
        )


def _change(
    config: VolumeConfig,
    command: str,
    reached: Callable[[NodeStatus], bool],
    *,
    both: Callable[[NodeStatus], bool] | None = None,
    **args: object,
) -> NodeStatus:
    """
    Send *command*, and wait until what the node says is as wanted.

    Args:
        reached: the change has come about, or has failed for good.
        both: that it has come about, if `reached` is also true before it begins.
    """
    _check_nodes(config)
    server = ask_process(config)
    epoch = _node(config).epoch
    # Without an answer: it was executed again before that was sent.
    with contextlib.suppress(NotRunningError):
        ask(config, command, ASK_S + config.hooks.limit_s, **args)
    deadline = time.monotonic() + config.stop_limit_s + SETTLE_S + config.hooks.limit_s
    last = ""
    while time.monotonic() < deadline:
        try:
            node = _node(config)
        except (NotRunningError, WaitTimeoutError):
            if server.seen and not _runs(server.pid):
                raise _ended(config, command) from None
        else:
            last = f"{node.name} is {node.role}: {node.why or node.state}"
            settled = both is None or both(node) or node.epoch > epoch
            if settled and reached(node):
                return node
        time.sleep(POLL_S)
    raise WaitTimeoutError(
        f'"{command}" has not come about in time; {last or "no server answers"}',
        "nbd-mirror status CONFIG",
    )


def _node(config: VolumeConfig) -> NodeStatus:
    node = ask_status(config, STATUS_S).node
    if node is None:
        raise ConfigError(
            f"the server of volume {config.name} was started without [[node]] tables",
            "nbd-mirror stop CONFIG, then nbd-mirror serve CONFIG",
        )
    return node


def _runs(pid: int) -> bool:
    try:
        return processes.stat_fields(pid)[processes.STATE] not in "ZX"
    except OSError:
        return False


def _ended(config: VolumeConfig, command: str) -> MirrorError:
    return NotRunningError(
        f'the server ended during "{command}"; {config.state}/serve.log says why, '
        "unless it logs elsewhere",
        "nbd-mirror serve CONFIG",
    )
