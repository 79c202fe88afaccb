# SPDX-License-Identifier: BSD-3-Clause
"""The arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from ..base.units import parse_duration
from ..rules.content import BLOCK_SIZES
from ..volume.config import VolumeConfig

__all__ = [
    "BlockSizeOption",
    "Config",
    "Door",
    "JsonOption",
    "NodeOption",
    "PolicyArgument",
    "ReadsOption",
    "RemoteArgument",
    "check_disk",
    "duration",
]


class Door(StrEnum):
    """The program that serves clients: our own server, or nbdkit."""

    direct = "direct"
    python = "python"


class Policy(StrEnum):
    """What clients get when a remote is lost."""

    degrade = "degrade"
    stop = "stop"


class FencedReads(StrEnum):
    """How a fenced volume answers reads."""

    serve = "serve"
    fail = "fail"


Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A TOML file, or a volume's name.")
]
NodeOption = Annotated[
    str | None,
    typer.Option(
        "--node",
        metavar="NODE",
        help="The node that this host is. Default: by its name.",
    ),
]
RemoteArgument = Annotated[
    str | None, typer.Argument(metavar="REMOTE", help="Default: all of them.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PolicyArgument = Annotated[
    Policy | None,
    typer.Argument(metavar="POLICY", help="degrade or stop. Default: show it."),
]
ReadsOption = Annotated[
    FencedReads | None, typer.Option(help="Reads while policy stop refuses writes.")
]


def block_size(text: str) -> str:
    """Check a block size from an option: one of the kernel's, or auto."""
    if text not in ("", "auto", *map(str, BLOCK_SIZES)):
        allowed = ", ".join(map(str, reversed(BLOCK_SIZES)))
        raise typer.BadParameter(f"{text}: it must be {allowed}, or auto")
    return text


BlockSizeOption = Annotated[
    str,
    typer.Option(
        metavar="N",
        callback=block_size,
        help="Default: as the content needs. Remembered; auto forgets it.",
    ),
]


def duration(option: str, text: str) -> float:
    """Return a time from an option, in seconds."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text}: {error}", param_hint=option) from None


def check_disk(volume: VolumeConfig, name: str | None) -> None:
    """Check that a disk of the volume has this name, if one was given."""
    if name not in (None, "local"):
        volume.copy_called(name)  # raises if there is none
