# SPDX-License-Identifier: BSD-3-Clause
"""
The server is killed, or the power is lost, while the local disk has failed.

Only a remote has the writes that were answered then, so it must stay the source: after
a kill at any step of the takeover or of copying back, after lost power, and when an
operator confuses two disks.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest
from e2e.lib.clients import dirty_set
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
from e2e.test_crash import move_to_another_boot

pytestmark = pytest.mark.slow


def lose_power(site: Site) -> None:
    """Let the next start find another boot, after a server that was killed."""
    for slot in (0, 4096):
        move_to_another_boot(site.state / "superblock", slot)


@pytest.mark.parametrize(
    ("door", "kind"),
    [("direct", "kill"), ("direct", "power"), ("python", "kill"), ("python", "power")],
)
def test_killed_while_local_has_failed_loses_nothing(
    site: Site, door: str, kind: str
) -> None:
    """Served again without the disk, which is gone: all that was answered is read."""
    disk = FuseDisk(site)
    site.fill(site.local, 8 * MIB)
    site.bring_up(door)
    load = take_over(site, disk.unplug)
    missed = dirty_set(site.map_path("local"))
    site.kill()
    load.join()
    if kind == "power":
        lose_power(site)

    site.serve(door)
    found = local_of(site)
    assert found["state"] == "failed"
    assert missed <= dirty_set(site.map_path("local"))
    assert "the local disk is not used" in site.log
    site.wait_in_sync()
    read_all(site, load)
    load.check_file(site.dr.image)
    handle = site.client()
    assert handle.get_size() == site.size
    handle.pwrite(b"later" + bytes(507), 31 * MIB)
    assert b"later" == bytes(handle.pread(512, 31 * MIB))[:5]
    handle.shutdown()
    disk.plug()
    resync_back(site)
    site.wait_in_sync()
    site.stop()
    site.assert_equal()
    load.check_file(site.local)
    assert site.local.read_bytes()[31 * MIB :][:5] == b"later"


@pytest.mark.parametrize(
    ("point", "kind"),
    [
        ("takeover_marked", "kill"),
        ("takeover_marked", "power"),
        ("takeover_done", "kill"),
        ("local_resync_after_read:3", "kill"),
        ("local_resync_before_clean", "kill"),
        ("local_resync_before_clean", "power"),
    ],
)
def test_killed_at_a_step_keeps_every_answered_write(
    site: Site, point: str, kind: str
) -> None:
    """Killed at each step of the takeover and the copy back, it is whole again."""
    disk = FuseDisk(site)
    site.fill(site.local, 8 * MIB)
    site.bring_up()
    site.stop()
    site.serve(fault=f"{point}=kill")
    site.wait_in_sync()
    load = site.load(flush_every=5)
    load.wait_for(50)
    disk.fail("write")
    if "resync" in point:
        wait_local(site, "failed")
        disk.mend()
        # It may be killed before it answers.
        site.processes.run(
            [*site.command(), "resume", str(site.config), "local"],
            env=site.environment(),
            check=False,
        )
    assert site.ended() == -9
    load.join()
    if kind == "power":
        lose_power(site)
    disk.mend()

    site.serve()
    site.wait_in_sync()
    read_all(site, load)
    if local_of(site)["state"] == "failed":
        site.tell("resume", "local")
    wait_local(site, "ok")
    site.wait_in_sync()
    site.stop()
    site.assert_equal()
    load.check_file(site.local)
    load.check_file(site.dr.image)


def test_stopped_while_local_has_failed_starts_without_it(
    site: Site, door: str
) -> None:
    """With `size = "adopt"` and no disk there: served from the remote, as it was."""
    disk = FuseDisk(site)
    site.fill(site.local, 4 * MIB)
    site.bring_up(door)
    load = take_over(site, disk.unplug)
    load.stop()
    site.stop()
    said = site.cli("status", str(site.config)).stdout
    assert "failed" in said
    assert "nbd-mirror resume" in said
    assert local_of_stopped(site)["dirty_bytes"] > 0

    # Nothing may make the disk that is behind the source again.
    for force in ([], ["--force"]):
        words = ["create", str(site.config), *force]
        site.refused(6, "misses writes that were answered", commands=words)

    done = site.cli("serve", str(site.config), "--door", door)
    assert "warning: volume v: the local disk is not used: " in done.stderr
    status = site.status()
    assert status["size"] == site.size
    assert status["door"] == door
    assert status["local"]["state"] == "failed"
    handle = site.client()
    assert handle.get_size() == site.size
    extents: list[list[int]] = []
    handle.block_status(site.size, 0, lambda _c, _o, found, _e: extents.append(found))
    assert sum(extents[0][::2]) == site.size
    assert set(extents[0][1::2]) == {0}, "holes of a disk that is behind"
    handle.trim(MIB, 0)
    assert bytes(MIB) == handle.pread(MIB, 0)
    handle.shutdown()
    disk.plug()
    resync_back(site)
    done = site.cli("stop", str(site.config))
    assert "stopped cleanly" in done.stdout
    site.assert_equal()


def local_of_stopped(site: Site) -> dict[str, Any]:
    """Return the local disk's status without a server, as --json prints it."""
    answer = json.loads(site.cli("status", str(site.config), "--json").stdout)
    found: dict[str, Any] = answer["local"]
    return found


def test_disk_missing_that_had_not_failed_is_refused(site: Site) -> None:
    """A path that is wrong is no failure: nothing says that local misses anything."""
    site.bring_up()
    site.stop()
    site.local.rename(site.folder / "elsewhere.img")
    words = ["serve", str(site.config)]
    site.refused(4, "does not exist", "read as zeroes", commands=words)


