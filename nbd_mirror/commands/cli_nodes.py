# SPDX-License-Identifier: BSD-3-Clause
"""Commands that set up a volume with nodes: init, key, nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..base.hints import quote
from ..base.units import format_size
from ..volume.config import VolumeConfig, load
from ..volume.config_nodes import how_chosen
from ..volume.tls_files import check_own_certificate, check_tls, make_key
from .asked import name_volume, words_for
from .cli_app import say
from .cli_types import Config, NodeOption
from .init import NewVolume, write_config

__all__ = ["init", "key", "nodes"]


def init(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The name of the new volume.")
    ],
    *,
    size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of the disk, as in 10GiB.")
    ],
    local: Annotated[
        Path, typer.Option(metavar="PATH", help="The disk of a node: file or device.")
    ],
    node: Annotated[
        list[str],
        typer.Option(metavar="NODE=HOST:PORT", help="A node; give two or more."),
    ],
    state: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Default: /var/lib/nbd-mirror/NAME."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Default: unix:/run/nbd-mirror/NAME.sock."
        ),
    ] = None,
) -> None:
    """Write the configuration of a volume with nodes, for all of them."""
    volume = write_config(
        NewVolume(
            name=name,
            size=size,
            local=os.fspath(local.absolute()),
            state=os.fspath((state or Path("/var/lib/nbd-mirror", name)).absolute()),
            listen=listen or f"unix:/run/nbd-mirror/{name}.sock",
            nodes=[_named(text) for text in node],
        )
    )
    say(f"wrote {volume.source}; each node needs it at the same place:")
    for line in _copies(volume, volume.source, "  "):
        say(line)
    say(f"next, on one node: nbd-mirror key {name}")


def _named(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if not equals:
        raise typer.BadParameter(
            f"{text}: it must be NODE=HOST:PORT", param_hint="--node"
        )
    return name, address


def key(
    config: Config,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the key that is there.")
    ] = False,
    node: NodeOption = None,
) -> None:
    """Make the secret that the nodes of a volume share, or its clients."""
    volume = load(config, node)
    fingerprint = make_key(volume, force=force)
    assert volume.tls is not None
    assert volume.tls.key is not None
    path = Path(volume.tls.key)
    say(f"made the key {path}, fingerprint {fingerprint}")
    if not volume.nodes:
        say("copy it to the host of each client, which cannot connect without it")
        return
    say("copy it to each other node, which cannot connect without it:")
    for line in _copies(volume, path, "  "):
        say(line)
    asked = words_for(config, None)
    say(name_volume("then, on each: nbd-mirror nodes CONFIG", asked))


def _copies(volume: VolumeConfig, path: Path, indent: str) -> Iterator[str]:
    """Yield the command that copies a file, for each other node."""
    for node in volume.nodes:
        if node.name != volume.node:
            there = quote(f"{node.address.shown_host}:{path}")
            source = quote(os.fspath(path))
            yield f"{indent}{node.name}: scp -p {source} {there}"


def nodes(config: Config, node: NodeOption = None) -> None:
    """Show what the configuration means on this host, and check its TLS files."""
    volume = load(config, node)
    for line in _about(volume, node):
        say(line)
    fingerprint = check_tls(volume)
    if fingerprint:
        say(f"  fingerprint of the key: {fingerprint}, the same for all its copies")
    late = check_own_certificate(volume)
    if late:
        typer.echo(f"nbd-mirror: warning: {late}", err=True)


def _about(volume: VolumeConfig, asked: str | None) -> Iterator[str]:
    size = format_size(volume.size, exact=True) if volume.size else "of its local disk"
    yield f"volume {volume.name}: {size}"
    for node in volume.nodes:
        here = (
            f"  this host, by {how_chosen(asked)}" if node.name == volume.node else ""
        )
        yield f"  node {node.name}: {node.address}{here}"
    for remote in volume.remotes:
        yield f"  remote {remote.name}: {remote.uri}"
    yield f"  local: {volume.local}"
    yield f"  state: {volume.state}"
    yield f"  listen: {volume.listen}"
    tls = volume.tls
    if tls is not None and tls.key is not None:
        yield f"  tls: by the key {tls.key}"
    elif tls is not None and tls.on:
        yield f"  tls: by the certificate {tls.certificate}, those of {tls.ca}"
    elif tls is not None:
        yield "  tls: off: any host that reaches a node's address can change the disk"
