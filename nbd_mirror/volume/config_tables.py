# SPDX-License-Identifier: BSD-3-Clause
"""
The tables of a configuration: [[remote]], [[node]] and [tls].

A volume's copies beside the own one are its remotes and its other nodes. They share the
names of files in the state directory, and the engine's limit, so their names and their
number are checked together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
)

from ..base.listen import Address, Listen, parse_address, parse_listen, plain_host
from . import config_values as values

__all__ = [
    "DEFAULT_PORT",
    "AnyPath",
    "Copy",
    "LocalDeadline",
    "MaxClients",
    "MaxMemory",
    "NodeConfig",
    "RemoteConfig",
    "StartAlone",
    "TlsConfig",
    "WhereToListen",
    "check_copies",
    "check_names",
    "check_nodes",
    "check_tls_table",
    "parse_tls",
]

DEFAULT_PORT = 10809  # of an NBD URI
# The engine adds these to the name of a log: while it makes one, and when it sets aside
# one that failed its check.
_FILE_ENDS = (".new", ".bad")

AnyPath = Annotated[str, AfterValidator(values.check_path)]
WhereToListen = Annotated[Listen, BeforeValidator(parse_listen)]
LocalDeadline = Annotated[float, BeforeValidator(values.parse_local_deadline)]
StartAlone = Annotated[float, BeforeValidator(values.parse_start_alone)]
Deadline = Annotated[float, values.between("deadline", 0.1, 600)]
MaxClients = Annotated[int, AfterValidator(values.check_max_clients)]
MaxMemory = Annotated[int, BeforeValidator(values.parse_max_memory)]


@dataclass(frozen=True, slots=True)
class Copy:
    """
    A copy of the volume beside the own one: another node, or a remote.

    *uri* of a node names no export; *deadline* is a command's, in seconds.
    """

    name: str
    uri: str
    deadline: float
    is_node: bool = False


class RemoteConfig(BaseModel):
    """One [[remote]] table: *name*, *uri*, and a command's *deadline* in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(values.check_remote_name)]
    uri: Annotated[str, AfterValidator(values.check_uri)]
    deadline: Deadline = 5.0


class NodeConfig(BaseModel):
    """
    One [[node]] table: a host that holds a copy of the volume and serves it.

    *address* is where the other nodes reach it, *deadline* that of a command to it, in
    seconds. The other keys are the volume's own, as they are on this node.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(values.check_remote_name)]
    address: Annotated[Address, BeforeValidator(parse_address)]
    deadline: Deadline = 5.0
    local: AnyPath | None = None
    state: AnyPath | None = None
    listen: WhereToListen | None = None
    local_deadline: LocalDeadline | None = None
    max_clients: MaxClients | None = None
    max_memory: MaxMemory | None = None

    @property
    def names(self) -> tuple[str, str]:
        """What its certificate may be of: its name, or the host of its address."""
        return self.name, self.address.place[0]

    def own(self) -> dict[str, Any]:
        """Return the volume's keys that this node has values of its own for."""
        keys = self.model_fields_set - {"name", "address", "deadline"}
        return {key: getattr(self, key) for key in keys}

    def copy_of(self, *, secure: bool) -> Copy:
        """Return this node as a copy for another one; *secure*: nodes use TLS."""
        uri = f"{'nbds' if secure else 'nbd'}://{self.address}"
        return Copy(self.name, uri, self.deadline, is_node=True)


class TlsConfig(BaseModel):
    """
    The [tls] table: how nodes prove to each other that they belong to the volume.

    Either *key*, a shared secret, or the other three: files of X.509. None of them
    stands for `tls = "off"`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    key: AnyPath | None = None
    certificate: AnyPath | None = None
    private_key: AnyPath | None = None
    ca: AnyPath | None = None

    @property
    def on(self) -> bool:
        """Whether nodes authenticate each other and encrypt."""
        return self.key is not None or self.certificate is not None


_OFF = TlsConfig.model_construct()


def parse_tls(value: object) -> object:
    """Take "off" for a table without files; the model checks a table."""
    if value == "off":
        return _OFF
    if not isinstance(value, dict | TlsConfig):
        raise ValueError(f"must be {values.RULES['tls']}")
    return value


def check_tls_table(tls: TlsConfig | None) -> TlsConfig | None:
    """Check that a table has the files of one way to authenticate."""
    if tls is None or tls is _OFF:
        return tls
    certificates = (tls.certificate, tls.private_key, tls.ca)
    complete = all(certificates) if tls.key is None else not any(certificates)
    if not complete:
        raise ValueError(
            "must have either key, or certificate, private_key and ca; "
            'tls = "off" does without'
        )
    return tls


def check_names(names: Sequence[str], kind: str) -> None:
    """
    Check that no two copies share a name, or a file of the state directory.

    Args:
        names: of the copies, without "local".
        kind: "remote" or "node", as which the file has these copies.
    Raises:
        ValueError: two do.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'two {kind}s are called "{name}"; names must differ')
    for name in ("local", *names):
        for end in _FILE_ENDS:
            if name + end in names:
                raise ValueError(
                    f'no {kind} can be called "{name}{end}" beside "{name}": '
                    f"dirty.{name}{end} is a file of either; give one of them "
                    f"another name, which makes it a new {kind}, all dirty"
                )


def check_nodes(nodes: tuple[NodeConfig, ...]) -> tuple[NodeConfig, ...]:
    """Check the number, the names and the addresses of all [[node]] tables."""
    if not 2 <= len(nodes) <= values.MAX_NODES:
        raise ValueError(f"must be {values.RULES['node']}, not {len(nodes)}")
    check_names([node.name for node in nodes], "node")
    seen: dict[object, NodeConfig] = {}
    for node in nodes:
        # The name of a host has no upper and lower case, and says which node it is.
        for key, what in (
            (node.name.lower(), "names that differ only in case"),
            (node.address.place, f"one address, {node.address}"),
        ):
            other = seen.setdefault(key, node)
            if other is not node:
                raise ValueError(f'"{other.name}" and "{node.name}" have {what}')
    return nodes


def check_copies(nodes: Sequence[NodeConfig], remotes: Sequence[RemoteConfig]) -> str:
    """Return what is wrong with nodes and remotes together, or ""."""
    count = len(nodes) - 1 + len(remotes)
    if count > values.MAX_REMOTES:
        return (
            f"{count} copies beside a node's own (other nodes: {len(nodes) - 1}, "
            f"remotes: {len(remotes)}); at most {values.MAX_REMOTES} are possible"
        )
    names = [node.name for node in nodes]
    for remote in remotes:
        if remote.name in names:
            return f'a node and a remote are called "{remote.name}"; names must differ'
        place = _place(remote.uri)
        for node in nodes:
            if node.address.place == place:
                return (
                    f'remote "{remote.name}": {remote.uri} is the address of node '
                    f'"{node.name}", which is a copy already'
                )
    try:
        check_names([*names, *(remote.name for remote in remotes)], "remote or node")
    except ValueError as error:
        return str(error)
    return ""


def _place(uri: str) -> tuple[str, int] | None:
    """Return the TCP address of a URI as that of a node; None for a unix socket."""
    parts = urlsplit(uri)
    if parts.hostname is None or parts.scheme.endswith("+unix"):
        return None
    return plain_host(parts.hostname), parts.port or DEFAULT_PORT
