# SPDX-License-Identifier: BSD-3-Clause
"""
The status as programs and people read it, recorded: what is there now stays readable.

Keys keep their names, their order and the types of their values, and the lines of
`nbd-mirror status` their words. data/status.json has both for each kind of volume, with
what differs from run to run replaced by its type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e.lib.disks import FuseDisk, wait_local
from e2e.lib.harness import MIB, Site

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "status.json").read_text()
)
VARYING = {
    *("uuid", "pid", "since", "generation", "flush_bound_bytes", "max_clients"),
    *("activity", "superblock", "dirty", "dirty_bytes", "late_bytes", "errors"),
    *("unflushed_bytes", "copied_bytes", "done_bytes", "total_bytes", "bytes_per_s"),
    *("eta_s", "growing", "silent_s", "clients", "inflight", "active_extents"),
}
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:[KMG]?i?B)?")
# Words that come and go while a volume stays of its kind.
PASSING = re.compile(
    r", (?:N late|N unflushed|flushed at least every N)"
    r"|, (?:N[a-z]+ )+left|; (?:next attempt in N s|trying now)"
)

Sites = Callable[..., Site]


@pytest.fixture
def new_site(new_site: Sites) -> Sites:
    """Give a maker of sites whose remote may be slow: no status is to tell of that."""

    def make(**options: Any) -> Site:
        site = new_site(**options)
        site.deadline = "60s"
        site.write_config()
        return site

    return make


def without_numbers(text: str, site: Site) -> str:
    """Replace the folder and every number of a text; leave out what only passes."""
    text = NUMBER.sub("N", text.replace(str(site.folder), "FOLDER"))
    return PASSING.sub("", text)


def normal(value: Any, site: Site, key: str = "") -> Any:
    """Replace what differs from run to run by its type."""
    if isinstance(value, dict):
        return {name: normal(one, site, name) for name, one in value.items()}
    if isinstance(value, list):
        return [normal(one, site) for one in value]
    if key in VARYING and value not in (None, ""):
        return type(value).__name__
    return without_numbers(value, site) if isinstance(value, str) else value


def found(site: Site) -> dict[str, Any]:
    """Return what both forms of the command print."""
    text = site.cli("status", str(site.config)).stdout
    status = json.loads(site.cli("status", str(site.config), "--json").stdout)
    lines = without_numbers(text, site).splitlines()
    return {"text": lines, "json": normal(status, site)}


def assert_recorded(kind: str, site: Site) -> None:
    """Fail unless the site's status is what was recorded for *kind*, in its order."""
    seen = found(site)
    assert seen == RECORDED[kind]
    assert json.dumps(seen) == json.dumps(RECORDED[kind])


def test_status_of_a_served_volume_is_as_recorded(site: Site) -> None:
    """In sync, stopped, and killed: the keys are the same, with or without a server."""
    site.create()
    assert_recorded("created", site)
    site.dr.start()
    site.serve()
    site.wait_in_sync()
    assert_recorded("running", site)
    site.stop()
    assert_recorded("stopped", site)
    site.serve()
    site.wait_in_sync()
    site.kill()
    assert_recorded("killed", site)


def test_status_of_a_resync_is_as_recorded(new_site: Sites) -> None:
    """While it copies, and paused, with the progress of either."""
    site = new_site(size=256 * MIB)
    site.fill(site.local, site.size)
    site.dr.start("--filter=rate", "rate=64M", "burstiness=0.1")
    site.create()
    site.serve()
    site.wait_remote(lambda one: one["resync"] and one["resync"]["eta_s"], "progress")
    assert_recorded("resyncing", site)
    site.tell("pause")
    site.wait_state("paused")
    assert_recorded("paused", site)


def test_status_of_a_lost_remote_is_as_recorded(site: Site) -> None:
    """On the operator's word first, and while it is out of sync."""
    site.keys["policy"] = "stop"
    site.keys["fenced_reads"] = "fail"
    site.write_config()
    site.dr.start()
    site.create("dr")
    assert_recorded("assumed", site)
    site.serve()
    site.wait_in_sync()
    site.dr.kill()
    site.wait_state("out_of_sync")
    assert_recorded("out_of_sync", site)


def test_status_of_a_failed_local_disk_is_as_recorded(site: Site) -> None:
    """While remotes serve, and without a server."""
    disk = FuseDisk(site)
    site.bring_up()
    disk.fail("write")
    handle = site.client()
    handle.pwrite(bytes(4096), 0)
    wait_local(site, "failed")
    assert_recorded("failed_local", site)
    handle.shutdown()
    site.stop()
    assert_recorded("failed_local_stopped", site)


def test_status_of_a_map_that_cannot_be_read_is_as_recorded(site: Site) -> None:
    """Without a server it says that all of the remote is taken as dirty."""
    site.bring_up()
    site.stop()
    site.map_path().write_bytes(b"garbled")
    assert_recorded("garbled_map", site)


def test_status_of_a_volume_that_does_not_answer_is_as_recorded(site: Site) -> None:
    """A process holds the volume, and its socket is gone."""
    site.bring_up()
    (site.state / "control").unlink()
    (site.state / "control").touch()
    assert_recorded("no_answer", site)
