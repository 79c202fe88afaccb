# SPDX-License-Identifier: BSD-3-Clause
"""
The rows of two nodes: a primary and its secondary, over TCP on this host.

Without TLS they are compared with the same mirror to a plain nbdkit over TCP: what
differs is the server that writes the second copy. With TLS they are compared with the
same pair without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from .fio_rows import begin, closely, compare, finish
from .load import Workload
from .mirror import Mirror
from .model import Context, Measured
from .servers import SetUp, listens, wait_until
from .tls_rows import HOST, RelayMirror, TcpMirror, free_port

__all__ = ["over_nodes"]

NODES = ("alpha", "beta")


class PlainPair(Mirror):
    """Two nodes without TLS; the first one is the primary."""

    key = "nodes"
    title = "two nodes over TCP"
    tls = False

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__(folder, size)
        self._ports = {node: free_port() for node in NODES}

    def prepare(self) -> None:
        """Make images, key and configuration."""
        lines = [f'name = "bench-{self.key.replace("_", "-")}"', f"size = {self.size}"]
        if not self.tls:
            lines.append('tls = "off"')
        for node in NODES:
            image = self._image(f"{node}.img")
            lines += [
                "[[node]]",
                f'name = "{node}"',
                f'address = "{HOST}:{self._ports[node]}"',
                f'local = "{image}"',
                f'state = "{self._state(node)}"',
                f'listen = "unix:{self._listens(node)}"',
            ]
        if self.tls:
            lines += ["[tls]", f'key = "{self.folder / "pair.key"}"']
        self.config.write_text("\n".join(lines) + "\n")
        self.state = self._state(NODES[0])

    def start_servers(self, *options: str) -> None:
        """Create and serve both nodes, and promote the first one."""
        if self.tls:
            self.run_command("key", self.config, "--node", NODES[0])
        for node in NODES:
            self.run_command("create", self.config, "--node", node, *options)
            self._serve(node)
        self.run_command("promote", self.config, "--node", NODES[0])
        self.wait()

    def _state(self, node: str) -> Path:
        return self.folder / f"state-{node}"

    def _listens(self, node: str) -> Path:
        return self.socket if node == NODES[0] else self.folder / f"{node}.sock"

    def _serve(self, node: str) -> None:
        command: list[str | Path] = [sys.executable, "-m", "nbd_mirror", "serve"]
        command += [self.config, "--node", node, "--foreground"]
        process = self._spawn(command, self.package)
        if node == NODES[0]:
            self._server = process
        wait_until(
            lambda: listens(self._listens(node)) or process.poll() is not None,
            lambda: f"{self.title}: {node} to listen",
        )

    def stop(self) -> None:
        """Stop the primary first, so that it does not lose its secondary."""
        self.stop_server()
        SetUp.stop(self)


class SecurePair(PlainPair):
    """The same with TLS."""

    key = "nodes_tls"
    title = "two nodes over TCP with TLS"
    tls = True


PEERS: dict[str, type[SetUp]] = {
    "tcp": TcpMirror,
    "nodes": PlainPair,
    "relay": RelayMirror,
}


def over_nodes(
    workload: Workload, *peers: str, tls: bool = False
) -> Callable[[Context], Measured]:
    """Return a row's run: two nodes, with TLS or without, against *peers*."""

    def run(ctx: Context) -> Measured:
        ours = SecurePair if tls else PlainPair
        set_ups: list[SetUp] = [ours(ctx.folder, ctx.size)]
        set_ups += [PEERS[peer](ctx.folder, ctx.size) for peer in peers]
        for set_up in set_ups:
            begin(ctx, set_up)
        measured = compare(closely(ctx), workload, set_ups)
        for set_up in set_ups:
            finish(set_up)
        return measured

    return run
