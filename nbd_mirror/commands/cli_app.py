# SPDX-License-Identifier: BSD-3-Clause
"""The command line's frame: the app, how a command joins it, and how one prints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console

from .. import __version__
from ..base.errors import EXIT_CODES, MirrorError
from .asked import asked_for
from .output import plain

__all__ = ["app", "command", "console", "say"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_EPILOG = "\b\nExit status:\n" + "\n".join(
    f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items()
)

app = typer.Typer(
    help="A disk mirror over NBD that needs no kernel module.\n\n"
    "CONFIG is the path of a volume's TOML file, or a volume's name, looked up "
    "in /etc/nbd-mirror/ ($NBD_MIRROR_CONFIG_DIR changes that).",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(function: Callable[_P, _R]) -> None:
    """Make a function a command whose errors use the user's name of the volume."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except MirrorError as error:
            asked = asked_for(function, kwargs)
            error.hint = asked.name(error.hint) if asked else error.hint
            raise

    app.command()(wrapper)


def console() -> Console:
    """Return a console for standard output."""
    return Console(highlight=False)


def say(text: str) -> None:
    """Print a line."""
    typer.echo(plain(text))


def _version(wanted: bool) -> None:
    if wanted:
        say(f"nbd-mirror {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass
