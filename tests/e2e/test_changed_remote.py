# SPDX-License-Identifier: BSD-3-Clause
"""
A remote that hangs somewhere, or comes back as another than it was.

Neither may hang a client: each command to a remote has a deadline for any wait. A
remote that comes back too small or read-only is refused before a byte is written.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from e2e.lib import faults, faulty
from e2e.lib.clients import checksum, error_of, nbd
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]
SIZE = 16 * MIB
DEADLINE_S = 0.3
PATIENCE_S = 20.0  # bounded means: far less than for ever, on any machine


def begin(new_site: Sites, door: str = "direct", **keys: Any) -> tuple[Site, Any]:
    """Serve a volume in sync with a short deadline; return it with a client."""
    site = new_site(remotes=["faulty"], **{"size": SIZE, **keys})
    site.deadline = f"{DEADLINE_S}s"
    site.write_config()
    site.fill(site.local, MIB)
    site.bring_up(door)
    return site, site.client()


def bounded(call: Callable[..., object], *arguments: object) -> float:
    """Fail unless *call* returns in time; say how long it took."""
    # In a thread: no signal of pytest's ends one that hangs in libnbd.
    caught: list[nbd.Error] = []

    def run() -> None:
        try:
            call(*arguments)
        except nbd.Error as error:
            caught.append(error)

    begun = time.monotonic()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the client hangs"
    if caught:
        raise caught[0]
    return time.monotonic() - begun


def finish(site: Site, handle: Any) -> None:
    """Heal the remote; fail unless it ends in sync, with equal disks."""
    site.faulty.off()
    site.faulty.thaw()
    site.tell("resume")
    site.wait_in_sync()
    handle.shutdown()
    site.stop()
    site.assert_equal()


# It hangs.

HANGS = [
    ("write", "header", faults.freeze),
    ("write", "payload", faults.freeze),  # far more than a socket takes
    ("write", "received", faults.freeze),
    ("write", "applied", faults.freeze),
    ("write", "received", faults.silent),
    ("zero", "received", faults.freeze),
    ("flush", "applied", faults.freeze),
]


@pytest.mark.parametrize(
    ("kind", "event", "fault"),
    HANGS,
    ids=[f"{kind}-{event}-{fault.__name__}" for kind, event, fault in HANGS],
)
def test_hung_command_is_bounded(
    new_site: Sites, kind: str, event: str, fault: faults.Action
) -> None:
    """Hung at any step of a command: answered ok after the deadline, without a hold."""
    site, handle = begin(new_site, hold="5min")
    handle.pwrite(os.urandom(4096), 0)
    site.faulty.on(event, fault, kind=kind)
    if kind == "write":
        took = bounded(handle.pwrite, os.urandom(8 * MIB), 4 * MIB)
    elif kind == "zero":
        took = bounded(handle.zero, MIB, 0)
    else:
        took = bounded(handle.flush)
    assert took > DEADLINE_S / 2
    what = "flush" if kind == "flush" else "command"
    site.wait_log(f"a {what} was not answered within {DEADLINE_S} s")
    site.wait_remote(lambda one: not one["connected"], "it to be lost")
    site.assert_covered()
    site.wait_log("in_sync -> out_of_sync")
    finish(site, handle)


def test_hung_command_policy_stop_gets_eio(new_site: Sites, door: str) -> None:
    """Stop: after the deadline the client gets EIO, and then at once."""
    site, handle = begin(new_site, door, policy="stop")
    site.faulty.on("received", faults.freeze)
    assert errno.EIO == error_of(bounded, handle.pwrite, b"a" * 4096, 0)
    assert errno.EIO == error_of(handle.pwrite, b"b" * 4096, 4096)
    site.assert_covered()
    finish(site, handle)


def test_starved_command_is_bounded(new_site: Sites) -> None:
    """One command never answered, all others are: it is given up as well."""
    site, handle = begin(new_site)
    site.faulty.on("received", faults.silent, times=1, at=8 * MIB)
    load = site.load(threads=2)
    load.wait_for(20)
    # Answers came all the time, so it was not one deadline that was over.
    assert bounded(handle.pwrite, os.urandom(4096), 8 * MIB) > 2 * DEADLINE_S
    load.stop()
    assert load.errors == []
    finish(site, handle)


@pytest.mark.parametrize("event", ["connect", "export", "read"])
def test_hung_while_connecting_is_bounded(new_site: Sites, event: str) -> None:
    """Hung in the handshake or the sample, clients wait for the hold, no longer."""
    site, handle = begin(new_site, hold="1s")
    if event == "read":
        site.faulty.on("received", faults.freeze, kind="read")
    else:
        site.faulty.on(event, faults.freeze, kind="connection")
    site.faulty.cut()
    bounded(handle.pwrite, os.urandom(4096), 0)
    found = site.wait_state("out_of_sync")
    assert found["reason"]
    site.assert_covered()
    finish(site, handle)


def test_slow_is_not_hung(new_site: Sites) -> None:
    """A link that needs longer than the deadline for what is sent stays in sync."""
    site = new_site(size=4 * MIB)
    site.deadline = f"{DEADLINE_S}s"
    site.write_config()
    # Bits a second; the new volume's holes are not counted.
    site.dr.start("--filter=rate", "rate=16M", "burstiness=0.1")
    site.create()
    site.serve()
    site.wait_in_sync()
    handle = site.client()
    begun = time.monotonic()
    cookies = [
        handle.aio_pwrite(
            nbd.Buffer.from_bytearray(bytearray(os.urandom(64 * 1024))), at * 64 * 1024
        )
        for at in range(48)
    ]
    for cookie in cookies:
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)
    assert time.monotonic() - begun > 2 * DEADLINE_S, "the filter slowed nothing"
    assert "-> out_of_sync" not in site.log
    assert "holding" not in site.log
    handle.shutdown()
    site.stop()
    site.assert_equal()


# It comes back changed.


def shrink(site: Site) -> None:
    """Export less than there was."""
    site.faulty.size = SIZE - 512


def lock(site: Site) -> None:
    """Export it read-only."""
    site.faulty.read_only = True


CHANGES = pytest.mark.parametrize(
    ("change", "words"), [(shrink, f"{SIZE - 512}"), (lock, "read-only")]
)


@CHANGES
@pytest.mark.parametrize("hold", ["0s", "1s"])
def test_back_changed_is_refused_and_not_written(
    new_site: Sites, change: Callable[[Site], None], words: str, hold: str
) -> None:
    """Back too small or read-only: refused with the cause, also within the hold."""
    site, handle = begin(new_site, hold=hold)
    handle.flush()
    before = checksum(site.dr.image)
    change(site)
    site.faulty.cut()
    handle.pwrite(os.urandom(MIB), 2 * MIB)
    found = site.wait_remote(lambda one: words in one["reason"], "the refusal")
    assert found["state"] == "out_of_sync"
    assert site.assert_covered()
    connections = site.faulty.count("export", "connection")
    site.tell("resume")
    site.faulty.wait("export", "connection", count=connections + 1)
    handle.pwrite(os.urandom(MIB), 4 * MIB)
    assert before == checksum(site.dr.image)
    site.faulty.size, site.faulty.read_only = None, False
    finish(site, handle)


@CHANGES
def test_back_changed_policy_stop_stays_fenced(
    new_site: Sites, door: str, change: Callable[[Site], None], words: str
) -> None:
    """Stop: one that came back changed does not lift the fence."""
    site, handle = begin(new_site, door, policy="stop", hold="200ms")
    change(site)
    site.faulty.cut()
    assert errno.EIO == error_of(handle.pwrite, b"a" * 4096, 0)
    site.wait_remote(lambda one: words in one["reason"], "the refusal")
    assert errno.EIO == error_of(handle.pwrite, b"a" * 4096, 0)
    site.faulty.size, site.faulty.read_only = None, False
    finish(site, handle)


@pytest.mark.parametrize("flags", [0, faulty.SEND_FLUSH], ids=["none", "flush"])
def test_back_with_fewer_commands_is_used(new_site: Sites, flags: int) -> None:
    """Back without FUA, zeroing, even flushing: used as far as it goes."""
    site, handle = begin(new_site, hold="30s")
    site.faulty.flags = flags
    site.faulty.cut()
    handle.pwrite(os.urandom(4096), 0)
    handle.zero(2 * MIB, 512)
    handle.trim(MIB, 4 * MIB)
    handle.flush()
    zeroes = site.faulty.count("received", "zero")
    site.wait_in_sync()
    handle.zero(MIB, 8 * MIB)
    assert zeroes == site.faulty.count("received", "zero")
    assert "-> out_of_sync" not in site.log
    finish(site, handle)


def test_address_of_one_that_left_is_said_and_copied_to(new_site: Sites) -> None:
    """A remote at the address of one that left, two starts ago, gets all of it."""
    site = new_site(size=SIZE, remotes=["nbdkit", "nbdkit"])
    site.fill(site.local, MIB)
    site.bring_up()
    site.stop()
    left = site.secondaries.pop()
    site.write_config()
    site.serve()
    site.wait_in_sync()
    site.stop()
    site.config.write_text(site.config.read_text().replace(site.dr.uri, left.uri))
    site.serve()
    words = "connected where a remote was that has left the configuration"
    site.wait_remote(lambda one: one["connected"], "dr to be connected")
    assert words in site.status()["reason"]
    site.wait_log(words)
    site.wait_in_sync()
    assert f"resync_start: {SIZE} bytes dirty" in site.log
    site.stop()
    assert site.local.read_bytes() == left.image.read_bytes()
