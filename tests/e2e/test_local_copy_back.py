# SPDX-License-Identifier: BSD-3-Clause
"""The local disk that failed is copied back to, and clients write beside it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import support
from e2e.lib.clients import dirty_set
from e2e.lib.disks import (
    FuseDisk,
    assert_whole,
    read_all,
    resync_back,
    take_over,
    wait_local,
)
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow


def missing_one_region(site: Site, fault: str, *, resume: bool = True) -> FuseDisk:
    """Let local miss the first region, "old" in it; then begin to copy it back."""
    disk = FuseDisk(site)
    site.bring_up()
    handle = site.client()
    disk.fail("write")
    handle.pwrite(b"old" + bytes(509), 0)
    handle.shutdown()
    wait_local(site, "failed")
    site.stop()
    disk.mend()
    site.serve(fault=fault)
    site.wait_in_sync()
    if resume:
        site.tell("resume", "local")
    return disk


def test_write_between_read_and_copy_waits(site: Site) -> None:
    """A write to a region that is being copied back waits, and is not overwritten."""
    gate = site.folder / "gate"
    missing_one_region(site, f"local_resync_after_read:1=wait:{gate}")
    support.wait_until(Path(f"{gate}.reached").exists, "the copy to have read")
    handle = site.client()
    write = threading.Thread(target=handle.pwrite, args=(b"new" + bytes(509), 0))
    write.start()
    support.wait_until(
        lambda: site.status()["inflight"] == 1 or not write.is_alive(), "the write"
    )
    assert write.is_alive(), "it did not wait for the copy"
    assert site.dr.image.read_bytes()[:3] == b"old", "nothing is written meanwhile"
    gate.touch()
    write.join(20)
    assert not write.is_alive()
    wait_local(site, "ok")
    assert b"new" == bytes(handle.pread(512, 0))[:3]
    handle.shutdown()
    site.stop()
    assert site.local.read_bytes()[:3] == b"new"
    site.assert_equal()


def test_copy_waits_for_a_write_that_came_first(site: Site) -> None:
    """A copy does not read what a write that is under way is about to replace."""
    write_gate, copy_gate = site.folder / "write", site.folder / "copy"
    missing_one_region(
        site,
        f"after_log:1=wait:{write_gate},local_resync_after_read:1=wait:{copy_gate}",
        resume=False,
    )
    handle = site.client()
    write = threading.Thread(target=handle.pwrite, args=(b"new" + bytes(509), 0))
    write.start()
    support.wait_until(Path(f"{write_gate}.reached").exists, "the write")
    copy_gate.touch()
    site.tell("resume", "local")
    wait_local(site, "resyncing")
    # No state shows that the copy reads nothing: give a wrong one time to read.
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline and not Path(f"{copy_gate}.reached").exists():
        time.sleep(0.02)  # between two looks
    assert not Path(f"{copy_gate}.reached").exists(), "it read beside the write"
    write_gate.touch()
    write.join(20)
    assert not write.is_alive()
    wait_local(site, "ok")
    handle.shutdown()
    site.stop()
    assert site.local.read_bytes()[:3] == b"new"
    site.assert_equal()


def test_write_between_copy_and_its_end_goes_to_both(site: Site) -> None:
    """A write to a region that was copied and is still missed is on local as well."""
    gate = site.folder / "gate"
    missing_one_region(site, f"local_resync_before_clean:1=wait:{gate}")
    support.wait_until(Path(f"{gate}.reached").exists, "the copy")
    handle = site.client()
    handle.pwrite(b"new" + bytes(509), 0)
    assert 0 in dirty_set(site.map_path("local"))
    gate.touch()
    wait_local(site, "ok")
    assert b"new" == bytes(handle.pread(512, 0))[:3]
    handle.shutdown()
    site.stop()
    assert site.local.read_bytes()[:3] == b"new"
    site.assert_equal()


def test_copied_back_is_durable_before_it_is_called_so(site: Site) -> None:
    """A disk that is pulled out the moment it is ok has all that was copied to it."""
    disk = missing_one_region(site, "")
    wait_local(site, "ok")
    disk.unplug()  # with its write cache
    handle = site.client()
    handle.pwrite(b"elsewhere" + bytes(503), 16 * MIB)
    wait_local(site, "failed")
    # The first region is in no active extent: nothing says that it was lost.
    assert 0 not in dirty_set(site.map_path("local"))
    disk.plug()
    resync_back(site)
    handle.shutdown()
    site.stop()
    assert site.local.read_bytes()[:3] == b"old"
    site.assert_equal()


def test_local_fails_again_while_it_is_copied_back(site: Site) -> None:
    """
    It fails in the middle of copying back: the remote serves on, and at the end all is
    whole.
    """
    disk = FuseDisk(site)
    site.fill(site.local, site.size)
    site.bring_up()
    site.stop()
    gate = site.folder / "gate"
    site.serve(fault=f"local_resync_after_read:9=wait:{gate}")
    site.wait_in_sync()
    load = take_over(site, disk.unplug)
    disk.plug()
    site.tell("invalidate", "local")
    support.wait_until(Path(f"{gate}.reached").exists, "the ninth copy")
    disk.fail("write")
    gate.touch()
    wait_local(site, "failed")
    load.stop()
    read_all(site, load)
    disk.mend()
    resync_back(site)
    assert_whole(site, load)
