# SPDX-License-Identifier: BSD-3-Clause
"""
The hosts of the soak's nodes: a network namespace each, and a router between them.

A node's host can be cut off from the router, so that no end notices, and it can lose
its way to one other host alone: a blackhole route, by which nothing leaves it, while
all that is sent to it still arrives. The router is in a namespace of its own, so that
nothing of it is visible outside.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import support
from e2e.lib.pair import Node, Pair

__all__ = ["NAMES", "Hosts", "Network", "possible"]

NAMES = ("alpha", "beta", "gamma")
NETWORK = "10.79"
FORWARD = "echo 1 >/proc/sys/net/ipv4/ip_forward"
_numbers = itertools.count()


def possible() -> bool:
    """Return whether this process may make namespaces."""
    return os.geteuid() == 0 and bool(shutil.which("ip") and shutil.which("nsenter"))


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=True, timeout=30)


class Network:
    """
    The namespaces of some hosts, and the router.

    Args:
        count: of the hosts.
    """

    def __init__(self, count: int) -> None:
        prefix = f"nbdm-nodes-{os.getpid()}-{next(_numbers)}"
        self._router = f"{prefix}-r"
        self._spaces = [f"{prefix}-{number}" for number in range(count)]
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        router = self._router
        _ip("netns", "add", router)
        _ip("netns", "exec", router, "sh", "-c", FORWARD)
        # What goes to a host without a cable is dropped, and its sender is not told.
        _ip("-n", router, "route", "add", "blackhole", f"{NETWORK}.0.0/16")
        for number, space in enumerate(self._spaces):
            port, way = f"port{number}", f"{NETWORK}.{number}.1"
            _ip("netns", "add", space)
            ends = ("type", "veth", "peer", "name", "eth", "netns", space)
            _ip("-n", router, "link", "add", port, *ends)
            _ip("-n", router, "addr", "add", f"{way}/24", "dev", port)
            _ip("-n", router, "link", "set", port, "up")
            _ip("-n", space, "addr", "add", f"{self.address(number)}/24", "dev", "eth")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth", "up")
            _ip("-n", space, "route", "add", "default", "via", way)

    def address(self, number: int) -> str:
        """Return the address of a host."""
        return f"{NETWORK}.{number}.2"

    def inside(self, number: int) -> list[str]:
        """Return the words that run a command on a host."""
        # Not `ip netns exec`, which mounts anew: a start after a kill would copy more.
        return ["nsenter", f"--net=/run/netns/{self._spaces[number]}"]

    def cut(self, number: int) -> None:
        """Pull the cable of a host, at the router: no host sees it."""
        _ip("-n", self._router, "link", "set", f"port{number}", "down")

    def mend(self, number: int) -> None:
        """Put the cable back."""
        _ip("-n", self._router, "link", "set", f"port{number}", "up")

    def deafen(self, number: int, other: int) -> None:
        """Let nothing of a host reach another one; the other way stays."""
        _ip(
            "-n", self._spaces[number], "route", "add", "blackhole", self.address(other)
        )

    def undeafen(self, number: int, other: int) -> None:
        """Give the way back."""
        _ip(
            "-n", self._spaces[number], "route", "del", "blackhole", self.address(other)
        )

    def close(self) -> None:
        """Remove all of it; processes inside keep what they have until they end."""
        for space in (*self._spaces, self._router):
            subprocess.run(
                ["ip", "netns", "del", space], capture_output=True, check=False
            )


class Hosts(Pair):
    """
    A volume of two or three nodes, each on its host; a plain remote beside them.

    Args:
        plain: the socket of the plain remote's server; None: there is no such remote.
    """

    def __init__(
        self,
        folder: Path,
        processes: support.Processes,
        network: Network,
        count: int,
        *,
        size: int,
        plain: Path | None,
        **keys: str,
    ) -> None:
        self.folder, self.processes, self.size = folder, processes, size
        self.config, self.key = folder / "pg.toml", folder / "pg.key"
        self.tls, self.certificates = True, False
        self.keys = {"hold": "200ms", "late_write_window": "300ms", **keys}
        self._plain = plain
        self._nodes = [
            Node(self, name, network.address(number), network.inside(number))
            for number, name in enumerate(NAMES[:count])
        ]
        self.write_config()

    @property
    def nodes(self) -> tuple[Node, ...]:  # type: ignore[override]
        """All nodes."""
        return tuple(self._nodes)

    def write_config(self) -> None:
        """Write the file that all hosts have."""
        super().write_config()
        if self._plain is not None:
            with self.config.open("a") as file:
                file.write(
                    f'[[remote]]\nname = "plain"\ndeadline = "2s"\n'
                    f'uri = "nbd+unix:///?socket={self._plain}"\n'
                )


def pause(node: Node, frozen: bool) -> None:
    """Stop or continue a node's server, as a host does that hangs for a while."""
    os.kill(node.pid, signal.SIGSTOP if frozen else signal.SIGCONT)


def run_on(node: Node, word: str, *words: str, limit_s: float) -> Sequence[str]:
    """Run a command; return its exit code and what it said. It must end in time."""
    done = node.cli(word, *words, check=False, timeout_s=limit_s)
    return str(done.returncode), (done.stdout + done.stderr).strip()
