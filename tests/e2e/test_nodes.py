# SPDX-License-Identifier: BSD-3-Clause
"""
Two nodes as two real servers, over TLS: first sync, failover, return, switchover.

A test ends with both images compared, byte by byte, and with one node that serves.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB
from e2e.lib.node_site import Pair

from nbd_mirror.base.errors import RoleError

CONTENT = (bytes(range(1, 256)) * 258)[: 64 << 10]  # no half equals the other


@pytest.fixture
def pair(run_dir: Path, processes: support.Processes) -> Pair:
    """Give two nodes, nothing created yet."""
    return Pair(run_dir, processes)


def test_the_first_promotion_fills_the_other_node(pair: Pair) -> None:
    """The data of the promoted node's disk count; then writes go to both."""
    with pair.alpha.local.open("r+b") as file:
        file.write(os.urandom(3 * MIB))
    pair.bring_up()
    assert pair.primaries == ["alpha"]
    pair.alpha.write(4 * MIB, CONTENT)
    assert pair.alpha.read(4 * MIB, len(CONTENT)) == CONTENT
    pair.assert_equal()
    assert CONTENT in pair.beta.local.read_bytes()


def test_no_client_gets_a_secondary(pair: Pair) -> None:
    """Its door says who is primary, and no promotion happens beside a primary."""
    pair.bring_up()
    assert not pair.beta.serves_clients()
    with pytest.raises(RoleError, match="is primary and connected"):
        pair.beta.ask("promote", force=False)
    with pytest.raises(RoleError, match="is primary and connected"):
        pair.beta.ask("promote", force=True)
    assert pair.primaries == ["alpha"]


def test_a_restarted_primary_resumes(pair: Pair) -> None:
    """After a clean stop nothing is copied; after a kill what was under way."""
    pair.bring_up()
    generation = pair.alpha.status()["generation"]
    pair.alpha.stop()
    pair.alpha.serve()
    pair.alpha.wait_role("primary")
    pair.wait_in_sync()
    assert pair.alpha.status()["generation"] == generation
    assert "resync" not in pair.alpha.log
    pair.alpha.write(MIB, CONTENT)
    pair.alpha.kill()
    pair.alpha.serve()
    pair.alpha.wait_role("primary")
    pair.wait_in_sync()
    assert pair.alpha.read(MIB, len(CONTENT)) == CONTENT
    pair.assert_equal()


def test_failover_and_return(pair: Pair) -> None:
    """A forced node serves; the old primary comes back and is made equal."""
    pair.bring_up()
    pair.alpha.write(MIB, CONTENT)
    pair.alpha.kill()
    with pytest.raises(RoleError, match="only by force"):
        pair.beta.ask("promote", force=False)
    pair.beta.ask("promote", force=True)
    pair.beta.wait_role("primary")
    assert pair.beta.read(MIB, len(CONTENT)) == CONTENT
    pair.beta.write(2 * MIB, CONTENT)
    pair.alpha.serve()
    pair.wait_in_sync()
    assert pair.primaries == ["beta"]
    pair.beta.write(3 * MIB, CONTENT)
    pair.assert_equal()


def test_switchover_there_and_back_copies_nothing(pair: Pair) -> None:
    """Nor does it begin a generation."""
    pair.bring_up()
    pair.alpha.write(MIB, CONTENT)
    generation = pair.alpha.status()["generation"]
    for first, second in ((pair.alpha, pair.beta), (pair.beta, pair.alpha)):
        first.ask("switchover", node=None)
        second.wait_role("primary")
        pair.wait_in_sync()
        assert pair.primaries == [second.name]
        assert second.status()["generation"] == generation
        assert second.read(MIB, len(CONTENT)) == CONTENT
    assert pair.alpha.status()["epoch"] == 3
    assert (pair.alpha.log + pair.beta.log).count("resync_start") == 1  # the first one
    pair.assert_equal()
