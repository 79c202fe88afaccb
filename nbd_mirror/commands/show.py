# SPDX-License-Identifier: BSD-3-Clause
"""
Status and maps in a terminal.

Every state is shown with its reason and the command that helps, because users of other
mirrors complain of volumes that are stuck and do not say why. Colours only repeat what
the words say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ..base.hints import Asked
from ..base.units import format_duration, format_size
from ..volume.answers import Policy
from ..volume.config import VolumeConfig
from ..volume.mapview import DirtyMaps
from ..volume.status import Disk, Local, Remote, Resync, Status
from .asked import name_volume
from .output import one_line
from .picture import picture
from .show_nodes import show_nodes

__all__ = [
    "NAME_WIDTH",
    "can_draw_blocks",
    "describe_policy",
    "describe_resync",
    "map_json",
    "show_map",
    "show_status",
    "state_text",
]

_STYLES = {
    "in_sync": "green",
    "ok": "green",
    "holding": "yellow",
    "resyncing": "yellow",
    "paused": "magenta",
    "out_of_sync": "bold red",
    "failed": "bold red",
    "stopped": "bold",
}
_SHADE_STYLE = "red"
LONGEST_RUNS = 10
# Names up to this width are aligned.  One long name must not move the lines of all
# other disks beyond the edge of the terminal.
NAME_WIDTH = 16


def state_text(state: str) -> Text:
    """Return a state's word in its colour."""
    return Text(one_line(state), style=_STYLES.get(state, ""))


def describe_resync(resync: Resync | None) -> str:
    """Return progress, rate and time left of a disk's resync; "" if none runs."""
    if resync is None:
        return ""
    done, total = resync.done_bytes, resync.total_bytes
    share = 100.0 * done / total if total else 100.0
    # Rounded down: 100% appears only when all is done.
    words = [
        f"{int(share * 10) / 10:.1f}%",
        f"{format_size(done)} of {format_size(total)}",
        f"{format_size(resync.bytes_per_s)}/s",
    ]
    if resync.growing:
        words.append("growing: clients make more dirty than is copied")
    elif resync.eta_s is not None:
        words.append(f"{format_duration(round(resync.eta_s))} left")
    return ", ".join(words)


def describe_policy(answer: Policy, config: VolumeConfig) -> Iterator[str]:
    """
    Yield the lines about the policy in force, and about that of the next start.

    A server keeps a switched policy until it ends, so the two may differ.

    Args:
        answer: the server's.
        config: the file as it is now.
    """
    reads = {"serve": "fenced reads are served", "fail": "fenced reads get EIO"}
    yield f"policy {answer.policy}, {reads[answer.fenced_reads]}"
    if answer.fenced:
        yield "  fenced: a remote is out of sync, writes get EIO until it is in_sync"
    for key in ("policy", "fenced_reads"):
        configured = getattr(config, key)
        if configured != getattr(answer, key):
            yield (
                f'  until the server ends: the configuration has {key} = "{configured}"'
            )


def show_status(console: Console, status: Status, asked: str | Asked) -> None:
    """
    Print a volume's status.

    Args:
        console: for the output.
        status: the volume's.
        asked: the user's name of the volume, for the hints; see name_volume().
    """
    facts = [format_size(status.size), f"policy {status.policy}"]
    if status.policy == "stop" and status.fenced_reads == "fail":
        facts += ["fenced reads fail"]
    if status.pid is not None:
        facts += [
            f"{status.door} door, pid {status.pid}",
            _clients(status.clients, status.max_clients),
            f"{status.inflight} in flight",
            _count(status.active_extents, "active extent"),
        ]
    head = Text(f"{status.volume}  ", style="bold")
    _line(console, head, state_text(status.state), f"  {', '.join(facts)}")
    # A volume's reason may be its worst remote's; then print it only once.
    said = [f"remote {one.name}: {one.reason}" for one in status.remotes]
    said.append(f"local: {status.local.reason}")
    if status.reason not in said:
        _why(console, status, asked)
    if status.log_lines_lost:
        lines = _count(status.log_lines_lost, "line")
        _line(console, f"  log: {lines} lost: it cannot be written, or was too slow")
    show_nodes(lambda *parts: _line(console, *parts), status, asked)
    width = min(max(len(disk.name) for disk in status.disks), NAME_WIDTH)
    _show_local(console, status.local, asked, width)
    for remote in status.remotes:
        _show_remote(console, remote, asked, width)


def _show_local(console: Console, local: Local, asked: str | Asked, width: int) -> None:
    words = [local.path]
    if local.state != "ok":
        words.append(f"{format_size(local.dirty_bytes)} dirty")
    if local.errors:
        words.append(_count(local.errors, "error"))
    if local.repaired_regions:
        words.append(f"{_count(local.repaired_regions, 'region')} repaired")
    if local.state != "ok" and local.since:
        words.append(f"since {local.since}")
    _line(
        console,
        f"  {'local':{width}}  ",
        state_text(local.state),
        f"{' ' * (13 - len(local.state))}{', '.join(words)}",
    )
    progress = describe_resync(local.resync)
    if progress:
        _line(console, f"    resync: {progress}")
    _why(console, local, asked)
    if local.last_error:
        _line(console, f"    last error: {local.last_error}")


