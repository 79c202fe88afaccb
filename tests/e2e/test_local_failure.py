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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
from e2e.lib.clients import Load, dirty_set, error_of
from e2e.lib.disks import FuseDisk, local_of, resync_back, small_disk, wait_local
from e2e.lib.harness import MIB, Site

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]


def assert_local_covered(site: Site) -> set[int]:
    """Fail unless every difference lies under local's dirty bits; return those."""
    differing = site.differing()
    missed = differing - dirty_set(site.map_path("local"))
    assert not missed, f"these differ and local does not miss them: {sorted(missed)}"
    return differing


def read_all(site: Site, load: Load) -> None:
    """Fail unless a client reads every answered block."""
    handle = site.client()
    load.check(lambda offset, length: bytes(handle.pread(length, offset)))
    handle.shutdown()


def assert_whole(site: Site, load: Load) -> None:
    """Stop; fail unless both images are equal and hold every answered block."""
    load.stop()
    assert load.errors == []
    site.stop()
    site.assert_equal()
    load.check_file(site.local)
    load.check_file(site.dr.image)


def take_over(site: Site, fail: Callable[[], object], **options: int) -> Load:
    """Have the local disk fail under load; return the load once clients went on."""
    load = site.load(flush_every=5, **options)
    support.wait_until(lambda: load.count > 50, "the load to run")
    fail()
    wait_local(site, "failed")
    before = load.count
    support.wait_until(lambda: load.count > before + 50, "writes without local")
    assert load.errors == []
    return load


@pytest.mark.parametrize(
    ("door", "kind"),
    [
        ("direct", "write"),
        ("direct", "flush"),
        ("native", "flush"),
        ("python", "write"),
    ],
)
def test_takeover_is_not_seen_by_clients(site: Site, door: str, kind: str) -> None:
    """EIO of a write or a flush: the remote serves, and what local misses goes back."""
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
    # What clients write meanwhile goes to both, and neither misses it.
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
    """ENOSPC of local is made up for by a remote that has room; with room, back."""
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
    """Trims, zeroes and FUA's flush are made up for as writes are."""
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
    support.wait_until(lambda: load.count > before + 20, "writes to both")
    assert_whole(site, load)
    assert fresh == site.local


def test_replaced_disk_at_another_path_is_taken_from_the_configuration(
    site: Site,
) -> None:
    """`local` is read anew: another path needs no restart, and holds after one."""
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


# --- a bad sector ---


def test_bad_sector_is_read_from_the_remote_and_rewritten(
    site: Site, door: str
) -> None:
    """One sector: the read is right, the sector is written again, and it is counted."""
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


# --- the remote while local has failed ---


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
    """With local failed a short outage is waited out, as ever."""
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
    """After the hold EIO, never local's old data; back again, all of it is there."""
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
    """What was under way when it died is not dirty on it: no other disk has it."""
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
    before = load.count
    support.wait_until(lambda: load.count > before + 50, "writes to the other")
    assert load.errors == []
    disk.mend()
    resync_back(site)
    first.start()
    site.tell("resume", first.name)
    site.wait_in_sync()
    assert_whole(site, load)
    load.check_file(second.image)


def test_local_fails_again_while_it_is_copied_back(site: Site) -> None:
    """In the middle of copying back: failed again, served on, and at the end whole."""
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


def test_bad_sector_does_not_keep_a_remote_out(site: Site) -> None:
    """A sector that the sample would compare: the remote is needed to mend it."""
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


# --- copying back, and clients beside it ---


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
