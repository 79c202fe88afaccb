# SPDX-License-Identifier: BSD-3-Clause
"""
`nbd-mirror wait` and `watch`: poll a volume until a condition holds.

Both ask the server again and again: a status costs it microseconds, and a client that
is not connected between two questions cannot block anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..base.errors import (
    ConfigError,
    MetadataFailedError,
    NotRunningError,
    OutputError,
    WaitTimeoutError,
)
from ..base.hints import Asked
from ..base.interrupts import put_off
from ..base.units import format_duration, format_size
from ..volume.client import ask_status
from ..volume.config import VolumeConfig
from ..volume.offline import stopped_status
from ..volume.status import Disk, Status
from .asked import name_volume
from .output import one_line, reader_ended
from .show import NAME_WIDTH, describe_resync, state_text
from .show_nodes import node_lines

__all__ = ["reached", "status_of", "wait_for", "watch"]

WAIT_POLL_S = 0.1
WATCH_POLL_S = 0.25
ASK_S = 10.0  # a server that needs longer hangs
LAST_ASK_S = 1.0
STATE_WIDTH = len("out_of_sync")

_Facts = tuple[str | int, ...]


def status_of(config: VolumeConfig) -> Status:
    """
    Return the server's status, or that from the logs if no server answers in time.

    Raises:
        MissingError: the volume was not created. FormatError: see stopped_status.
    """
    try:
        return ask_status(config, ASK_S)
    except (NotRunningError, WaitTimeoutError):
        return stopped_status(config)


def reached(status: Status, state: str, remote: str | None) -> bool:
    """
    Return whether the remote, or without a name each of them, is in *state*.

    For in_sync of all disks, the local disk counts too, with its state ok; if *remote*
    is "local", only the local disk counts. A secondary has no remotes: it is itself in
    the state that its primary has it in. While the volume itself is failed, no disk
    is in any other state.
    """
    if _metadata_failed(status):
        return state == "failed"
    if status.secondary and remote != "local":
        return status.pid is not None and status.state == state
    states = [_word(one) for one in _asked(status, state, remote)]
    return status.pid is not None and all(one == state for one in states)


def _asked(status: Status, state: str, name: str | None) -> list[Disk]:
    """Return the disks whose states count."""
    found: list[Disk] = [one for one in status.remotes if name in (None, one.name)]
    if name == "local" or (name is None and state == "in_sync"):
        found.append(status.local)
    return found


def _word(disk: Disk) -> str:
    """Return a disk's state, the local one's in a remote's words."""
    return "in_sync" if disk.state == "ok" else disk.state


def wait_for(
    config: VolumeConfig,
    state: str,
    timeout_s: float,
    remote: str | None,
    tell: Callable[[str], None],
) -> list[str]:
    """
    Wait until the remote, or without a name each of them, is in *state*.

    Also waits for a server that does not answer yet.

    Returns:
        The names of the server's remotes.
    Raises:
        ConfigError: the server does not know a remote that is waited for.
        WaitTimeoutError: the time is over; the message has the present state and
        the reason, or says that the server still does not answer.
        NotRunningError: no server answered by then. MetadataFailedError: the
        volume is failed, which only an operator can change.
    """
    deadline = time.monotonic() + timeout_s
    told = False
    while True:
        # The last question gets this time too: a busy host is no silent server.
        left = max(deadline - time.monotonic(), LAST_ASK_S)
        try:
            status = ask_status(config, min(left, ASK_S))
        except (NotRunningError, WaitTimeoutError):
            if time.monotonic() >= deadline:
                raise
            if not told:
                tell("no server answers yet; waiting for it")
            told = True
        else:
            _check_served(config, status, remote)
            if reached(status, state, remote):
                mine = [status.node.name] if status.secondary and status.node else []
                return mine or [disk.name for disk in status.remotes]
            if _metadata_failed(status):
                raise MetadataFailedError(
                    f"volume {config.name} is failed: {status.reason}",
                    status.hint,
                )
            if time.monotonic() >= deadline:
                raise _not_reached(status, state, timeout_s, remote)
        time.sleep(min(WAIT_POLL_S, max(deadline - time.monotonic(), 0)))


def _check_served(config: VolumeConfig, status: Status, remote: str | None) -> None:
    """
    Check that the server has the remotes that are waited for.

    It has those of the configuration that it was started with.
    """
    if status.secondary:
        return
    wanted = [remote] if remote else [one.name for one in config.copies]
    served = [one.name for one in status.remotes]
    missing = [name for name in wanted if name not in ("local", *served)]
    if missing:
        raise ConfigError(
            f"the server of volume {config.name} does not mirror to {missing[0]}: the "
            f"configuration was changed since its start; it has: {', '.join(served)}",
            "nbd-mirror stop CONFIG, then nbd-mirror serve CONFIG",
        )


def _metadata_failed(status: Status) -> bool:
    """Return whether the volume itself is failed, and not only a disk of it."""
    others = [disk.state for disk in status.disks]
    return status.state == "failed" and "failed" not in others


