# SPDX-License-Identifier: BSD-3-Clause
"""Commands about one disk of a volume: pause, resume, invalidate."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.errors import ConfigError
from ..volume.answers import Disks, read
from ..volume.client import ask
from ..volume.config import VolumeConfig, load
from .cli_app import say
from .cli_types import Config, NodeOption, RemoteArgument, check_disk
from .output import one_line

__all__ = ["invalidate", "pause", "resume"]


def pause(
    config: Config, remote: RemoteArgument = None, node: NodeOption = None
) -> None:
    """Pause resync of one remote or of all."""
    _remote_command(load(config, node), "pause", remote)


def resume(
    config: Config, remote: RemoteArgument = None, node: NodeOption = None
) -> None:
    """Resume resync, and check a failed disk again. "local" is the local disk."""
    _remote_command(load(config, node), "resume", remote)


def invalidate(
    config: Config,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="Which remote.")],
    node: NodeOption = None,
) -> None:
    """Overwrite a remote with a full copy. "local" is a replaced local disk."""
    _remote_command(load(config, node), "invalidate", remote)


def _remote_command(volume: VolumeConfig, command: str, remote: str | None) -> None:
    if remote == "local" and command == "pause":
        raise ConfigError("what the local disk misses is copied back without a pause")
    check_disk(volume, remote)
    arguments = {} if remote is None else {"remote": remote}
    answer = read(Disks, ask(volume, command, 30.0, **arguments))
    done = {"pause": "paused", "resume": "resumed", "invalidate": "all dirty"}[command]
    # The file may have other remotes by now than the server.
    say(one_line(f"{', '.join(answer.remotes)}: {done}"))
