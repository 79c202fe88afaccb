# SPDX-License-Identifier: BSD-3-Clause
"""
The command line, `nbd-mirror`.

A command reads the configuration, calls one function that does the work, and prints.
Errors are the exceptions of errors.py; ending.py handles them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console

from .. import __version__
from ..base.errors import (
    EXIT_CODES,
    ConfigError,
    MetadataFailedError,
    MirrorError,
    OutputError,
    from_errno,
)
from ..base.interrupt import INTERRUPTED, end_at_once, raise_it
from ..base.units import format_size
from ..device import attach as kernel
from ..rules.state import RemoteState
from ..volume import offline
from ..volume.client import ask, ask_policy, ask_status
from ..volume.config import VolumeConfig, load
from ..volume.mapview import save_png
from .asked import asked_for, name_volume
from .cli_types import (
    BlockSizeOption,
    Config,
    Door,
    JsonOption,
    PolicyArgument,
    ReadsOption,
    RemoteArgument,
    duration,
)
from .create import create_volume
from .ending import run
from .output import finish_output, guard_output, keep_descriptors, plain
from .serve import exec_server, start
from .show import describe_policy, map_json, show_map, show_status
from .stop import stop as stop_server
from .watch import status_of, wait_for
from .watch import watch as watch_volume

__all__ = ["app", "main"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_EPILOG = "\b\nExit status:\n" + "\n".join(
    f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items()
)

# What the local disk can be, in a remote's words.
_LOCAL_STATES = (RemoteState.IN_SYNC, RemoteState.RESYNCING, RemoteState.FAILED)

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


def _command(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function a command whose errors use the user's name of the volume."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except MirrorError as error:
            asked = asked_for(function, kwargs)
            error.hint = asked.name(error.hint) if asked else error.hint
            raise

    return app.command()(wrapper)


def _console() -> Console:
    return Console(highlight=False)


def _say(text: str) -> None:
    typer.echo(plain(text))


def _version(wanted: bool) -> None:
    if wanted:
        _say(f"nbd-mirror {__version__}")
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


@_command
def create(
    config: Config,
    assume_in_sync: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REMOTE",
            help="This remote is a copy already; may be given several times.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite an existing state.")
    ] = False,
) -> None:
    """Format a volume's state. The local disk is not touched."""
    volume = load(config)
    create_volume(volume, assume_in_sync or [], force=force)
    status = offline.stopped_status(volume)
    regions = -(-status.size // status.region_size)
    _say(
        f"created volume {volume.name}: {format_size(status.size, exact=True)}, "
        f"{regions} regions of {format_size(status.region_size, exact=True)}"
    )
    for remote in status.remotes:
        words = "all dirty: the first resync copies everything, holes cheaply"
        if remote.assumed:
            words = "assumed in sync on your word, until a full resync proves it"
        _say(f"  {remote.name}: {words}")
    _say(name_volume("next: nbd-mirror serve CONFIG", config))


@_command
def serve(
    config: Config,
    door: Annotated[Door, typer.Option(help="Which server clients use.")] = Door.direct,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay; log to standard error.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Use the local disk as it is, and overwrite every remote with it.",
        ),
    ] = False,
    without_local: Annotated[
        bool,
        typer.Option(
            "--without-local", help="Give up the local disk: a remote in sync serves."
        ),
    ] = False,
) -> None:
    """Serve a volume over NBD. Runs in the background unless --foreground is given."""
    asked = asked_for(serve, locals())
    if force and without_local:
        raise typer.BadParameter("--force and --without-local exclude each other")
    volume = load(config)
    choice = "forced" if force else "lost" if without_local else ""
    if foreground:
        exec_server(volume, door.value, choice, asked)
    pid = start(volume, door.value, choice, asked)
    _say(f"volume {volume.name} is served at {volume.listen.uri} by process {pid}")


@_command
def stop(config: Config) -> None:
    """Stop the server cleanly. Drain, flush both sides, persist the logs."""
    volume = load(config)
    stop_server(volume)
    status = offline.stopped_status(volume)
    if not status.clean_stop:
        raise MetadataFailedError(
            f"volume {volume.name} stopped, but not cleanly: some logs could not be "
            "persisted; nothing answered is lost, the next start recovers "
            f"as after a crash. {volume.state}/serve.log says more",
            "nbd-mirror serve CONFIG",
        )
    remotes = (
        f"{one.name} {one.state}"
        + (f" ({format_size(one.dirty_bytes)} dirty)" if one.dirty_bytes else "")
        for one in status.remotes
    )
    _say(f"volume {volume.name} stopped cleanly, {', '.join(remotes)}")


@_command
def status(config: Config, as_json: JsonOption = False) -> None:
    """Show the state of a volume and of each disk, with the reason."""
    answer = status_of(load(config))
    if as_json:
        found = answer.dump()
        for about in (found, found["local"], *found["remotes"]):
            about["hint"] = name_volume(about["hint"], config)
        _say(json.dumps(found, indent=2))
    else:
        show_status(_console(), answer, config)


