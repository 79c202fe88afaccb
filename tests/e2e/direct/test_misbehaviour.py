# SPDX-License-Identifier: BSD-3-Clause
"""Clients of the direct door that do harm: to themselves, and to no other."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import support
from e2e.direct import nbd_raw as raw
from e2e.direct.checks import (
    DEADLINE_S,
    KIB,
    Dial,
    transmitting,
)
from e2e.direct.nbd_raw import RawClient
from e2e.lib.harness import MIB, Site, free_port


def send_reads(client: RawClient, count: int, length: int) -> None:
    """Send reads, and read no answer."""
    client.send(
        b"".join(client.request(raw.CMD_READ, 0, length)[1] for _ in range(count))
    )


def assert_quick(site: Site) -> None:
    """Fail unless a client can do everything within the deadline."""
    start = time.monotonic()
    with RawClient(site.socket, timeout_s=DEADLINE_S) as client:
        transmitting(client)
        for i in range(50):
            client.write(i * 4096, bytes([i + 1]) * 4096)
        client.write(0, b"w" * MIB)
        assert client.read(0, MIB) == b"w" * MIB
        assert client.call(raw.CMD_FLUSH).error == 0
        assert client.call(raw.CMD_TRIM, 0, 4096).error == 0
        assert client.call(raw.CMD_BLOCK_STATUS, 0, MIB).error == 0
    assert time.monotonic() - start < DEADLINE_S


@pytest.mark.parametrize("length", [4096, MIB])
def test_client_that_never_reads_harms_nobody(site: Site, length: int) -> None:
    """It keeps neither another client nor `nbd-mirror stop`."""
    site.bring_up("direct")
    with RawClient(site.socket) as deaf:
        transmitting(deaf)
        send_reads(deaf, 400, length)
        assert_quick(site)
        # Its own writes, in the ranges others write to, behind the reads.
        with RawClient(site.socket) as other:
            transmitting(other)
            for i in range(50):
                other.send(
                    other.request(raw.CMD_WRITE, 4096 * i, payload=bytes(4096))[1]
                )
            send_reads(other, 400, length)
            assert_quick(site)
        done = site.cli("stop", str(site.config), timeout_s=20)
        assert "stopped cleanly" in done.stdout
        assert site.ended() == 0
    site.assert_equal()


def test_clients_that_never_read_leave_workers_for_others(site: Site) -> None:
    """Not even as many of them as there are workers keep another client."""
    site.bring_up("direct")
    with ExitStack() as open_ones:
        for _ in range(140):
            deaf = open_ones.enter_context(RawClient(site.socket))
            transmitting(deaf)
            send_reads(deaf, 2, MIB)
        assert_quick(site)
        site.cli("stop", str(site.config), timeout_s=20)
        assert site.ended() == 0
    site.assert_equal()


def test_client_that_asks_and_never_reads_in_handshake_keeps_nobody(
    site: Site,
) -> None:
    """Options without end, with answers that are not read, end with the server."""
    site.bring_up("direct")
    with RawClient(site.socket) as deaf:
        deaf.hello()
        deaf.socket.settimeout(1)
        # Far more than sockets hold: it is stuck before the end.
        with pytest.raises((TimeoutError, ConnectionError)):
            deaf.send(raw.option(raw.OPT_LIST) * MIB)
        assert_quick(site)
        site.cli("stop", str(site.config), timeout_s=20)
        assert site.ended() == 0
    site.assert_equal()


KILLED = """
import sys
from pathlib import Path
from e2e.direct import nbd_raw as raw
client = raw.RawClient(Path(sys.argv[1]))
client.hello()
client.go()
client.send(client.request(raw.CMD_WRITE, 4 << 20, 1 << 20)[1] + b"k" * 600000)
print("sent", flush=True)
sys.stdin.read()
"""


def test_client_killed_amid_a_payload_writes_nothing(served: Site, dial: Dial) -> None:
    """Half a write is no write, and keeps no range from other clients."""
    client = transmitting(dial())
    before = os.urandom(MIB)
    client.write(4 * MIB, before)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(served.socket)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(support.ROOT / "tests")},
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"sent\n"
        victim.kill()
        assert victim.wait(10) == -9
    assert before == client.read(4 * MIB, MIB) == served.on_both(4 * MIB, MIB)
    client.write(4 * MIB, b"after" * 1024)
    assert client.read(4 * MIB, 5120) == b"after" * 1024


def test_client_gone_while_its_remote_is_frozen(site: Site) -> None:
    """Requests that wait for a remote outlive their client, and do no harm."""
    site.bring_up("direct")
    site.dr.freeze()
    with ExitStack() as open_ones:
        for n in range(4):
            gone = open_ones.enter_context(RawClient(site.socket))
            transmitting(gone)
            for i in range(40):
                at = (8 * n + i % 8) * 256 * KIB
                length = (4096, 128 * KIB)[i % 2]
                gone.send(gone.request(raw.CMD_WRITE, at, payload=bytes(length))[1])
            send_reads(gone, 40, 128 * KIB)
            gone.send(gone.request(raw.CMD_FLUSH)[1])
            if n % 2:
                gone.send(raw.request(raw.CMD_DISC))
    with RawClient(site.socket) as other:
        transmitting(other)
        assert len(other.read(0, 4096)) == 4096
    site.dr.thaw()
    support.wait_until(
        lambda: site.status()["clients"] == 0, "the clients to be forgotten"
    )
    site.wait_in_sync()
    assert_quick(site)
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("reset", [False, True])
def test_tcp_clients_that_leave_harm_nobody(
    new_site: Callable[..., Site], *, reset: bool
) -> None:
    """Over TCP: clients that close, or reset, with requests under way."""
    port = free_port()
    site = new_site(listen=f"tcp:127.0.0.1:{port}")
    site.bring_up("direct")
    for i in range(40):
        with RawClient(("127.0.0.1", port)) as client:
            transmitting(client, structured=bool(i % 2))
            client.send(client.request(raw.CMD_WRITE, 0, payload=bytes(4096))[1])
            send_reads(client, 40, (4096, MIB)[i % 4 // 2])
            client.send(client.request(raw.CMD_WRITE, 0, MIB)[1] + b"half")
            if reset:
                linger = struct.pack("ii", 1, 0)
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    support.wait_until(
        lambda: site.status()["clients"] == 0, "the clients to be forgotten"
    )
    with RawClient(("127.0.0.1", port)) as client:
        transmitting(client)
        client.write(0, b"t" * MIB)
        assert client.read(0, MIB) == b"t" * MIB
        site.stop()
    site.assert_equal()


def test_clients_idle_in_handshake_keep_nobody(site: Site) -> None:
    """50 connections that say nothing, or half of it, keep neither client nor stop."""
    site.bring_up("direct")
    with ExitStack() as open_ones:
        for i in range(50):
            idle = open_ones.enter_context(RawClient(site.socket))
            idle.send(
                (b"\0\0\0\3" + raw.option(raw.OPT_GO, length=100) + b"a" * 50)[: 2 * i]
            )
        assert_quick(site)
        done = site.cli("stop", str(site.config), timeout_s=20)
        assert "stopped cleanly" in done.stdout
        assert site.ended() == 0
    site.assert_equal()


def test_connections_many_one_after_another_leave_nothing(
    served: Site, dial: Dial
) -> None:
    """Clients that come and go leave no descriptors and no threads behind."""
    process = Path("/proc") / str(served.pid)

    def counts() -> tuple[int, int]:
        return len(list((process / "fd").iterdir())), len(
            list((process / "task").iterdir())
        )

    def come_and_go(how: int) -> None:
        with RawClient(served.socket) as client:
            if how > 0:
                transmitting(client)
            if how > 1:
                send_reads(client, 20, 4096)
            if how > 2:
                client.send(client.request(raw.CMD_WRITE, 0, 4096)[1] + b"half")

    fds, _ = counts()
    for i in range(200):
        come_and_go(i % 4)
    support.wait_until(lambda: counts()[0] <= fds, "the descriptors to be closed")
