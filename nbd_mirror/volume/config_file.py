# SPDX-License-Identifier: BSD-3-Clause
"""Find the file of a configuration, and read its text."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..base.errors import AccessError, ConfigError, MissingError
from ..base.files import is_there
from .config_explain import plain_line

__all__ = ["CONFIG_DIR_ENV", "config_dir", "find", "read_text"]

CONFIG_DIR_ENV = "NBD_MIRROR_CONFIG_DIR"
DEFAULT_CONFIG_DIR = Path("/etc/nbd-mirror")
MAX_CONFIG_BYTES = 1 << 20


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


def read_text(source: Path, asked: str) -> str:
    """
    Return the text of a file.

    Args:
        source: its path.
        asked: the user's word for it.
    Raises:
        MissingError: there is none. AccessError: it may not be read. ConfigError: it
        is no file of a configuration.
    """
    where = plain_line(os.fspath(source))
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
