# SPDX-License-Identifier: BSD-3-Clause
"""
`nbd-mirror wait` and `watch`: look at a volume until something is so.

Both ask the server over and over: a status costs it microseconds, and a client
that is not connected between two questions cannot hold anything up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .cli_show import describe_resync, name_volume, state_text
from .client import ask
from .config import VolumeConfig
from .errors import MetadataFailedError, NotRunningError, WaitTimeoutError
from .offline import stopped_status
from .units import format_duration, format_size

__all__ = ["reached", "status_of", "wait_for", "watch"]

WAIT_POLL_S = 0.1
WATCH_POLL_S = 0.25

Status = Mapping[str, Any]


def status_of(config: VolumeConfig, timeout_s: float = 10.0) -> dict[str, Any]:
    """
    Return the server's status, or what the logs say if no server answers.

    Raises:
        MissingError: the volume was not created. FormatError: see stopped_status.
    """
    try:
        return ask(config, "status", timeout_s)
    except NotRunningError:
        return stopped_status(config)


def reached(status: Status, state: str, remote: str | None) -> bool:
    """
    Say whether the remote, or without a name each of them, is in *state*.

    The local disk is asked too where all are to be in_sync, which it is when it is
    ok; and alone where *remote* is "local". Of a volume that is failed itself, no
    disk is in any other state.
    """
    if _metadata_failed(status):
        return state == "failed"
    states = [one["state"] for one in _asked(status, state, remote)]
    return status["pid"] is not None and all(one == state for one in states)


def _asked(status: Status, state: str, name: str | None) -> list[dict[str, Any]]:
    """Give the disks whose states count, the local one with a remote's words."""
    found = [one for one in status["remotes"] if name in (None, one["name"])]
    if name == "local" or (name is None and state == "in_sync"):
        local = status["local"]
        word = "in_sync" if local["state"] == "ok" else local["state"]
        found.append({**local, "name": "local", "state": word})
    return found


def wait_for(
    config: VolumeConfig,
    state: str,
    timeout_s: float,
    remote: str | None,
    tell: Callable[[str], None],
) -> None:
    """
    Wait until the remote, or without a name each of them, is in *state*.

    A server that does not answer yet is waited for too.

    Raises:
        WaitTimeoutError: the time was over; it says the present state and why.
        NotRunningError: no server answered by then. MetadataFailedError: the
        volume is failed, which only an operator can change.
    """
    deadline = time.monotonic() + timeout_s
    told = False
    while True:
        left = max(deadline - time.monotonic(), 0.05)
        try:
            status = ask(config, "status", min(left, 10.0))
        except NotRunningError:
            if time.monotonic() >= deadline:
                raise
            if not told:
                tell("no server answers yet; waiting for it")
            told = True
        else:
            if reached(status, state, remote):
                return
            if _metadata_failed(status):
                raise MetadataFailedError(
                    f"volume {config.name} is failed: {status['reason']}",
                    status["hint"],
                )
            if time.monotonic() >= deadline:
                raise _not_reached(status, state, timeout_s, remote)
        time.sleep(min(WAIT_POLL_S, max(deadline - time.monotonic(), 0)))


def _metadata_failed(status: Status) -> bool:
    """Say whether the volume itself is failed, and not only a disk of it."""
    others = [status["local"]["state"], *(one["state"] for one in status["remotes"])]
    return status["state"] == "failed" and "failed" not in others


def _not_reached(
    status: Status, state: str, timeout_s: float, remote: str | None
) -> WaitTimeoutError:
    lines, hint = [], ""
    for one in _asked(status, state, remote):
        if one["state"] != state:
            why = f": {one['reason']}" if one["reason"] else ""
            lines.append(f"{one['name']} is {one['state']}{why}")
            hint = hint or one["hint"]
    return WaitTimeoutError(
        f"not {state} after {format_duration(timeout_s)}: {'; '.join(lines)}", hint
    )


def watch(
    config: VolumeConfig, console: Console, asked: str, until: str | None
) -> None:
    """
    Show the volume as it changes, until *until* is reached or for ever.

    On a terminal it is a live picture; elsewhere a line for each change.

    Raises:
        KeyboardInterrupt: the user has seen enough.
    """
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for status in _statuses(config, until):
                live.update(_picture(status, asked), refresh=True)
        return
    last: list[str] = []
    for status in _statuses(config, until):
        lines = list(_lines(status))
        for line in lines:
            if line not in last:
                console.print(
                    Text(f"{time.strftime('%H:%M:%S')} {line}"), soft_wrap=True
                )
        last = lines


def _statuses(config: VolumeConfig, until: str | None) -> Iterator[Status]:
    while True:
        status = status_of(config)
        yield status
        if until is not None and reached(status, until, None):
            return
        time.sleep(WATCH_POLL_S)


def _lines(status: Status) -> Iterator[str]:
    """Give one line a remote, with what is worth a new line when it changes."""
    if status["pid"] is None:
        yield f"{status['volume']}: {status['reason']}"
        return
    for disk in _disks(status):
        words = [f"{disk['name']}: {disk['state']}"]
        if disk["dirty_bytes"]:
            words.append(f"{format_size(disk['dirty_bytes'])} dirty")
        resync = disk["resync"]
        if resync and resync["total_bytes"]:
            # In steps of a tenth, or a log of it would be endless.
            tenths = 10 * resync["done_bytes"] // resync["total_bytes"]
            words = [
                words[0],
                f"{tenths * 10}% of {format_size(resync['total_bytes'])}",
            ]
        yield ", ".join(words)


def _disks(status: Status) -> list[dict[str, Any]]:
    """Give the disks to watch: the remotes, and first local unless it is ok."""
    local = {**status["local"], "name": "local"}
    return [*([] if local["state"] == "ok" else [local]), *status["remotes"]]


def _picture(status: Status, asked: str) -> Group:
    head = Text.assemble(
        Text(f"{status['volume']}  ", style="bold"),
        state_text(status["state"]),
        f"  {format_size(status['size'])}, {status['inflight']} in flight, "
        f"{status['active_extents']} active extents",
    )
    table = Table.grid(padding=(0, 2))
    for disk in _disks(status):
        bar: ProgressBar | Text = Text(f"{format_size(disk['dirty_bytes'])} dirty")
        resync = disk["resync"]
        if resync:
            bar = ProgressBar(
                total=max(resync["total_bytes"], 1),
                completed=resync["done_bytes"],
                width=32,
            )
        table.add_row(
            Text(disk["name"], style="bold"),
            state_text(disk["state"]),
            bar,
            Text(describe_resync(disk)),
        )
        for about in (disk["reason"], name_volume(disk["hint"], asked)):
            if about:
                table.add_row("", "", "", Text(about, style="dim"))
    lines: list[Text | Table] = [head, table]
    if status["reason"]:
        lines.append(Text(f"{status['reason']}"))
    return Group(*lines)
