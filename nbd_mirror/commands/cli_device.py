# SPDX-License-Identifier: BSD-3-Clause
"""Commands about a volume's device in the kernel: attach, detach."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.errors import RoleError
from ..device import attach as kernel
from ..volume.client import ask_status
from ..volume.config import VolumeConfig, load
from .cli_app import say
from .cli_types import BlockSizeOption, Config, NodeOption

__all__ = ["attach", "detach"]


def attach(
    config: Config,
    device: Annotated[
        str | None,
        typer.Argument(metavar="/dev/nbdN", help="Default: the first free one."),
    ] = None,
    connections: Annotated[
        int, typer.Option(min=1, max=16, help="Kernel to server connections.")
    ] = 1,
    block_size: BlockSizeOption = "",
    node: NodeOption = None,
) -> None:
    """Attach a served volume to the kernel, as /dev/nbdN."""
    volume = load(config, node)
    if volume.node:
        _check_primary(volume)
    kernel.check_kernel(volume, device or "")
    answer = ask_status(volume)
    name, choice = kernel.attach(
        *(volume, answer.size, device or ""),
        connections=connections,
        asked=block_size,
    )
    say(
        f"volume {volume.name} is {name}: {choice.block}-byte blocks ({choice.why}), "
        f"a request fails after {kernel.fails_after_s(volume, connections)}s"
    )
    if choice.warning:
        typer.echo(f"nbd-mirror: warning: {choice.warning}", err=True)


def _check_primary(volume: VolumeConfig) -> None:
    """Refuse a secondary before a kernel without nbd is told what else would work."""
    status = ask_status(volume)
    if not status.secondary or status.node is None:
        return
    leaders = [one.name for one in status.node.peers if one.role == "primary"]
    primary = f"{leaders[0]} is primary" if leaders else "no node is primary"
    raise RoleError(
        f"node {volume.node} is secondary and serves no clients: {primary}",
        "nbd-mirror status CONFIG (tells whether this node may be promoted)",
    )


def detach(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG|/dev/nbdN", help="A volume or a device.")
    ],
    node: NodeOption = None,
) -> None:
    """Detach a volume or a device from the kernel."""
    kernel.check_root("detach", "nbd-mirror detach CONFIG")
    if config.startswith("/dev/"):
        name = kernel.detach(None, config)
    else:
        name = kernel.detach(load(config, node))
    say(f"{name} is detached")
