# SPDX-License-Identifier: BSD-3-Clause
"""
The local disk hangs, and `local_deadline` is set: clients go on by a remote.

The hang is real: a file system that is frozen keeps a write in the kernel, where no
signal ends it; a file of nbdfuse's keeps reads and flushes too. What the disk was told
before is carried out when it lets go, and no client may see that.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import support
from e2e.lib.clients import Load, dirty_set
from e2e.lib.disks import FrozenDisk, FuseDisk, local_of, resync_back, wait_local
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow

SOON_S = 15.0  # far less than a stop may take


@pytest.fixture
def hanging(new_site: Callable[..., Site]) -> Site:
    """Give a site whose volume has a deadline for its local disk."""
    return new_site(local_deadline="1s")


def wait_for_more(load: Load, writes: int) -> None:
    """Wait until the load has been answered so many writes more."""
    load.wait_for(load.count + writes, "the load to go on")


def wait_released(site: Site) -> None:
    """Wait until the disk keeps nothing any more."""
    support.wait_until(lambda: local_of(site)["silent_s"] == 0, "the disk to let go")


def assert_kept(site: Site) -> None:
    """Fail unless status says what local does, and no disk is attached."""
    found = local_of(site)
    assert "it has not answered for" in found["reason"]
    assert "still keeps a request" in found["reason"]
    words = "a request to the failed disk has not ended yet"
    site.refused(5, words, commands=("resume", str(site.config), "local"))


def assert_whole_again(site: Site) -> None:
    """Copy back; fail unless the images are equal then."""
    resync_back(site)
    site.stop()
    site.assert_equal()


def test_frozen_file_system_is_not_seen_by_clients(hanging: Site, door: str) -> None:
    """All writers go on within the deadline; thawed and attached, all is equal."""
    site = hanging
    disk = FrozenDisk(site)
    site.fill(site.local, 8 * MIB)
    site.bring_up(door)
    load = site.load(threads=4, flush_every=5)
    wait_for_more(load, 50)
    disk.freeze()
    wait_local(site, "failed")
    wait_for_more(load, 200)
    load.stop()
    assert load.errors == []
    assert_kept(site)
    disk.thaw()
    wait_released(site)
    # The late write is done by now, in a region that local misses, and no client reads
    # it.
    assert site.differing() <= dirty_set(site.map_path("local"))
    handle = site.client()
    load.check(lambda offset, length: bytes(handle.pread(length, offset)))
    handle.shutdown()
    assert_whole_again(site)
    load.check_file(site.local)
    load.check_file(site.dr.image)


@pytest.mark.parametrize("kind", ["read", "write", "flush"])
def test_each_kind_of_request_that_hangs_is_answered(hanging: Site, kind: str) -> None:
    """A client's read, write or flush that the disk keeps is answered by the remote."""
    site = hanging
    disk = FuseDisk(site)
    site.fill(site.local, 8 * MIB)
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"a" * 4096, MIB)
    disk.forget()  # or a read asks the page cache alone
    disk.hang()
    begin = time.monotonic()
    if kind == "read":
        assert bytes(handle.pread(4096, MIB)) == b"a" * 4096
    elif kind == "write":
        handle.pwrite(b"b" * 4096, MIB)
    else:
        handle.flush()
    assert time.monotonic() - begin < SOON_S
    wait_local(site, "failed")
    assert_kept(site)
    disk.go_on()
    wait_released(site)
    handle.shutdown()
    assert_whole_again(site)


def test_one_connection_goes_on_beside_a_request_that_hangs(hanging: Site) -> None:
    """Requests of the same client that the disk does not keep are answered at once."""
    site = hanging
    site.keys["local_deadline"] = "10s"
    disk = FuseDisk(site)
    site.fill(site.local, 8 * MIB)
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"a" * 4096, MIB)
    # In the page cache: the disk is not asked for it.
    assert bytes(handle.pread(4096, MIB)) == b"a" * 4096
    disk.hang()
    write = handle.aio_pwrite(b"b" * 4096, 2 * MIB)
    begin = time.monotonic()
    assert bytes(handle.pread(4096, MIB)) == b"a" * 4096
    assert time.monotonic() - begin < 5
    assert local_of(site)["state"] != "failed"
    while not handle.aio_command_completed(write):
        handle.poll(-1)
    assert local_of(site)["state"] == "failed"
    disk.go_on()
    wait_released(site)
    handle.shutdown()
    assert_whole_again(site)


def write_to_a_hung_disk(site: Site, hang: Callable[[], None]) -> None:
    """Bring the site up, have its disk hang, and write what the remote answers."""
    site.fill(site.local, 8 * MIB)
    site.bring_up()
    handle = site.client()
    hang()
    handle.pwrite(b"b" * 4096, MIB)
    handle.shutdown()


def test_stop_with_a_disk_that_hangs_is_clean(hanging: Site) -> None:
    """The kernel lets the process end: exit code 0, and the next start serves."""
    site = hanging
    disk = FuseDisk(site)
    write_to_a_hung_disk(site, disk.hang)
    assert local_of(site)["state"] == "failed"
    begin = time.monotonic()
    site.cli("stop", str(site.config))
    assert time.monotonic() - begin < SOON_S
    assert site.ended() == 0
    assert "stopped cleanly" in site.log
    serve_without(site)
    disk.go_on()
    assert_whole_again(site)


def test_stop_says_that_the_kernel_keeps_a_thread(hanging: Site) -> None:
    """No signal ends a frozen write: the stop is clean, says so, and another serves."""
    site = hanging
    disk = FrozenDisk(site)
    write_to_a_hung_disk(site, disk.freeze)
    begin = time.monotonic()
    said = site.refused(11, "was stopped cleanly", commands=("stop", str(site.config)))
    assert "the kernel keeps a thread of server" in said
    assert time.monotonic() - begin < SOON_S
    old = site.leave_server()
    serve_without(site)
    words = "in use by another program"
    site.refused(5, words, commands=("resume", str(site.config), "local"))
    disk.thaw()
    assert old.wait(SOON_S) == 0
    assert_whole_again(site)


def serve_without(site: Site) -> None:
    """Serve anew; fail unless the remote serves what was written last."""
    site.serve()
    site.wait_in_sync()
    assert local_of(site)["state"] == "failed"
    handle = site.client()
    assert bytes(handle.pread(4096, MIB)) == b"b" * 4096
    handle.shutdown()
