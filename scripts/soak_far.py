# SPDX-License-Identifier: BSD-3-Clause
"""
A secondary of the soak and the link to it, and the signals that break either.

Several faults may hold one of them down at once, each ending by itself; so they are
counted, and only the last to end mends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import support
from e2e.servers import Secondary

__all__ = ["Far"]

LINK = Path(__file__).with_name("soak_link.py")


class Far:
    """
    A secondary and the link to it.

    A *volatile* one is an nbdkit whose cache is written back by flushes alone: what
    was not flushed is lost with it.
    """

    def __init__(self, folder: Path, server: Secondary, *, volatile: bool) -> None:
        self.server = server
        self.name = server.name
        self.volatile = volatile
        self._folder = folder
        self._link: Any = None
        self.broken = 0  # how many faults hold it down on purpose
        self.link_broken = 0
        server.uri = f"nbd+unix:///disk?socket={folder}/{self.name}.link"

    def start(self) -> None:
        """Start the server."""
        self.server.start(*(["--filter=cache"] if self.volatile else []))

    def start_link(self) -> None:
        """Start the link."""
        listen = self._folder / f"{self.name}.link"
        self._link = self.server._processes.start(
            [sys.executable, LINK, listen, self.server.socket]
        )
        support.wait_until(listen.exists, "the link")

    def signal(self, number: signal.Signals) -> None:
        """Signal every process of the server; some may have ended."""
        for pid in self.server.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill the server, return once all of it is gone."""
        support.wait_until(self._is_killed, f"{self.name} to die")

    def _is_killed(self) -> bool:
        self.signal(signal.SIGKILL)
        return not self.server.pids()

    def signal_link(self, number: signal.Signals) -> None:
        """Signal the link; return once it is dead if that was to kill it."""
        os.kill(self._link.pid, number)
        if number == signal.SIGKILL:
            self._link.wait(10)

    @property
    def died(self) -> bool:
        """Whether it died and nobody killed it; nbd-server, a daemon, cannot tell."""
        process = self.server._process
        if self.server.kind == "nbd-server":
            return False
        return not self.broken and process is not None and process.poll() is not None

    @property
    def death(self) -> int:
        """Give the exit status of one that died."""
        assert self.server._process is not None
        return int(self.server._process.returncode)
