# SPDX-License-Identifier: BSD-3-Clause
"""The remotes while local has failed: they alone have what was written since."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest
import support
from e2e.lib.clients import error_of
from e2e.lib.disks import (
    FuseDisk,
    assert_whole,
    local_of,
    read_all,
    resync_back,
    take_over,
    wait_local,
)
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]


def failed_with_data(site: Site) -> tuple[FuseDisk, Any]:
    """Bring up a volume whose local disk then fails; regions 0 to 15 hold "new"."""
    disk = FuseDisk(site)
    site.fill(site.local, 8 * MIB)
    site.bring_up()
    handle = site.client()
    disk.fail("write")
    handle.pwrite(b"new!" * (MIB // 4), 0)
    handle.flush()
    wait_local(site, "failed")
    disk.mend()  # from now on it would give old data, if it was asked
    disk.forget()
    return disk, handle


def test_remote_back_within_the_hold_costs_no_error(new_site: Sites) -> None:
    """With local failed, requests wait for the end of a short outage, as otherwise."""
    site = new_site(hold="20s")
    _, handle = failed_with_data(site)
    results: list[bytes] = []
    site.dr.kill()
    reader = threading.Thread(
        target=lambda: results.append(bytes(handle.pread(MIB, 0)))
    )
    reader.start()
    support.wait_until(
        lambda: site.remote()["state"] == "holding", "the loss to be noticed"
    )
    site.dr.start()
    reader.join(30)
    assert results == [b"new!" * (MIB // 4)]
    site.wait_in_sync()
    resync_back(site)
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_remote_lost_for_longer_gives_eio_and_loses_nothing(site: Site) -> None:
    """
    After the hold clients get EIO, never local's old data; then the remote has all of
    it.
    """
    _, handle = failed_with_data(site)
    site.dr.kill()
    assert errno.EIO == error_of(handle.pread, 4096, 0)
    assert errno.EIO == error_of(handle.pwrite, b"x" * 4096, 0)
    assert errno.EIO == error_of(handle.flush)
    assert "EIO" in local_of(site)["reason"]
    # Nothing to compare it with: not admitted unproven.
    words = ["resume", str(site.config), "local"]
    site.refused(9, "no remote is connected", commands=words)
    site.dr.start()
    site.tell("resume")
    support.wait_until(lambda: site.remote()["connected"], "the remote")
    assert b"new!" * 1024 == handle.pread(4096, MIB - 4096)
    handle.pwrite(b"more" * 1024, 2 * MIB)
    resync_back(site)
    site.wait_in_sync()
    handle.shutdown()
    site.stop()
    site.assert_equal()
    assert site.local.read_bytes()[2 * MIB :][:4] == b"more"


def test_remote_killed_under_load_stays_the_source(site: Site) -> None:
    """Writes under way when it died are not dirty on it: no other disk has them."""
    disk = FuseDisk(site)
    site.bring_up()
    load = take_over(site, lambda: disk.fail("write"), threads=4)
    site.dr.kill()
    load.join()  # each by an EIO of its own, after the hold
    assert len(load.errors) == 4
    assert site.remote()["dirty_bytes"] == 0
    disk.mend()
    disk.forget()
    site.dr.start()
    site.tell("resume")
    site.wait_in_sync()
    read_all(site, load)
    resync_back(site)
    read_all(site, load)
    site.stop()
    site.assert_equal()
    load.check_file(site.local)


def test_two_remotes_one_lost_the_other_serves(new_site: Sites) -> None:
    """One of two remotes is enough to serve, and to copy back from."""
    site = new_site(remotes=("nbdkit", "nbdkit"))
    disk = FuseDisk(site)
    site.fill(site.local, 8 * MIB)
    site.bring_up()
    load = take_over(site, lambda: disk.fail("write"))
    first, second = site.secondaries
    first.kill()
    site.wait_state("out_of_sync", name=first.name)
    load.wait_for(load.count + 50, "writes to the other")
    assert load.errors == []
    disk.mend()
    resync_back(site)
    first.start()
    site.tell("resume", first.name)
    site.wait_in_sync()
    assert_whole(site, load)
    load.check_file(second.image)
