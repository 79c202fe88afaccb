# SPDX-License-Identifier: BSD-3-Clause
"""A planned restart under clients: to them it is a connection that was lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable

import pytest
import support
from e2e.direct import nbd_raw as raw
from e2e.direct.checks import KIB, transmitting
from e2e.direct.nbd_raw import RawClient
from e2e.lib.harness import MIB, Site, free_port

BLOCK = 4 * KIB
BLOCKS = 1024  # of the volume that are written, over and over


class Qemu:
    """
    A qemu-io that reconnects, and writes one block after another on a thread.

    *answers* has its word on each, in order.
    """

    def __init__(self, site: Site) -> None:
        options = (
            f"driver=nbd,server.type=unix,server.path={site.socket},reconnect-delay=30"
        )
        self.answers: list[str] = []
        self._ending = threading.Event()
        self._process = subprocess.Popen(
            ["qemu-io", "--image-opts", options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        site.processes.on_exit(self._process.kill)
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        while not self._ending.is_set():
            n = len(self.answers)
            at = n % BLOCKS * BLOCK
            stdin.write(f"write -P {n // BLOCKS + 1} {at} {BLOCK}\n")
            stdin.flush()
            line = stdout.readline()
            while line and "wrote" not in line and "rror" not in line.lower():
                if "failed" in line:
                    break
                line = stdout.readline()
            self.answers.append(line.strip().removeprefix("qemu-io> "))
            if not line:
                return

    def end(self) -> None:
        """Stop writing; it must end by itself."""
        self._ending.set()
        self._thread.join(40)
        assert not self._thread.is_alive(), "a write hangs"
        self._process.communicate("quit\n", timeout=20)

    def wait_writes(self, more: int) -> None:
        """Wait until it has made so many *more* writes."""
        goal = len(self.answers) + more
        support.wait_until(lambda: len(self.answers) >= goal, f"{more} more writes")


def test_restart_is_no_error_to_qemu(site: Site) -> None:
    """QEMU with reconnect-delay writes through planned restarts without an error."""
    support.requires_program("qemu-io")
    site.bring_up("direct")
    qemu = Qemu(site)
    for _ in range(3):
        qemu.wait_writes(30)
        site.stop()
        site.serve("direct")
    qemu.wait_writes(30)
    qemu.end()
    failed = [one for one in qemu.answers if not one.startswith("wrote")]
    assert not failed, failed[:3]
    last = (len(qemu.answers) - 1) % BLOCKS
    value = (len(qemu.answers) - 1) // BLOCKS + 1
    site.wait_in_sync()
    assert site.on_both(last * BLOCK, BLOCK) == bytes([value]) * BLOCK
    site.stop()
    site.assert_equal()


def answers_until_the_end(client: RawClient) -> list[raw.Answer]:
    """Return what is answered before the connection ends."""
    found: list[raw.Answer] = []
    with contextlib.suppress(ConnectionError):
        while True:
            found.append(client.answer())
    return found


@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("policy", ["degrade", "stop"])
def test_stop_answers_what_it_took_and_no_more(
    new_site: Callable[..., Site], over: str, policy: str
) -> None:
    """Clients that send on and on get good answers until their connection ends."""
    port = free_port()
    address = {"listen": f"tcp:127.0.0.1:{port}"} if over == "tcp" else {}
    site = new_site(policy=policy, **address)
    site.bring_up("direct")
    client = RawClient(("127.0.0.1", port) if address else site.socket)
    with client:
        transmitting(client)
        written: dict[int, tuple[int, bytes]] = {}

        def send() -> None:
            with contextlib.suppress(OSError):
                for i in range(1 << 20):
                    content = os.urandom(8) * (BLOCK // 8)
                    at = i % 256 * 32 * BLOCK
                    kind = raw.CMD_FLUSH if i % 16 == 9 else raw.CMD_WRITE
                    payload = b"" if kind == raw.CMD_FLUSH else content
                    # An answer of a read is large: some are on their way at the end.
                    if i % 16 == 3:
                        kind, payload = raw.CMD_READ, b""
                    length = 128 * KIB if kind == raw.CMD_READ else len(payload)
                    at = 0 if kind == raw.CMD_FLUSH else at
                    cookie, wire = client.request(kind, at, length, payload=payload)
                    if kind == raw.CMD_WRITE:
                        written[cookie] = (at, content)
                    client.send(wire)

        sender = threading.Thread(target=send)
        sender.start()
        answered = [client.answer() for _ in range(200)]
        stopper = threading.Thread(target=site.stop)
        stopper.start()
        answered += answers_until_the_end(client)
        stopper.join()
        client.close()
        sender.join()
    assert {one.error for one in answered} == {0}
    latest = {
        written[one.cookie][0]: written[one.cookie][1]
        for one in answered
        if one.cookie in written
    }
    # A write that was not answered may be there all the same: each block holds one
    # that was sent last to it.
    for at, content in latest.items():
        later = [c for a, c in written.values() if a == at]
        assert site.on_both(at, BLOCK) in later[later.index(content) :]
    site.assert_equal()


def test_stop_while_writes_wait_for_a_remote(new_site: Callable[..., Site]) -> None:
    """Writes that a held remote keeps are answered, and the stop does not wait."""
    site = new_site(hold="60s")
    site.bring_up("direct")
    with RawClient(site.socket) as client:
        transmitting(client)
        client.write(0, b"before" * 256)
        site.dr.kill()
        site.wait_state("holding")
        for i in range(8):
            client.send(client.request(raw.CMD_WRITE, i * MIB, payload=b"h" * 512)[1])
        support.wait_until(lambda: site.status()["inflight"] == 8, "the writes")
        site.stop()
        answered = answers_until_the_end(client)
    assert [one.error for one in answered] == [0] * 8
    assert site.local.read_bytes()[7 * MIB :][:512] == b"h" * 512
