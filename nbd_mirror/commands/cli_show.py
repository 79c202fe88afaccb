# SPDX-License-Identifier: BSD-3-Clause
"""Commands that show a volume: status, wait, watch, inspect."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import from_errno
from ..rules.state import RemoteState
from ..volume import offline
from ..volume.config import load
from .asked import name_volume, words_for
from .cli_app import console, say
from .cli_types import Config, JsonOption, NodeOption, check_disk, duration
from .output import one_line
from .picture import save_png
from .show import map_json, show_map, show_status
from .watch import status_of, wait_for
from .watch import watch as watch_volume

__all__ = ["inspect", "status", "wait", "watch"]

# What the local disk can be, in a remote's words.
_LOCAL_STATES = (RemoteState.IN_SYNC, RemoteState.RESYNCING, RemoteState.FAILED)


def status(
    config: Config, as_json: JsonOption = False, node: NodeOption = None
) -> None:
    """Show the state of a volume and of each disk, with the reason."""
    answer = status_of(load(config, node))
    words = words_for(config, node)
    if as_json:
        found = answer.dump()
        nodes = [found["node"]] if "node" in found else []
        for about in (found, found["local"], *found["remotes"], *nodes):
            about["hint"] = name_volume(about["hint"], words)
        for promotable in (one["promotable"] for one in nodes):
            promotable["command"] = name_volume(promotable["command"], words)
        say(json.dumps(found, indent=2))
    else:
        show_status(console(), answer, words)


def wait(
    config: Config,
    state: Annotated[RemoteState, typer.Option("--for", help="The state to wait for.")],
    timeout: Annotated[
        str, typer.Option(metavar="TIME", help="Time limit, as in 60s.")
    ] = "60s",
    remote: Annotated[
        str | None,
        typer.Option(
            metavar="REMOTE", help='Only this remote, or "local". Default: all.'
        ),
    ] = None,
    node: NodeOption = None,
) -> None:
    """Wait until the remotes are in a state. For in_sync, also the local disk."""
    volume = load(config, node)
    check_disk(volume, remote)
    if remote == "local" and state not in _LOCAL_STATES:
        allowed = ", ".join(one.value for one in _LOCAL_STATES)
        raise typer.BadParameter(
            f"the local disk is never {state.value}, only {allowed}",
            param_hint="--for",
        )
    timeout_s = duration("--timeout", timeout)
    served = wait_for(
        volume,
        state.value,
        timeout_s,
        remote,
        lambda text: typer.echo(f"nbd-mirror: {text}", err=True),
    )
    names = remote or ", ".join(served)
    say(one_line(f"{names}: {state.value}"))


def watch(
    config: Config,
    until: Annotated[
        RemoteState | None,
        typer.Option(help="End when all remotes are in this state."),
    ] = None,
    node: NodeOption = None,
) -> None:
    """Watch a volume live, with a progress bar while resyncing. Ctrl-C ends it."""
    try:
        watch_volume(
            load(config, node),
            console(),
            words_for(config, node),
            until and until.value,
        )
    except KeyboardInterrupt:
        if until is not None:
            raise


def inspect(
    config: Config,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save a picture of the maps.")
    ] = None,
    as_json: JsonOption = False,
    node: NodeOption = None,
) -> None:
    """Show the dirty maps: counts, the longest runs, a picture."""
    volume = load(config, node)
    found = offline.read_superblock(volume).volume
    with contextlib.ExitStack() as stack:
        maps = [
            stack.enter_context(offline.open_disk_map(volume, disk, found))
            for disk in offline.mapped_disks(volume)
        ]
        if as_json:
            say(json.dumps(map_json(volume.name, maps), indent=2))
        else:
            for one in maps:
                show_map(console(), one, volume.size)
        if png is not None:
            try:
                save_png(maps, png, f"nbd_mirror volume {volume.name}")
            except OSError as error:
                full = error.errno in {errno.ENOSPC, errno.EDQUOT}
                raise from_errno(
                    error.errno or errno.EIO,
                    f"{png}: {error.strerror}",
                    "another FILE, where there is room" if full else "",
                ) from None
