# SPDX-License-Identifier: BSD-3-Clause
"""A bad sector of the local disk: a remote in sync has its content, and mends it."""

from __future__ import annotations

import pytest
import support
from e2e.lib.disks import FuseDisk, assert_whole, local_of, resync_back, wait_local
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow


def test_bad_sector_is_read_from_the_remote_and_rewritten(
    site: Site, door: str
) -> None:
    """The read is right, the sector is written again, and it is counted."""
    disk = FuseDisk(site)
    site.fill(site.local, site.size)
    site.bring_up(door)
    before = site.dr.image.read_bytes()
    disk.spoil(10 * MIB + 512)
    handle = site.client()
    content = bytes(handle.pread(MIB, 10 * MIB))
    assert content == before[10 * MIB : 11 * MIB]
    found = wait_local(site, "ok")
    support.wait_until(lambda: local_of(site)["repaired_regions"], "the count")
    found = local_of(site)
    # The read may be served in one: the engine says which regions it gave up.
    assert 1 <= found["repaired_regions"] <= MIB // site.region_size
    assert found["errors"] >= 1
    assert disk.bad == "", "it was not written again"
    support.wait_until(lambda: "bad sectors: " in site.log, "its line in the log")
    assert "local_failed" not in site.log
    disk.forget()
    assert content == bytes(handle.pread(MIB, 10 * MIB))
    assert local_of(site)["errors"] == found["errors"], "it reads again"
    handle.shutdown()
    site.stop()
    site.assert_equal()
    assert before == site.dr.image.read_bytes()


def test_bad_sector_that_cannot_be_rewritten_fails_the_disk(site: Site) -> None:
    """A disk without spare sectors: failed, and the data is served all the same."""
    disk = FuseDisk(site)
    site.fill(site.local, site.size)
    site.bring_up()
    disk.spoil(10 * MIB)
    disk.fail("write")
    handle = site.client()
    content = bytes(handle.pread(MIB, 10 * MIB))
    assert content == site.dr.image.read_bytes()[10 * MIB : 11 * MIB]
    wait_local(site, "failed")
    assert content == bytes(handle.pread(MIB, 10 * MIB))
    disk.mend()
    resync_back(site)
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_bad_sector_while_clients_write_keeps_what_they_wrote(site: Site) -> None:
    """A repair and clients' writes to its region: the last answered write wins."""
    disk = FuseDisk(site)
    site.fill(site.local, site.size)
    site.bring_up()
    load = site.load(threads=4)
    handle = site.client()
    for at in range(0, site.size, MIB):
        disk.spoil(at + 4096)
        handle.pread(site.region_size, at)
    support.wait_until(
        lambda: local_of(site)["repaired_regions"] >= 1, "a repaired region"
    )
    wait_local(site, "ok")
    handle.shutdown()
    assert_whole(site, load)


def test_bad_sector_does_not_keep_a_remote_out(site: Site) -> None:
    """The sample would compare this sector: the remote is needed to repair it."""
    disk = FuseDisk(site)
    site.fill(site.local, site.size)
    site.bring_up()
    site.stop()
    before = site.dr.image.read_bytes()
    disk.spoil(0)
    disk.spoil(site.size - 512)
    site.serve()
    site.wait_in_sync()
    handle = site.client()
    assert before[:4096] == handle.pread(4096, 0)
    assert before[-4096:] == handle.pread(4096, site.size - 4096)
    wait_local(site, "ok")
    assert disk.bad == ""
    handle.shutdown()
    site.stop()
    site.assert_equal()
