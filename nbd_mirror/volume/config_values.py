# SPDX-License-Identifier: BSD-3-Clause
"""
The allowed values of each key of a configuration: the rules in words, and the checks.

A check returns the value in base units, bytes or seconds, or raises ValueError with the
rule.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from pydantic import BeforeValidator, ValidationInfo

from ..base.listen import ADDRESS_RULE, LISTEN_RULE
from ..base.units import parse_duration, parse_size
from ..base.unix import MAX_UNIX_PATH

MAX_SIZE = 1 << 50  # 1 PiB
MIN_REGION, MAX_REGION = 4 << 10, 4 << 20
MAX_REMOTES = 8  # NBDM_MAX_REMOTES
MAX_NODES = MAX_REMOTES + 1  # with this one
MAX_CLIENTS = 1 << 16
MIN_MEMORY, MAX_MEMORY = 64 << 20, 1 << 40  # one of the largest requests must fit

# Shorter than NBDM_NAME_LEN.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
# As RFC 3986 has it, and libnbd reads it.
_NOT_IN_URI = re.compile(r"[^A-Za-z0-9._~:/?#@!$&'()*+,;=%-]|%(?![0-9A-Fa-f]{2})")
_NOT_IN_HOST = re.compile(r"[^A-Za-z0-9._~:@!$&'()*+,;=%\[\]-]|%(?![0-9A-Fa-f]{2})")
_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")

_NAME_RULE = (
    "1 to 63 letters, digits, '_', '.' or '-', beginning with a letter or a digit"
)
_URI_RULE = (
    "an NBD URI: nbd://HOST/NAME, nbds://HOST/NAME, "
    "nbd+unix:///NAME?socket=/PATH or nbds+unix:///NAME?socket=/PATH"
)

HOOK_RULE = (
    "a program's absolute path, or a list of it and its arguments, as in "
    '["/usr/bin/systemctl", "stop", "pg"]'
)

# The allowed values by key, for a value of the wrong type.
RULES = {
    "name": _NAME_RULE,
    "size": 'a size above 0 and at most 1PiB, as in "10GiB", or "adopt"',
    "local": "the path of a file or a block device",
    "state": "the path of a directory for the logs",
    "listen": LISTEN_RULE,
    "region_size": "a power of two from 4KiB to 4MiB",
    "policy": '"degrade" or "stop"',
    "fenced_reads": '"serve" or "fail"',
    "hold": "a time from 0s to 5min",
    "local_deadline": '"off", or a time from 1s to 10min',
    "start_alone": '"off", or a time from 1s to 1h',
    "late_write_window": "a time from 0s to 1h",
    "max_clients": "a whole number from 1 to 65536",
    "max_memory": "a size from 64MiB to 1TiB, or 0",
    "remote": f"1 to {MAX_REMOTES} [[remote]] tables",
    "uri": _URI_RULE,
    "deadline": "a time from 100ms to 10min",
    "node": f"2 to {MAX_NODES} [[node]] tables",
    "address": ADDRESS_RULE,
    "tls": '"off", or a [tls] table',
    "key": "the path of the nodes' shared secret",
    "certificate": "the path of this node's certificate",
    "private_key": "the path of the certificate's private key",
    "ca": "the path of the certificates that sign the nodes' certificates",
    "hooks": "a [hooks] table",
    "promoting": HOOK_RULE,
    "promoted": HOOK_RULE,
    "demoting": HOOK_RULE,
    "demoted": HOOK_RULE,
    "timeout": "a time from 1s to 10min",
}
# Where a key stands that was put into another table.
PLACES = {
    "uri": "in a [[remote]] table",
    "deadline": "in a [[remote]] or [[node]] table",
    "address": "in a [[node]] table",
    "key": "in the [tls] table",
    "certificate": "in the [tls] table",
    "private_key": "in the [tls] table",
    "ca": "in the [tls] table",
    "promoting": "in the [hooks] table",
    "promoted": "in the [hooks] table",
    "demoting": "in the [hooks] table",
    "demoted": "in the [hooks] table",
    "timeout": "in the [hooks] table",
}


def check_name(value: str) -> str:
    """Check the name of a volume."""
    if not _NAME.fullmatch(value):
        raise ValueError(f"must be {_NAME_RULE}")
    return value


def check_remote_name(value: str) -> str:
    """Check the name of a remote or a node; "local" is the local disk's."""
    if value == "local":
        raise ValueError('"local" is the local disk\'s name; choose another')
    return check_name(value)


