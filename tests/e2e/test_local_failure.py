# SPDX-License-Identifier: BSD-3-Clause
"""
The local disk fails while a remote is in sync: clients never learn of it.

The failures are real where they can be: a file of nbdfuse's whose requests get EIO, a
tmpfs that is full, a disk that is pulled out. Then nothing answered is lost, what local
misses is copied back and no more than that, and both images end up equal.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
import support
from e2e.lib.clients import dirty_set, error_of
from e2e.lib.disks import (
    FuseDisk,
    assert_whole,
    local_of,
    read_all,
    resync_back,
    small_disk,
    take_over,
    wait_local,
)
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]


def assert_local_covered(site: Site) -> set[int]:
    """Fail unless every difference lies under local's dirty bits; return those."""
    differing = site.differing()
    missed = differing - dirty_set(site.map_path("local"))
    assert not missed, f"these differ and local does not miss them: {sorted(missed)}"
    return differing


@pytest.mark.parametrize(
    ("door", "kind"),
    [
        ("direct", "write"),
        ("direct", "flush"),
        ("python", "flush"),
        ("python", "write"),
    ],
)
def test_takeover_is_not_seen_by_clients(site: Site, door: str, kind: str) -> None:
    """EIO of a write or a flush: the remote serves, and local is copied back to."""
    disk = FuseDisk(site)
    site.fill(site.local, 24 * MIB, offset=8 * MIB)
    site.bring_up(door)
    load = take_over(site, lambda: disk.fail(kind))
    found = local_of(site)
    assert "Input/output error" in found["reason"]
    assert "nbd-mirror resume CONFIG local" in found["hint"]
    assert found["errors"] >= 1
    status = site.status()
    assert status["state"] == "failed"
    assert "local" in status["reason"]
    assert site.log.count("local_failed: ") == 1, "said once, loudly"
    load.stop()
    assert load.errors == []
    read_all(site, load)
    assert assert_local_covered(site)
    missed = local_of(site)["dirty_bytes"]
    assert missed == len(dirty_set(site.map_path("local"))) * site.region_size

    load = site.load(flush_every=5)
    disk.mend()
    back = resync_back(site)
    # What clients write during the copy goes to both, and neither misses it.
    assert 0 < back["copied_bytes"] <= missed
    assert back["repaired_regions"] == 0, "nothing was unreadable"
    assert_whole(site, load)


def test_takeover_copies_only_what_was_missed(site: Site) -> None:
    """What was written while it had failed, and the active extents: nothing else."""
    disk = FuseDisk(site)
    site.fill(site.local, 16 * MIB, offset=16 * MIB)
    site.bring_up()
    handle = site.client()
    disk.fail("write")
    for region in (3, 7, 8):
        handle.pwrite(os.urandom(site.region_size), region * site.region_size)
    wait_local(site, "failed")
    # The first write activated the first extent, of 4 MiB, and no other.
    assert {3, 7, 8} <= dirty_set(site.map_path("local")) <= set(range(64))
    disk.mend()
    back = resync_back(site)
    assert 3 * site.region_size <= back["copied_bytes"] <= 4 * MIB
    support.wait_until(
        lambda: "local: resync_done: " in site.log, "its line in the log"
    )
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_takeover_on_a_full_disk(site: Site) -> None:
    """A remote with room serves while local has ENOSPC; with room, local is back."""
    resize = small_disk(site, 2)
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"a" * MIB, 0)
    handle.pwrite(b"b" * 4 * MIB, 4 * MIB)
    found = wait_local(site, "failed")
    assert "No space left" in found["reason"]
    assert b"a" * MIB == handle.pread(MIB, 0)
    assert b"b" * 4 * MIB == handle.pread(4 * MIB, 4 * MIB)
    resize(64)
    resync_back(site)
    handle.shutdown()
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("request_kind", ["zero", "trim", "write with FUA"])
def test_takeover_by_each_kind_of_request(site: Site, request_kind: str) -> None:
    """The remote serves when a trim, a zero or a FUA flush fails, as for a write."""
    site.fill(site.local, site.size)
    site.bring_up()
    site.stop()
    point = "local_flush:2" if "FUA" in request_kind else "local_write:1"
    site.serve(fault=f"{point}=error")
    site.wait_in_sync()
    handle = site.client()
    if request_kind == "zero":
        handle.zero(MIB, 8 * MIB)
    elif request_kind == "trim":
        handle.trim(MIB, 8 * MIB)
    else:
        handle.pwrite(bytes(MIB), 8 * MIB, 1)
    wait_local(site, "failed")
    assert bytes(MIB) == handle.pread(MIB, 8 * MIB)
    resync_back(site)
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_disk_pulled_out_and_replaced_under_load(site: Site) -> None:
    """The disk is gone; an empty one in its place gets everything, beside the load."""
    disk = FuseDisk(site)
    site.fill(site.local, 24 * MIB)
    site.bring_up()
    load = take_over(site, disk.unplug)
    fresh = site.folder / "fresh.img"
    with fresh.open("wb") as file:
        file.truncate(site.size)
    disk.plug(fresh)
    before = load.count
    back = resync_back(site, "invalidate")
    assert back["copied_bytes"] == site.size
    load.wait_for(before + 20, "writes to both")
    assert_whole(site, load)
    assert fresh == site.local


