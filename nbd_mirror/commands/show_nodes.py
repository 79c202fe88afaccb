# SPDX-License-Identifier: BSD-3-Clause
"""
The nodes of a volume in a terminal: who is primary, and what a failover costs now.

Both nodes stand in one view on either of them, and the question that an operator asks
in an outage has an answer before it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.text import Text

from ..base.hints import Asked
from ..volume.status import NodeStatus, OtherNode, Promotable, Status
from .asked import name_volume

__all__ = ["fail_over", "node_lines", "show_nodes"]

_STYLES = {"yes": "green", "force": "yellow", "no": "bold red"}


def show_nodes(line: Callable[..., None], status: Status, asked: str | Asked) -> None:
    """
    Print the nodes, and whether the volume may fail over now.

    Args:
        line: prints a line of its parts.
        status: the volume's; without nodes nothing is printed.
        asked: the user's name of the volume, for the hints; see name_volume().
    """
    node = status.node
    if node is None:
        return
    for text in node_lines(status):
        line(f"  {text}")
    if status.pid is None:
        return
    if node.why and node.why != status.reason:
        line(f"    why: {node.why}")
        if node.hint:
            line(f"    try: {name_volume(node.hint, asked)}")
    if node.hook:
        line(f"    hook: {node.hook}")
    found = fail_over(node)
    answer = Text(found.answer, style=_STYLES.get(found.answer, ""))
    line("  fail over now?  ", answer, f": {found.reason}" if found.reason else "")
    if found.lost:
        line(f"    may be lost: {found.lost}")
    if found.command:
        line(f"    try: {name_volume(found.command, asked)}")


def node_lines(status: Status) -> Iterator[str]:
    """Yield a line for this node, and one for each other node."""
    node = status.node
    if node is None:
        return
    width = max(len(name) for name in (node.name, *(one.name for one in node.peers)))
    epoch = f"epoch {node.epoch}" if node.epoch else "never promoted"
    words, role = ["this node", epoch, node.state.replace("_", " ")], node.role
    if status.pid is None:
        # Its record says what it was; a start is secondary first.
        words, role = ["this node", f"was {node.role}", epoch], "stopped"
        words += [node.state.replace("_", " ")] if node.state != "waiting" else []
    yield f"node {node.name:{width}}  {role or 'unknown':9}  {', '.join(words)}"
    for other in node.peers:
        words = [other.address]
        if other.connected:
            words += ["connected", "in sync" if other.in_sync else "not in sync"]
        elif status.pid is not None:
            words.append("not connected")
        if other.why:
            words.append(other.why)
        if other.since and not other.connected:
            words.append(f"met {other.since}")
        role = other.role or "unknown"
        yield f"node {other.name:{width}}  {role:9}  {', '.join(words)}"


def fail_over(node: NodeStatus) -> Promotable:
    """Return whether the role may move now, seen from either node."""
    if node.role != "primary":
        return node.promotable
    for other in node.peers:
        if _takes_over(other):
            return Promotable(
                answer="yes",
                reason=f"{other.name} is in sync",
                command=f"nbd-mirror switchover CONFIG {other.name}",
            )
    return Promotable(answer="no", reason=_why_none(node))


def _takes_over(other: OtherNode) -> bool:
    return other.connected and other.in_sync


def _why_none(node: NodeStatus) -> str:
    parts = (
        f"{other.name} is {'not in sync' if other.connected else 'not connected'}"
        for other in node.peers
    )
    return f"no other node can take over: {', '.join(parts)}"
