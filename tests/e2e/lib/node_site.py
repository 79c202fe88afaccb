# SPDX-License-Identifier: BSD-3-Clause
"""
Two nodes of a volume: two real servers on two loopback addresses, with a shared key.

They have one configuration file and one host, so each command names its node. Death is
SIGKILL. A role is changed over the control socket, as the commands do it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import support
from e2e.lib.clients import connect, nbd
from e2e.lib.harness import MIB, command, free_port

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.volume import control

__all__ = ["Node", "Pair"]

REGION = 64 << 10


class Node:
    """One node: its files and its server."""

    def __init__(self, pair: Pair, name: str, address: str) -> None:
        self._pair = pair
        self.name = name
        self.address = address
        self.folder = pair.folder / name
        self.state = self.folder / "state"
        self.local = self.folder / "disk.img"
        self.socket = self.folder / "v.sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self._server: subprocess.Popen[bytes] | None = None
        self._serves = 0
        self.log_path = pair.folder / "none"
        self.folder.mkdir()
        with self.local.open("wb") as file:
            file.truncate(pair.size)

    @property
    def table(self) -> str:
        """Its table of the configuration."""
        return (
            f'[[node]]\nname = "{self.name}"\naddress = "{self.address}"\n'
            f'local = "{self.local}"\nstate = "{self.state}"\n'
            f'listen = "unix:{self.socket}"\ndeadline = "2s"\n'
        )

    def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `nbd-mirror WORDS... --node NAME`."""
        done = self._pair.processes.run(
            [*command(), *words, "--node", self.name],
            env={"PYTHONPATH": str(support.ROOT)},
            check=check,
            timeout_s=60,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    def serve(self, fault: str = "") -> None:
        """Start its server, and wait until it answers, or a fault has killed it."""
        assert not self.alive
        self._serves += 1
        logs = self._pair.processes.log_dir
        self.log_path = logs / f"{self.name}.{self._serves}.log"
        shell = ["/bin/sh", "-c", 'exec "$@" >>"$0" 2>&1', str(self.log_path)]
        words = ["serve", str(self._pair.config), "--foreground", "--node", self.name]
        self._server = self._pair.processes.start(
            [*shell, *command(), *words],
            env={"PYTHONPATH": str(support.ROOT), "NBDM_FAULT": fault},
        )
        support.wait_until(
            lambda: not self.alive or self.answers(),
            f"node {self.name} to answer",
            progress=lambda: support.cpu_s(self.pid),
        )
        assert self.alive or fault, self.log

    @property
    def alive(self) -> bool:
        """Whether its server's process runs."""
        return self._server is not None and self._server.poll() is None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._server is not None
        return self._server.pid

    @property
    def log(self) -> str:
        """What the last server has said."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def answers(self) -> bool:
        """Tell whether its server answers."""
        with contextlib.suppress(MirrorError):
            control.call(self.state, "ping", 5.0)
            return True
        return False

    def ask(self, request: str, **args: Any) -> Any:
        """Send a request to the server."""
        return control.call(self.state, request, 20.0, **args)

    def status(self) -> dict[str, Any]:
        """Return the node's part of the status, or nothing without a server."""
        with contextlib.suppress(MirrorError):
            found: dict[str, Any] = control.call(self.state, "status", 10.0)["node"]
            return found
        return {}

    @property
    def role(self) -> str:
        """Its role now, or ""."""
        return str(self.status().get("role", ""))

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self.ended()

    def stop(self) -> None:
        """Have the server end cleanly."""
        os.kill(self.pid, signal.SIGTERM)
        assert self.ended() == 0, self.log

    def ended(self) -> int:
        """Wait until the server has ended; return its exit code, or -signal."""
        assert self._server is not None
        return self._server.wait(30)

    def wait_role(self, role: str) -> None:
        """Wait until it has this role."""
        support.wait_until(
            lambda: self.role == role, f"{self.name} to be {role}\n", timeout_s=30
        )

    def wait_state(self, state: str) -> None:
        """Wait until its own state is this one."""
        support.wait_until(
            lambda: self.status().get("state") == state,
            f"{self.name} to be {state}",
            timeout_s=40,
        )

    def write(self, offset: int, content: bytes) -> None:
        """Write as a client, and flush."""
        client = connect(self.uri)
        client.pwrite(content, offset)
        client.flush()
        client.shutdown()

    def read(self, offset: int, length: int) -> bytes:
        """Read as a client."""
        client = connect(self.uri)
        content = bytes(client.pread(length, offset))
        client.shutdown()
        return content

    def serves_clients(self) -> bool:
        """Tell whether a client gets the volume now."""
        try:
            self.read(0, 512)
        except nbd.Error:
            return False
        return True


class Pair:
    """A volume of the nodes alpha and beta."""

    def __init__(
        self, folder: Path, processes: support.Processes, *, size: int = 8 * MIB
    ) -> None:
        self.folder = folder
        self.processes = processes
        self.size = size
        self.config = folder / "v.toml"
        port = free_port()
        self.alpha = Node(self, "alpha", f"127.0.0.1:{port}")
        self.beta = Node(self, "beta", f"127.0.0.2:{port}")
        self.config.write_text(
            f'name = "v"\nsize = {size}\n[tls]\nkey = "{folder}/v.psk"\n'
            + self.alpha.table
            + self.beta.table
        )
        self.alpha.cli("key", str(self.config))

    @property
    def nodes(self) -> tuple[Node, Node]:
        """Both."""
        return self.alpha, self.beta

    def other(self, node: Node) -> Node:
        """Give the other one of the two."""
        return self.beta if node is self.alpha else self.alpha

    def create(self) -> None:
        """Make both states."""
        for node in self.nodes:
            node.cli("create", str(self.config))

    def bring_up(self) -> None:
        """Serve both, and promote alpha, whose disk has the data."""
        self.create()
        for node in self.nodes:
            node.serve()
        self.alpha.ask("promote", force=False)
        self.alpha.wait_role("primary")
        self.wait_in_sync()

    def wait_in_sync(self) -> None:
        """Wait until one node is primary, and both are in sync."""
        for node in self.nodes:
            node.wait_state("in_sync")

    @property
    def primaries(self) -> list[str]:
        """The nodes that give a client the volume now."""
        return [node.name for node in self.nodes if node.serves_clients()]

    def assert_equal(self) -> None:
        """Stop both nodes, the primary first, and compare their images."""
        for node in sorted(self.nodes, key=lambda one: one.role != "primary"):
            if node.alive:
                node.stop()
        one, other = (node.local.read_bytes() for node in self.nodes)
        differ = [
            at // REGION
            for at in range(0, self.size, REGION)
            if one[at : at + REGION] != other[at : at + REGION]
        ]
        assert not differ, f"regions {differ}"
