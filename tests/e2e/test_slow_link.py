# SPDX-License-Identifier: BSD-3-Clause
"""
Links that are slow or dead: bytes that move keep a connection, silence ends it.

Everything takes several deadlines here, which are a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
from e2e.lib.links import LinkSite

pytestmark = pytest.mark.slow

KIB, MIB = 1024, 1024 * 1024
DEADLINE_S = 1.0
Links = Callable[..., LinkSite]


@pytest.fixture
def new_link(run_dir: Path, processes: support.Processes, netns_prefix: str) -> Links:
    """Give a maker of this test's site; takes what LinkSite takes."""

    def make(**options: Any) -> LinkSite:
        return LinkSite(run_dir, processes, netns_prefix, **options)

    return make


def served(site: LinkSite) -> LinkSite:
    """Start both servers; the rest is the link's."""
    site.serve_far()
    site.create()
    site.serve()
    return site


def test_region_that_takes_longer_than_the_deadline(new_link: Links) -> None:
    """A copy's bytes are on their way for several deadlines: it is not begun again."""
    site = new_link(size=128 * KIB, region_size="128KiB")
    site.local.write_bytes(os.urandom(128 * KIB))
    site.link.shape("256kbit")
    served(site)
    started = time.monotonic()
    site.wait_in_sync(timeout_s=30)
    assert time.monotonic() - started > 2 * DEADLINE_S
    assert "disconnect" not in site.log
    site.link.shape("1gbit")
    site.stop()
    site.assert_equal()


def test_one_large_write(new_link: Links) -> None:
    """Policy stop: a write that the link needs four deadlines for is answered, ok."""
    site = new_link(size=512 * KIB, policy="stop")
    served(site).wait_in_sync()
    site.link.shape("1mbit")
    content = os.urandom(512 * KIB)
    started = time.monotonic()
    site.client().pwrite(content, 0)
    assert time.monotonic() - started > 2 * DEADLINE_S
    assert site.remote()["state"] == "in_sync"
    assert "disconnect" not in site.log
    site.link.shape("1gbit")
    site.stop()
    assert site.on_both(0, len(content)) == content


@pytest.mark.parametrize("paused", [False, True])
def test_cable_pulled_while_nobody_writes(new_link: Links, paused: bool) -> None:
    """The server is asked, and a dead connection is noticed without a client."""
    site = new_link(size=512 * KIB)
    served(site).wait_in_sync()
    if paused:
        site.tell("pause")
    site.link.cut()
    found = site.wait_remote(
        lambda one: not one["connected"] and one["state"] != "in_sync",
        "the dead connection to be noticed",
        timeout_s=10,
    )
    assert found["reason"]
    site.wait_log("the server has not answered for")
    waited = site.cli(
        *("wait", str(site.config), "--for", "in_sync", "--timeout", "1s"), check=False
    )
    assert waited.returncode == 11
    site.link.mend()
    if paused:
        site.tell("resume")
    site.wait_in_sync(timeout_s=30)
    site.stop()


def test_stop_does_not_wait_for_a_slow_link(new_link: Links) -> None:
    """A copy that would take a minute is left, and the stop is clean."""
    site = new_link(size=2048 * KIB, region_size="2MiB")
    site.local.write_bytes(os.urandom(2048 * KIB))
    site.link.shape("256kbit")
    served(site).wait_state("resyncing")
    site.wait_remote(lambda one: one["late_bytes"], "a copy to be under way")
    started = time.monotonic()
    site.stop()
    assert time.monotonic() - started < 10


def test_data_behind_a_hole_does_not_flood_the_link(new_link: Links) -> None:
    """A hole of half a gigabyte costs the link nothing: it says nothing of its rate."""
    size, tail = 512 * MIB, 32 * MIB
    site = new_link(size=size)
    with site.local.open("r+b") as file:
        file.seek(size - tail)
        file.write(os.urandom(4 * MIB))
    site.link.shape("1mbit")
    served(site)
    site.wait_remote(lambda one: one["dirty_bytes"] <= tail, "the hole's end")
    under_way: list[int] = []

    def copied(one: dict[str, Any]) -> bool:
        # What was sent and is not answered is late.
        under_way.append(one["late_bytes"])
        return bool(one["dirty_bytes"] <= tail - MIB)

    site.wait_remote(copied, "some of the data to be copied", timeout_s=60)
    assert 0 < max(under_way) <= MIB
    site.link.shape("1gbit")
    site.wait_in_sync(timeout_s=60)
    site.stop()
    site.assert_equal()
