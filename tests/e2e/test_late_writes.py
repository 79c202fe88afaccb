# SPDX-License-Identifier: BSD-3-Clause
"""
Late writes: the far server carries out a dead connection's command afterwards.

It may do so after a newer write to the same blocks, and the protocol does not report
that. So regions with an unanswered command stay dirty for `late_write_window` and are
copied again: once the remote is shown in sync the disks are equal, and stay so. The
faulty server keeps a command, loses the connection, and carries it out when the test
says so.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import support
from e2e.lib import faults
from e2e.lib.clients import error_of
from e2e.lib.faults import Command
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]
SIZE = 4 * MIB
WINDOW_S = 3.0
LENGTH = 8192
AT = MIB - 4096  # in two regions
OLD, NEW, NEWER = (word * LENGTH for word in (b"o", b"n", b"w"))


def begin(new_site: Sites, **keys: Any) -> tuple[Site, Any]:
    """Serve a volume with something on it; return it with a client."""
    keys = {"hold": "30s", "late_write_window": f"{WINDOW_S}s", **keys}
    site = new_site(remotes=["faulty"], size=SIZE, **keys)
    site.fill(site.local, SIZE)
    site.bring_up()
    return site, site.client()


def there(site: Site) -> bytes:
    """Return what the remote's disk holds at AT."""
    with site.dr.image.open("rb") as file:
        file.seek(AT)
        return file.read(LENGTH)


def strike(site: Site) -> None:
    """Have the old command carried out, while nothing is claimed yet."""
    before = there(site)
    site.faulty.late()
    assert before != there(site), "it would change nothing"
    assert site.remote()["state"] == "resyncing", "the window was over too early"
    site.assert_covered()


def finish(site: Site, handle: Any) -> None:
    """Fail unless the disks are equal once in sync is shown, and stay so."""
    site.wait_in_sync()
    site.assert_equal()
    handle.shutdown()
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("kind", ["write", "zero"])
def test_late_after_resend_is_copied_over(new_site: Sites, kind: str) -> None:
    """Sent again within `hold`, answered and written anew: then the old one comes."""
    site, handle = begin(new_site)
    site.faulty.on("received", faults.keep, faults.drop, kind=kind, times=1, at=AT)
    if kind == "write":
        handle.pwrite(OLD, AT)
    else:
        handle.zero(LENGTH, AT)
    handle.pwrite(NEW, AT)
    assert there(site) == NEW
    strike(site)
    finish(site, handle)
    assert there(site) == NEW
    assert "-> out_of_sync" not in site.log


def test_late_after_outage_and_catch_up_is_copied_over(new_site: Sites) -> None:
    """Out of sync, all but the late regions caught up: then the old one comes."""
    site, handle = begin(new_site, hold="200ms")
    site.faulty.on("received", faults.keep, faults.drop, times=1, at=AT)
    site.faulty.on("export", faults.drop, kind="connection")
    handle.pwrite(OLD, AT)
    site.wait_state("out_of_sync")
    handle.pwrite(NEW, AT)
    handle.pwrite(NEW, 2 * MIB)
    site.faulty.off()
    site.tell("resume")
    site.wait_remote(
        lambda one: one["connected"] and one["dirty_bytes"] == one["late_bytes"],
        "all but what is late to be copied",
    )
    handle.pwrite(NEWER, AT)
    assert there(site)[:4096] == NEWER[:4096], "connected: writes go to both"
    strike(site)
    finish(site, handle)
    assert there(site) == NEWER


def test_late_resync_copy_is_copied_over(new_site: Sites) -> None:
    """A copy of resync's own comes late, after a newer write."""
    site, handle = begin(new_site, hold="200ms")
    site.faulty.kill()
    site.wait_state("out_of_sync")
    handle.pwrite(OLD, AT)
    site.faulty.on("received", faults.keep, faults.drop, times=1)
    site.faulty.start()
    site.tell("resume")
    site.faulty.wait("export", "connection", count=3)
    site.wait_remote(
        lambda one: one["connected"] and 0 < one["dirty_bytes"] == one["late_bytes"],
        "all but what is late to be copied",
    )
    handle.pwrite(NEW, AT)
    assert there(site) == NEW
    strike(site)
    finish(site, handle)
    assert there(site) == NEW


