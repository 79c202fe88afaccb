# SPDX-License-Identifier: BSD-3-Clause
"""
Two hosts, used by README's words: a plain nbdkit there, `nbd-mirror` here.

Each host is a network namespace. The commands are programs, as an operator starts
them, and the next command is the one that the last status names.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import support
from e2e.lib.harness import MIB
from e2e.lib.links import LinkSite

pytestmark = pytest.mark.slow


class TwoHosts(LinkSite):
    """The primary here; its server runs in the background, as `serve` leaves it."""

    secondary: subprocess.Popen[bytes]

    def primary(self, *words: str) -> str:
        """Run a command on the primary; it must succeed."""
        # Not `ip netns exec`, which mounts anew: a start after a kill would copy more.
        inside = ["nsenter", f"--net=/run/netns/{self.link.near}"]
        done = self.processes.run(
            [*inside, *self.command(), words[0], str(self.config), *words[1:]],
            env=self.environment(),
        )
        assert "Traceback" not in done.stderr
        return done.stdout

    def told(self) -> str:
        """Return the command that the status names for the remote."""
        found = re.search(r"^ +try: nbd-mirror (resume \S+ dr)", self.shown(), re.M)
        assert found is not None, self.shown()
        return found[1]

    def shown(self) -> str:
        """Return what `status` shows."""
        return self.primary("status")

    def wait_shown(self, words: str) -> None:
        """Wait until `status` shows *words*, at most 15 s."""
        support.wait_until(lambda: words in self.shown(), words, timeout_s=15)

    def kill_server(self) -> None:
        """Kill the server in the background."""
        pid = int(self.status()["pid"])
        os.kill(pid, signal.SIGKILL)
        support.wait_until(lambda: not support.is_running(pid), "the server to end")


@pytest.fixture
def hosts(run_dir: Path, processes: support.Processes, netns_prefix: str) -> TwoHosts:
    """Give two hosts with a volume that is created and in sync."""
    site = TwoHosts(run_dir, processes, netns_prefix, size=48 * MIB)
    site.fill(site.local, 16 * MIB)
    site.secondary = site.serve_far()
    for words in (["create"], ["serve"], ["wait", "--for", "in_sync"]):
        site.primary(*words)
    return site


@contextmanager
def watched(site: TwoHosts) -> Iterator[list[str]]:
    """Run `watch` into a file; give the lines in it once the block has ended."""
    lines: list[str] = []
    log = site.folder / "watch.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*site.command(), "watch", str(site.config)],
            env={**os.environ, **site.environment()},
            stdout=out,
            stderr=out,
        )
    support.wait_until(lambda: log.stat().st_size, "watch to show the volume")
    try:
        yield lines
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        lines += log.read_text().splitlines()


def test_cable_is_pulled_and_server_freezes_under_load(hosts: TwoHosts) -> None:
    """The status is never wrong, what it names helps, and no client sees an error."""
    far = hosts.secondary
    with watched(hosts) as lines:
        load = hosts.load(flush_every=5)
        hosts.link.cut()
        hosts.wait_shown("dr     out_of_sync")
        assert "why: " in hosts.shown()
        command = hosts.told()
        hosts.link.mend()
        assert command == f"resume {hosts.config} dr"
        hosts.primary("resume", "dr")
        hosts.primary("wait", "--for", "in_sync", "--timeout", "30s")
        os.killpg(far.pid, signal.SIGSTOP)
        try:
            hosts.wait_shown("dr     out_of_sync")
            assert hosts.told()
        finally:
            os.killpg(far.pid, signal.SIGCONT)
        hosts.primary("wait", "--for", "in_sync", "--timeout", "60s")
        hosts.processes.kill(far)
        hosts.wait_shown("dr     out_of_sync")
        hosts.serve_far()
        hosts.primary("resume", "dr")
        hosts.primary("wait", "--for", "in_sync", "--timeout", "30s")
        load.stop()
    assert load.errors == []
    seen = [line.split(" ", 1)[1] for line in lines]
    assert sum(line == "dr: in_sync" for line in seen) >= 4
    assert any(line.startswith("dr: resyncing, ") for line in seen)
    hosts.primary("stop")
    hosts.assert_equal()


def test_primary_is_killed_and_served_again(hosts: TwoHosts) -> None:
    """The status says what is not known, and the next start copies only that."""
    handle = hosts.client()
    handle.pwrite(os.urandom(MIB), 8 * MIB)
    hosts.kill_server()
    shown = hosts.shown()
    assert "stopped" in shown
    assert "did not stop cleanly" in shown
    hosts.primary("serve")
    hosts.primary("wait", "--for", "in_sync", "--timeout", "30s")
    assert "stopped cleanly" in hosts.primary("stop")
    hosts.assert_equal()
    copied = re.findall(
        r"resync_done: (\d+) bytes", (hosts.state / "serve.log").read_text()
    )
    assert int(copied[-1]) <= 2 * MIB
