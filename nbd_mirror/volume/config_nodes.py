# SPDX-License-Identifier: BSD-3-Clause
"""
One file for all nodes of a volume: which node this host is, and what holds there.

The whole file is checked on every node, also the tables of the other nodes. So a file
that one host accepts is right on all of them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from ..base.errors import ConfigError
from .config_tables import NodeConfig

__all__ = ["NODE_VARIABLE", "choose", "complete", "how_chosen"]

NODE_VARIABLE = "NBD_MIRROR_NODE"
# Each node has its own, at the top of the file or in the node's table.
_NEEDED = ("local", "state", "listen")
_NAME_IT = f"name the node: --node NODE, or {NODE_VARIABLE}=NODE in the environment"


def complete(data: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the top of a file with nodes, without the keys that it may leave to them.

    No remote is needed beside nodes, and a required key may stand in each node's table
    instead. It gets the first node's value, which counts for no other node.
    """
    found = {"remote": [], **data}
    nodes = data["node"]
    if not isinstance(nodes, list) or not all(isinstance(one, dict) for one in nodes):
        return found
    for key in _NEEDED:
        if key not in data and nodes and all(key in one for one in nodes):
            found[key] = nodes[0][key]
    return found


def choose(nodes: Sequence[NodeConfig], asked: str | None) -> NodeConfig:
    """
    Return the node that this host is.

    Args:
        nodes: all of the volume.
        asked: the name after `--node`, or None.
    Raises:
        ConfigError: this host is none of them; the message lists them.
    """
    names = ", ".join(node.name for node in nodes)
    name, source = _wanted(asked)
    if source:
        for node in nodes:
            if node.name == name:
                return node
        raise ConfigError(f'{source}: no node is called "{name}"; there are: {names}')
    host = socket.gethostname()
    # A host's name may be a whole domain name, of which the file has the first part.
    for word in (host.lower(), host.lower().partition(".")[0]):
        for node in nodes:
            if node.name.lower() == word:
                return node
    raise ConfigError(
        f'this host is called "{host}", but no node is; there are: {names}', _NAME_IT
    )


def how_chosen(asked: str | None) -> str:
    """Say what told `choose` which node this host is."""
    _, source = _wanted(asked)
    return source or "the host's name"


def _wanted(asked: str | None) -> tuple[str, str]:
    """Return the name that the user gave and where, or two empty texts."""
    if asked is not None:
        return asked, "--node"
    name = os.environ.get(NODE_VARIABLE, "")
    return name, NODE_VARIABLE if name else ""
