# SPDX-License-Identifier: BSD-3-Clause
"""
A site whose secondary is behind a link of its own, as slow as a test wants it.

Two network namespaces with a pair of interfaces between them: the mirror's server runs
in the one, nbdkit in the other, and tc shapes the traffic of the mirror. Images, state
and control socket are in the folder as usual.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import support
from e2e.lib.harness import Site

__all__ = ["Link", "LinkSite"]

NEAR, FAR, PORT = "10.77.0.1", "10.77.0.2", 10809


class Link:
    """
    A link between two namespaces; both are gone when the test is over.

    Args:
        processes: end the link with the test.
        prefix: of the namespaces' names.
    """

    def __init__(self, processes: support.Processes, prefix: str) -> None:
        support.requires(os.geteuid() == 0, "network namespaces need root")
        support.requires_program("ip", "tc", "nbdkit")
        self.near, self.far = f"{prefix}near", f"{prefix}far"
        processes.on_exit(self._remove)
        for name in (self.near, self.far):
            run("ip", "netns", "add", name)
        ends = ["veth", "peer", "name", "far", "netns", self.far]
        run("ip", "link", "add", "near", "netns", self.near, "type", *ends)
        for name, end, address in ((self.near, "near", NEAR), (self.far, "far", FAR)):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
            run("ip", "-n", name, "link", "set", end, "up")

    def shape(self, rate: str) -> None:
        """Let no more than *rate* through, in either direction."""
        # A queue that is deep: where it drops, TCP itself is silent for a second and
        # more at such rates, and no server can be told from a dead one.
        for name, end in ((self.near, "near"), (self.far, "far")):
            tbf = ["tbf", "rate", rate, "burst", "8kb", "latency", "5s"]
            run(
                *("ip", "netns", "exec", name, "tc", "qdisc", "replace"),
                *("dev", end, "root", *tbf),
            )

    def cut(self) -> None:
        """Pull the cable: nothing comes through, and neither end notices."""
        run("ip", "-n", self.far, "link", "set", "far", "down")

    def mend(self) -> None:
        """Put it back."""
        run("ip", "-n", self.far, "link", "set", "far", "up")

    def _remove(self) -> None:
        for name in (self.near, self.far):
            subprocess.run(
                ["ip", "netns", "del", name],
                check=False,
                timeout=30,
                stderr=subprocess.DEVNULL,
            )


def run(*words: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True, timeout=30)


class InNamespace:
    """Starts processes in a network namespace; else as what it stands for."""

    def __init__(self, processes: support.Processes, name: str) -> None:
        self._processes = processes
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processes, name)

    def start(
        self,
        words: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start *words* there."""
        inside = ["ip", "netns", "exec", self._name, *words]
        return self._processes.start(inside, env=env)


class LinkSite(Site):
    """A site with one nbdkit at the far end of a link."""

    def __init__(
        self,
        folder: Path,
        processes: support.Processes,
        prefix: str,
        *,
        size: int,
        deadline: str = "1s",
        **keys: str,
    ) -> None:
        self.link = Link(processes, prefix)
        super().__init__(folder, processes, size=size, **keys)
        self.deadline = deadline
        self.dr.uri = f"nbd://{FAR}:{PORT}"
        self.write_config()
        self.processes = InNamespace(processes, self.link.near)  # type: ignore[assignment]
        self._far = InNamespace(processes, self.link.far)

    def serve_far(self) -> subprocess.Popen[bytes]:
        """Start the secondary, and return it once it listens."""
        words: list[str | Path] = ["nbdkit", "-f", "-i", FAR, "-p", str(PORT)]
        words += ["file", self.dr.image]
        process = self._far.start(words)
        probe = f"nbdinfo --size nbd://{FAR}:{PORT} >/dev/null 2>&1"
        inside = ["ip", "netns", "exec", self.link.near, "sh", "-c", probe]
        support.wait_until(
            lambda: subprocess.run(inside, check=False, timeout=30).returncode == 0,
            "the secondary to listen",
        )
        return process