def test_remote_lost_and_server_killed_waits_for_the_remote(site: Site) -> None:
    """Neither disk alone has all: EIO until the remote is back, then all of it."""
    disk = FuseDisk(site)
    site.bring_up()
    load = take_over(site, disk.unplug)
    site.kill()
    load.join()
    site.dr.kill()
    site.serve()
    site.wait_state("out_of_sync")
    assert "EIO" in local_of(site)["reason"]
    disk.plug()
    site.dr.start()
    site.tell("resume")
    site.wait_in_sync()
    resync_back(site)
    read_all(site, load)
    load.errors.clear()  # that the server was killed
    assert_whole(site, load)


# --- an operator's commands ---


@pytest.fixture
def failed(site: Site) -> FuseDisk:
    """Give the disk of a volume whose local disk has failed, and misses 4 regions."""
    disk = FuseDisk(site)
    site.fill(site.local, site.size)
    site.bring_up()
    handle = site.client()
    disk.fail("write")
    for region in (0, 3, 7, 8):
        handle.pwrite(os.urandom(site.region_size), region * site.region_size)
    handle.shutdown()
    wait_local(site, "failed")
    disk.mend()
    return disk


def test_resume_of_another_disk_is_refused_by_the_sample(
    site: Site, failed: FuseDisk
) -> None:
    """Another disk is refused with a reason and not written to; the right one works."""
    failed.unplug()
    right, wrong = site.local, site.folder / "wrong.img"
    content = os.urandom(site.size)
    wrong.write_bytes(content)
    failed.plug(wrong)
    words = ["resume", str(site.config), "local"]
    said = site.refused(17, "not the same disk as before", commands=words)
    assert f"nbd-mirror invalidate {site.config} local" in said
    found = local_of(site)
    assert found["state"] == "failed"
    assert "not the same disk as before" in found["reason"]
    assert content == wrong.read_bytes()
    failed.unplug()
    failed.plug(right)
    done = site.cli(*words)
    assert done.stdout == "local: resumed\n"
    wait_local(site, "ok")
    site.stop()
    site.assert_equal()


def test_resume_of_an_old_copy_is_refused(site: Site, failed: FuseDisk) -> None:
    """A backup differs where clients wrote last, and that is compared."""
    resync_back(site)
    old = site.folder / "old.img"
    shutil.copy(site.local, old)
    handle = site.client()
    handle.pwrite(os.urandom(4096), 20 * MIB)
    handle.shutdown()
    # What was written just before it failed is copied again in any case.
    site.stop()
    site.serve()
    site.wait_in_sync()
    handle = site.client()
    failed.fail("write")
    handle.pwrite(os.urandom(512), 0)
    wait_local(site, "failed")
    handle.shutdown()
    failed.mend()
    failed.unplug()
    failed.plug(old)
    words = ["resume", str(site.config), "local"]
    site.refused(17, "not the same disk as before", commands=words)


def test_resume_of_a_disk_that_is_not_there_yet_is_refused(
    site: Site, failed: FuseDisk
) -> None:
    """Each cause has its exit code, and changes nothing; then it works."""
    words = ["resume", str(site.config), "local"]
    failed.unplug()
    site.refused(4, str(failed.path), "does not exist", commands=words)
    site.keys["local"] = str(site.folder / "small.img")
    site.write_config()
    (site.folder / "small.img").write_bytes(bytes(MIB))
    done = site.cli(*words, check=False)
    assert done.returncode != 0
    assert str(MIB) in done.stderr
    site.keys["local"] = str(failed.path)
    site.write_config()
    failed.plug()
    failed.fail("read")
    site.refused(13, "cannot read", commands=words)
    assert local_of(site)["state"] == "failed"
    failed.mend()
    failed.forget()
    resync_back(site)


def test_commands_for_a_disk_that_has_not_failed_are_refused(site: Site) -> None:
    """One clear line, and an exit code of its own; nothing is copied."""
    site.bring_up()
    for command in ("resume", "invalidate"):
        words = [command, str(site.config), "local"]
        said = site.refused(5, "the local disk has not failed", commands=words)
        assert len(said.splitlines()) == 1
    assert local_of(site)["copied_bytes"] == 0


def test_invalidate_of_the_only_source_is_refused(site: Site, failed: FuseDisk) -> None:
    """While local misses anything the remote is not overwritten by it."""
    assert local_of(site)["dirty_bytes"] > 0
    words = ["invalidate", str(site.config), "dr"]
    site.refused(5, "local", commands=words)
    assert failed.bad == ""


def test_status_wait_watch_and_inspect_tell_of_it(site: Site, failed: FuseDisk) -> None:
    """Each command shows the state, the reason, the bytes and what helps."""
    config = str(site.config)
    said = site.cli("status", config).stdout
    assert "Input/output error" in said
    assert f"nbd-mirror resume {config} local" in said
    assert f"nbd-mirror invalidate {config} local" in said
    wait = ["wait", config, "--for", "in_sync", "--timeout"]
    said = site.refused(11, "local is failed", commands=[*wait, "300ms"])
    assert f"try: nbd-mirror resume {config} local" in said
    assert site.cli(*wait, "20s", "--remote", "dr").stdout == "dr: in_sync\n"
    said = site.cli("inspect", config).stdout
    dirty = len(dirty_set(site.map_path("local")))
    assert f"local: {dirty} dirty regions of " in said
    assert "dr: 0 dirty regions of " in said
    site.tell("resume", "local")
    assert site.cli(*wait, "20s").stdout == "dr: in_sync\n"
    assert local_of(site)["state"] == "ok"
    assert failed.bad == ""