def _not_reached(
    status: Status, state: str, timeout_s: float, remote: str | None
) -> WaitTimeoutError:
    lines, hint = [], ""
    if status.secondary and remote != "local":
        why = f": {status.reason}" if status.reason else ""
        lines, hint = [f"this node is {status.state}{why}"], status.hint
    for one in _asked(status, state, remote):
        if _word(one) != state:
            why = f": {one.reason}" if one.reason else ""
            lines.append(f"{one.name} is {_word(one)}{why}")
            hint = hint or one.hint
    return WaitTimeoutError(
        f"not {state} after {format_duration(timeout_s)}: {'; '.join(lines)}", hint
    )


def watch(
    config: VolumeConfig, console: Console, asked: str | Asked, until: str | None
) -> None:
    """
    Show the volume as it changes, until *until* is reached or forever.

    On a terminal it is a live picture; elsewhere a line for each change.

    Raises:
        KeyboardInterrupt: the user ended it.
    """
    if console.is_terminal:
        # Live hides the cursor: no signal ends the command before it is shown again.
        with (
            put_off() as signals,
            Live(console=console, auto_refresh=False) as live,
            signals.let_through(),
        ):
            for status in _statuses(config, until):
                live.update(_picture(status, asked), refresh=True)
        return
    last: dict[_Facts, str] = {}
    for status in _statuses(config, until):
        lines = dict(_lines(status))
        for facts, line in lines.items():
            if facts not in last:
                _print(console, f"{time.strftime('%H:%M:%S')} {line}", until)
        last = lines


def _print(console: Console, line: str, until: str | None) -> None:
    """Print a line. With *until*, the end of the reader does not end the wait."""
    try:
        console.print(Text(one_line(line)), soft_wrap=True)
    except OutputError as error:
        if until is None or not error.quiet:
            raise


def _statuses(config: VolumeConfig, until: str | None) -> Iterator[Status]:
    while True:
        status = status_of(config)
        yield status
        if until is not None and status.pid is not None:
            _check_served(config, status, None)
            if reached(status, until, None):
                return
        if reader_ended(WATCH_POLL_S) and until is None:
            return


def _lines(status: Status) -> Iterator[tuple[_Facts, str]]:
    """
    Yield a line per disk, and the facts whose change is worth a new line.

    Bytes change all the time, and a log of them would be endless: a new line is worth
    twice as many dirty bytes, or half as many, and a tenth of a resync.
    """
    if status.pid is None:
        text = f"{status.volume}: {status.reason}"
        yield (text,), text
        return
    for text in node_lines(status):
        yield (text,), text
    if status.secondary:
        text = f"{status.volume}: {status.state}"
        yield (text,), text
    for disk in _disks(status):
        head = f"{disk.name}: {disk.state}"
        total = disk.resync.total_bytes if disk.resync else 0
        if disk.resync and total:
            percent = 10 * disk.resync.done_bytes // total * 10
            yield (head, "done", percent), f"{head}, {percent}% of {format_size(total)}"
        elif disk.dirty_bytes:
            facts = (head, "dirty", disk.dirty_bytes.bit_length())
            yield facts, f"{head}, {format_size(disk.dirty_bytes)} dirty"
        else:
            yield (head,), head


def _disks(status: Status) -> Sequence[Disk]:
    """Return the disks to watch: the remotes, and first local unless it is ok."""
    return status.remotes if status.local.state == "ok" else status.disks


def _picture(status: Status, asked: str | Asked) -> Group:
    head = Text.assemble(
        Text(f"{status.volume}  ", style="bold"),
        state_text(status.state),
        f"  {format_size(status.size)}, {status.inflight} in flight, "
        f"{status.active_extents} active extents",
    )
    lines: list[Text | Table | Padding] = [head]
    for text in node_lines(status):
        lines.append(Padding(Text(one_line(text)), (0, 0, 0, 2)))
    disks = _disks(status)
    longest = max((len(one_line(disk.name)) for disk in disks), default=0)
    name_width = min(longest, NAME_WIDTH)
    for disk in disks:
        lines.append(_disk_line(disk, name_width))
        # Not in a column: a narrow terminal has no room for one.
        for about in (disk.reason, name_volume(disk.hint, asked)):
            if about:
                lines.append(Padding(Text(one_line(about), style="dim"), (0, 0, 0, 4)))
    if status.reason:
        lines.append(Text(one_line(status.reason)))
    return Group(*lines)


def _disk_line(disk: Disk, name_width: int) -> Table:
    bar: ProgressBar | Text = Text(f"{format_size(disk.dirty_bytes)} dirty")
    if disk.resync:
        bar = ProgressBar(
            total=max(disk.resync.total_bytes, 1),
            completed=disk.resync.done_bytes,
            width=32,
        )
    table = Table.grid(padding=(0, 2))
    # A long name is folded: the state and the progress keep their room.
    table.add_column(width=name_width, overflow="fold")
    table.add_column(min_width=STATE_WIDTH, no_wrap=True)
    table.add_row(
        Text(one_line(disk.name), style="bold"),
        state_text(disk.state),
        bar,
        Text(describe_resync(disk.resync)),
    )
    return table
