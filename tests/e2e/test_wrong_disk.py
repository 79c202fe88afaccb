# SPDX-License-Identifier: BSD-3-Clause
"""
The disk behind the remote's address is not the same as before.

A plain NBD server has no identity: an old backup put back answers just as well. It
must be seen before the first byte is written to it, and then nothing but an
operator's word may change it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from e2e.lib.clients import checksum
from e2e.lib.harness import MIB, Site

Sites = Callable[..., Site]


def swap(site: Site, other: str) -> None:
    """Put another image in the secondary's place: random, empty or an old backup."""
    image = site.dr.image
    image.rename(image.with_suffix(".right"))
    if other == "backup":
        image.with_suffix(".backup").rename(image)
        return
    with image.open("wb") as file:
        file.truncate(site.size)
    if other == "random":
        site.fill(image, site.size, seed=77)


@pytest.fixture(params=["random", "empty", "backup"])
def swapped(request: pytest.FixtureRequest, site: Site) -> Site:
    """Give a served volume whose secondary came back with another image."""
    site.fill(site.local, site.size)
    site.bring_up()
    site.dr.image.with_suffix(".backup").write_bytes(site.dr.image.read_bytes())
    handle = site.client()
    # Written after the backup was taken: six blocks scattered over two extents, and
    # neither the first nor the last region shows it.
    for offset in range(8 * MIB, 14 * MIB, MIB):
        handle.pwrite(os.urandom(4096), offset)
    handle.flush()
    handle.shutdown()
    site.dr.kill()
    swap(site, request.param)
    site.wait_state("out_of_sync")
    return site


def test_other_disk_is_failed_and_not_written(swapped: Site) -> None:
    """Another image, or an old backup, is failed with reason and hint, untouched."""
    site = swapped
    before = checksum(site.dr.image)
    handle = site.client()
    handle.pwrite(bytes(512), MIB)
    site.dr.start()
    failed = site.wait_state("failed")
    assert "not the same disk as before" in failed["reason"]
    assert "nothing was written to it" in failed["reason"]
    assert "invalidate" in failed["hint"]
    assert "resume" in failed["hint"]
    assert not failed["connected"]
    assert site.status()["state"] == "failed"
    # Writes go on, and none reaches it, also not after a restart.
    handle.pwrite(b"x" * MIB, 4 * MIB)
    handle.shutdown()
    site.stop()
    site.serve()
    site.wait_state("failed")
    handle = site.client()
    handle.pwrite(b"y" * MIB, 4 * MIB)
    handle.shutdown()
    site.stop()
    assert before == checksum(site.dr.image)


def test_other_disk_invalidate_copies_all(swapped: Site) -> None:
    """`invalidate` takes the other image as it is, and copies everything to it."""
    site = swapped
    site.dr.start()
    site.wait_state("failed")
    site.cli("invalidate", str(site.config), "dr")
    site.wait_in_sync()
    assert site.copied(2) == [site.size, site.size]
    site.stop()
    site.assert_equal()


def test_other_disk_right_one_back_resumes(swapped: Site) -> None:
    """With the right image put back, `resume` brings it in sync by its map."""
    site = swapped
    handle = site.client()
    handle.pwrite(b"z" * 512, 3 * MIB)
    handle.shutdown()
    site.dr.start()
    site.wait_state("failed")
    site.dr.kill()
    site.dr.image.with_suffix(".right").replace(site.dr.image)
    site.dr.start()
    site.cli("resume", str(site.config), "dr")
    site.wait_in_sync()
    assert site.copied(2) == [site.size, site.region_size]
    site.stop()
    site.assert_equal()


def test_wrong_uri_corrected_resumes(site: Site) -> None:
    """A wrong uri in the configuration is corrected and resumed without a restart."""
    site.bring_up()
    site.stop()
    right = site.dr.uri
    site.dr.uri = right.replace("dr.sock", "nowhere.sock")
    site.write_config()
    site.serve()
    site.wait_state("out_of_sync")
    site.dr.uri = right
    site.write_config()
    site.cli("resume", str(site.config), "dr")
    site.wait_in_sync()
    assert site.remote()["uri"] == right
    site.stop()


def test_other_disk_while_stopped_is_caught_at_start(site: Site) -> None:
    """An image swapped while nothing ran is caught at the next start."""
    site.fill(site.local, site.size)
    site.bring_up()
    site.stop()
    site.dr.kill()
    swap(site, "random")
    before = checksum(site.dr.image)
    site.dr.start()
    site.serve()
    site.wait_state("failed")
    handle = site.client()
    handle.pwrite(b"x" * 4096, 0)
    handle.shutdown()
    site.stop()
    assert before == checksum(site.dr.image)