def parse_volume_size(value: object) -> int:
    """Return bytes; 0 stands for "adopt"."""
    if value == "adopt":
        return 0
    size = parse_size(value)
    if not 0 < size <= MAX_SIZE:
        raise ValueError(f"must be {RULES['size']}")
    return size


def parse_region_size(value: object) -> int:
    """Return bytes."""
    size = parse_size(value)
    if size & (size - 1) or not MIN_REGION <= size <= MAX_REGION:
        raise ValueError(f"must be {RULES['region_size']}")
    return size


def check_max_clients(value: int) -> int:
    """Check the limit of clients."""
    if not 1 <= value <= MAX_CLIENTS:
        raise ValueError(f"must be {RULES['max_clients']}")
    return value


def parse_max_memory(value: object) -> int:
    """Return bytes; 0 leaves the limit to the server."""
    size = parse_size(value)
    if size and not MIN_MEMORY <= size <= MAX_MEMORY:
        raise ValueError(f"must be {RULES['max_memory']}")
    return size


def parse_local_deadline(value: object) -> float:
    """Return seconds; 0 stands for "off"."""
    seconds = 0.0 if value == "off" else parse_duration(value)
    if value != "off" and not 1 <= seconds <= 600:
        raise ValueError(f"must be {RULES['local_deadline']}")
    return seconds


def parse_start_alone(value: object) -> float:
    """Return seconds; 0 stands for "off"."""
    seconds = 0.0 if value == "off" else parse_duration(value)
    if value != "off" and not 1 <= seconds <= 3600:
        raise ValueError(f"must be {RULES['start_alone']}")
    return seconds


def between(key: str, least_s: float, most_s: float) -> BeforeValidator:
    """Return a check of the time *key*: seconds, within the two limits."""

    def check(value: object) -> float:
        seconds = parse_duration(value)
        if not least_s <= seconds <= most_s:
            raise ValueError(f"must be {RULES[key]}")
        return seconds

    return BeforeValidator(check)


def check_uri(value: str) -> str:
    """Check an NBD URI; it is not changed."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError(f"must be {_URI_RULE}") from None
    # C ends a string at a NUL, and urlsplit ignores line ends: both change the address.
    if value.partition(":")[0] not in _SCHEMES or not value.isprintable():
        raise ValueError(f"must be {_URI_RULE}")
    _check_characters(value, parts.netloc)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme.endswith("+unix"):
        if len(sockets) != 1 or sockets[0][:1] != "/" or "\0" in sockets[0]:
            raise ValueError("needs ?socket=/absolute/path of the server's socket")
        if len(os.fsencode(sockets[0])) > MAX_UNIX_PATH:
            raise ValueError(f"the socket's path is over {MAX_UNIX_PATH} bytes")
    elif not parts.hostname or port == 0 or parts.netloc.endswith(":"):
        raise ValueError(f"has no host or no port; must be {_URI_RULE}")
    elif sockets:
        raise ValueError(f"has a socket beside a host; must be {_URI_RULE}")
    if parts.fragment:
        raise ValueError("an NBD URI has no '#' part")
    return value


def _check_characters(value: str, host: str) -> None:
    """
    Check that libnbd can read a URI, as urlsplit reads any text.

    A remote that cannot be asked for would look like one that is away.
    """
    bad = _NOT_IN_HOST.search(host)
    if bad is not None:
        raise ValueError(f'has "{bad[0]}" in its host; must be {_URI_RULE}')
    behind = value.partition(":")[2].removeprefix("//")[len(host) :]
    bad = _NOT_IN_URI.search(behind)
    if bad is not None:
        raise ValueError(f'has "{bad[0]}", which a URI writes as {quote(bad[0])}')
    if "%00" in value:
        raise ValueError("has a NUL, %00")


def check_path(value: str, info: ValidationInfo) -> str:
    """Make it absolute; a relative one is relative to the file's folder."""
    if not value or "\0" in value:
        raise ValueError(f"must be {RULES[info.field_name or 'local']}")
    return os.path.normpath(Path((info.context or {}).get("folder", "/"), value))
