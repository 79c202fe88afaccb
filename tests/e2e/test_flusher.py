# SPDX-License-Identifier: BSD-3-Clause
"""Clients that never flush: the engine does, so that an outage costs little."""

from __future__ import annotations

from collections.abc import Callable

import support
from e2e.lib.harness import MIB, Site

Sites = Callable[..., Site]


def test_never_flushing_load_leaves_little_behind(new_site: Sites) -> None:
    """The unflushed set shrinks again and again, and is empty when the writes end."""
    site = new_site(size=128 * MIB)
    site.bring_up()
    load = site.load(block=MIB)
    drops, last = 0, 0

    def dropped() -> bool:
        nonlocal drops, last
        now: int = site.remote()["unflushed_bytes"]
        drops, last = drops + (now < last), now
        return drops >= 3

    support.wait_until(dropped, "three flushes that no client asked for", timeout_s=60)
    load.stop()
    assert load.errors == []
    site.wait_remote(lambda one: one["unflushed_bytes"] == 0, "all to be flushed")
    site.dr.kill()
    assert site.wait_state("out_of_sync")["dirty_bytes"] == 0
    site.assert_equal()
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    handle.shutdown()
    assert site.remote()["dirty_bytes"] == site.region_size
    site.dr.start()
    site.wait_in_sync()
    assert site.copied(2) == [site.size, site.region_size]
    site.stop()
    site.assert_equal()


def test_each_remote_is_flushed_by_itself(new_site: Sites) -> None:
    """A remote that hangs in its flush does not keep the other's from being made."""
    site = new_site(remotes=["nbdkit", "nbdkit"])
    site.deadline = "60s"
    site.write_config()
    site.bring_up()
    slow = site.secondaries[1]
    handle = site.client()
    for i in range(4):
        handle.pwrite(b"a" * 4096, i * MIB)
    slow.freeze()
    assert site.remote("dr1")["unflushed_bytes"] == 4 * site.region_size
    site.wait_remote(lambda one: one["unflushed_bytes"] == 0, "dr to be flushed")
    behind = site.remote("dr1")
    assert behind["state"] == "in_sync"
    assert behind["unflushed_bytes"] == 4 * site.region_size
    slow.thaw()
    site.wait_remote(
        lambda one: one["unflushed_bytes"] == 0, "dr1 to be flushed", name="dr1"
    )
    handle.shutdown()
    site.stop()
    site.assert_equal()
