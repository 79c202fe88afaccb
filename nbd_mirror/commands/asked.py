# SPDX-License-Identifier: BSD-3-Clause
"""What the user asked for, as hints that can be pasted repeat it."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from typer.models import OptionInfo

from ..base.errors import MissingError
from ..base.hints import Asked
from ..volume.config import CONFIG_DIR_ENV, find

__all__ = ["asked_for", "name_volume"]


def name_volume(hint: str, config: str) -> str:
    """Put what the user calls the volume where a hint says CONFIG."""
    return _asked(config).name(hint)


def asked_for(
    function: Callable[..., object], arguments: Mapping[str, object]
) -> Asked | None:
    """
    Return what a command was asked for; None if it was for no volume.

    Args:
        function: the command's.
        arguments: what it was called with.
    """
    config = arguments.get("config")
    if not isinstance(config, str):
        return None
    # A command that another one started repeats what that one was asked for.
    return Asked.load() or _asked(
        config, function.__name__, dict(_options(function, arguments))
    )


def _asked(
    config: str, command: str = "", options: Mapping[str, str] | None = None
) -> Asked:
    path = config
    try:
        # sudo takes the variable away; a word that begins with "-" is an option.
        if os.environ.get(CONFIG_DIR_ENV) or config.startswith("-"):
            path = os.fspath(find(config))
    except MissingError:
        pass  # relative to a folder that was removed
    if config.startswith("-"):
        config = path
    return Asked(shlex.quote(config), shlex.quote(path), command, options)


def _options(
    function: Callable[..., object], arguments: Mapping[str, object]
) -> Iterator[tuple[str, str]]:
    """Give the options that are not as they are without a word of the user's."""
    parameters = inspect.signature(function, eval_str=True).parameters
    for name, value in arguments.items():
        found = _option(parameters[name].annotation)
        if found is None or not value or value == parameters[name].default:
            continue
        flag = (found.param_decls or [f"--{name.replace('_', '-')}"])[0]
        if value is True:
            yield flag, flag
            continue
        values = value if isinstance(value, list) else [value]
        words = (str(getattr(one, "value", one)) for one in values)
        yield flag, " ".join(f"{flag} {shlex.quote(word)}" for word in words)


def _option(annotation: Any) -> OptionInfo | None:
    for one in getattr(annotation, "__metadata__", ()):
        if isinstance(one, OptionInfo):
            return one
    return None
