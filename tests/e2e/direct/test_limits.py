# SPDX-License-Identifier: BSD-3-Clause
"""The direct door's limits, as the configuration has them: clients and memory."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import support
from e2e.conftest import DOORS
from e2e.direct import nbd_raw as raw
from e2e.direct.checks import DEADLINE_S, transmitting
from e2e.direct.nbd_raw import RawClient
from e2e.lib.harness import MIB, Site, command, free_port

Sites = Callable[..., Site]


def locked_mib(site: Site) -> int:
    """Return how much of the server's memory is in RAM."""
    status = Path(f"/proc/{site.pid}/status").read_text()
    line = next(one for one in status.splitlines() if one.startswith("VmRSS:"))
    return int(line.split()[1]) // 1024


def test_one_client_too_many_is_told_and_status_says_so(new_site: Sites) -> None:
    """It gets an answer with the reason, and status shows the limit."""
    site = new_site(max_clients="3")
    site.bring_up("direct")
    with ExitStack() as open_ones:
        clients = [open_ones.enter_context(RawClient(site.socket)) for _ in range(4)]
        for client in clients[:3]:
            transmitting(client)
            client.read(0, 512)
        last = clients[3]
        last.hello()
        found = last.ask(raw.OPT_GO, raw.name_and_infos())[-1]
        assert found.type == raw.REP_ERR_POLICY
        assert found.data == b"there are 3 clients, as many as max_clients allows"
        site.wait_log("refused: there are 3 clients")
        assert (site.status()["clients"], site.status()["max_clients"]) == (3, 3)
        shown = site.cli("status", str(site.config)).stdout
        assert "3 of 3 clients" in shown
        clients[0].close()
        support.wait_until(lambda: site.status()["clients"] == 2, "a free place")
        assert last.go().size == site.size
        assert len(last.read(0, 512)) == 512
    site.stop()


def test_silent_connections_keep_no_client_out(new_site: Sites) -> None:
    """300 that connect and say nothing, over TCP: a client is served at once."""
    port = free_port()
    site = new_site(listen=f"tcp:127.0.0.1:{port}", max_clients="4")
    site.bring_up("direct")
    with ExitStack() as open_ones:
        idle = open_ones.enter_context(RawClient(("127.0.0.1", port)))
        transmitting(idle).read(0, 512)
        for _ in range(300):
            open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
        start = time.monotonic()
        client = RawClient(("127.0.0.1", port), timeout_s=DEADLINE_S)
        transmitting(open_ones.enter_context(client)).write(0, b"s" * 512)
        assert time.monotonic() - start < DEADLINE_S
        assert idle.read(0, 512) == b"s" * 512
        site.stop()


def test_host_that_connects_again_and_again_puts_out_its_own(new_site: Sites) -> None:
    """A client of another host, which shakes hands slowly, is the oldest there."""
    port = free_port()
    site = new_site(listen=f"tcp:127.0.0.1:{port}")
    site.bring_up("direct")
    address = ("127.0.0.1", port)
    with ExitStack() as open_ones:
        slow = open_ones.enter_context(RawClient(address, timeout_s=DEADLINE_S))
        slow.hello()
        for _ in range(300):
            many = socket.create_connection(address, source_address=("127.0.0.2", 0))
            open_ones.enter_context(many)
            assert many.recv(8) == b"NBDMAGIC"  # it is in the handshake
        assert slow.go().size == site.size
        slow.write(0, b"s" * 512)
        site.stop()


