# SPDX-License-Identifier: BSD-3-Clause
"""
Answered is not durable: a remote crashes and loses what it had not flushed.

The faulty server has a volatile write cache here, so its image file is what would be
on the platters. What it answered and lost is dirty, wherever in a write's life it
crashed and also if it is back at once; what it flushed is not copied again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import support
from e2e.lib import faults, faulty
from e2e.lib.clients import dirty_set, nbd
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]
SIZE = 4 * MIB


def begin(new_site: Sites, door: str = "direct", **keys: Any) -> tuple[Site, Any]:
    """Serve a volume in sync with a volatile remote; return it with a client."""
    site = new_site(remotes=["faulty"], size=SIZE, **keys)
    site.fill(site.local, SIZE)
    site.faulty.volatile = True
    site.bring_up(door)
    return site, site.client()


def scatter(site: Site, handle: Any) -> set[int]:
    """Write to regions here and there until some are in the cache; return which."""
    regions: set[int] = set()
    while not site.faulty.unflushed:  # maintenance may flush at any moment
        chosen = random.sample(range(2, SIZE // site.region_size - 2), 8)
        regions |= set(chosen)
        for region in chosen:
            handle.pwrite(os.urandom(4096), region * site.region_size + 8192)
    return regions


def finish(site: Site, handle: Any) -> None:
    """Fail unless in sync and a flush mean that the remote's platters are equal."""
    site.wait_in_sync()
    handle.flush()
    assert site.faulty.unflushed == 0
    site.assert_equal()
    handle.shutdown()
    site.stop()
    site.assert_equal()


CHOICES = pytest.mark.parametrize(
    "choose", [None, random.Random(7)], ids=["all", "some"]
)


@CHOICES
def test_crash_makes_what_was_lost_dirty(
    new_site: Sites, door: str, choose: random.Random | None
) -> None:
    """Crashed, and away: all it lost is dirty, nothing else, and it is caught up."""
    site, handle = begin(new_site, door)
    handle.flush()
    regions = scatter(site, handle)
    site.faulty.kill(choose)
    site.wait_state("out_of_sync")
    lost = site.assert_covered()
    assert choose or bool(lost) == bool(site.faulty.lost)
    assert dirty_set(site.map_path()) <= regions
    site.faulty.start()
    site.tell("resume")
    finish(site, handle)


@CHOICES
def test_crash_and_back_within_hold_loses_nothing(
    new_site: Sites, choose: random.Random | None
) -> None:
    """Crashed and back at once, its writes all answered: they are copied again."""
    site, handle = begin(new_site, hold="30s")
    handle.flush()
    scatter(site, handle)
    site.faulty.crash(choose)
    site.faulty.wait("export", "connection", count=2)
    finish(site, handle)
    assert "-> out_of_sync" not in site.log


def test_crash_after_flush_copies_nothing(new_site: Sites, door: str) -> None:
    """A flush that was answered covers every write before it, on any connection."""
    site, handle = begin(new_site, door)
    other = site.client()
    for offset in range(0, SIZE, 4 * site.region_size):
        handle.pwrite(os.urandom(4096), offset)
    other.flush()
    site.assert_equal()
    site.faulty.kill()
    site.wait_state("out_of_sync")
    assert dirty_set(site.map_path()) == set()
    site.faulty.start()
    site.tell("resume")
    other.shutdown()
    finish(site, handle)
    assert site.copied(1) == [SIZE], "only the first, full copy"


@pytest.mark.parametrize("fua", [True, False], ids=["with FUA", "without"])
def test_crash_after_fua_write_keeps_it(new_site: Sites, fua: bool) -> None:
    """A FUA write is on the remote's platters too, also if it knows no FUA."""
    site = new_site(remotes=["faulty"], size=SIZE)
    site.faulty.volatile = True
    if not fua:
        site.faulty.flags &= ~faulty.SEND_FUA
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"f" * 4096, MIB, nbd.CMD_FLAG_FUA)
    with site.dr.image.open("rb") as file:
        file.seek(MIB)
        assert file.read(4096) == b"f" * 4096
    site.faulty.kill()
    site.wait_state("out_of_sync")
    assert dirty_set(site.map_path()) == set()
    site.faulty.start()
    site.tell("resume")
    finish(site, handle)


