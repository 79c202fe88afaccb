# SPDX-License-Identifier: BSD-3-Clause
"""
A network of two namespaces with a real kernel's link between them, for root.

The kernel's own queue makes the link slow (tc), so what is under way waits there, and
TCP's windows limit it. Nothing of it is visible outside the namespaces.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess

__all__ = ["FAR", "PORT", "Network", "possible"]

NEAR, FAR = "10.78.0.1", "10.78.0.2"
PORT = 10809
FASTEST = 1_000_000_000  # bits a second
BURST = 1600  # bytes; a packet
QUEUE = 256 << 10  # bytes that may wait
_numbers = itertools.count()


class Network:
    """
    Two namespaces and the link between them.

    Raises:
        OSError, subprocess.CalledProcessError: impossible on this machine.
    """

    def __init__(self) -> None:
        name = f"nbdm-soak-{os.getpid()}-{next(_numbers)}"
        self._names = (f"{name}-a", f"{name}-b")
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        near, far = self._names
        for name in self._names:
            _ip("netns", "add", name)
        _ip("-n", near, "link", "add", "nbdm", "type", "veth", "peer", "name", "nbdm-p")
        _ip("-n", near, "link", "set", "nbdm-p", "netns", far, "name", "nbdm")
        for name, address in zip(self._names, (NEAR, FAR), strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "nbdm")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "nbdm", "up")

    def command(self, *, far: bool) -> list[str]:
        """Return the command prefix that runs a command at one end."""
        return ["ip", "netns", "exec", self._names[far]]

    def speed(self, up: float | None, back: float | None) -> None:
        """Limit the link to so many bytes a second each way; None: no limit."""
        for name, limit in zip(self._names, (up, back), strict=True):
            rate = min(FASTEST, round(8 * limit)) if limit else FASTEST
            burst = max(BURST, rate // 8 // 250)
            words = ["tc", "-n", name, "qdisc", "replace", "dev", "nbdm", "root", "tbf"]
            words += ["rate", f"{rate}bit", "burst", str(burst), "limit", str(QUEUE)]
            _run(*words)

    def close(self) -> None:
        """Remove all of it; processes inside keep what they have until they end."""
        for name in self._names:
            subprocess.run(
                ["ip", "netns", "del", name], capture_output=True, check=False
            )


def possible() -> bool:
    """Return whether this process may make one."""
    return os.geteuid() == 0 and bool(shutil.which("ip") and shutil.which("tc"))


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True)
