# SPDX-License-Identifier: BSD-3-Clause
"""
A pair: one volume on two nodes, each with its disk, its state and its server.

Both servers are real, and what connects them is TCP and TLS. A node's host dies with
SIGKILL of its server; a link that is cut is of links.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import support
from e2e.lib.clients import connect
from e2e.lib.harness import MIB, command, free_port

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.volume import control

__all__ = ["Node", "Pair"]


class Node:
    """
    One node of a pair.

    Args:
        host: its address, without the port.
        inside: the words that run a command on its host.
    """

    def __init__(
        self, pair: Pair, name: str, host: str, inside: Sequence[str] = ()
    ) -> None:
        self.pair = pair
        self.name = name
        self.address = f"{host}:{free_port()}"
        self.image = pair.folder / f"{name}.img"
        self.state = pair.folder / f"{name}.state"
        self.socket = pair.folder / f"{name}.sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.log_path = pair.folder / "none"
        # The files of X.509, NAME-cert.pem and so on, are each host's own.
        self.tls_folder = pair.folder / f"{name}.tls"
        self.environment = {"PYTHONPATH": str(support.ROOT)}  # of its server
        self._inside = list(inside)
        self._serves = 0
        self._server: subprocess.Popen[bytes] | None = None
        with self.image.open("wb") as file:
            file.truncate(pair.size)

    @property
    def table(self) -> str:
        """Its [[node]] table."""
        return (
            f'[[node]]\nname = "{self.name}"\naddress = "{self.address}"\n'
            f'deadline = "2s"\nlocal = "{self.image}"\nstate = "{self.state}"\n'
            f'listen = "unix:{self.socket}"\n'
        )

    @property
    def config(self) -> Path:
        """The file that its host has."""
        if self.pair.certificates:
            return self.pair.folder / f"{self.name}.toml"
        return self.pair.config

    # --- commands ---

    def cli(
        self, word: str, *words: str, check: bool = True, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run `nbd-mirror WORD CONFIG WORDS...` on this node's host."""
        config = str(self.config)
        done = self.pair.processes.run(
            [*self._inside, *command(), word, config, *words, "--node", self.name],
            env={"PYTHONPATH": str(support.ROOT), "COLUMNS": "200"},
            check=check,
            timeout_s=timeout_s,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    def refused(self, code: int, *words: str) -> str:
        """Run a command that must fail with *code*; return what it says of it."""
        done = self.cli(*words, check=False)
        assert code == done.returncode, done.stdout + done.stderr
        for line in done.stderr.splitlines():
            assert line.startswith(("nbd-mirror: ", "  try: ", "       ")), line
        return done.stderr

    def serve(self) -> None:
        """Start `nbd-mirror serve --foreground`, and wait until it answers."""
        assert not self.alive
        self._serves += 1
        folder = self.pair.processes.log_dir
        self.log_path = folder / f"{self.name}.{self._serves}.log"
        shell = ["/bin/sh", "-c", 'exec "$@" >>"$0" 2>&1', str(self.log_path)]
        words = ["serve", str(self.config), "--foreground", "--node", self.name]
        self._server = self.pair.processes.start(
            [*self._inside, *shell, *command(), *words],
            env=self.environment,
        )
        support.wait_until(
            self._is_ready,
            f"node {self.name} to answer",
            progress=lambda: support.cpu_s(self.pid),
        )

    def _is_ready(self) -> bool:
        if not self.alive:
            pytest.fail(f"the server of {self.name} ended by itself:\n{self.log}")
        try:
            control.call(self.state, "ping", 5.0)
        except MirrorError:
            return False
        return True

    @property
    def alive(self) -> bool:
        """Whether its server's process runs."""
        return self._server is not None and self._server.poll() is None

    @property
    def pid(self) -> int:
        """Its server's process id, the same after a change of role."""
        assert self._server is not None
        return self._server.pid

    @property
    def log(self) -> str:
        """What its last server said so far."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def kill(self) -> None:
        """Kill its server."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._server is not None
        self._server.wait(20)

    def stop(self) -> None:
        """Stop its server cleanly, by the command."""
        self.cli("stop")
        assert self._server is not None
        assert self._server.wait(20) == 0

    # --- what it says ---

    def status(self) -> dict[str, Any]:
        """Return the status as programs get it."""
        answer: dict[str, Any] = json.loads(self.cli("status", "--json").stdout)
        return answer

    def node(self) -> dict[str, Any]:
        """Return its server's word on the nodes."""
        answer = control.call(self.state, "status", 10.0)
        found: dict[str, Any] = answer["node"]
        return found

    def wait_node(
        self, condition: Callable[[dict[str, Any]], object], what: str
    ) -> dict[str, Any]:
        """Wait until what it says of the nodes fulfils *condition*; return it."""
        last: dict[str, Any] = {}

        def holds() -> object:
            try:
                last.update(self.node())
            except MirrorError:  # its role changes just now
                return False
            return condition(last)

        try:
            support.wait_until(holds, what, timeout_s=40)
        except pytest.fail.Exception as error:
            raise AssertionError(f"{error}; last seen: {last}\n{self.log}") from None
        return last

    def wait_in_sync(self) -> None:
        """Wait until it is in sync with the other node."""
        self.cli("wait", "--for", "in_sync", "--timeout", "60s")

    def client(self) -> Any:
        """Return a connected libnbd handle."""
        return connect(self.uri)


class Pair:
    """
    A volume of two nodes, alpha and beta; nothing is created or started.

    Args:
        hosts: an address, and the words that run a command there, of each node.
        tls: the nodes authenticate each other by a key.
        certificates: by certificates instead, in each node's `tls_folder`.
        keys: of the configuration, in addition.
    """

    def __init__(
        self,
        folder: Path,
        processes: support.Processes,
        *,
        size: int = 16 * MIB,
        hosts: Sequence[tuple[str, Sequence[str]]] = (("127.0.0.1", ()),) * 2,
        tls: bool = True,
        certificates: bool = False,
        **keys: str,
    ) -> None:
        self.folder = folder
        self.processes = processes
        self.size = size
        self.config = folder / "pg.toml"
        self.key = folder / "pg.key"
        self.tls = tls
        self.certificates = certificates
        self.keys = {"hold": "200ms", "late_write_window": "300ms", **keys}
        self.alpha, self.beta = (
            Node(self, name, host, inside)
            for name, (host, inside) in zip(("alpha", "beta"), hosts, strict=True)
        )
        self.write_config()

    @property
    def nodes(self) -> tuple[Node, Node]:
        """Both nodes."""
        return self.alpha, self.beta

    def write_config(self) -> None:
        """Write the file that both nodes have, or with certificates each its own."""
        lines = ['name = "pg"', f"size = {self.size}"]
        lines += [f'{key} = "{value}"' for key, value in self.keys.items()]
        lines += [] if self.tls else ['tls = "off"']
        tls = f'[tls]\nkey = "{self.key}"\n' if self.tls else ""
        tables = "".join(node.table for node in self.nodes)
        self.config.write_text("\n".join(lines) + f"\n{tables}{tls}")
        if self.certificates:
            for node in self.nodes:
                files = (
                    f'certificate = "{node.tls_folder}/{node.name}-cert.pem"\n'
                    f'private_key = "{node.tls_folder}/{node.name}-key.pem"\n'
                    f'ca = "{node.tls_folder}/ca-cert.pem"\n'
                )
                head = "\n".join(lines)
                node.config.write_text(f"{head}\n{tables}[tls]\n{files}")

    def set_up(self) -> None:
        """Make the key, and create and serve both nodes."""
        if self.tls and not self.certificates:
            self.alpha.cli("key")
        for node in self.nodes:
            node.cli("create")
            node.serve()

    def bring_up(self) -> None:
        """Set up, promote alpha, and wait until both are in sync."""
        self.set_up()
        self.alpha.cli("promote")
        for node in self.nodes:
            node.wait_in_sync()

    def assert_equal(self) -> None:
        """Fail unless both images hold the same bytes."""
        mine, other = (node.image.read_bytes() for node in self.nodes)
        differ = [
            at
            for at in range(0, self.size, 4096)
            if mine[at : at + 4096] != other[at : at + 4096]
        ]
        assert not differ, f"{len(differ)} blocks differ, the first at {differ[0]}"
