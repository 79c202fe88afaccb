# SPDX-License-Identifier: BSD-3-Clause
"""
A volume's configuration: one TOML file, checked as a whole before use.

The models define the keys; an unknown or missing key is an error. Every message names
the file, the key, its value as written and the allowed values, one line each, because a
wrong file is usually wrong in one place and the reader has it open. config_values.py
checks each value. Values are kept in base units: bytes and seconds.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import stat
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)

from ..base.errors import AccessError, ConfigError, MissingError
from ..base.files import is_there
from ..base.listen import Listen, parse_listen
from . import config_values as values
from .model import Params, RemoteParams

__all__ = [
    "CHOICE_VARIABLE",
    "CONFIG_DIR_ENV",
    "STARVED_DEADLINES",
    "STATE_FILES",
    "RemoteConfig",
    "VolumeConfig",
    "check_links",
    "config_dir",
    "find",
    "load",
    "to_params",
]

CONFIG_DIR_ENV = "NBD_MIRROR_CONFIG_DIR"
# `serve` passes --force and --without-local in this variable, because the server's
# command line may be nbdkit's.
CHOICE_VARIABLE = "NBD_MIRROR_LOCAL_CHOICE"
DEFAULT_CONFIG_DIR = Path("/etc/nbd-mirror")
MAX_CONFIG_BYTES = 1 << 20
# NBDM_STARVED_DEADLINES: the engine's limit for a command that starves while others are
# answered.
STARVED_DEADLINES = 8
STOP_S = 60.0  # of a stop, in addition to a starved command and the hold
# Names that we use in the state directory, as patterns.
STATE_FILES = (
    "superblock*",
    "activity*",
    "inflight*",
    "dirty.*",
    "lock*",
    "failed",
    "control",
    "attached",
    "serve.log*",
)
# The engine adds these to the name of a log: while it makes one, and when it sets aside
# one that failed its check.
_FILE_ENDS = (".new", ".bad")


def _check_remotes(remotes: tuple[RemoteConfig, ...]) -> tuple[RemoteConfig, ...]:
    if not 1 <= len(remotes) <= values.MAX_REMOTES:
        raise ValueError(f"must be {values.RULES['remote']}, not {len(remotes)}")
    names = [remote.name for remote in remotes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'two remotes are called "{name}"; names must differ')
    for name in ("local", *names):
        for end in _FILE_ENDS:
            if name + end in names:
                raise ValueError(
                    f'no remote can be called "{name}{end}" beside "{name}": '
                    f"dirty.{name}{end} is a file of either; give one of them "
                    "another name, which makes it a new remote, all dirty"
                )
    return remotes


_AnyPath = Annotated[str, AfterValidator(values.check_path)]


class RemoteConfig(BaseModel):
    """One [[remote]] table: *name*, *uri*, and a command's *deadline* in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(values.check_remote_name)]
    uri: Annotated[str, AfterValidator(values.check_uri)]
    deadline: Annotated[float, values.between("deadline", 0.1, 600)] = 5.0


