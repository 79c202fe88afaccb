# SPDX-License-Identifier: BSD-3-Clause
"""
The disk at `local` is not the one that the state belongs to.

In every such case it is refused before a byte of it is served or written; and the right
disk is never refused, in whatever way the server ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.lib.clients import checksum, dirty_set
from e2e.lib.disks import local_of, wait_local
from e2e.lib.harness import MIB, Site, command
from e2e.lib.oracle import PAGE, crc32c

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]

OLD_STATE = Path(__file__).parent / "data" / "version-1-without-features.tar.xz"
NOT_IT = "not the same disk as before"


@pytest.fixture
def served(site: Site) -> Site:
    """Give a volume of data in sync, with a link to its local disk."""
    site.fill(site.local, site.size)
    link = site.folder / "disk"
    link.symlink_to(site.local)
    site.keys["local"] = str(link)
    site.write_config()
    site.bring_up()
    return site


def write(site: Site, *offsets: int) -> None:
    """Write 4 KiB of anything to each of *offsets*, and flush."""
    handle = site.client()
    for offset in offsets:
        handle.pwrite(os.urandom(4096), offset)
    handle.flush()
    handle.shutdown()


def refused(site: Site, *words: str, code: int = 17) -> str:
    """Fail unless `serve` refuses the disk, which it leaves as it is."""
    path = Path(site.keys["local"])
    before = checksum(path) if path.exists() else None
    said = site.refused(code, *words, commands=["serve", str(site.config)])
    assert not site.answers()
    assert before == (checksum(path) if path.exists() else None)
    return said


def back_in_sync(site: Site) -> None:
    """Serve the right disk: nothing is refused, nothing copied without need."""
    site.serve()
    site.wait_in_sync()
    assert "resync_start" not in site.log
    site.stop()
    site.assert_equal()


def patch(site: Site, offset: int, content: bytes) -> None:
    """Change both slots of the superblock, with their CRC."""
    path = site.state / "superblock"
    whole = bytearray(path.read_bytes())
    for at in (0, PAGE):
        page = whole[at : at + PAGE]
        page[offset : offset + len(content)] = content
        page[12:16] = bytes(4)
        page[12:16] = crc32c(bytes(page)).to_bytes(4, "little")
        whole[at : at + PAGE] = page
    path.write_bytes(whole)


# --- another disk ------------------------------------------------------------


def test_link_to_another_disk_is_refused(served: Site, door: str) -> None:
    """Names swapped: exit code 17 by each door, and what helps."""
    site = served
    other = site.folder / "other.img"
    other.write_bytes(os.urandom(site.size))
    site.stop()
    link = Path(site.keys["local"])
    link.unlink()
    link.symlink_to(other)
    before = checksum(other)
    site.serve(door, ready=False)
    assert site.ended() == 17
    assert NOT_IT in site.log
    assert "nothing was written to it" in site.log
    options = f"{'' if door == 'direct' else f' --door {door}'} --foreground"
    assert f"nbd-mirror serve {site.config}{options} --force" in site.log
    words = ["serve", str(site.config), "--door", "python"]
    said = site.refused(17, NOT_IT, commands=words)
    assert f"nbd-mirror serve {site.config} --door python --without-local\n" in said
    said = refused(site, NOT_IT, "samples differ", "inode")
    assert f"nbd-mirror serve {site.config} --force" in said
    assert f"nbd-mirror serve {site.config} --without-local" in said
    assert before == checksum(other)
    link.unlink()
    link.symlink_to(site.local)
    back_in_sync(site)


def test_empty_disk_in_its_place_is_refused(served: Site) -> None:
    """A new file of the right size has none of the content."""
    site = served
    site.stop()
    kept = site.folder / "kept.img"
    site.local.rename(kept)
    with site.local.open("wb") as file:
        file.truncate(site.size)
    refused(site, NOT_IT, "64 of 64 samples")
    kept.replace(site.local)
    back_in_sync(site)


@pytest.mark.parametrize("how", ["in place", "renamed while served"])
def test_older_copy_is_refused(served: Site, how: str) -> None:
    """A backup put back lacks what was written last, and that is looked at."""
    site = served
    old = site.folder / "old.img"
    shutil.copy(site.local, old)
    write(site, 9 * MIB)
    if how == "renamed while served":
        kept = site.local.rename(site.folder / "kept.img")
        old.replace(site.local)
        write(site, 17 * MIB)  # to the disk that is open, whatever its name is
        site.stop()
        refused(site, NOT_IT, "samples differ")
        kept.replace(site.local)
        back_in_sync(site)
    else:
        site.stop()
        shutil.copyfile(old, site.local)
        refused(site, NOT_IT, "an older copy")


def test_disk_used_by_two_volumes_in_turn_is_refused(served: Site) -> None:
    """What another volume has written to it is not this one's content."""
    site = served
    site.stop()
    config, state = site.config.read_text(), site.state
    site.keys |= {"name": "w", "state": str(site.folder / "state2")}
    site.state = site.folder / "state2"
    site.write_config()
    site.create()
    site.serve()
    site.wait_in_sync()
    handle = site.client()
    for offset in range(0, site.size, MIB):
        handle.pwrite(os.urandom(MIB), offset)
    handle.shutdown()
    site.stop()
    site.state = state
    site.config.write_text(config)
    refused(site, NOT_IT)


