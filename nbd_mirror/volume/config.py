# SPDX-License-Identifier: BSD-3-Clause
"""
A volume's configuration: one TOML file, checked as a whole before use.

The models define the keys; an unknown or missing key is an error. Every message names
the file, the key, its value as written and the allowed values, one line each, because a
wrong file is usually wrong in one place and the reader has it open. config_values.py
checks each value. Values are kept in base units: bytes and seconds.
"""

from __future__ import annotations

import fnmatch
import os
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
)

from ..base.errors import ConfigError, UnsupportedError
from ..base.listen import plain_host
from . import config_tables as tables
from . import config_values as values
from .config_explain import explain, plain_line
from .config_file import CONFIG_DIR_ENV, config_dir, find, read_text
from .config_hooks import HooksConfig
from .config_nodes import choose, complete
from .config_tables import Copy, NodeConfig, RemoteConfig, TlsConfig
from .model import Params, RemoteParams

__all__ = [
    "CHOICE_VARIABLE",
    "CONFIG_DIR_ENV",
    "GRANT_VARIABLE",
    "HAND_OVER_VARIABLE",
    "STARVED_DEADLINES",
    "STATE_FILES",
    "RemoteConfig",
    "VolumeConfig",
    "check",
    "check_links",
    "check_nodes",
    "config_dir",
    "find",
    "load",
    "to_params",
]

# `serve` passes --force and --without-local in this variable, because the server's
# command line may be nbdkit's.
CHOICE_VARIABLE = "NBD_MIRROR_LOCAL_CHOICE"
# The environment of the process that replaces a node's server. `serve` removes both: a
# user's environment gives no role.
GRANT_VARIABLE = "NBD_MIRROR_GRANT"  # the epoch in which it opens as primary
HAND_OVER_VARIABLE = "NBD_MIRROR_HAND_OVER"  # the node that it gives its role to
# NBDM_STARVED_DEADLINES: the engine's limit for a command that starves while others are
# answered.
STARVED_DEADLINES = 8
MAX_SERVED_NODES = 2
STOP_S = 60.0  # of a stop, in addition to a starved command and the hold
# Names that we use in the state directory, as patterns.
STATE_FILES = (
    "superblock*",
    "activity*",
    "inflight*",
    "dirty.*",
    "lock*",
    "failed",
    "unflushed",
    "control",
    "attached",
    "serve.log*",
)


def _check_remotes(
    remotes: tuple[RemoteConfig, ...], info: ValidationInfo
) -> tuple[RemoteConfig, ...]:
    # Wrong nodes are not in *info*, and are told by themselves.
    least = 0 if info.data.get("nodes", True) else 1
    if not least <= len(remotes) <= values.MAX_REMOTES:
        raise ValueError(f"must be {values.RULES['remote']}, not {len(remotes)}")
    tables.check_names([remote.name for remote in remotes], "remote")
    return remotes