def test_replaced_disk_at_another_path_is_taken_from_the_configuration(
    site: Site,
) -> None:
    """`local` is read again: another path needs no restart, and is kept."""
    disk = FuseDisk(site)
    site.fill(site.local, 4 * MIB)
    site.bring_up()
    handle = site.client()
    disk.fail("write")
    handle.pwrite(b"x" * MIB, MIB)
    wait_local(site, "failed")
    disk.unplug()
    site.local = site.folder / "other.img"
    with site.local.open("wb") as file:
        file.truncate(site.size)
    site.keys["local"] = str(site.local)
    site.write_config()
    done = site.cli("invalidate", str(site.config), "local")
    assert done.stdout == "local: all dirty\n"
    wait_local(site, "ok")
    assert local_of(site)["path"] == str(site.local)
    handle.pwrite(b"y" * MIB, 2 * MIB)
    handle.shutdown()
    site.stop()
    site.assert_equal()
    site.serve()
    assert local_of(site)["state"] == "ok"


# --- no remote that could make up for it ---


def test_error_without_a_remote_in_sync_reaches_the_client(site: Site) -> None:
    """No remote has it: EIO, the error is counted, the disk stays in use."""
    disk = FuseDisk(site)
    site.fill(site.local, 4 * MIB)
    site.bring_up()
    old = site.dr.image.read_bytes()
    site.dr.kill()
    site.wait_state("out_of_sync")
    handle = site.client()
    handle.pwrite(b"new!" * 1024, 0)
    disk.spoil(0)
    disk.fail("write")
    assert errno.EIO == error_of(handle.pread, 4096, 0)
    assert errno.EIO == error_of(handle.pwrite, b"x" * 4096, MIB)
    found = local_of(site)
    assert found["state"] == "ok"
    assert found["errors"] >= 2
    assert "failed to write at 1048576" in found["last_error"]
    # The remote is back, and dirty there: still no disk has it.
    site.dr.start()
    site.tell("pause")
    site.wait_remote(lambda one: one["connected"], "the remote")
    assert errno.EIO == error_of(handle.pread, 4096, 0)
    disk.mend()
    disk.forget()
    assert b"new!" * 1024 == handle.pread(4096, 0)
    assert old == site.dr.image.read_bytes()
    site.tell("resume")
    site.wait_in_sync()
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_region_that_only_local_has_is_never_served_from_the_remote(
    site: Site,
) -> None:
    """Clean regions go on, one that is dirty on the remote gets EIO: never old data."""
    disk = FuseDisk(site)
    site.fill(site.local, 8 * MIB)
    site.bring_up()
    site.dr.kill()
    site.wait_state("out_of_sync")
    handle = site.client()
    handle.pwrite(b"n" * site.region_size, 0)
    site.tell("pause")
    site.dr.start()
    site.wait_remote(lambda one: one["connected"], "the remote")
    disk.fail("read", "write")
    assert errno.EIO == error_of(handle.pread, 4096, 0)
    assert errno.EIO == error_of(handle.pwrite, b"x" * 4096, 0)
    assert handle.pread(MIB, 4 * MIB) == site.dr.image.read_bytes()[4 * MIB : 5 * MIB]
    disk.mend()
    disk.forget()
    site.tell("resume")
    wait_local(site, "ok")
    site.wait_in_sync()
    assert b"n" * 4096 == handle.pread(4096, site.region_size - 4096)
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_policy_stop_gives_eio_and_a_fence(new_site: Sites) -> None:
    """Every answered write is to be on both disks: one that fails is not answered."""
    site = new_site(policy="stop")
    disk = FuseDisk(site)
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"a" * MIB, 0)
    disk.fail("write")
    assert errno.EIO == error_of(handle.pwrite, b"b" * MIB, MIB)
    assert errno.EIO == error_of(handle.pwrite, b"b" * MIB, 2 * MIB)
    assert b"a" * MIB == handle.pread(MIB, 0)
    disk.mend()
    assert local_of(site)["state"] == "ok"
    site.wait_in_sync()
    handle.pwrite(b"c" * MIB, MIB)
    handle.shutdown()
    site.stop()
    site.assert_equal()