def test_other_file_behind_a_loop_device_is_refused(site: Site) -> None:
    """The same device name, another file; the same file by another name is right."""
    support.requires_program("losetup")
    support.requires(os.geteuid() == 0, "loop devices need root")
    site.fill(site.local, site.size)
    other = site.folder / "other.img"
    other.write_bytes(os.urandom(site.size))
    devices: list[str] = []

    def losetup(*words: str) -> str:
        done = site.processes.run(["losetup", *words])
        return done.stdout.strip()

    def release() -> None:
        while devices:
            subprocess.run(["losetup", "-d", devices.pop()], check=True)

    def use(image: Path, *words: str) -> None:
        devices.append(losetup("-f", "--show", *words, str(image)))
        site.keys["local"] = devices[-1]
        site.write_config()

    site.processes.on_exit(release)
    use(site.local)
    site.bring_up()
    write(site, 5 * MIB)
    site.stop()
    use(other)
    refused(site, NOT_IT, "it is loop over inode", "and was loop over inode")
    release()
    use(site.local, "-r")
    said = refused(site, "is read-only", code=15)
    assert "blockdev --setrw" in said
    release()
    use(other)  # another device takes the name, unless another program is quicker
    use(site.local)
    site.serve()
    site.wait_in_sync()
    assert "another device" not in site.log
    site.stop()


def test_disk_attached_anew_after_a_kill_has_lost_its_cache(site: Site) -> None:
    """It was pulled out with writes in its cache, and is back: as after lost power."""
    support.requires_program("losetup")
    support.requires(os.geteuid() == 0, "loop devices need root")
    site.fill(site.local, site.size)
    devices: list[str] = []

    def attach() -> None:
        words = ["losetup", "-f", "--show", str(site.local)]
        devices.append(site.processes.run(words).stdout.strip())
        site.keys["local"] = devices[-1]
        site.write_config()

    def detach() -> None:
        while devices:
            subprocess.run(["losetup", "-d", devices.pop()], check=True)

    site.processes.on_exit(detach)
    attach()
    site.bring_up()
    write(site, 5 * MIB)
    with site.local.open("rb") as image:
        image.seek(5 * MIB)
        flushed = image.read(4096)
    handle = site.client()
    handle.pwrite(os.urandom(4096), 5 * MIB)
    handle.shutdown()
    # The remote is flushed after a while, and local is not.
    support.wait_until(lambda: site.remote()["unflushed_bytes"] == 0, "its flush")
    site.kill()
    detach()
    with site.local.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(flushed)
    attach()
    site.serve()
    site.wait_in_sync()
    assert site.copied(1) == [4 * MIB]
    site.stop()
    assert flushed == site.on_both(5 * MIB, 4096)
    site.assert_equal()


