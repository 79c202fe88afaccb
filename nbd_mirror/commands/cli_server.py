# SPDX-License-Identifier: BSD-3-Clause
"""Commands about a volume's server: create, serve, stop, policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from ..base.errors import MetadataFailedError
from ..base.units import format_size
from ..volume import offline
from ..volume.client import ask_policy, ask_status
from ..volume.config import VolumeConfig, load
from .asked import asked_for, name_volume, words_for
from .cli_app import say
from .cli_types import Config, Door, NodeOption, PolicyArgument, ReadsOption
from .create import create_volume
from .serve import exec_server, start
from .show import describe_policy
from .stop import stop as stop_server

__all__ = ["create", "policy", "serve", "stop"]


def create(
    config: Config,
    assume_in_sync: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REMOTE",
            help="This remote is a copy already; may be given several times.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite an existing state.")
    ] = False,
    node: NodeOption = None,
) -> None:
    """Format a volume's state. The local disk is not touched."""
    volume = load(config, node)
    create_volume(volume, assume_in_sync or [], force=force)
    status = offline.stopped_status(volume)
    regions = -(-status.size // status.region_size)
    on = f" on node {volume.node}" if volume.node else ""
    say(
        f"created volume {volume.name}{on}: {format_size(status.size, exact=True)}, "
        f"{regions} regions of {format_size(status.region_size, exact=True)}"
    )
    asked = words_for(config, node)
    for line in _about_nodes(volume):
        say(line)
    names = [one.name for one in volume.remotes]
    for remote in status.remotes:
        if remote.name not in names:
            continue  # a node
        words = "all dirty: the first resync copies everything, holes cheaply"
        if remote.assumed:
            words = "assumed in sync on your word, until a full resync proves it"
        say(f"  {remote.name}: {words}")
    then = (
        ", on each node, and nbd-mirror promote CONFIG on the one whose content counts"
        if volume.node
        else ""
    )
    say(name_volume(f"next: nbd-mirror serve CONFIG{then}", asked))


def _about_nodes(volume: VolumeConfig) -> Iterator[str]:
    """Yield what a new node is told of itself and of the others."""
    record = offline.read_superblock(volume).node
    if record is None:
        return
    if record.zero:
        yield "  local: reads as zeroes"
    else:
        yield "  local: has content, which counts if this node is promoted first"
    for other in volume.others:
        yield f"  {other.name}: another node, at {other.address}; create it there too"


def serve(
    config: Config,
    *,
    door: Annotated[Door, typer.Option(help="Which server clients use.")] = Door.direct,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay; log to standard error.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Use the local disk as it is, and overwrite every remote with it.",
        ),
    ] = False,
    without_local: Annotated[
        bool,
        typer.Option(
            "--without-local", help="Give up the local disk: a remote in sync serves."
        ),
    ] = False,
    node: NodeOption = None,
) -> None:
    """Serve a volume over NBD. Runs in the background unless --foreground is given."""
    asked = asked_for(serve, locals())
    if force and without_local:
        raise typer.BadParameter("--force and --without-local exclude each other")
    volume = load(config, node)
    choice = "forced" if force else "lost" if without_local else ""
    if foreground:
        exec_server(volume, door.value, choice, asked)
    pid = start(volume, door.value, choice, asked)
    if volume.node and ask_status(volume).secondary:
        say(f"node {volume.node} of volume {volume.name} is secondary, process {pid}")
        say(name_volume("its state: nbd-mirror status CONFIG", words_for(config, node)))
        return
    say(f"volume {volume.name} is served at {volume.listen.uri} by process {pid}")


def stop(config: Config, node: NodeOption = None) -> None:
    """Stop the server cleanly. Drain, flush both sides, persist the logs."""
    volume = load(config, node)
    stop_server(volume)
    status = offline.stopped_status(volume)
    if not status.clean_stop:
        raise MetadataFailedError(
            f"volume {volume.name} stopped, but not cleanly: some logs could not be "
            "persisted; nothing answered is lost, the next start recovers "
            f"as after a crash. {volume.state}/serve.log says more",
            "nbd-mirror serve CONFIG",
        )
    remotes = (
        f"{one.name} {one.state}"
        + (f" ({format_size(one.dirty_bytes)} dirty)" if one.dirty_bytes else "")
        for one in status.remotes
    )
    found = ", ".join(remotes)
    say(f"volume {volume.name} stopped cleanly" + (f", {found}" if found else ""))


def policy(
    config: Config,
    policy: PolicyArgument = None,
    fenced_reads: ReadsOption = None,
    node: NodeOption = None,
) -> None:
    """Show or switch the policy of a served volume. Lasts until the server ends."""
    volume = load(config, node)
    answer = ask_policy(volume, policy=policy, fenced_reads=fenced_reads)
    for line in describe_policy(answer, volume):
        say(line)
