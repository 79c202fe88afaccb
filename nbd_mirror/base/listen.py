# SPDX-License-Identifier: BSD-3-Clause
"""
The addresses a volume listens on: the key `listen`, and the `address` of a node.

An address is parsed once, into its parts, so that binding, attaching and printing
cannot parse the text in different ways.
"""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ConfigDict

from .unix import MAX_UNIX_PATH

__all__ = [
    "ADDRESS_RULE",
    "CLIENTS",
    "LISTEN_RULE",
    "NODES",
    "Address",
    "Listen",
    "parse_address",
    "parse_listen",
    "plain_host",
]

# The name of a listening socket says which kind of peer connects there.
CLIENTS, NODES = "clients", "nodes"

LISTEN_RULE = (
    '"unix:/absolute/path" (at most 107 bytes), "tcp:HOST:PORT", "tcp::PORT", or '
    '"tls:HOST:PORT" for TCP with TLS'
)
ADDRESS_RULE = (
    '"HOST:PORT", where the other nodes reach this one: "10.0.0.1:10810" or '
    '"[fd00::1]:10810", with a port from 1 to 65535'
)

_LABEL = r"[A-Za-z0-9_-]{1,63}"  # of a host's name


class Listen(BaseModel):
    """
    Where the server listens: a unix socket's *path*, or *host* and *port*.

    An empty *host* stands for every address of this host. *tls*: clients need TLS.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = None
    host: str = ""
    port: int = 0
    tls: bool = False

    @property
    def uri(self) -> str:
        """The NBD URI for a client on this host."""
        if self.path is not None:
            return "nbd+unix:///?" + urlencode(
                {"socket": self.path}, safe="/", quote_via=quote
            )
        host = f"[{self.client_host}]" if ":" in self.host else self.client_host
        return f"{'nbds' if self.tls else 'nbd'}://{host}:{self.port}"

    @property
    def client_host(self) -> str:
        """The host to connect to; for a wildcard address, the loopback one."""
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "localhost"}  # noqa: S104
        return loopback.get(self.host, self.host)

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}:{host}:{self.port}"


class Address(BaseModel):
    """Where the other nodes reach a node: a TCP *host* and *port*."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    port: int

    @property
    def place(self) -> tuple[str, int]:
        """The same for two spellings of one address; names are not looked up."""
        return plain_host(self.host), self.port

    @property
    def shown_host(self) -> str:
        """The host as a URI or a program such as scp needs it: IPv6 in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def __str__(self) -> str:
        return f"{self.shown_host}:{self.port}"


def plain_host(host: str) -> str:
    """Return one spelling for all of a host's, without looking it up."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().removesuffix(".")
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(address)


def parse_address(value: object) -> Address:
    """
    Read the address of a node.

    Args:
        value: "HOST:PORT", IPv6 in brackets.
    Raises:
        ValueError: it is none, or stands for every address of a host.
    """
    if isinstance(value, Address):
        return value
    try:
        if not isinstance(value, str) or value.startswith(":"):
            raise ValueError
        found = parse_listen(f"tcp:{value}")
    except ValueError:
        raise ValueError(f"must be {ADDRESS_RULE}") from None
    if plain_host(found.host) in ("0.0.0.0", "::"):  # noqa: S104
        raise ValueError(
            "stands for every address of a host; name the one to connect to"
        )
    return Address(host=found.host, port=found.port)


def parse_listen(value: object) -> Listen:
    """
    Read a listening address.

    Args:
        value: "unix:/absolute/path" or "tcp:HOST:PORT", IPv6 in brackets, or
            "tcp::PORT"; "tls:" instead of "tcp:" for TLS.
    Raises:
        ValueError: it is neither; the text says what is allowed.
    """
    if isinstance(value, Listen):
        return value
    kind, _, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind == "unix" and rest.startswith("/") and "\0" not in rest:
        if len(os.fsencode(rest)) > MAX_UNIX_PATH:
            raise ValueError(
                f"the path is {len(os.fsencode(rest))} bytes long, "
                f"at most {MAX_UNIX_PATH} are possible"
            )
        return Listen(path=os.path.normpath(rest))
    host, _, port = rest.rpartition(":")
    if kind in ("tcp", "tls") and ":" in rest and port.isascii() and port.isdigit():
        if len(port) > 5 or not 1 <= int(port) <= 65535:
            shown = port if len(port) <= 5 else f"{port[:5]}..."
            raise ValueError(f"port {shown} is not from 1 to 65535")
        return Listen(host=_parse_host(host), port=int(port), tls=kind == "tls")
    raise ValueError(f"must be {LISTEN_RULE}")


def _parse_host(host: str) -> str:
    if not host:
        return ""
    if host.startswith("[") and host.endswith("]"):
        try:
            address = ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise ValueError(f"{host} is no IPv6 address") from None
        # The name of the interface, which `ipaddress` does not check.
        if not re.fullmatch(r"[!-~]{0,15}", address.scope_id or ""):
            raise ValueError(f"{host} is no IPv6 address")
        return str(address)
    if ":" in host:
        raise ValueError('an IPv6 address stands in brackets: "tcp:[::1]:10809"')
    if len(host) > 253 or not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*\.?", host):
        raise ValueError(f"must be {LISTEN_RULE}")
    return host
