# SPDX-License-Identifier: BSD-3-Clause
"""The user's own command and options, which hints repeat so that they can be pasted."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from typer.models import OptionInfo

from ..base.errors import MissingError
from ..base.hints import Asked, quote
from ..volume.config import CONFIG_DIR_ENV, find

__all__ = ["asked_for", "name_volume", "words_for"]


def name_volume(hint: str, asked: str | Asked) -> str:
    """
    Replace CONFIG in a hint by the user's name of the volume.

    Args:
        hint: the text.
        asked: that name, or words_for().
    """
    return (_asked(asked) if isinstance(asked, str) else asked).name(hint)


def words_for(config: str, node: str | None) -> Asked:
    """Return the user's name of the volume, and of the node if there was one."""
    return _asked(config, node=node)


def asked_for(
    function: Callable[..., object], arguments: Mapping[str, object]
) -> Asked | None:
    """
    Return what a command was asked for, or None if it has no volume.

    Args:
        function: the command's.
        arguments: those that it was called with.
    """
    config = arguments.get("config")
    if not isinstance(config, str):
        return None
    # A command that another one started repeats that one's command and options.
    node = arguments.get("node")
    options = dict(_options(function, arguments))
    options.pop("--node", None)
    return Asked.load() or _asked(
        config,
        function.__name__,
        options,
        node=node if isinstance(node, str) else None,
    )


def _asked(
    config: str,
    command: str = "",
    options: Mapping[str, str] | None = None,
    *,
    node: str | None = None,
) -> Asked:
    path = config
    try:
        # sudo drops the variable, and a word that begins with "-" is an option.
        if os.environ.get(CONFIG_DIR_ENV) or config.startswith("-"):
            path = os.fspath(find(config))
    except MissingError:
        pass  # relative to a folder that was removed
    if config.startswith("-"):
        config = path
    # Every command of this volume needs it, and not only the user's own.
    of_node = "" if node is None else f" --node {quote(node)}"
    return Asked(
        quote(config) + of_node, quote(path) + of_node, command, options, of_node
    )


def _options(
    function: Callable[..., object], arguments: Mapping[str, object]
) -> Iterator[tuple[str, str]]:
    """Yield the options that the user changed from their defaults."""
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
        yield flag, " ".join(f"{flag} {quote(word)}" for word in words)


def _option(annotation: Any) -> OptionInfo | None:
    for one in getattr(annotation, "__metadata__", ()):
        if isinstance(one, OptionInfo):
            return one
    return None