def _show_remote(
    console: Console, remote: Remote, asked: str | Asked, width: int
) -> None:
    state = remote.state
    words = [remote.uri]
    # Without a mark yet, "0B dirty" would look like a copy that lacks nothing.
    if remote.dirty_bytes or state == "in_sync":
        words.append(f"{format_size(remote.dirty_bytes)} dirty")
    if remote.late_bytes:
        words.append(f"{format_size(remote.late_bytes)} late")
    if remote.unflushed_bytes:
        words.append(f"{format_size(remote.unflushed_bytes)} unflushed")
    bound_bytes = remote.flush_bound_bytes
    if bound_bytes and (remote.resync or remote.unflushed_bytes):
        bound = format_size(bound_bytes)
        words.append(f"flushed at least every {bound}")
    if remote.assumed:
        words.append("assumed")
    if remote.paused:
        words.append("paused by an operator")
    if remote.since:
        words.append(f"since {remote.since}")
    _line(
        console,
        f"  {remote.name:{width}}  ",
        state_text(state),
        f"{' ' * max(13 - len(state), 1)}{', '.join(words)}",
    )
    progress = describe_resync(remote.resync)
    if progress:
        _line(console, f"    resync: {progress}")
    _why(console, remote, asked)
    error = remote.last_error
    if error and state != "in_sync" and error not in remote.reason:
        _line(console, f"    last error: {error}")


def _why(console: Console, about: Status | Disk, asked: str | Asked) -> None:
    if about.reason:
        _line(console, f"    why: {about.reason}")
    if about.hint:
        _line(console, f"    try: {name_volume(about.hint, asked)}")


def _line(console: Console, *parts: str | Text) -> None:
    text = Text.assemble(*parts)
    text.plain = one_line(text.plain)
    console.print(text, soft_wrap=True, highlight=False)


def _clients(count: int, most: int | None) -> str:
    """Name the limit once it is near: most volumes have few clients."""
    if most is not None and count * 10 >= most * 9:
        return f"{count} of {_count(most, 'client')}"
    return _count(count, "client")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def can_draw_blocks(console: Console) -> bool:
    """Return whether the output can show block characters."""
    return console.encoding.lower().replace("-", "") in ("utf8", "utf16", "utf32")


def show_map(console: Console, maps: DirtyMaps, size: int) -> None:
    """
    Print a disk's counts, longest runs and the picture of its dirty map.

    Args:
        console: for the output; its width is the picture's.
        maps: of the remote, or of the local disk.
        size: of the volume, in bytes; 0 if unknown.
    """
    dirty = maps.dirty_regions
    share = 100.0 * dirty / maps.nr_regions
    _line(
        console,
        Text(maps.remote, style="bold"),
        f": {_count(dirty, 'dirty region')} of {maps.nr_regions} "
        f"({share:.1f}%), {format_size(maps.bytes_of(dirty, size))}; "
        f"a region is {format_size(maps.region_size, exact=True)}",
    )
    for name, count in (
        ("unflushed", maps.unflushed_regions),
        ("late", maps.late_regions),
    ):
        _line(console, f"  {name}: {format_size(maps.bytes_of(count, size))}")
    runs, total, all_seen = maps.longest_runs(LONGEST_RUNS)
    if runs:
        more = "" if all_seen else ", and more that were not counted"
        _line(console, f"  {_count(total, 'run')}{more}; the longest:")
        for run in runs:
            _line(console, f"    {run}")
    plain = not can_draw_blocks(console)
    *cells, legend = picture(maps, max(console.width - 4, 16), plain=plain)
    for row in cells:
        _line(console, "  ", Text(row, style=_SHADE_STYLE if dirty else ""))
    _line(console, f"  {legend}")


def map_json(volume: str, maps: Sequence[DirtyMaps]) -> dict[str, Any]:
    """Return the output of `inspect --json`: counts and longest runs of each map."""
    found = [_one_map_json(one) for one in maps]
    return {
        "volume": volume,
        "local": next((one for one in found if one["name"] == "local"), None),
        "remotes": [one for one in found if one["name"] != "local"],
    }


def _one_map_json(maps: DirtyMaps) -> dict[str, Any]:
    runs, total, all_seen = maps.longest_runs(LONGEST_RUNS)
    return {
        "name": maps.remote,
        "nr_regions": maps.nr_regions,
        "region_size": maps.region_size,
        "clean_stop": maps.clean_stop,
        "dirty_regions": maps.dirty_regions,
        "unflushed_regions": maps.unflushed_regions,
        "late_regions": maps.late_regions,
        "runs": total,
        "all_runs_seen": all_seen,
        "longest_runs": [{"offset": run.offset, "length": run.length} for run in runs],
    }
