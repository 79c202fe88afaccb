# SPDX-License-Identifier: BSD-3-Clause
"""Write the first configuration of a volume with nodes, with a comment for each key."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..base.errors import ConfigError, ExistsError, from_errno
from ..base.files import place_file
from ..volume.config import VolumeConfig, check, find
from ..volume.config_nodes import NODE_VARIABLE
from ..volume.config_values import check_name

__all__ = ["NewVolume", "write_config"]


@dataclass(frozen=True)
class NewVolume:
    """
    The user's choices for `init`; all except the name are text for the file.

    Args:
        nodes: name and address of each.
    """

    name: str
    size: str
    local: str
    state: str
    listen: str
    nodes: Sequence[tuple[str, str]]


def write_config(volume: NewVolume) -> VolumeConfig:
    """
    Write the file of a new volume, checked as a command that reads it would.

    Returns:
        The volume, as if this host was no node of it.
    Raises:
        ConfigError: a value is wrong. ExistsError: there is such a file.
    """
    try:
        check_name(volume.name)
        if volume.name.endswith(".toml"):
            raise ValueError("is the name of a file; the volume's name has no .toml")
    except ValueError as error:
        raise ConfigError(f"NAME = {json.dumps(volume.name)}: {error}") from None
    path = find(volume.name)
    text = "\n".join(_lines(volume, os.fspath(path.with_suffix(".key")))) + "\n"
    try:
        content = text.encode()
    except UnicodeEncodeError:
        raise ConfigError("a path that is not UTF-8 cannot stand in the file") from None
    config = check(path, text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place_file(path, content, mode=0o644)
    except FileExistsError:
        raise ExistsError(f"{path} is there already, and was not changed") from None
    except OSError as error:
        words = f"{path} cannot be written: {error.strerror}"
        raise from_errno(error.errno or 0, words) from None
    return config


_ABOUT = (
    ("name", "The volume's name, fixed when it is created."),
    ("size", "The size of the disk that clients see, fixed when it is created."),
    (
        "local",
        "The disk of this volume on each node: a file or a block device of that",
        "size or more. A node with another path has a local of its own.",
    ),
    (
        "state",
        "The directory for the logs, which `nbd-mirror create` makes. It must not",
        "be on the disk local.",
    ),
    ("listen", "Where clients connect. Only the primary serves them."),
)


def _lines(volume: NewVolume, key: str) -> Iterator[str]:
    yield f"# Volume {volume.name}, mirrored between its nodes."
    yield "# Every node has the same file; a node's table has the keys that differ."
    for name, *about in _ABOUT:
        value = _toml(getattr(volume, name))
        yield from ("", *(f"# {line}" for line in about), f"{name} = {value}")
    for name, address in volume.nodes:
        yield from (
            "",
            "[[node]]",
            "# A host is this node if its host name is this name; otherwise commands",
            f"# get --node {name}, or {NODE_VARIABLE}={name} in the environment.",
            f"name = {_toml(name)}",
            "# Where the other nodes reach it.",
            f"address = {_toml(address)}",
        )
    yield from (
        "",
        "[tls]",
        "# The secret that all nodes share. `nbd-mirror key` makes it on one node.",
        "# Copy it to the others; no other user may read it.",
        f"key = {_toml(key)}",
    )


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