@pytest.mark.parametrize("event", ["received", "applied"])
def test_crash_in_flush_loses_nothing(new_site: Sites, event: str) -> None:
    """Crashed with a flush under way: its end is not known, so all of it is dirty."""
    site, handle = begin(new_site, hold="30s")
    handle.flush()
    flushes = site.faulty.count(event, "flush")
    site.faulty.on(event, faults.freeze, kind="flush", times=1)
    regions = scatter(site, handle)
    cookie = handle.aio_flush()
    site.faulty.wait(event, "flush", count=flushes + 1)
    site.faulty.crash()
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)
    # It was sent again: what is answered now is durable, or is copied again.
    site.wait_in_sync()
    assert regions
    finish(site, handle)


def test_crash_in_flush_of_resync_copies_again(new_site: Sites) -> None:
    """Copied, answered, and crashed before resync's flush: nothing became clean."""
    site, handle = begin(new_site, hold="200ms")
    site.faulty.kill()
    site.wait_state("out_of_sync")
    for offset in range(0, SIZE, 2 * site.region_size):
        handle.pwrite(os.urandom(4096), offset)
    before = dirty_set(site.map_path())
    flushes = site.faulty.count("received", "flush")
    site.faulty.on("received", faults.drop, kind="flush", times=1)
    site.faulty.on("connect", faults.drop, kind="connection", nth=2)
    site.faulty.start()
    site.tell("resume")
    site.faulty.wait("received", "flush", count=flushes + 1)
    site.wait_state("out_of_sync")
    site.faulty.crash()
    assert site.faulty.lost
    assert before <= dirty_set(site.map_path())
    assert site.assert_covered()
    site.faulty.off()
    site.tell("resume")
    finish(site, handle)


def test_crash_of_both_loses_nothing(new_site: Sites) -> None:
    """The primary is killed and the remote's machine lost at once: still dirty."""
    site, handle = begin(new_site)
    handle.flush()
    regions = scatter(site, handle)
    site.kill()
    site.faulty.kill()
    site.serve()
    assert site.assert_covered() <= regions
    site.faulty.start()
    site.tell("resume")
    finish(site, site.client())


def test_unflushed_is_flushed_without_a_client(new_site: Sites) -> None:
    """Clients never flush: the engine does, so that a crash costs little."""
    site, handle = begin(new_site)
    scatter(site, handle)
    support.wait_until(lambda: site.faulty.unflushed == 0, "a flush of its own")
    support.wait_until(lambda: site.remote()["unflushed_bytes"] == 0, "it to be known")
    site.faulty.kill()
    site.wait_state("out_of_sync")
    assert dirty_set(site.map_path()) == set()
    site.faulty.start()
    site.tell("resume")
    finish(site, handle)


def test_policy_stop_flush_after_crash_waits_for_both(
    new_site: Sites, door: str
) -> None:
    """Stop: a flush after a crash within the hold is answered once both have it."""
    site, handle = begin(new_site, door, policy="stop", hold="30s")
    for _ in range(3):
        scatter(site, handle)
        site.faulty.crash()
        handle.flush()
        site.assert_equal()
    finish(site, handle)


def test_crashes_at_random_under_load_end_equal(new_site: Sites) -> None:
    """Crash after crash, within the hold and beyond, at random: equal in the end."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown if it fails
    chance = random.Random(seed)
    site, handle = begin(new_site, hold="1s")
    handle.shutdown()
    load = site.load(threads=4, flush_every=50)
    for _ in range(8):
        before = load.count
        goal = chance.randrange(20, 150)
        load.wait_for(before + goal, "the load")
        site.faulty.kill(chance if chance.random() < 0.5 else None)
        if chance.random() < 0.3:
            site.wait_state("out_of_sync")
            site.assert_covered()
        site.faulty.start()
        site.tell("resume")
    load.stop()
    assert load.errors == []
    site.wait_in_sync()
    handle = site.client()
    finish(site, handle)
    load.check_file(site.dr.image)