class VolumeConfig(BaseModel):
    """
    A whole file: sizes in bytes, times in seconds, paths absolute.

    *size* is 0 for "adopt", *start_alone* 0 for "off". *max_memory* is 0 for the
    smaller of 1 GiB and a quarter of the machine's memory. With nodes, the keys have
    the values that they have on *node*.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(values.check_name)]
    size: Annotated[int, BeforeValidator(values.parse_volume_size)]
    local: tables.AnyPath
    state: tables.AnyPath
    listen: tables.WhereToListen
    region_size: Annotated[int, BeforeValidator(values.parse_region_size)] = 64 << 10
    policy: Literal["degrade", "stop"] = "degrade"
    fenced_reads: Literal["serve", "fail"] = "serve"
    hold: Annotated[float, values.between("hold", 0, 300)] = 2.0
    local_deadline: tables.LocalDeadline = 0.0
    start_alone: tables.StartAlone = 0.0
    late_write_window: Annotated[
        float, values.between("late_write_window", 0, 3600)
    ] = 30.0
    max_clients: tables.MaxClients = 1024
    max_memory: tables.MaxMemory = 0
    tls: Annotated[
        TlsConfig | None,
        BeforeValidator(tables.parse_tls),
        AfterValidator(tables.check_tls_table),
    ] = None
    hooks: HooksConfig = HooksConfig()
    nodes: Annotated[
        tuple[NodeConfig, ...],
        Field(alias="node", strict=False),
        AfterValidator(tables.check_nodes),
    ] = ()
    remotes: Annotated[
        tuple[RemoteConfig, ...],
        Field(alias="remote", strict=False),
        AfterValidator(_check_remotes),
    ]
    _source: Path = PrivateAttr(default=Path())
    _node: str = PrivateAttr(default="")

    @property
    def source(self) -> Path:
        """The file that this was read from, absolute."""
        return self._source

    @property
    def node(self) -> str:
        """The name of the node that this host is, or "" for a volume without nodes."""
        return self._node

    @property
    def others(self) -> tuple[NodeConfig, ...]:
        """The nodes that this host is not, in the order of the file."""
        return tuple(node for node in self.nodes if node.name != self._node)

    @property
    def copies(self) -> tuple[Copy, ...]:
        """The copies beside the own one, as the engine numbers them: nodes first."""
        secure = self.tls is not None and self.tls.on
        nodes = (node.copy_of(secure=secure) for node in self.others)
        remotes = (Copy(one.name, one.uri, one.deadline) for one in self.remotes)
        return (*nodes, *remotes)

    @property
    def state_dir(self) -> Path:
        """The directory of the logs."""
        return Path(self.state)

    @property
    def stop_limit_s(self) -> float:
        """The time after which the server ends even if its stop has not completed."""
        deadline = max((copy.deadline for copy in self.copies), default=0.0)
        limit = STOP_S + STARVED_DEADLINES * deadline + self.hold
        return limit + self.local_deadline

    def copy_called(self, name: str) -> Copy:
        """
        Return the copy beside the own one that is called *name*.

        Raises:
            ConfigError: there is none; the message lists them.
        """
        for copy in self.copies:
            if copy.name == name:
                return copy
        names = ", ".join(copy.name for copy in self.copies)
        kind = "other node or remote" if self.nodes else "remote"
        raise ConfigError(f'volume {self.name} has no {kind} "{name}"; it has: {names}')


def load(path_or_name: str | os.PathLike[str], node: str | None = None) -> VolumeConfig:
    """
    Read and check the configuration of a volume.

    Args:
        path_or_name: a path, or a volume's name; see find().
        node: the node that this host is, as the user says; see choose().
    Raises:
        MissingError: there is no such file. AccessError: it may not be read.
        ConfigError: it is wrong; one line for each mistake.
    """
    asked = os.fspath(path_or_name)
    source = find(asked)
    config = check(source, read_text(source, asked))
    if config.nodes:
        try:
            mine = choose(config.nodes, node)
        except ConfigError as error:
            raise ConfigError(_line(source, error.message), error.hint) from None
        config = _on(config, mine)
    elif node is not None:
        wrong = f"--node {node}: volume {config.name} has no [[node]] tables"
        raise ConfigError(_line(source, wrong))
    return config


def check(source: Path, text: str) -> VolumeConfig:
    """
    Check the *text* of a file on all nodes at once.

    Returns:
        The volume, as if this host was no node of it.
    Raises:
        ConfigError: it is wrong; one line for each mistake.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of too many digits
        raise ConfigError(f"{source.name}: not valid TOML: {error}") from None
    whole = complete(data) if "node" in data else data
    try:
        config = VolumeConfig.model_validate(whole, context={"folder": source.parent})
    except ValidationError as error:
        lines = explain(data, error, _MODELS)
        text = "\n".join(_line(source, line) for line in lines)
        raise ConfigError(text) from None
    config._source = source
    wrong = _check_tables(config)
    if wrong:
        raise ConfigError(_line(source, wrong))
    for node in config.nodes:
        _check_paths(_on(config, node), os.path.normpath)
    if not config.nodes:
        _check_paths(config, os.path.normpath)
    return config


_MODELS: dict[str, type[BaseModel]] = {
    "": VolumeConfig,
    "remote": RemoteConfig,
    "node": NodeConfig,
    "tls": TlsConfig,
    "hooks": HooksConfig,
}


def _on(config: VolumeConfig, node: NodeConfig) -> VolumeConfig:
    """Return the configuration as it is on *node*."""
    found = config.model_copy(update=node.own())
    found._node = node.name
    return found