def test_resume_of_another_disk_is_refused(site: Site) -> None:
    """A link that leads elsewhere by now is found out before the remote is asked."""
    site.fill(site.local, site.size)
    link, other = site.folder / "disk", site.folder / "other.img"
    link.symlink_to(site.local)
    shutil.copy(site.local, other)
    site.keys["local"] = str(link)
    site.write_config()
    site.bring_up()
    write(site, 9 * MIB)
    site.stop()
    site.serve(fault="local_write:1=error")
    site.wait_in_sync()
    write(site, MIB)
    wait_local(site, "failed")
    link.unlink()
    link.symlink_to(other)
    before = checksum(other)
    words = ["resume", str(site.config), "local"]
    said = site.refused(17, NOT_IT, commands=words)
    assert f"nbd-mirror invalidate {site.config} local" in said
    assert NOT_IT in local_of(site)["reason"]
    assert before == checksum(other)
    link.unlink()
    link.symlink_to(site.local)
    site.cli(*words)
    wait_local(site, "ok")
    site.stop()
    back_in_sync(site)


# --- after a crash -----------------------------------------------------------


def wait_sampled(site: Site) -> None:
    """Wait until the samples that a start takes are in the superblock."""

    def found() -> bool:
        content = (site.state / "superblock").read_bytes()
        return any(
            any(content[at + 2816 : at + 2816 + 1024])
            for at in range(0, 2 * PAGE, PAGE)
        )

    support.wait_until(found, "samples")


def test_killed_in_its_first_session_knows_its_disk(served: Site) -> None:
    """Of a disk never stopped cleanly a start knows what was not written since."""
    site = served
    wait_sampled(site)
    write(site, 9 * MIB)
    site.kill()
    kept = site.folder / "kept.img"
    site.local.rename(kept)
    site.local.write_bytes(os.urandom(site.size))
    refused(site, NOT_IT)
    kept.replace(site.local)
    site.serve()
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


def test_killed_while_busy_everywhere_goes_by_the_device(served: Site) -> None:
    """No sample is left to compare: the same file is used, and a copy of it is not."""
    site = served
    write(site, *range(0, site.size, 4 * MIB))
    site.kill()
    kept = site.folder / "kept.img"
    site.local.rename(kept)
    shutil.copy(kept, site.local)
    refused(site, "none of its content could be compared", "and was inode")
    kept.replace(site.local)
    site.serve()
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


def test_identity_of_another_session_is_not_believed(served: Site) -> None:
    """An older program ran since: it kept the bytes, and not what they stand for."""
    site = served
    site.stop()
    patch(site, 2560, struct.pack("<Q", 1))
    with site.local.open("r+b") as file:
        file.write(bytes(MIB))
    shutil.copy(site.local, site.dr.image)
    back_in_sync(site)


# --- the right disk, changed -------------------------------------------------


def test_copy_is_used_and_said(served: Site) -> None:
    """The same content on another device: a clone, or a restored disk."""
    site = served
    site.stop()
    copy = site.folder / "copy.img"
    shutil.copy(site.local, copy)
    copy.replace(site.local)
    done = site.cli("serve", str(site.config))
    assert "another device than before, with the same content" in done.stderr
    site.wait_in_sync()
    site.cli("stop", str(site.config))
    back_in_sync(site)
    assert "another device" not in site.log


def test_grown_disk_is_served_as_before_and_said(served: Site) -> None:
    """The volume keeps its size; clients see nothing of the rest."""
    site = served
    site.stop()
    with site.local.open("r+b") as file:
        file.truncate(2 * site.size)
    site.serve()
    site.wait_in_sync()
    words = f"had {site.size} bytes and has {2 * site.size}"
    assert words in site.log
    handle = site.client()
    assert handle.get_size() == site.size
    handle.shutdown()
    site.stop()
    site.serve()
    assert words not in site.log
    site.stop()


