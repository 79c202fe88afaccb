# SPDX-License-Identifier: BSD-3-Clause
"""
A volume's life: create, serve, pause, stop, serve again, add a remote.

What must not happen is copying that was not needed, and stopping that loses or
forgets something.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable

import pytest
import support
from e2e.lib.clients import checksum, dirty_set
from e2e.lib.harness import MIB, Site, command
from e2e.lib.servers import Secondary

Sites = Callable[..., Site]


@pytest.fixture
def slow_site(new_site: Sites) -> Site:
    """Give a volume served and full of data, whose full copy takes some seconds."""
    site = new_site(size=96 * MIB)
    site.fill(site.local, site.size)
    site.dr.start("--filter=rate", "rate=256M", "burstiness=0.1")
    site.create()
    site.serve()
    return site


def test_create_adopts_image_unchanged(site: Site, door: str) -> None:
    """Neither create nor serve nor a full copy changes a byte of the local image."""
    site.fill(site.local, site.size)
    before = checksum(site.local)
    site.cli("create", str(site.config))
    assert before == checksum(site.local)
    assert stat.S_IMODE(site.state.stat().st_mode) == 0o700
    site.dr.start()
    site.serve(door)
    site.wait_in_sync()
    site.stop()
    assert before == checksum(site.local)
    site.assert_equal()


def test_create_existing_state_needs_force(site: Site) -> None:
    """An existing state is not overwritten without --force."""
    site.create()
    uuid = site.cli("status", str(site.config), "--json").stdout
    said = site.refused(6, "--force", commands=["create", str(site.config)])
    assert "try: nbd-mirror create" in said
    assert uuid == site.cli("status", str(site.config), "--json").stdout
    site.cli("create", str(site.config), "--force")
    assert uuid != site.cli("status", str(site.config), "--json").stdout


def test_create_foreign_files_are_refused(site: Site) -> None:
    """A folder that holds other files is not taken for the state."""
    site.state.mkdir()
    (site.state / "letters.txt").write_text("dear")
    site.refused(6, "letters.txt", commands=["create", str(site.config)])
    assert [path.name for path in site.state.iterdir()] == ["letters.txt"]


def test_create_while_served_is_refused(site: Site) -> None:
    """Not even --force takes the state from under a running server."""
    site.bring_up()
    site.refused(5, "served", commands=["create", str(site.config), "--force"])
    assert site.remote()["state"] == "in_sync"


def test_assume_in_sync_copies_nothing_and_is_said(site: Site) -> None:
    """--assume-in-sync copies nothing, and status calls it assumed until proven."""
    site.fill(site.local, site.size)
    site.dr.image.write_bytes(site.local.read_bytes())
    site.cli("create", str(site.config), "--assume-in-sync", "dr")
    site.dr.start()
    site.serve()
    site.wait_in_sync()
    found = site.remote()
    assert found["assumed"] is True
    assert "assumed" in found["reason"]
    assert "invalidate" in found["hint"]
    assert "resync_start" not in site.log
    assert "assumed" in site.cli("status", str(site.config)).stdout
    site.tell("invalidate")
    site.wait_remote(
        lambda one: one["state"] == "in_sync" and not one["assumed"], "the proof"
    )
    assert site.copied(1) == [site.size]
    site.stop()
    site.assert_equal()


def test_assume_in_sync_wrong_copy_is_caught(site: Site) -> None:
    """An image assumed in sync that is not is caught before anything is written."""
    site.fill(site.local, site.size)
    site.fill(site.dr.image, site.size, seed=9)
    before = checksum(site.dr.image)
    site.create("dr")
    site.dr.start()
    site.serve()
    site.wait_state("failed")
    assert before == checksum(site.dr.image)


def test_assume_in_sync_unknown_remote_is_refused(site: Site) -> None:
    """A remote that does not exist cannot be assumed, and nothing is made."""
    commands = ["create", str(site.config), "--assume-in-sync", "nowhere"]
    site.refused(3, "nowhere", "dr", commands=commands)
    assert not (site.state / "superblock").exists()


def test_pause_holds_resync_across_restart(site: Site, door: str) -> None:
    """A paused resync copies nothing, also after a restart, until it is resumed."""
    site.fill(site.local, site.size)
    site.create()
    site.serve(door)
    site.cli("pause", str(site.config), "dr")
    site.dr.start()
    site.tell("pause")
    paused = site.wait_remote(
        lambda one: one["state"] == "paused" and one["connected"], "paused, connected"
    )
    assert "paused by an operator" in paused["reason"]
    assert "resume" in paused["hint"]
    assert paused["dirty_bytes"] == site.size
    site.stop()
    site.serve(door)
    paused = site.wait_remote(
        lambda one: one["state"] == "paused" and one["connected"], "paused, connected"
    )
    assert paused["dirty_bytes"] == site.size
    handle = site.client()
    handle.pwrite(b"p" * 4096, 0)
    handle.shutdown()
    assert site.dr.image.read_bytes() == bytes(site.size)
    site.cli("resume", str(site.config))
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


def test_pause_in_the_middle_keeps_progress(slow_site: Site) -> None:
    """Pausing while it copies keeps what was copied; resume does the rest."""
    site = slow_site
    site.wait_remote(lambda one: 0 < one["dirty_bytes"] < site.size, "a first batch")
    site.tell("pause")
    paused = site.wait_state("paused")
    assert 0 < paused["dirty_bytes"] < site.size
    site.tell("resume")
    site.wait_in_sync(60)
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_resync_interrupted_goes_on_where_it_was(slow_site: Site, how: str) -> None:
    """A restart in the middle of a resync copies the rest, and not all again."""
    site = slow_site
    site.wait_remote(
        lambda one: 0 < one["dirty_bytes"] < site.size * 3 // 4, "some batches"
    )
    getattr(site, how)()
    left = len(dirty_set(site.map_path())) * site.region_size
    assert 0 < left < site.size * 3 // 4
    site.serve()
    site.wait_in_sync(60)
    assert site.copied(1) == [left]
    site.stop()
    site.assert_equal()


def test_resync_progress_is_honest(slow_site: Site) -> None:
    """While resyncing, status shows done, total, rate and what is left."""
    site = slow_site
    found = site.wait_remote(
        lambda one: one["resync"] and one["resync"]["done_bytes"] > 0, "progress"
    )
    resync = found["resync"]
    assert resync["total_bytes"] == site.size
    assert resync["done_bytes"] + found["dirty_bytes"] == site.size
    later = site.wait_remote(
        lambda one: one["resync"] and one["resync"]["eta_s"] is not None, "a time left"
    )
    assert later["resync"]["bytes_per_s"] > 0
    assert "left to copy" in later["reason"]
    site.wait_in_sync(60)
    # The state is the engine's, and before the keeper's notice of it.
    site.wait_remote(lambda one: one["resync"] is None, "the progress to end")


def test_resync_slow_link_gets_there(new_site: Sites) -> None:
    """On a link that carries little in a deadline, resync still gets to its end."""
    site = new_site(size=16 * MIB)
    site.deadline = "1s"
    site.write_config()
    site.fill(site.local, 10 * MIB)
    # 3 MiB/s: what may be in flight at most would take five deadlines.
    site.dr.start("--filter=rate", "rate=24M", "burstiness=0.1")
    site.create()
    site.serve()
    site.wait_in_sync(30)
    assert "resync_interrupted" not in site.log
    site.stop()
    site.assert_equal()


def test_resync_holes_stay_cheap(new_site: Sites) -> None:
    """A full copy of a sparse image leaves the secondary sparse."""
    site = new_site(size=256 * MIB)
    site.fill(site.local, MIB, offset=200 * MIB)
    site.bring_up()
    site.stop()
    site.assert_equal()
    assert site.dr.image.stat().st_blocks * 512 < 8 * MIB


def test_invalidate_copies_all_again(site: Site, door: str) -> None:
    """After invalidate everything is dirty, and copied again."""
    site.fill(site.local, site.size)
    site.bring_up(door)
    site.cli("invalidate", str(site.config), "dr")
    site.copied(2)
    site.wait_in_sync()
    assert site.copied(2) == [site.size, site.size]
    site.stop()
    site.assert_equal()


def test_stop_in_sync_next_start_copies_nothing(site: Site, door: str) -> None:
    """A clean stop leaves nothing to do for the next start."""
    site.bring_up(door)
    handle = site.client()
    handle.pwrite(os.urandom(MIB), MIB)
    handle.shutdown()
    done = site.cli("stop", str(site.config))
    assert "stopped cleanly" in done.stdout
    assert site.ended() == 0
    site.assert_equal()
    site.serve(door)
    site.wait_in_sync()
    assert "resync_start" not in site.log
    site.stop()


@pytest.mark.parametrize("idle_client", [False, True])
def test_sigterm_is_a_clean_stop(site: Site, door: str, *, idle_client: bool) -> None:
    """SIGTERM stops cleanly too, whether or not a client stays connected."""
    site.bring_up(door)
    handle = site.client()
    handle.pwrite(os.urandom(MIB), MIB)
    if not idle_client:
        handle.shutdown()
    os.kill(site.pid, signal.SIGTERM)
    assert site.ended() == 0
    site.assert_equal()
    site.serve(door)
    site.wait_in_sync()
    assert "resync_start" not in site.log


def test_stop_with_idle_client_ends(site: Site, door: str) -> None:
    """A client that stays connected and does nothing does not keep the server."""
    site.bring_up(door)
    handle = site.client()
    handle.pwrite(os.urandom(MIB), MIB)
    site.cli("stop", str(site.config), timeout_s=20)
    assert site.ended() == 0
    site.assert_equal()


def test_stop_under_load_ends_the_clients(site: Site, door: str) -> None:
    """
    Clients that write while it stops lose their connection; both images are equal.

    With nbdkit, which alone decides when it disconnects, they get ESHUTDOWN before.
    """
    site.bring_up(door)
    load = site.load(threads=4)
    load.wait_for(100)
    site.stop()
    load.join()
    assert len(load.errors) == 4
    found = {error.errnum for error in load.errors}
    # A client whose connection ends before its next request sees that instead.
    assert (errno.ESHUTDOWN in found) == (door != "direct")
    site.assert_equal()
    load.check_file(site.local)


def test_stop_out_of_sync_keeps_what_is_missed(site: Site) -> None:
    """A stop while the remote is away keeps its map; the next start catches up."""
    site.bring_up()
    site.dr.kill()
    site.wait_state("out_of_sync")
    handle = site.client()
    handle.pwrite(os.urandom(4096), 5 * site.region_size)
    handle.shutdown()
    site.stop()
    assert dirty_set(site.map_path()) == {5}
    site.dr.start()
    site.serve()
    site.wait_in_sync()
    assert site.copied(1) == [site.region_size]
    site.stop()
    site.assert_equal()


def test_doors_take_turns_on_one_volume(site: Site) -> None:
    """What one door wrote, the other serves on: the state is the same."""
    site.bring_up("direct")
    for turn, door in enumerate(("python", "direct", "python", "direct")):
        handle = site.client()
        handle.pwrite(bytes([turn]) * 4096, 0)
        handle.shutdown()
        site.stop()
        site.serve(door)
        site.wait_in_sync()
        assert site.status()["door"] == door
        assert "resync_start" not in site.log
        handle = site.client()
        assert handle.pread(4096, 0) == bytes([turn]) * 4096
        handle.shutdown()
    site.stop()
    site.assert_equal()


def test_remote_added_later_is_copied_fully(
    new_site: Sites, processes: support.Processes
) -> None:
    """A remote added to the configuration is copied fully; the first is left alone."""
    site = new_site()
    site.fill(site.local, site.size)
    site.bring_up()
    site.stop()
    added = Secondary(processes, site.folder, "added", "nbdkit")
    with added.image.open("wb") as file:
        file.truncate(site.size)
    added.start()
    site.secondaries.append(added)
    site.write_config()
    site.serve()
    site.wait_in_sync()
    assert site.copied(1) == [site.size]
    assert "remote added: resync_done" in site.log
    site.stop()
    site.assert_equal()


def test_serve_in_background_stays_after_the_command(site: Site, door: str) -> None:
    """`serve` returns once the volume is served, and the server stays."""
    site.dr.start()
    site.create()
    done = site.cli("serve", str(site.config), "--door", door)
    assert site.uri in done.stdout
    pid = site.status()["pid"]
    assert str(pid) in done.stdout
    site.wait_in_sync()
    handle = site.client()
    handle.pwrite(b"s" * 512, 0)
    handle.shutdown()
    assert site.status()["pid"] == pid
    assert site.status()["door"] == door
    done = site.cli("stop", str(site.config))
    assert "stopped cleanly" in done.stdout
    assert not support.is_running(pid)
    assert not site.socket.exists()
    site.assert_equal()


def test_start_in_another_mount_namespace_says_why_it_copies(site: Site) -> None:
    """After a crash the start trusts no page cache there, and the log says so."""
    support.requires_program("unshare")
    site.bring_up()
    handle = site.client()
    handle.pwrite(b"x" * 512, 0)
    handle.shutdown()
    site.kill()
    serve = ["unshare", "--mount", *command(), "serve", str(site.config)]
    done = site.processes.run(serve, env=site.environment())
    words = "or in another mount namespace: all active extents are copied to the"
    assert words in done.stderr
    site.wait_in_sync()
    site.cli("stop", str(site.config))