def _check_listen_tls(config: VolumeConfig) -> str:
    """Return what is wrong with `listen` and the [tls] table together, or ""."""
    listens = [_on(config, node).listen for node in config.nodes] or [config.listen]
    secure = [listen for listen in listens if listen.tls]
    if secure and not (config.tls and config.tls.on):
        return f'listen = "{secure[0]}": needs a [tls] table with a key or certificates'
    if not secure and not config.nodes and config.tls:
        return (
            'tls: is of use only with [[node]] tables, or with listen = "tls:HOST:PORT"'
        )
    return ""


def _check_tables(config: VolumeConfig) -> str:
    """Return what is wrong with the tables of a file together, or ""."""
    wrong = _check_listen_tls(config)
    if not config.nodes and config.start_alone:
        wrong = wrong or "start_alone: is of use only with [[node]] tables"
    if not config.nodes and "hooks" in config.model_fields_set:
        wrong = wrong or "hooks: is of use only with [[node]] tables"
    if wrong or not config.nodes:
        return wrong
    if config.size == 0:
        return 'size = "adopt": must be a size where there are [[node]] tables'
    if config.tls is None:
        return (
            "tls: is missing; nodes need a [tls] table with the key that `nbd-mirror "
            'key` makes, or tls = "off" before the first table'
        )
    for node in config.nodes:
        listen, address = _on(config, node).listen, node.address
        hosts = ("", "0.0.0.0", "::", plain_host(address.host))  # noqa: S104
        if listen.port == address.port and plain_host(listen.host) in hosts:
            return (
                f'node "{node.name}": address and listen are the same, {node.address}'
            )
    return tables.check_copies(config.nodes, config.remotes)


def check_nodes(config: VolumeConfig) -> None:
    """
    Check that this version serves such nodes.

    Raises:
        UnsupportedError: it does not.
    """
    if len(config.nodes) > MAX_SERVED_NODES:
        raise UnsupportedError(
            f"volume {config.name} has {len(config.nodes)} [[node]] tables: this "
            "version serves two nodes",
            "two [[node]] tables, and a [[remote]] table for each further copy",
        )


def _line(source: Path, text: str) -> str:
    return f"{source.name}: {plain_line(text)}"


def check_links(config: VolumeConfig, *, uses_local: bool = True) -> None:
    """
    Check that no log of the state is a link to the disk or to the listening socket.

    `load` does not check this, because a disk that hangs must not delay a command that
    only reads the status.

    Args:
        config: of the volume.
        uses_local: False: the local disk has failed, and is not checked.
    Raises:
        ConfigError: one is.
    """
    _check_paths(config, os.path.realpath, uses_local=uses_local)


def _check_paths(
    config: VolumeConfig, resolve: Callable[[str], str], *, uses_local: bool = True
) -> None:
    resolve_local = resolve if uses_local else os.path.normpath
    local = Path(resolve_local(config.local))
    state = Path(resolve(config.state))
    folder, name = os.path.split(config.listen.path or "")
    wrong = ""
    if local == state:
        wrong = f"local and state are the same path, {config.local}"
    elif state in local.parents:
        wrong = f'local = "{config.local}": must not lie in the state directory'
    elif folder and Path(resolve(folder)) == state and _is_state_file(name):
        wrong = f'listen = "{config.listen}": that is the name of a file of the state'
    if wrong:
        of_node = f'node "{config.node}": ' if config.node else ""
        raise ConfigError(_line(config.source, of_node + wrong))


def _is_state_file(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in STATE_FILES)


def to_params(config: VolumeConfig, assume: Collection[str] = ()) -> Params:
    """
    Make the engine's parameters.

    Args:
        config: the volume.
        assume: names of remotes that are copies already, as the operator says.
    Raises:
        ConfigError: *assume* names no remote of this volume. UnsupportedError: it has
        more than two nodes.
    """
    check_nodes(config)
    for name in assume:
        if config.copy_called(name).is_node:
            raise ConfigError(
                f'"{name}" is a node: the first promotion says which node\'s copy '
                "counts, and the others are compared with it"
            )
    return Params(
        name=config.name,
        local=config.local,
        state_dir=config.state,
        size=config.size,
        region_size=config.region_size,
        policy=config.policy,
        fenced_reads=config.fenced_reads,
        hold_ms=round(config.hold * 1000),
        local_deadline_ms=round(config.local_deadline * 1000),
        node=config.node,
        remotes=tuple(
            RemoteParams(
                name=copy.name,
                deadline_ms=round(copy.deadline * 1000),
                assume_in_sync=copy.name in assume,
                is_node=copy.is_node,
            )
            for copy in config.copies
        ),
    )
