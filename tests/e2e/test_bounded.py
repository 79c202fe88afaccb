# SPDX-License-Identifier: BSD-3-Clause
"""
Memory, descriptors and threads stay what they are, whatever the remotes do.

Both are measured in the running server when nothing is under way: after some rounds,
by when every cache and pool has filled, and after many more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import support
from e2e.lib.clients import nbd
from e2e.lib.faulty import Faulty
from e2e.lib.harness import MIB, Site

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("timed")]

Sites = Callable[..., Site]
KIB = 1024
REMOTES = 8
RECONNECTS = 2000


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has: KiB in memory, at most, of data; descriptors, threads."""

    resident: int
    peak: int
    data: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Look at a running process."""
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        resident, peak, data, threads = (
            int(status[key].split()[0])
            for key in ("VmRSS", "VmHWM", "VmData", "Threads")
        )
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(resident, peak, data, descriptors, threads)


def settled(site: Site, fewest: Usage | None = None) -> Usage:
    """Return the usage once all is in sync; *fewest*: wait until it is no more."""
    site.wait_in_sync()
    if fewest is not None:
        # Clients' threads and sockets go away a little after they were closed.
        support.wait_until(
            lambda: (
                Usage.of(site.pid).descriptors <= fewest.descriptors
                and Usage.of(site.pid).threads <= fewest.threads
            ),
            f"no more descriptors and threads than {fewest}",
        )
    return Usage.of(site.pid)


def test_reconnects_leak_nothing(new_site: Sites) -> None:
    """Thousands of lost connections under load cost no descriptor and no memory."""
    # Eight remotes lose their connections at once: one alone would take too long.
    site = new_site(
        remotes=["faulty"] * REMOTES,
        size=256 * KIB,
        hold="1min",
        late_write_window="0s",
    )
    site.bring_up()
    servers = [one for one in site.secondaries if isinstance(one, Faulty)]
    idle = settled(site)
    load = site.load(threads=2, flush_every=10)

    def reconnect_all() -> int:
        wanted = [one.count("export", "connection") + 1 for one in servers]
        for one in servers:
            one.cut()

        def back() -> bool:
            site.tell("resume", None)
            return all(
                one.count("export", "connection") >= count
                for one, count in zip(servers, wanted, strict=True)
            )

        support.wait_until(back, "all to be connected again", interval_s=0.01)
        return sum(one.count("export", "connection") for one in servers)

    while reconnect_all() < RECONNECTS // 4:
        pass
    before = settled(site)
    while reconnect_all() < RECONNECTS:
        pass
    load.stop()
    assert load.errors == []
    assert load.count > 100
    after = settled(site, idle)
    assert after.resident - before.resident < 4 * KIB, (before, after)
    assert after.data - before.data < 8 * KIB, (before, after)
    site.stop()
    site.assert_equal()


def test_failed_connections_leak_nothing(new_site: Sites) -> None:
    """Connections that end in the handshake or the sample cost nothing either."""
    site = new_site(remotes=["faulty"] * REMOTES, size=256 * KIB)
    site.bring_up()
    idle = settled(site)
    servers = [one for one in site.secondaries if isinstance(one, Faulty)]

    def drop(_: object) -> None:
        raise ConnectionResetError

    def fail_all(event: str, kind: str) -> None:
        for one in servers:
            one.off()
            one.on(event, drop, kind=kind)
            one.cut()

    def refused() -> int:
        site.tell("resume", None)
        return sum(one.count("connect", "connection") for one in servers)

    for event, kind in [
        ("connect", "connection"),
        ("export", "connection"),
        ("received", "read"),
    ]:
        fail_all(event, kind)
        goal = refused() + 150
        support.wait_until(
            lambda: refused() >= goal,  # noqa: B023
            f"150 failed at {event} of a {kind}",
            interval_s=0.01,
        )
    before = Usage.of(site.pid)
    goal = refused() + 300
    support.wait_until(lambda: refused() >= goal, "300 more", interval_s=0.01)
    after = Usage.of(site.pid)
    assert after.resident - before.resident < 2 * KIB, (before, after)
    assert after.data - before.data < 8 * KIB, (before, after)
    for one in servers:
        one.off()
    site.tell("resume", None)
    settled(site, idle)
    site.stop()
    site.assert_equal()


def write_all(handles: list[Any], content: Any, depth: int) -> None:
    """Have each client send *depth* writes at once, and wait for all answers."""
    pending = [
        (one, one.aio_pwrite(content, (number * depth + at) * MIB))
        for number, one in enumerate(handles)
        for at in range(depth)
    ]
    for one, cookie in pending:
        while not one.aio_command_completed(cookie):
            one.poll(-1)


def test_frozen_remote_under_large_writes_is_bounded(new_site: Sites) -> None:
    """Many clients' large writes against a hung remote use no more each time."""
    clients, depth = 2, 16  # all of nbdkit's threads for a connection, at once
    site = new_site(size=clients * depth * MIB, late_write_window="0s")
    site.deadline = "300ms"
    site.write_config()
    site.bring_up()
    handles = [site.client() for _ in range(clients)]
    content = nbd.Buffer.from_bytearray(bytearray(os.urandom(MIB)))
    usages = [settled(site)]
    for _ in range(8):
        site.dr.freeze()
        write_all(handles, content, depth)
        site.wait_state("out_of_sync")
        site.dr.thaw()
        site.dr.revive()
        site.tell("resume")
        usages.append(settled(site))
    # nbdkit reads each request into memory, and keeps that for the next; resync has
    # 16 MiB of buffers. A copy for each leg is what the engine could add.
    limit = usages[0].resident + 2 * clients * depth * KIB + 48 * KIB
    assert usages[-1].peak < limit, usages
    # The peak: free memory goes back to the system now and then only.  Rounds differ by
    # some MiB; what five rounds kept would be more than the payload of one.
    assert usages[-1].peak - usages[3].peak < clients * depth * KIB, usages
    settled(site, usages[0])
    for one in handles:
        one.shutdown()
    site.stop()
    site.assert_equal()
