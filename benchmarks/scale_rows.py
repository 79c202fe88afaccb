# SPDX-License-Identifier: BSD-3-Clause
"""
The rows about a volume of 16 TiB: memory, request rate and start.

Its images are sparse files on tmpfs that hold only what was written. It is created as
in sync, because another row measures the copying of holes.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from .fio_rows import begin, closely, compare, finish
from .load import Workload, measure
from .mirror import Mirror
from .model import MIB, BenchError, Context, Measured, rotated
from .servers import SetUp, wait_until

__all__ = ["memory_16t", "rate_16t", "start_16t"]

LARGE = 16 << 40  # bytes
START_TIMEOUT_S = 60.0
GREETING = b"NBDMAGIC"


class EqualMirror(Mirror):
    """Our mirror of two empty disks, which needs no first sync."""

    def start(self) -> None:
        """Create it as in sync."""
        self.prepare()
        self.start_servers("--assume-in-sync", "far")


def _pair(ctx: Context) -> list[SetUp]:
    """Return the large volume and one of --size, not started."""
    large = EqualMirror(ctx.folder, LARGE, key="large")
    small = EqualMirror(ctx.folder, ctx.size, key="small")
    large.title, small.title = "16 TiB volume", f"{ctx.size // MIB} MiB volume"
    return [large, small]


def rate_16t(workload: Workload) -> Callable[[Context], Measured]:
    """Return a row's run: a large volume against a small one, the same hot set."""

    def run(ctx: Context) -> Measured:
        set_ups = _pair(ctx)
        for set_up in set_ups:
            begin(ctx, set_up, fill_size=ctx.size)
        measured = compare(closely(ctx), workload, set_ups, size=ctx.size)
        for one in set_ups:
            finish(one)
        return measured

    return run


# --- memory --------------------------------------------------------------


def _memory_mib(pid: int) -> dict[str, float]:
    """Return the kernel's report of a process's memory, MiB."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0]) / 1024
    return found


def _mapped_mib(pid: int, folder: Path) -> float:
    """Return the resident part of the files in *folder*, MiB."""
    total, ours = 0.0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = f" {folder}/" in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) / 1024
    return total


def memory_16t(ctx: Context) -> Measured:
    """Measure the resident set after a load all over the disk, and all dirty."""
    mirror = EqualMirror(ctx.folder, LARGE, key="large")
    ctx.stack.callback(mirror.stop)
    mirror.start()
    mirror.mark()
    # Once from end to end and at random, thinly: this touches every page of the maps.
    workload = Workload.writes(16)
    measure([mirror.uri], mirror.folder, workload, mirror.size, 2 * ctx.seconds)
    measure([mirror.uri], mirror.folder, workload, ctx.size, ctx.seconds)
    mirror.check()
    in_sync = _memory_mib(mirror.pid)
    logs = _mapped_mib(mirror.pid, mirror.state)
    mirror.command("pause")
    mirror.command("invalidate")
    wait_until(
        lambda: mirror.remote()["dirty_bytes"] == LARGE, lambda: "all to be dirty"
    )
    dirty = _memory_mib(mirror.pid)
    measured = Measured()
    measured.add("rss", in_sync["Rss"])
    measured.add("pss", in_sync["Pss"])
    measured.add("logs", logs)
    measured.add("locked", in_sync["Locked"])
    measured.add("all_dirty", dirty["Rss"])
    measured.rounds.append({"in_sync": in_sync, "all_dirty": dirty, "logs": logs})
    ctx.say(
        f"in sync {in_sync['Rss']:.0f} MiB, of it {logs:.0f} MiB mapped logs, "
        f"all dirty {dirty['Rss']:.0f} MiB"
    )
    measured.notes.append(
        "measured once: memory does not vary as time does; after random writes over "
        "the whole disk"
    )
    finish(mirror)  # nothing was copied: they must be equal
    return measured


# --- start ---------------------------------------------------------------


def _serve_s(mirror: Mirror) -> float:
    """Start the server; return the seconds until it greets a client."""
    mirror.socket.unlink(missing_ok=True)
    started = time.monotonic()
    process = mirror.spawn_server()
    deadline = started + START_TIMEOUT_S
    while not _greeted(mirror.socket, deadline):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"{mirror.title} did not start")
        time.sleep(0.002)
    return time.monotonic() - started


def _greeted(path: Path, deadline: float) -> bool:
    """Return whether a server greets a client; the socket exists long before."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            sock.connect(os.fspath(path))
            return sock.recv(len(GREETING)) == GREETING
        except OSError:
            return False


def start_16t(ctx: Context) -> Measured:
    """Measure the time of a start after a clean stop."""
    mirrors = [EqualMirror(ctx.folder, LARGE, key="large")]
    mirrors.append(EqualMirror(ctx.folder, ctx.size, key="small"))
    for mirror in mirrors:
        ctx.stack.callback(mirror.stop)
        mirror.start()
        measure([mirror.uri], mirror.folder, Workload.writes(16), ctx.size, 0.5)
    measured = Measured()
    for number in range(ctx.rounds):
        took = {}
        for mirror in rotated(mirrors, number):
            _stop_cleanly(mirror)
            took[mirror.key] = _serve_s(mirror)
            mirror.wait()
        for key, seconds in took.items():
            measured.add(key, seconds)
        measured.rounds.append(dict(took))
        ctx.say(
            f"{number + 1}/{ctx.rounds}  16 TiB {took['large']:.3f} s, "
            f"{ctx.size // MIB} MiB {took['small']:.3f} s"
        )
    for mirror in mirrors:
        finish(mirror)
    return measured


def _stop_cleanly(mirror: Mirror) -> None:
    """Stop the server as an operator does."""
    mirror.stop_server()
    with mirror.maps() as maps:
        if not maps.clean_stop:
            raise BenchError(f"{mirror.title} did not stop cleanly")
