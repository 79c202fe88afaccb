# SPDX-License-Identifier: BSD-3-Clause
"""Commands about a split brain: resolve, and keep, which has what it saved."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..base.units import format_size, iso_time
from ..volume.config import VolumeConfig, load
from . import keep as keeping
from . import resolve as resolving
from .asked import name_volume, words_for
from .cli_app import say
from .cli_types import Config, JsonOption, NodeOption
from .output import one_line

__all__ = ["keep", "resolve"]


class KeepAction(StrEnum):
    """What to do with keep files."""

    list = "list"
    open = "open"
    delete = "delete"


def resolve(
    config: Config,
    keep: Annotated[
        str, typer.Option(metavar="NODE", help="The node whose writes count.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")
    ] = False,
    node: NodeOption = None,
) -> None:
    """End a split brain. What the other node alone has goes into a keep file."""
    volume = load(config, node)
    found = resolving.resolve(volume, keep, dry_run=dry_run, tell=lambda *_: None)
    count, size = found.regions, format_size(found.bytes, exact=True)
    regions = f"{count} region{'' if count == 1 else 's'} ({size})"
    words = words_for(config, None)
    if dry_run:
        room = format_size(found.keep_bytes)
        say(one_line(f"{found.keep} would be kept, and {found.loser} overwritten"))
        say(one_line(f"{regions} of {found.loser} differ, and would be saved first"))
        say(one_line(f"the keep file would take {room}; nothing was changed"))
        return
    say(one_line(f"{found.keep} is kept, and {found.loser} gets its data"))
    say(one_line(f"saved on {found.loser}: {regions}, in the keep file {found.id}"))
    say(name_volume(f"next, on {found.loser}: nbd-mirror keep CONFIG", words))


def keep(
    config: Config,
    action: Annotated[
        KeepAction,
        typer.Argument(metavar="ACTION", help="list, open or delete. Default: list."),
    ] = KeepAction.list,
    name: Annotated[
        str | None, typer.Argument(metavar="ID", help="Of open and delete: which file.")
    ] = None,
    socket: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Of open: the unix socket to serve on."),
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Of delete: do not ask.")] = False,
    as_json: JsonOption = False,
    node: NodeOption = None,
) -> None:
    """List, read or remove what `resolve` saved on this node."""
    volume = load(config, node)
    if action is KeepAction.list:
        _list(volume, as_json=as_json)
        return
    if name is None:
        raise typer.BadParameter(f"{action.value} needs the ID", param_hint="ID")
    if action is KeepAction.delete:
        _delete(volume, name, yes=yes)
        return
    if socket is None:
        raise typer.BadParameter("open needs the socket", param_hint="--socket")
    keeping.open_image(
        volume,
        name,
        socket.absolute(),
        lambda uri: say(f"serving {name} read-only at {uri}; Ctrl-C ends it"),
        lambda text: typer.echo(f"nbd-mirror: warning: {text}", err=True),
    )


def _list(volume: VolumeConfig, *, as_json: bool) -> None:
    found = list(keeping.kept_files(volume))
    if as_json:
        say(json.dumps([one.dump() for one in found], indent=2))
        return
    if not found:
        say(f"volume {volume.name} has no keep files on this node")
    for one in found:
        size, header = format_size(one.bytes), one.header
        if header is None:
            say(one_line(f"{one.id}: {size}; it cannot be read: {one.why}"))
            continue
        lost = f"; {one.lost} of them are lost" if one.lost else ""
        say(one_line(f"{one.id}: {size}, made {iso_time(header.time)}"))
        say(one_line(f"  {header.regions} regions of {header.node}{lost}"))
        say(one_line(f"  given up for {header.kept}: {header.reason}"))
        say(one_line(f"  generation {header.generation}, base {header.base or 'none'}"))


def _delete(volume: VolumeConfig, name: str, *, yes: bool) -> None:
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter(
                "without a terminal it is needed: what only the file holds is lost",
                param_hint="--yes",
            )
        typer.confirm(f"delete {name}? What only it holds is lost", abort=True)
    keeping.delete(volume, name)
    say(one_line(f"deleted {name}"))