def test_late_after_primary_killed_is_copied_over(new_site: Sites) -> None:
    """The primary is killed with a write open, and started: then the old one comes."""
    site, handle = begin(new_site)
    site.faulty.on("received", faults.keep, times=1, at=AT)
    lost = threading.Thread(target=error_of, args=(handle.pwrite, OLD, AT))
    lost.start()
    support.wait_until(lambda: site.faulty.kept, "the write to arrive")
    site.kill()
    lost.join(20)
    site.serve()
    site.wait_state("resyncing")
    handle = site.client()
    handle.pwrite(NEW, AT)
    assert there(site) == NEW
    strike(site)
    finish(site, handle)
    assert there(site) == NEW


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_late_after_restart_within_window_is_copied_over(
    new_site: Sites, end: str
) -> None:
    """What is late is not forgotten by a primary that ends within the window."""
    site, handle = begin(new_site)
    site.faulty.on("received", faults.keep, faults.drop, times=1, at=AT)
    handle.pwrite(OLD, AT)
    handle.pwrite(NEW, AT)
    handle.flush()
    late = site.remote()["late_bytes"]
    assert late == 2 * site.region_size
    if end == "killed":
        site.kill()
    else:
        handle.shutdown()
        site.stop()
    site.serve()
    handle = site.client()
    waiting = site.wait_state("resyncing")
    assert waiting["late_bytes"] == late
    strike(site)
    finish(site, handle)
    assert there(site) == NEW


def test_late_at_end_of_window_is_copied_over(new_site: Sites) -> None:
    """The last moment of the window counts as well as its first."""
    site, handle = begin(new_site)
    for _ in range(3):
        site.faulty.on("received", faults.keep, faults.drop, times=1, at=AT)
        begun = time.monotonic()  # the window begins later than this
        handle.pwrite(OLD, AT)
        handle.pwrite(NEW, AT)
        # The instant is what is tested: the last moment before the window ends.
        time.sleep(max(0.0, begun + WINDOW_S - 0.2 - time.monotonic()))
        site.faulty.late()
        if time.monotonic() < begun + WINDOW_S:
            break
        site.wait_in_sync()  # this machine was too slow: try again
    else:
        support.requires(False, "too slow to hit a tenth of a second")
    finish(site, handle)
    assert there(site) == NEW


def test_late_without_window_differs(new_site: Sites) -> None:
    """
    Without the window the disks differ: this proves that the server does what the
    others need.
    """
    site, handle = begin(new_site, late_write_window="0s")
    site.faulty.on("received", faults.keep, faults.drop, times=1, at=AT)
    handle.pwrite(OLD, AT)
    handle.pwrite(NEW, AT)
    site.wait_in_sync()
    site.assert_equal()
    site.faulty.late()
    assert site.differing() == {AT // site.region_size, AT // site.region_size + 1}


@pytest.mark.parametrize("primary", ["lives", "killed"])
def test_late_at_random_under_load_ends_equal(new_site: Sites, primary: str) -> None:
    """Many commands late, at random moments, resync's copies too: equal in the end."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown if it fails
    chance = random.Random(seed)
    site, handle = begin(new_site, late_write_window="1s")
    handle.shutdown()
    kept: list[tuple[float, Command]] = []

    def sometimes(command: Command) -> None:
        if chance.random() < 0.01:
            kept.append((time.monotonic(), command))
            faults.keep(command)
            faults.drop(command)

    for kind in ("write", "zero"):
        site.faulty.on("received", sometimes, kind=kind)
    load = site.load(threads=4, flush_every=7)
    carried_out = 0

    def carry_out() -> int:
        # The window begins after the keeping, so all of these are within it.
        while kept and chance.random() < 0.2:
            when, command = kept.pop(chance.randrange(len(kept)))
            if time.monotonic() - when > 0.9:
                site.faulty.kept.remove(command)  # too late for any promise
                continue
            site.faulty.late(command)
            nonlocal carried_out
            carried_out += 1
        if not site.remote()["connected"]:
            site.tell("resume")  # such a server is retried less and less often
        return carried_out

    support.wait_until(lambda: carry_out() >= 10, "ten late writes", timeout_s=60)
    if primary == "killed":
        site.kill()
        load.join()
        load.check_file(site.local)
        site.serve()
        load = site.load(threads=4, flush_every=7)
        support.wait_until(lambda: carry_out() >= 20, "ten more", timeout_s=60)
    site.faulty.off()
    load.stop()
    assert load.errors == []
    site.assert_covered()  # not beside a write: it reaches one disk first
    site.tell("resume")
    site.wait_in_sync()
    load.check_file(site.dr.image)
    assert "invalid in state" not in site.log, "no reason for an operator"
    finish(site, site.client())