@_command
def wait(
    config: Config,
    state: Annotated[RemoteState, typer.Option("--for", help="The state to wait for.")],
    timeout: Annotated[
        str, typer.Option(metavar="TIME", help="Time limit, as in 60s.")
    ] = "60s",
    remote: Annotated[
        str | None,
        typer.Option(
            metavar="REMOTE", help='Only this remote, or "local". Default: all.'
        ),
    ] = None,
) -> None:
    """Wait until the remotes are in a state. For in_sync, also the local disk."""
    volume = load(config)
    _check_disk(volume, remote)
    if remote == "local" and state not in _LOCAL_STATES:
        allowed = ", ".join(one.value for one in _LOCAL_STATES)
        raise typer.BadParameter(
            f"the local disk is never {state.value}, only {allowed}",
            param_hint="--for",
        )
    timeout_s = duration("--timeout", timeout)
    wait_for(
        volume,
        state.value,
        timeout_s,
        remote,
        lambda text: typer.echo(f"nbd-mirror: {text}", err=True),
    )
    names = remote or ", ".join(one.name for one in volume.remotes)
    _say(f"{names}: {state.value}")


@_command
def watch(
    config: Config,
    until: Annotated[
        RemoteState | None,
        typer.Option(help="End when all remotes are in this state."),
    ] = None,
) -> None:
    """Watch a volume live, with a progress bar while resyncing. Ctrl-C ends it."""
    try:
        watch_volume(load(config), _console(), config, until and until.value)
    except KeyboardInterrupt:
        if until is not None:
            raise


@_command
def pause(config: Config, remote: RemoteArgument = None) -> None:
    """Pause resync of one remote or of all."""
    _remote_command(load(config), "pause", remote)


@_command
def resume(config: Config, remote: RemoteArgument = None) -> None:
    """Resume resync, and check a failed disk again. "local" is the local disk."""
    _remote_command(load(config), "resume", remote)


@_command
def invalidate(
    config: Config,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="Which remote.")],
) -> None:
    """Overwrite a remote with a full copy. "local" is a replaced local disk."""
    _remote_command(load(config), "invalidate", remote)


def _check_disk(volume: VolumeConfig, name: str | None) -> None:
    if name not in (None, "local"):
        volume.remote(name)  # raises if there is none


def _remote_command(volume: VolumeConfig, command: str, remote: str | None) -> None:
    if remote == "local" and command == "pause":
        raise ConfigError("what the local disk misses is copied back without a pause")
    _check_disk(volume, remote)
    arguments = {} if remote is None else {"remote": remote}
    ask(volume, command, 30.0, **arguments)
    done = {"pause": "paused", "resume": "resumed", "invalidate": "all dirty"}[command]
    names = [remote] if remote else [one.name for one in volume.remotes]
    _say(f"{', '.join(names)}: {done}")


@_command
def policy(
    config: Config,
    policy: PolicyArgument = None,
    fenced_reads: ReadsOption = None,
) -> None:
    """Show or switch the policy of a served volume. Lasts until the server ends."""
    volume = load(config)
    answer = ask_policy(volume, policy=policy, fenced_reads=fenced_reads)
    for line in describe_policy(answer, volume):
        _say(line)


@_command
def attach(
    config: Config,
    device: Annotated[
        str | None,
        typer.Argument(metavar="/dev/nbdN", help="Default: the first free one."),
    ] = None,
    connections: Annotated[
        int, typer.Option(min=1, max=16, help="Kernel to server connections.")
    ] = 1,
    block_size: BlockSizeOption = "",
) -> None:
    """Attach a served volume to the kernel, as /dev/nbdN."""
    volume = load(config)
    kernel.check_kernel(volume, device or "")
    answer = ask_status(volume)
    name, choice = kernel.attach(
        *(volume, answer.size, device or ""),
        connections=connections,
        asked=block_size,
    )
    _say(
        f"volume {volume.name} is {name}: {choice.block}-byte blocks ({choice.why}), "
        f"a request fails after {kernel.fails_after_s(volume, connections)}s"
    )
    if choice.warning:
        typer.echo(f"nbd-mirror: warning: {choice.warning}", err=True)


@_command
def detach(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG|/dev/nbdN", help="A volume or a device.")
    ],
) -> None:
    """Detach a volume or a device from the kernel."""
    kernel.check_root("detach", "nbd-mirror detach CONFIG")
    if config.startswith("/dev/"):
        name = kernel.detach(None, config)
    else:
        name = kernel.detach(load(config))
    _say(f"{name} is detached")


@_command
def inspect(
    config: Config,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save a picture of the maps.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the dirty maps: counts, the longest runs, a picture."""
    volume = load(config)
    found = offline.read_superblock(volume).volume
    with contextlib.ExitStack() as stack:
        maps = [
            stack.enter_context(offline.open_disk_map(volume, disk, found))
            for disk in offline.mapped_disks(volume)
        ]
        if as_json:
            _say(json.dumps(map_json(volume.name, maps), indent=2))
        else:
            for one in maps:
                show_map(_console(), one, volume.size)
        if png is not None:
            try:
                save_png(maps, png, f"nbd_mirror volume {volume.name}")
            except OSError as error:
                full = error.errno in {errno.ENOSPC, errno.EDQUOT}
                raise from_errno(
                    error.errno or errno.EIO,
                    f"{png}: {error.strerror}",
                    "another FILE, where there is room" if full else "",
                ) from None


def main() -> NoReturn:
    """Run the command line, and exit with a code that errors.py documents."""
    keep_descriptors()
    guard_output()
    try:
        raise_it()
        code = run(app)
        end_at_once()
    except KeyboardInterrupt:  # over the words of an error
        end_at_once()
        code = INTERRUPTED
    with contextlib.suppress(OutputError):
        finish_output()
    sys.exit(code)
