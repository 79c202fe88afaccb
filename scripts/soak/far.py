# SPDX-License-Identifier: BSD-3-Clause
"""
A secondary of the soak and the link to it, and the signals that break either.

Several faults may hold one of them down at the same time, and each ends by itself. So
they are counted, and only the last one to end repairs it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any

import support
from e2e.lib.servers import Secondary

from .net import FAR, PORT, Network

__all__ = ["Far"]

LINK = Path(__file__).with_name("link.py")
SLOW_DISK = Path(support.__file__).parent / "e2e" / "lib" / "slow_disk.py"


class Far:
    """
    A secondary and the link to it.

    A "volatile" one is an nbdkit whose cache is written back only by flushes, so
    unflushed data is lost with it. A "slow-disk" is one whose flushes take as long as
    those of a disk of *rate* bytes a second. With a *network* the link leads through
    it.
    """

    def __init__(
        self,
        folder: Path,
        server: Secondary,
        kind: str,
        rate: int,
        network: Network | None,
    ) -> None:
        self.server = server
        self.name = server.name
        self.volatile = kind == "volatile"
        self.network = network
        self._slow_disk = rate if kind == "slow-disk" else 0
        self._folder = folder
        self._speed = folder / f"{self.name}.speed"
        self.speed("-", "-")
        self._link: Any = None
        self._back: Any = None  # the link's far end, over a network
        self.broken = 0  # number of faults that hold it down on purpose
        self.link_broken = 0
        server.uri = f"nbd+unix:///disk?socket={folder}/{self.name}.link"

    def start(self) -> None:
        """Start the server."""
        if self._slow_disk:
            rate = self._folder / f"{self.name}.rate"
            rate.write_text(str(self._slow_disk))
            words = (f"image={self.server.image}", f"rate={rate}")
            self.server.start_plugin("python", SLOW_DISK, *words)
            return
        self.server.start(*(["--filter=cache"] if self.volatile else []))

    def start_link(self) -> None:
        """Start the link."""
        start = self.server._processes.start
        listen = self._folder / f"{self.name}.link"
        target: str | Path = self.server.socket
        front: list[str] = []
        if self.network is not None:
            front, target = self.network.command(far=False), f"{FAR}:{PORT}"
            words: list[str | Path] = [LINK, target, self.server.socket, self._speed]
            self._back = start(
                [*self.network.command(far=True), sys.executable, *words]
            )
        self._link = start([*front, sys.executable, LINK, listen, target, self._speed])
        support.wait_until(listen.exists, "the link")

    def speed(self, up: str, back: str) -> None:
        """Limit the link, in the format of link.py; at once, connections stay."""
        if self.network is not None and up != "early" and float(up.strip("-") or 1):
            limits = [None if word == "-" else float(word) for word in (up, back)]
            self.network.speed(*limits)
            up = back = "-"
        new = self._speed.with_suffix(".new")
        new.write_text(f"{up} {back}\n")
        new.replace(self._speed)

    def signal(self, number: Signals) -> None:
        """Signal every process of the server; some may have ended."""
        for pid in self.server.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill the server; return once all its processes have ended."""
        support.wait_until(self._is_killed, f"{self.name} to die")

    def _is_killed(self) -> bool:
        self.signal(SIGKILL)
        return not self.server.pids()

    def signal_link(self, number: Signals) -> None:
        """Signal the link; if the signal kills it, return once it is dead."""
        os.kill(self._link.pid, number)
        if number == SIGKILL:
            self._link.wait(10)
            if self._back is not None:
                self._back.kill()
                self._back.wait(10)

    @property
    def died(self) -> bool:
        """Whether it died by itself; unknown for nbd-server, a daemon."""
        process = self.server._process
        if self.server.kind == "nbd-server":
            return False
        return not self.broken and process is not None and process.poll() is not None

    @property
    def death(self) -> int:
        """Return the exit status of a server that died."""
        assert self.server._process is not None
        return int(self.server._process.returncode)
