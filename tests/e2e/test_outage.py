# SPDX-License-Identifier: BSD-3-Clause
"""
The secondary is lost, hangs, answers errors, and comes back.

A client never learns of it (policy degrade), the dirty map covers every region that
differs, and the volume comes back in sync by itself with equal images.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.lib.clients import error_of
from e2e.lib.harness import MIB, Site
from e2e.lib.servers import KINDS

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]


@pytest.mark.parametrize("kind", KINDS)
def test_secondary_killed_under_load_catches_up(new_site: Sites, kind: str) -> None:
    """Any server killed under load is caught up with, and no client sees an error."""
    site = new_site(remotes=[kind])
    site.fill(site.local, 3 * MIB, offset=5 * MIB)
    site.bring_up()
    site.assert_equal()
    load = site.load(flush_every=20)
    load.wait_for(100)

    site.dr.kill()
    lost = site.wait_state("out_of_sync")
    assert not lost["connected"]
    load.wait_for(load.count + 50, "writes while it is lost")
    differing = site.assert_covered()
    assert differing
    assert site.remote()["dirty_bytes"] >= len(differing) * site.region_size

    site.dr.start()
    site.wait_in_sync()
    load.wait_for(load.count + 20, "writes after the catch-up")
    load.stop()
    assert load.errors == []
    site.stop()
    site.assert_equal()
    load.check_file(site.dr.image)


def test_secondary_killed_through_python_door_catches_up(site: Site) -> None:
    """The python door lives through the same outage as the direct one."""
    site.bring_up("python")
    load = site.load(flush_every=20)
    load.wait_for(100)
    site.dr.kill()
    site.wait_state("out_of_sync")
    site.assert_covered()
    site.dr.start()
    site.wait_in_sync()
    load.stop()
    assert load.errors == []
    site.stop()
    site.assert_equal()
    load.check_file(site.dr.image)


@pytest.mark.parametrize("kind", KINDS)
def test_secondary_back_within_hold_stays_in_sync(new_site: Sites, kind: str) -> None:
    """A remote back within `hold` is never out of sync; writes wait, none fails."""
    site = new_site(remotes=[kind], hold="15s")
    site.bring_up()
    load = site.load()
    load.wait_for(100)
    site.dr.kill()
    site.wait_state("holding")
    site.dr.start()
    site.wait_in_sync()
    load.wait_for(load.count + 20, "writes to go on")
    load.stop()
    assert load.errors == []
    assert "-> out_of_sync" not in site.log
    site.stop()
    site.assert_equal()
    load.check_file(site.dr.image)


def test_policy_stop_writes_get_eio_until_in_sync(new_site: Sites, door: str) -> None:
    """Policy stop: no write while out of sync, reads go on, writes come back."""
    site = new_site(policy="stop", size=4 * MIB)
    site.bring_up(door)
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    site.dr.kill()
    assert errno.EIO == error_of(handle.pwrite, b"b" * 4096, MIB)
    site.wait_state("out_of_sync")
    status = site.status()
    assert status["state"] == "out_of_sync"
    assert "policy stop" in status["reason"]
    assert errno.EIO == error_of(handle.pwrite, b"c" * 4096, 2 * MIB)
    assert errno.EIO == error_of(handle.trim, 4096, 2 * MIB)
    assert errno.EIO == error_of(handle.zero, 4096, 2 * MIB)
    assert b"a" * 4096 == handle.pread(4096, 0)
    site.assert_covered()
    site.dr.start()
    site.wait_in_sync()
    handle.pwrite(b"d" * 4096, 3 * MIB)
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_policy_stop_fence_survives_restart(new_site: Sites) -> None:
    """Policy stop: a restart without the remote does not let writes through."""
    site = new_site(policy="stop", size=4 * MIB)
    site.bring_up()
    site.dr.kill()
    handle = site.client()
    assert errno.EIO == error_of(handle.pwrite, b"b" * 4096, MIB)
    site.kill()
    site.serve()
    handle = site.client()
    assert errno.EIO == error_of(handle.pwrite, b"b" * 4096, MIB)
    site.dr.start()
    site.wait_in_sync()
    handle.pwrite(b"d" * 4096, 3 * MIB)
    handle.shutdown()
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("kind", KINDS)
def test_secondary_hung_is_bounded_and_catches_up(new_site: Sites, kind: str) -> None:
    """A hung remote is out of sync after its deadline, and writes are answered."""
    site = new_site(remotes=[kind])
    site.deadline = "1s"
    site.write_config()
    site.bring_up()
    load = site.load()
    load.wait_for(100)
    site.dr.freeze()
    begin = time.monotonic()
    lost = site.wait_state("out_of_sync", timeout_s=10)
    assert time.monotonic() - begin < 5
    assert "1" in lost["reason"]
    load.wait_for(load.count + 20, "writes while it hangs")
    site.dr.thaw()
    site.wait_remote(lambda one: one["state"] == "in_sync", "dr to be in_sync")
    assert "resyncing" in site.log
    load.stop()
    assert load.errors == []
    site.stop()
    site.assert_equal()
    load.check_file(site.dr.image)


def test_flush_secondary_hung_is_bounded(site: Site) -> None:
    """A flush is answered though the remote hangs, and so is a read."""
    site.deadline = "500ms"
    site.write_config()
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    site.dr.freeze()
    begin = time.monotonic()
    assert b"a" * 4096 == handle.pread(4096, 0)
    handle.flush()
    assert time.monotonic() - begin < 5
    assert site.wait_state("out_of_sync")["dirty_bytes"] >= site.region_size
    handle.shutdown()
    site.dr.thaw()
    site.wait_in_sync()


def test_stop_secondary_hung_is_bounded(site: Site) -> None:
    """A stop ends though the remote hangs, and nothing is lost by it."""
    site.deadline = "500ms"
    site.write_config()
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    site.dr.freeze()
    begin = time.monotonic()
    site.stop()
    assert time.monotonic() - begin < 15
    site.dr.thaw()
    site.serve()
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


def test_late_write_window_resyncing_says_why(new_site: Sites) -> None:
    """Unanswered ranges stay dirty for the window after a reconnect, with a reason."""
    site = new_site(late_write_window="3s")
    site.deadline = "500ms"
    site.write_config()
    site.bring_up()
    load = site.load()
    load.wait_for(50)
    site.dr.freeze()
    site.wait_state("out_of_sync")
    load.stop()
    site.dr.kill()
    site.dr.start()
    waiting = site.wait_remote(
        lambda one: one["late_bytes"] and one["late_bytes"] == one["dirty_bytes"],
        "only late regions to be left",
    )
    assert waiting["state"] == "resyncing"
    assert "writes of the lost connection may still be carried out" in waiting["reason"]
    assert site.status()["state"] == "resyncing"
    begin = time.monotonic()
    site.wait_in_sync()
    assert time.monotonic() - begin > 1, "the window was not waited for"
    site.stop()
    site.assert_equal()
    load.check_file(site.dr.image)


def test_late_write_held_and_sent_again_is_copied_again(new_site: Sites) -> None:
    """Within `hold` too: a request sent twice is copied again after the window."""
    site = new_site(hold="15s", late_write_window="1s")
    site.bring_up()
    # Nothing is unflushed yet.  So no region is copied before the window ends
    # because a flush needs it, and no write waits for room: all four are sent.
    site.dr.freeze()
    load = site.load(threads=4)
    support.wait_until(lambda: site.status()["inflight"] == 4, "writes to wait")
    site.dr.kill()
    site.dr.start()
    waiting = site.wait_state("resyncing")
    assert 0 < waiting["late_bytes"] <= waiting["dirty_bytes"]
    site.wait_in_sync()
    load.stop()
    assert load.errors == []
    assert "-> out_of_sync" not in site.log
    site.stop()
    site.assert_equal()


def test_two_remotes_one_lost_other_stays_in_sync(new_site: Sites) -> None:
    """Of two remotes one is lost and caught up with; the other never notices."""
    site = new_site(remotes=["nbdkit", "qemu-nbd"])
    site.bring_up()
    load = site.load()
    load.wait_for(50)
    site.dr.kill()
    site.wait_state("out_of_sync")
    load.wait_for(load.count + 20, "writes while one is lost")
    assert site.remote("dr1")["state"] == "in_sync"
    site.assert_covered()
    site.dr.start()
    site.wait_in_sync()
    load.stop()
    assert load.errors == []
    assert "dr1: in_sync -> " not in site.log
    site.stop()
    site.assert_equal()


def test_outage_without_writes_copies_nothing(site: Site) -> None:
    """An outage in which nothing was written costs no copying."""
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    handle.flush()
    site.dr.kill()
    site.wait_state("out_of_sync")
    assert site.remote()["dirty_bytes"] == 0
    site.dr.start()
    site.wait_in_sync()
    assert site.copied(1) == [site.size], "only the first, full copy"
    handle.shutdown()


@pytest.mark.parametrize("primary", ["lives", "killed"])
def test_late_write_of_old_server_is_copied_over(new_site: Sites, primary: str) -> None:
    """A command a hung server carries out after a reconnect does not stay on disk."""
    # Of the three it is nbd-server that surely carries out what it finds in the
    # socket of a client that has gone; of nbdkit's threads some other may see the end.
    site = new_site(remotes=["nbd-server"], late_write_window="4s")
    site.deadline = "500ms"
    site.write_config()
    site.bring_up()
    handle = site.client()
    old, new, newer = (word * 2048 for word in (b"o", b"n", b"w"))
    site.dr.freeze()
    if primary == "killed":
        lost = threading.Thread(target=error_of, args=(handle.pwrite, old, 0))
        lost.start()
        support.wait_until(lambda: read(site.local) == old, "the write on local")
        site.kill()
        lost.join(20)
        site.dr.start()  # another process: the hung one keeps its connection
        site.serve()
        handle = site.client()
    else:
        handle.pwrite(old, 0)
        site.wait_state("out_of_sync")
        handle.pwrite(new, 0)
        site.dr.start()
    site.wait_state("resyncing")
    handle.pwrite(newer, 0)
    assert read(site.dr.image) == newer, "connected: writes go to both"
    site.dr.thaw()
    support.wait_until(lambda: read(site.dr.image) == old, "the late write")
    assert site.remote()["state"] == "resyncing", "the window was over too early"
    site.wait_in_sync()
    assert read(site.dr.image) == newer
    handle.shutdown()
    site.stop()
    site.assert_equal()


def read(image: Path) -> bytes:
    """Return the first 2 KiB of an image."""
    with image.open("rb") as file:
        return file.read(2048)