def test_shrunk_disk_is_refused_with_a_way_out(served: Site) -> None:
    """Its end is lost: said with both sizes; a remote that is in sync serves."""
    site = served
    site.stop()
    with site.local.open("r+b") as file:
        file.truncate(site.size // 2)
    said = refused(site, str(site.size), str(site.size // 2))
    assert f"nbd-mirror serve {site.config} --without-local" in said


def test_missing_disk_is_given_up_and_replaced(served: Site) -> None:
    """The disk is lost: the remote serves, and a new one is copied in full."""
    site = served
    write(site, 3 * MIB)
    site.stop()
    site.local.unlink()
    said = refused(site, "does not exist", code=4)
    assert f"nbd-mirror serve {site.config} --without-local" in said
    done = site.cli("serve", str(site.config), "--without-local")
    assert "the local disk is not used" in done.stderr
    site.wait_state("in_sync")
    assert local_of(site)["state"] == "failed"
    expected = site.dr.image.read_bytes()
    handle = site.client()
    assert bytes(handle.pread(4096, 3 * MIB)) == expected[3 * MIB : 3 * MIB + 4096]
    handle.pwrite(os.urandom(4096), 5 * MIB)
    handle.shutdown()
    # Nor does the next start ask for it.
    site.cli("stop", str(site.config))
    site.serve()
    site.wait_state("in_sync")
    with site.local.open("wb") as file:
        file.truncate(site.size)
    site.cli("invalidate", str(site.config), "local")
    wait_local(site, "ok")
    site.stop()
    back_in_sync(site)


def test_given_up_by_a_start_that_was_killed_misses_everything(served: Site) -> None:
    """
    It also misses answered writes that were not flushed: the next start has no record
    of them.
    """
    site = served
    write(site, 3 * MIB)
    site.kill()
    words = ["serve", str(site.config), "--without-local", "--foreground"]
    done = site.processes.run(
        [*command(), *words],
        env=site.environment() | {"NBDM_FAULT": "superblock_synced=kill"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    site.serve()
    assert local_of(site)["state"] == "failed"
    nr_regions = site.size // site.region_size
    assert len(dirty_set(site.map_path("local"))) == nr_regions
    site.wait_state("in_sync")


def test_disk_is_not_given_up_without_a_remote_in_sync(served: Site) -> None:
    """What no remote has would be lost: refused, and the state stays as it is."""
    site = served
    site.dr.kill()
    write(site, 3 * MIB)
    site.wait_state("out_of_sync")
    site.stop()
    dirty = dirty_set(site.map_path())
    assert dirty
    commands = ["serve", str(site.config), "--without-local"]
    site.refused(9, "no remote was in sync", commands=commands)
    assert dirty == dirty_set(site.map_path())
    site.dr.start()
    site.serve()
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


def test_force_makes_the_disk_the_source(served: Site) -> None:
    """An operator says that this disk is right: all of it is copied, and said."""
    site = served
    site.stop()
    content = os.urandom(site.size)
    site.local.write_bytes(content)
    refused(site, NOT_IT)
    done = site.cli("serve", str(site.config), "--force")
    assert "everything is copied to every remote" in done.stderr
    site.wait_in_sync()
    site.cli("stop", str(site.config))
    assert content == site.dr.image.read_bytes()
    back_in_sync(site)
    # Where nothing is wrong it changes nothing.
    site.cli("serve", str(site.config), "--force")
    site.wait_in_sync()
    assert site.remote()["dirty_bytes"] == 0
    site.cli("stop", str(site.config))


# --- other versions ----------------------------------------------------------


def test_state_of_an_earlier_version_is_taken_over(new_site: Sites) -> None:
    """Its bytes are zero where features stand: it opens, and knows its disk then."""
    site = new_site(size=16 * MIB)
    content = b"".join(bytes([1 + n % 255]) * 4096 for n in range(4096))
    site.local.write_bytes(content)
    site.dr.image.write_bytes(content)
    site.processes.run(["tar", "-C", site.folder, "-xJf", OLD_STATE])
    with site.local.open("r+b") as file:
        for region in (3, 4, 100):
            file.seek(region * site.region_size)
            file.write(b"z" * 4096)
    site.dr.start()
    site.serve()
    site.wait_in_sync()
    assert site.copied(1) == [3 * site.region_size]
    site.stop()
    site.assert_equal()
    site.local.write_bytes(bytes(16 * MIB))
    refused(site, NOT_IT)


def test_state_of_a_newer_version_is_refused(served: Site) -> None:
    """An unknown incompatible feature is, an unknown compatible one is not."""
    site = served
    site.stop()
    patch(site, 432, struct.pack("<Q", 1 << 40 | 1))
    back_in_sync(site)
    assert (site.state / "superblock").read_bytes()[432:440] == struct.pack("<Q", 1)
    before = checksum(site.state / "superblock")
    patch(site, 424, struct.pack("<Q", 1 << 3))
    said = refused(site, "features that this program does not know: 0x8", code=7)
    assert "newer" in said
    patch(site, 424, bytes(8))
    patch(site, 200, struct.pack("<I", 2))
    refused(site, "in the role 2", code=7)
    patch(site, 200, struct.pack("<I", 1))
    assert before == checksum(site.state / "superblock")
    back_in_sync(site)
