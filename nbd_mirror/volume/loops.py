# SPDX-License-Identifier: BSD-3-Clause
"""
Is a remote's address the volume's own?

A volume that mirrors to itself waits for itself: each write is held until a deadline
ends it. So this module compares the addresses in any spelling: a unix socket over
links, a TCP port under any name or address of this host.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from ..base.errors import ConfigError
from ..base.listen import Listen
from .config import VolumeConfig
from .config_tables import DEFAULT_PORT

__all__ = ["check_remotes", "own_address"]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_remotes(config: VolumeConfig) -> None:
    """
    Check that no remote is the volume itself.

    Raises:
        ConfigError: one is.
    """
    for remote in config.remotes:
        why = own_address(remote.uri, config.listen)
        if why:
            raise ConfigError(
                f"remote {remote.name}: {remote.uri}: {why}",
                "correct `uri`, or `listen`",
            )


def own_address(uri: str, listen: Listen) -> str:
    """
    Return why a remote at *uri* would be the volume that listens at *listen*; or "".

    Never raises: a name that cannot be resolved gives no answer.
    """
    parts = urlsplit(uri)
    if parts.scheme.endswith("+unix"):
        path = parse_qs(parts.query).get("socket", [""])[0]
        same = listen.path is not None and _same_file(path, listen.path)
    else:
        same = listen.path is None and _same_port(
            parts.hostname or "", parts.port or DEFAULT_PORT, listen
        )
    return f"this is the volume's own address, {listen}" if same else ""


def _same_file(one: str, other: str) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    with contextlib.suppress(OSError):
        return Path(one).samefile(other)
    return False


def _same_port(host: str, port: int, listen: Listen) -> bool:
    if port != listen.port:
        return False
    asked = {_reached(one) for one in _resolve(host)}
    bound = _resolve(listen.host)
    if any(one.is_unspecified for one in bound):
        # A wildcard receives connections to any address of this host.
        return any(_is_ours(one) for one in asked)
    return bool(asked & {_reached(one) for one in bound})


def _resolve(host: str) -> set[_Address]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # the latter for a name that can be none
        return set()
    return {ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found}


def _reached(address: _Address) -> _Address:
    """Return the address that a connect to *address* reaches."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    if address.is_unspecified:
        return ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return address


def _is_ours(address: _Address) -> bool:
    """Is it an address of this host? Then the kernel uses it as the source too."""
    if address.is_loopback:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with (
        contextlib.suppress(OSError),
        socket.socket(family, socket.SOCK_DGRAM) as probe,
    ):
        probe.connect((str(address), 9))  # nothing is sent
        return bool(ipaddress.ip_address(probe.getsockname()[0]) == address)
    return False