def test_host_with_many_clients_leaves_places_for_others(new_site: Sites) -> None:
    """It gets seven places of eight; a client of another host gets the last one."""
    port = free_port()
    site = new_site(listen=f"tcp:127.0.0.1:{port}", max_clients="8")
    site.bring_up("direct")
    address = ("127.0.0.1", port)
    with ExitStack() as open_ones:
        for _ in range(7):
            many = RawClient(address, source=("127.0.0.2", 0))
            transmitting(open_ones.enter_context(many)).read(0, 512)
        one_more = open_ones.enter_context(RawClient(address, source=("127.0.0.2", 0)))
        one_more.hello()
        found = one_more.ask(raw.OPT_GO, raw.name_and_infos())[-1]
        words = (
            "this host or user has 7 clients, and the rest of the 8 that max_clients "
            "allows is for others"
        )
        assert (found.type, found.data) == (raw.REP_ERR_POLICY, words.encode())
        site.wait_log(f"refused: {words}")
        other = open_ones.enter_context(RawClient(address))
        assert len(transmitting(other).read(0, 512)) == 512
        last = open_ones.enter_context(RawClient(address))
        last.hello()
        found = last.ask(raw.OPT_GO, raw.name_and_infos())[-1]
        assert found.data == b"there are 8 clients, as many as max_clients allows"
        many.close()
        support.wait_until(lambda: site.status()["clients"] == 7, "a free place")
        assert one_more.go().size == site.size
        site.stop()


def test_strangers_do_not_use_up_the_log_lines_of_clients(new_site: Sites) -> None:
    """A hundred handshakes that are refused, and then a client's error is logged."""
    site = new_site(max_clients="1")
    site.bring_up("direct")
    with RawClient(site.socket) as client, RawClient(site.socket) as stranger:
        transmitting(client).read(0, 512)
        stranger.hello()
        for _ in range(150):
            found = stranger.ask(raw.OPT_GO, raw.name_and_infos())[-1]
            assert found.type == raw.REP_ERR_POLICY
        client.send(bytes(28))
        site.wait_log("it sent a request without the magic number of one")
        site.wait_log("more lines about connections in the handshake were left out")
    site.stop()


def test_clients_share_the_memory(new_site: Sites) -> None:
    """Clients that read nothing hold no more than max_memory, all together."""
    site = new_site(max_memory="128MiB", size=32 * MIB)
    site.fill(site.local, 32 * MIB)
    site.bring_up("direct")
    before = locked_mib(site)
    most = 0
    with ExitStack() as open_ones:
        for _ in range(8):
            deaf = open_ones.enter_context(RawClient(site.socket))
            transmitting(deaf)
            reads = (deaf.request(raw.CMD_READ, 0, 16 * MIB)[1] for _ in range(8))
            deaf.send(b"".join(reads))
        small = open_ones.enter_context(RawClient(site.socket, timeout_s=DEADLINE_S))
        transmitting(small)
        start = time.monotonic()
        while time.monotonic() - start < 1:
            small.write(0, b"n" * 4096)  # waits for none of them
            most = max(most, locked_mib(site))
        assert most - before < 128 + 64
        site.stop()


@pytest.mark.parametrize("door", DOORS)
def test_a_name_is_served_at_all_its_addresses(new_site: Sites, door: str) -> None:
    """`tcp:localhost` is 127.0.0.1 and, where this host has it, ::1."""
    port = free_port()
    site = new_site(listen=f"tcp:localhost:{port}")
    site.bring_up(door)
    found = socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)
    for address in {"127.0.0.1", *(one[4][0] for one in found)}:
        with socket.create_connection((str(address), port), timeout=10) as client:
            assert client.recv(8) == b"NBDMAGIC"
    site.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_few_descriptors_are_said_and_leave_some_for_remotes(site: Site) -> None:
    """Where the limit of open files allows fewer clients, the start says how many."""
    support.requires_program("setpriv")
    for one in site.secondaries:
        one.start()
    site.create()
    # Without the capability root may not raise the hard limit either.
    words = ["setpriv", "--bounding-set", "-sys_resource"]
    words += ["--inh-caps", "-sys_resource", "sh", "-c", 'ulimit -n 1200; exec "$@"']
    done = site.processes.run(
        [*words, "sh", *command(), "serve", str(site.config)], env=site.environment()
    )
    assert "max_clients is 1024, but the limit of open files" in done.stderr
    assert 0 < site.status()["max_clients"] < 600
    site.wait_in_sync()
    site.cli("stop", str(site.config))
