# SPDX-License-Identifier: BSD-3-Clause
"""
Two nodes on two hosts, by an operator's commands alone: failover, return, failback.

Each host is a network namespace. It goes down by the loss of its server and its cable.
The next command is the one that `status` names.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import support
from e2e.lib.clients import Load
from e2e.lib.harness import MIB
from e2e.lib.links import FAR, NEAR, Link
from e2e.lib.pair import Node, Pair

from nbd_mirror.base.errors import RoleError
from nbd_mirror.server.node_status import FRESH_S

pytestmark = pytest.mark.slow


class Hosts(Pair):
    """A pair on two hosts, with a cable between them."""

    def __init__(self, folder: Path, processes: support.Processes, prefix: str) -> None:
        self.link = Link(processes, prefix)
        # Not `ip netns exec`, which mounts anew: a start after a kill would copy more.
        ends = ((NEAR, self.link.near), (FAR, self.link.far))
        hosts = [(host, ["nsenter", f"--net=/run/netns/{name}"]) for host, name in ends]
        super().__init__(folder, processes, hosts=hosts)

    def lose_alpha(self) -> None:
        """Have alpha's host go down."""
        self.link.cut()
        self.alpha.kill()


@pytest.fixture
def hosts(run_dir: Path, processes: support.Processes, netns_prefix: str) -> Hosts:
    """Give a pair that is created, served and in sync; alpha is primary."""
    pair = Hosts(run_dir, processes, netns_prefix)
    pair.bring_up()
    return pair


def told(node: Node) -> list[str]:
    """Return the words of the command that `status` names for a failover."""
    shown = node.cli("status").stdout
    found = re.search(
        r"fail over now\?.*\n(?: +may.*\n)?\s+try: nbd-mirror (.*)", shown
    )
    assert found is not None, shown
    word, config, *words = found[1].split()
    assert config == str(node.pair.config)
    assert words[:2] == ["--node", node.name]
    return [word, *words[2:]]


def write(node: Node, offset: int, seed: int) -> bytes:
    """Write a MiB as a client does, with a flush; return it."""
    content = bytes([seed]) * MIB
    client = node.client()
    client.pwrite(content, offset)
    client.flush()
    client.shutdown()
    return content


def read(node: Node, offset: int) -> bytes:
    """Read a MiB as a client does."""
    client = node.client()
    content = bytes(client.pread(MIB, offset))
    client.shutdown()
    return content


def test_host_is_lost_and_comes_back(hosts: Hosts) -> None:
    """Failover under load, the return of the old primary, and the failback."""
    alpha, beta = hosts.nodes
    load = Load(alpha.uri, hosts.size, flush_every=10)
    load.wait_for(200)
    hosts.lose_alpha()
    load.join()
    said = beta.refused(RoleError.exit_code, "promote")
    assert "only by force" in said
    beta.wait_node(lambda node: not node["peers"][0]["connected"], "alpha to be away")
    assert told(beta) == ["promote", "--force"]
    assert "node beta is primary, in epoch 2" in beta.cli("promote", "--force").stdout
    client = beta.client()
    load.check(lambda offset, length: client.pread(length, offset))
    client.shutdown()
    first = write(beta, 3 * MIB, 1)

    hosts.link.mend()
    alpha.serve()
    alpha.wait_in_sync()
    beta.wait_in_sync()
    found = alpha.node()
    assert (found["role"], found["epoch"], found["leader"]) == ("secondary", 2, "beta")
    second = write(beta, 5 * MIB, 2)

    assert told(beta) == ["switchover", "alpha"]
    assert "node alpha is primary" in beta.cli("switchover", "alpha").stdout
    alpha.wait_in_sync()
    assert (read(alpha, 3 * MIB), read(alpha, 5 * MIB)) == (first, second)
    third = write(alpha, 7 * MIB, 3)
    alpha.stop()
    beta.stop()
    hosts.assert_equal()
    assert third in beta.image.read_bytes()


def test_cable_is_pulled_and_both_went_on(hosts: Hosts) -> None:
    """A split brain: both stay apart and say so, until an operator decides."""
    alpha, beta = hosts.nodes
    hosts.link.cut()
    mine = write(alpha, MIB, 1)
    assert "only by force" in beta.refused(RoleError.exit_code, "promote")
    beta.cli("promote", "--force")
    other = write(beta, MIB, 2)
    hosts.link.mend()
    for node in hosts.nodes:
        found = node.wait_node(
            lambda one: "writes since they were equal" in one["peers"][0]["why"],
            f"{node.name} to say that both went on",
        )
        assert "resume" not in node.cli("status").stdout, "it would only meet again"
        assert not found["peers"][0]["in_sync"]
    assert read(alpha, MIB) == mine
    assert read(beta, MIB) == other
    assert alpha.image.read_bytes()[MIB : 2 * MIB] == mine
    assert beta.image.read_bytes()[MIB : 2 * MIB] == other
    # An operator decides for alpha's, as the manual says.
    alpha.cli("resolve", "--keep", "alpha")
    for node in hosts.nodes:
        node.wait_in_sync()
    assert read(alpha, MIB) == mine
    alpha.stop()
    beta.stop()
    hosts.assert_equal()


def test_planned_work_loses_no_writes(hosts: Hosts) -> None:
    """Demote while clients are there is refused; then both nodes may be promoted."""
    alpha, beta = hosts.nodes
    content = write(alpha, MIB, 1)
    time.sleep(FRESH_S + 1)  # the last meeting is old then, and the session is not
    assert alpha.node()["peers"][0]["role"] == "secondary"
    client = alpha.client()
    said = alpha.refused(RoleError.exit_code, "demote")
    assert "connections of clients would be cut" in said or "client" in said
    client.shutdown()
    support.wait_until(
        lambda: alpha.status()["clients"] == 0, "the client to be forgotten"
    )
    assert "no node is primary" in alpha.cli("demote").stdout
    said = alpha.refused(RoleError.exit_code, "attach")
    assert "no node is primary" in said
    said = alpha.refused(RoleError.exit_code, "switchover")
    assert "secondary" in said
    support.wait_until(
        lambda: told(beta) == ["promote"], "beta to be promotable", timeout_s=40
    )
    beta.cli("promote")
    assert read(beta, MIB) == content
    alpha.wait_in_sync()
    beta.stop()
    alpha.stop()
    hosts.assert_equal()
