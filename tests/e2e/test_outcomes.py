# SPDX-License-Identifier: BSD-3-Clause
"""
A request's outcomes: one step of one command to the remote goes wrong.

Each is judged by the same: what the client was told, the state and its reason, that
the dirty map covers every difference, and that the disks are equal in the end. Where
the connection is lost and back at once, the client is told nothing at all and the
remote is never out of sync; test_refusals.py has the servers that stay away.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import support
from e2e.lib import faults
from e2e.lib.clients import error_of
from e2e.lib.harness import MIB, Site

Sites = Callable[..., Site]
SIZE = 4 * MIB
AT = MIB + 4096  # of the request that meets its fault
PATIENCE_S = "30s"  # a hold that no request waits for in vain


def ask(handle: Any, kind: str, offset: int = AT) -> None:
    """Send one request of a kind."""
    if kind == "write":
        handle.pwrite(os.urandom(64 * 1024), offset)
    elif kind == "flush":
        handle.flush()
    else:
        getattr(handle, kind)(64 * 1024, offset)


def sent_as(kind: str) -> str:
    """Return the kind of command a request becomes: trims are zeroes that may trim."""
    return "zero" if kind == "trim" else kind


def begin(site: Site, door: str = "direct") -> Any:
    """Bring a site up with something on its disks, and return a client."""
    site.fill(site.local, site.size)
    site.bring_up(door)
    handle = site.client()
    handle.pwrite(os.urandom(8192), 0)
    return handle


def finish(site: Site, handle: Any) -> None:
    """Fail unless clients are served and, in the end, the disks are equal."""
    site.wait_in_sync()
    handle.pwrite(b"after" + bytes(507), 0)
    assert b"after" == bytes(handle.pread(512, 0))[:5]
    handle.shutdown()
    site.stop()
    site.assert_equal()


# The connection is lost; the server is there again at once.

DROPS = [
    ("write", "header"),
    ("write", "payload"),
    ("write", "received"),  # not carried out
    ("write", "applied"),  # carried out and not answered
    ("zero", "header"),
    ("zero", "received"),
    ("zero", "applied"),
    ("trim", "applied"),
    ("flush", "header"),
    ("flush", "received"),
    ("flush", "applied"),
]


@pytest.mark.parametrize(("kind", "event"), DROPS)
def test_dropped_within_hold_costs_nothing(
    new_site: Sites, kind: str, event: str
) -> None:
    """Dropped at any step of a command and back within `hold`: no client notices."""
    site = new_site(remotes=["faulty"], size=SIZE, hold=PATIENCE_S)
    handle = begin(site)
    site.faulty.on(event, faults.drop, kind=sent_as(kind), times=1)
    ask(handle, kind)
    site.faulty.wait("export", "connection", count=2)
    site.assert_covered()
    finish(site, handle)
    assert "in_sync -> holding" in site.log
    assert "-> out_of_sync" not in site.log
    assert site.faulty.count("answered", sent_as(kind)) > 0


ANSWERS = [
    (faults.twice, "cookie"),
    (faults.unknown_cookie, "cookie"),
    (faults.garbage, "magic"),
    (faults.half, ""),
]


@pytest.mark.parametrize("kind", ["write", "flush"])
@pytest.mark.parametrize(
    ("fault", "words"), ANSWERS, ids=["twice", "unknown", "garbage", "half"]
)
def test_answer_wrong_is_a_lost_connection(
    new_site: Sites, fault: faults.Action, words: str, kind: str
) -> None:
    """A server that answers what it may not is not believed, and connected anew."""
    site = new_site(remotes=["faulty"], size=SIZE, hold=PATIENCE_S)
    handle = begin(site)
    site.faulty.on("applied", fault, kind=kind, times=1)
    ask(handle, kind)
    ask(handle, kind)  # the first may have been answered truthfully, once
    site.faulty.wait("export", "connection", count=2)
    site.assert_covered()
    finish(site, handle)
    (lost,) = [line for line in site.log.splitlines() if "disconnect: " in line]
    assert words in lost
    assert "-> out_of_sync" not in site.log


def test_shutting_down_answer_is_a_lost_connection(new_site: Sites) -> None:
    """ESHUTDOWN says that the server ends, not that a write failed: it is held."""
    site = new_site(remotes=["faulty"], size=SIZE, hold=PATIENCE_S)
    handle = begin(site)
    site.faulty.on("received", faults.error(errno.ESHUTDOWN), times=1)
    ask(handle, "write")
    site.faulty.wait("export", "connection", count=2)
    finish(site, handle)
    assert "the server is shutting down" in site.log
    assert "-> out_of_sync" not in site.log


# The server answers an error.

ERRORS = [
    ("write", errno.ENOMEM, "Cannot allocate memory"),
    ("write", errno.EPERM, "Operation not permitted"),
    ("zero", errno.EIO, "Input/output error"),
    ("trim", errno.ENOSPC, "No space left on device"),
    ("flush", errno.EIO, "Input/output error"),
    ("flush", errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize(("kind", "number", "words"), ERRORS)
def test_error_answered_degrades_and_heals(
    new_site: Sites, kind: str, number: int, words: str
) -> None:
    """
    Degrade: the client gets no error, the remote is out of sync with the error as
    reason.
    """
    site = new_site(remotes=["faulty"], size=SIZE, hold=PATIENCE_S)
    handle = begin(site)
    # Away after it, so that the state lasts and can be looked at.
    site.faulty.on("export", faults.drop, kind="connection")
    site.faulty.on("received", faults.error(number), kind=sent_as(kind), times=1)
    ask(handle, kind)
    lost = site.wait_state("out_of_sync")
    site.wait_log("in_sync -> out_of_sync")  # an answered error is not held
    assert f"it answered a {kind}" in site.log
    assert words in site.log
    assert lost["reason"]
    assert lost["dirty_bytes"] >= site.region_size
    assert kind == "flush" or site.assert_covered()
    site.faulty.off()
    site.tell("resume")
    finish(site, handle)


@pytest.mark.parametrize("kind", ["write", "zero", "flush"])
def test_error_answered_policy_stop_fences(
    new_site: Sites, door: str, kind: str
) -> None:
    """Stop: EIO, and writes are refused until the remote is in sync again."""
    site = new_site(remotes=["faulty"], size=SIZE, policy="stop")
    handle = begin(site, door)
    site.faulty.on("export", faults.drop, kind="connection")
    site.faulty.on("received", faults.error(errno.ENOSPC), kind=kind, times=1)
    assert errno.EIO == error_of(ask, handle, kind)
    site.wait_state("out_of_sync")
    before = site.local.read_bytes()
    assert errno.EIO == error_of(ask, handle, "write", 2 * MIB)
    assert errno.EIO == error_of(ask, handle, "flush")
    assert before == site.local.read_bytes(), "refused before a byte moves"
    site.assert_covered()
    site.faulty.off()
    site.tell("resume")
    finish(site, handle)


def test_error_of_resync_copy_is_told_and_retried(new_site: Sites) -> None:
    """A copy answered with an error stays dirty, is said, and is done again."""
    site = new_site(remotes=["faulty"], size=SIZE)
    handle = begin(site)
    site.faulty.kill()
    site.wait_state("out_of_sync")
    ask(handle, "write")
    site.faulty.on("received", faults.error(errno.ENOSPC))
    site.faulty.start()
    site.tell("resume")
    support.wait_until(
        lambda: site.log.count("resync_interrupted") >= 2, "resync to be tried again"
    )
    site.assert_covered()
    site.faulty.off()
    site.tell("resume")
    site.wait_in_sync()
    assert re.search(r"it answered a resync write at \d+ with: No space left", site.log)
    finish(site, handle)


# Local fails as well.


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_error_of_both_is_told_and_reconciled(
    new_site: Sites, door: str, number: int
) -> None:
    """Both disks refuse, alike or not: the client gets local's error, no more."""
    site = new_site(remotes=["faulty"], size=SIZE)
    begin(site, door).shutdown()
    site.stop()
    site.serve(door, fault="local_write:1=error")
    site.wait_in_sync()
    handle = site.client()
    copies = site.faulty.count("received")
    site.faulty.on("received", faults.error(number), times=1, at=AT)
    assert errno.EIO == error_of(ask, handle, "write")
    site.assert_covered()
    site.wait_in_sync()
    lost = "in_sync -> out_of_sync" in site.log
    assert lost == (number != errno.EIO), "the same error: neither is worse"
    assert site.faulty.count("received") > copies + 1, "copied from local again"
    finish(site, handle)


def test_error_of_local_and_one_of_two_remotes(new_site: Sites) -> None:
    """One remote has it: that one serves, and the one that refused is behind."""
    site = new_site(remotes=["faulty", "faulty"], size=SIZE)
    begin(site).shutdown()
    site.stop()
    site.serve(fault="local_write:1=error")
    site.wait_in_sync()
    handle = site.client()
    site.faulty.on("received", faults.error(errno.EIO), times=1, at=AT)
    ask(handle, "write")
    site.wait_log("dr: in_sync -> out_of_sync")
    site.wait_in_sync()
    images = [one.image.read_bytes() for one in site.secondaries]
    assert images[0] == images[1]
    assert bytes(handle.pread(64 * 1024, AT)) == images[1][AT : AT + 64 * 1024]
    handle.shutdown()
