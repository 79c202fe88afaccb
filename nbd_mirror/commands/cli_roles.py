# SPDX-License-Identifier: BSD-3-Clause
"""Commands about the nodes: promote, demote, switchover, replace."""

from __future__ import annotations

from typing import Annotated

import typer

from ..volume.config import load
from . import roles
from .asked import name_volume, words_for
from .cli_app import say
from .cli_types import Config, NodeOption
from .output import one_line

__all__ = ["demote", "promote", "replace", "switchover"]


def promote(
    config: Config,
    force: Annotated[
        bool,
        typer.Option("--force", help="Without proof that no answered write is lost."),
    ] = False,
    node: NodeOption = None,
) -> None:
    """Make this node primary. Refuses if answered writes may be lost."""
    volume = load(config, node)
    found = roles.promote(volume, force=force)
    say(one_line(f"node {found.name} is primary, in epoch {found.epoch}"))
    say(f"clients connect to {volume.listen.uri}")


def demote(
    config: Config,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also if clients are connected, which are cut off, or a hook fails.",
        ),
    ] = False,
    node: NodeOption = None,
) -> None:
    """Make this node secondary. No node is primary then."""
    volume = load(config, node)
    found = roles.demote(volume, force=force)
    say(one_line(f"node {found.name} is secondary, and no node is primary"))
    then = "next, on the node that is to serve: nbd-mirror promote CONFIG"
    say(name_volume(then, words_for(config, None)))


def switchover(
    config: Config,
    target: Annotated[
        str | None,
        typer.Argument(metavar="NODE", help="Default: the only other node."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also if the hook `demoting` fails.")
    ] = False,
    node: NodeOption = None,
) -> None:
    """Give the role of primary to another node, in sync. Nothing is lost."""
    volume = load(config, node)
    taken = roles.switchover(volume, target, force=force)
    say(one_line(f"node {taken} is primary"))


def replace(
    config: Config,
    target: Annotated[
        str, typer.Argument(metavar="NODE", help="The node that is a new host.")
    ],
    node: NodeOption = None,
) -> None:
    """Take another host as a node. What only the earlier host held is given up."""
    volume = load(config, node)
    roles.replace(volume, target)
    say(one_line(f"node {target} is filled from this one as soon as it is met"))
