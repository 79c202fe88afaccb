# SPDX-License-Identifier: BSD-3-Clause
"""
Disks that flush more slowly than their link brings data: they are slow, and not dead.

All that a test writes would take several deadlines to flush. So it must reach the disk
in pieces: no connection is lost, nothing is copied twice, and no client gets an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB, Site
from e2e.lib.servers import Secondary

pytestmark = pytest.mark.slow

Sites = Callable[..., Site]

PLUGIN = Path(__file__).parent / "lib" / "slow_disk.py"
RATE = 8_000_000  # bytes a second


def set_rate(one: Secondary, rate: int) -> None:
    """Let *one* flush so many bytes a second from now on; 0: at once."""
    one.image.with_suffix(".rate").write_text(str(rate))


def start_slow(one: Secondary, rate: int) -> None:
    """Start *one* over a disk that flushes so many bytes a second."""
    support.requires_program("nbdkit")
    set_rate(one, rate)
    rates = one.image.with_suffix(".rate")
    one.start_plugin("python", PLUGIN, f"image={one.image}", f"rate={rates}")


def bring_up(site: Site, rate: int) -> None:
    """Bring up a volume in sync, whose last secondary flushes slowly from then on."""
    for one in site.secondaries[:-1]:
        one.start()
    start_slow(site.secondaries[-1], 0)
    site.create()
    site.serve()
    site.wait_in_sync()
    set_rate(site.secondaries[-1], rate)


def lost(site: Site) -> int:
    """Count the connections that were lost."""
    return site.log.count("disconnect: ")


def write_much(site: Site, length: int) -> None:
    """Write without a flush, and then flush: no error may come of it."""
    handle = site.client()
    for offset in range(0, length, 2 * MIB):
        handle.pwrite(bytes([1 + offset // MIB]) * (2 * MIB), offset)
    handle.flush()
    handle.shutdown()


def test_resync_to_a_slow_disk(new_site: Sites) -> None:
    """It is copied once, at about the disk's speed, and progress shows throughout."""
    site = new_site(size=14 * MIB)
    site.deadline = "800ms"
    site.write_config()
    site.fill(site.local, site.size)
    start_slow(site.dr, RATE)
    site.create()
    site.serve()
    seen: set[int] = set()

    def in_sync() -> bool:
        now = site.remote()
        seen.add(now["dirty_bytes"])
        return bool(now["state"] == "in_sync")

    support.wait_until(in_sync, "in_sync", timeout_s=20)
    assert len(seen) > 4
    assert lost(site) == 0
    assert site.copied(1) == [site.size]
    # What fits the deadline: how far below it the bound ends depends on how quickly
    # the first flushes happened to be.
    assert 0 < site.remote()["flush_bound_bytes"] <= RATE * 8 // 10
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("policy", ["degrade", "stop"])
def test_client_flushes_much_to_a_slow_disk(new_site: Sites, policy: str) -> None:
    """Writers wait for the disk while they write, and so the flush can be answered."""
    site = new_site(size=12 * MIB, policy=policy)
    site.deadline = "800ms"
    site.write_config()
    bring_up(site, RATE)
    write_much(site, site.size)
    assert site.remote()["state"] == "in_sync"
    assert lost(site) == 0
    site.stop()
    site.assert_equal()


def test_slow_disk_beside_a_quick_one(new_site: Sites) -> None:
    """What each may have unflushed is its own, and survives a lost connection."""
    site = new_site(size=12 * MIB, remotes=["nbdkit", "nbdkit"])
    site.deadline = "800ms"
    site.write_config()
    bring_up(site, RATE)
    write_much(site, site.size)
    quick, slow = (site.remote(one.name) for one in site.secondaries)
    assert quick["state"] == slow["state"] == "in_sync"
    assert quick["flush_bound_bytes"] > slow["flush_bound_bytes"]
    assert lost(site) == 0
    site.secondaries[1].kill()
    site.wait_state("out_of_sync", name="dr1")
    start_slow(site.secondaries[1], RATE)
    site.wait_in_sync()
    after = site.remote("dr1")["flush_bound_bytes"]
    assert after <= 2 * slow["flush_bound_bytes"]
    site.stop()
    site.assert_equal()


def test_quick_disk_becomes_slow(new_site: Sites) -> None:
    """One connection may be lost over it, and not one after the other."""
    site = new_site(size=16 * MIB)
    site.deadline = "800ms"
    site.write_config()
    bring_up(site, 0)
    for _ in range(3):
        write_much(site, site.size)
    assert site.remote()["flush_bound_bytes"] >= 4 * MIB
    set_rate(site.dr, RATE // 8)
    write_much(site, 4 * MIB)
    site.wait_in_sync(timeout_s=30)
    assert lost(site) <= 2
    assert site.remote()["flush_bound_bytes"] <= MIB
    site.stop()
    site.assert_equal()