class VolumeConfig(BaseModel):
    """
    A whole file: sizes in bytes, times in seconds, paths absolute.

    *size* is 0 for "adopt". *max_memory* is 0 for the smaller of 1 GiB and a quarter of
    the machine's memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(values.check_name)]
    size: Annotated[int, BeforeValidator(values.parse_volume_size)]
    local: _AnyPath
    state: _AnyPath
    listen: Annotated[Listen, BeforeValidator(parse_listen)]
    region_size: Annotated[int, BeforeValidator(values.parse_region_size)] = 64 << 10
    policy: Literal["degrade", "stop"] = "degrade"
    fenced_reads: Literal["serve", "fail"] = "serve"
    hold: Annotated[float, values.between("hold", 0, 300)] = 2.0
    local_deadline: Annotated[float, BeforeValidator(values.parse_local_deadline)] = 0.0
    late_write_window: Annotated[
        float, values.between("late_write_window", 0, 3600)
    ] = 30.0
    max_clients: Annotated[int, AfterValidator(values.check_max_clients)] = 1024
    max_memory: Annotated[int, BeforeValidator(values.parse_max_memory)] = 0
    remotes: Annotated[
        tuple[RemoteConfig, ...],
        Field(alias="remote", strict=False),
        AfterValidator(_check_remotes),
    ]
    _source: Path = PrivateAttr(default=Path())

    @property
    def source(self) -> Path:
        """The file that this was read from, absolute."""
        return self._source

    @property
    def state_dir(self) -> Path:
        """The directory of the logs."""
        return Path(self.state)

    @property
    def stop_limit_s(self) -> float:
        """The time after which the server ends even if its stop has not completed."""
        deadline = max(remote.deadline for remote in self.remotes)
        limit = STOP_S + STARVED_DEADLINES * deadline + self.hold
        return limit + self.local_deadline

    def remote(self, name: str) -> RemoteConfig:
        """
        Return the remote called *name*.

        Raises:
            ConfigError: there is none; the message lists the remotes.
        """
        for remote in self.remotes:
            if remote.name == name:
                return remote
        names = ", ".join(remote.name for remote in self.remotes)
        raise ConfigError(f'volume {self.name} has no remote "{name}"; it has: {names}')


def config_dir() -> Path:
    """Return the folder where volumes are looked up by name."""
    return Path(os.environ.get(CONFIG_DIR_ENV) or DEFAULT_CONFIG_DIR)


def find(path_or_name: str) -> Path:
    """
    Return the file that a user means, absolute, even if it does not exist.

    Args:
        path_or_name: a path if it has a slash, ends in ".toml", or is "." or "..";
            else a volume's name, looked up in config_dir().
    Raises:
        MissingError: it is relative to a folder that was removed.
    """
    is_folder = path_or_name in (".", "..")
    is_path = is_folder or "/" in path_or_name or path_or_name.endswith(".toml")
    path = Path(path_or_name) if is_path else config_dir() / f"{path_or_name}.toml"
    try:
        return path.absolute()
    except FileNotFoundError:
        raise MissingError(
            f"there is no configuration {path}: the current folder was removed",
            "the file's whole path, or cd to a folder that is there",
        ) from None


def load(path_or_name: str | os.PathLike[str]) -> VolumeConfig:
    """
    Read and check a volume's configuration.

    Args:
        path_or_name: a path, or a volume's name; see find().
    Raises:
        MissingError: there is no such file. AccessError: it may not be read.
        ConfigError: it is wrong; one line for each mistake.
    """
    source = find(os.fspath(path_or_name))
    text = _read(source, os.fspath(path_or_name))
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of too many digits
        raise ConfigError(f"{source.name}: not valid TOML: {error}") from None
    try:
        config = VolumeConfig.model_validate(data, context={"folder": source.parent})
    except ValidationError as error:
        lines = _explain(data, error)
        text = "\n".join(f"{source.name}: {_plain(line)}" for line in lines)
        raise ConfigError(text) from None
    config._source = source
    _check_paths(config, os.path.normpath)
    return config


def _read(source: Path, asked: str) -> str:
    where = _plain(os.fspath(source))
    try:
        with open(source, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{where} is no plain file, so no configuration")
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        hint = "create the file; the README shows one"
        if asked != os.fspath(source) and is_there(f"{asked}.toml"):
            hint = f"name the file with its folder: ./{asked}.toml"
        raise MissingError(f"there is no configuration {where}", hint) from None
    except IsADirectoryError:
        raise ConfigError(f"{where} is a folder, not a configuration file") from None
    except PermissionError:
        raise AccessError(f"{where} may not be read by this user") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{where} cannot be read: {why}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{source.name}: over 1MiB long, so no configuration file")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{source.name}: is UTF-16 text", "save it as UTF-8")
    try:
        # editors of other systems may write a mark first
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{source.name}: line {line} is not UTF-8 text") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, and do not wait for the other end of a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


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
        raise ConfigError(f"{config.source.name}: {_plain(wrong)}")


def _is_state_file(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in STATE_FILES)


def _explain(data: Mapping[str, Any], error: ValidationError) -> Iterator[str]:
    """Turn pydantic's errors into lines: the key, the value, what is allowed."""
    for item in error.errors(include_url=False):
        *where, key = item["loc"]
        table = data
        prefix = ""
        model: type[BaseModel] = VolumeConfig
        if where or isinstance(key, int):
            index = next(part for part in item["loc"] if isinstance(part, int))
            entry = data["remote"][index]
            name = entry.get("name") if isinstance(entry, dict) else None
            prefix = f'remote "{name}": ' if name else f"remote {index + 1}: "
            if isinstance(key, int):
                yield f"{prefix}must be a [[remote]] table"
                continue
            table, model = entry, RemoteConfig
        yield prefix + _explain_key(str(key), table, model, item)


def _explain_key(
    key: str, table: Mapping[str, Any], model: type[BaseModel], item: Any
) -> str:
    if item["type"] == "extra_forbidden":
        fields = model.model_fields.items()
        return _explain_unknown(key, [field.alias or name for name, field in fields])
    if item["type"] == "missing":
        return f"{key}: is missing; it must be {values.RULES[key]}"
    cause = item.get("ctx", {}).get("error")
    rule = (
        str(cause) if item["type"] == "value_error" else f"must be {values.RULES[key]}"
    )
    value = table[key]
    if isinstance(value, list | dict):
        return f"{key}: {rule}"
    return f"{key} = {_toml(value)}: {rule}"


def _explain_unknown(key: str, allowed: Collection[str]) -> str:
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
    if key == "deadline":
        near = []  # a remote's key, no misspelt local_deadline
    # A key of the other kind of table was most often put after [[remote]].
    if near:
        return f"{key}: unknown key; did you mean {near[0]}?"
    if key in values.RULES:
        place = (
            "in a [[remote]] table"
            if key in ("uri", "deadline")
            else ("before the first [[remote]]")
        )
        return f"{key}: unknown key here; it stands {place}"
    return f"{key}: unknown key; allowed are {', '.join(allowed)}"


def _toml(value: object) -> str:
    """Write a value as in the file, shortened."""
    if isinstance(value, int) and value.bit_length() > 400:
        return "a number of over 120 digits"  # Python prints no such number
    known = isinstance(value, str | bool | int | float)
    text = json.dumps(value, ensure_ascii=False) if known else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _plain(line: str) -> str:
    """Remove line breaks from quoted text, so that a line stays one line."""
    line = line if len(line) <= 500 else f"{line[:497]}..."
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in line
    )


def to_params(config: VolumeConfig, assume: Collection[str] = ()) -> Params:
    """
    Make the engine's parameters.

    Args:
        config: the volume.
        assume: names of remotes that are copies already, as the operator says.
    Raises:
        ConfigError: *assume* names no remote of this volume.
    """
    for name in assume:
        config.remote(name)
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
        remotes=tuple(
            RemoteParams(
                name=remote.name,
                deadline_ms=round(remote.deadline * 1000),
                assume_in_sync=remote.name in assume,
            )
            for remote in config.remotes
        ),
    )
