# SPDX-License-Identifier: BSD-3-Clause
"""
Secondaries: real NBD servers over an image, that can be killed, frozen, restarted.

Three of different authors, because each promises something else: nbdkit can all,
qemu-nbd locks its image, nbd-server knows no zeroing and forks for each client.
Death is SIGKILL to every process of it, as a host that lost its power would do.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import support

__all__ = ["KINDS", "Secondary"]

KINDS = ("nbdkit", "qemu-nbd", "nbd-server")


class Secondary:
    """
    One server over *image*, listening on a unix socket in *folder*.

    Args:
        processes: starts and surely ends them.
        folder: with a short path.
        name: the remote's.
        kind: one of KINDS, or a subclass's own.
    """

    def __init__(
        self, processes: support.Processes, folder: Path, name: str, kind: str
    ) -> None:
        if kind in KINDS:
            support.requires_program(kind)
        self.name = name
        self.kind = kind
        self.image = folder / f"{name}.img"
        self.socket = folder / f"{name}.sock"
        self.uri = f"nbd+unix:///disk?socket={self.socket}"
        self._conf = folder / f"{name}.nbd-server.conf"
        self._processes = processes
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str | Path) -> None:
        """
        Start it and return once it takes connections.

        Args:
            options: of nbdkit: a filter or `-r`, and the filter's parameters.
        """
        self.socket.unlink(missing_ok=True)
        self._process = self._processes.start(self._command(options))
        support.wait_until(self.answers, f"{self.kind} {self.name} to listen")

    def start_eval(self, *callbacks: str) -> None:
        """Start nbdkit with shell scripts as its plugin, for what no filter can do."""
        self.start_plugin("eval", *callbacks)

    def start_plugin(self, *words: str | Path) -> None:
        """Start nbdkit with another plugin than over its image: *words* name it."""
        assert self.kind == "nbdkit"
        self.socket.unlink(missing_ok=True)
        self._process = self._processes.start(
            ["nbdkit", "-f", "-U", self.socket, *words]
        )
        support.wait_until(self.answers, f"{self.name} to listen")

    def _command(self, options: tuple[str | Path, ...]) -> list[str | Path]:
        words: list[str | Path]
        if self.kind == "qemu-nbd":
            assert not options
            words = ["qemu-nbd", "-k", self.socket, "-x", "disk", "-f", "raw"]
            return [*words, "-t", "--shared=0", "--discard=unmap", self.image]
        if self.kind == "nbd-server":
            assert not options
            self._conf.write_text(
                f"[generic]\nunixsock = {self.socket}\n"
                f"[disk]\nexportname = {self.image}\nflush = true\nfua = true\n"
                "trim = true\n"
            )
            return ["nbd-server", "-C", self._conf, "-p", f"{self._conf}.pid"]
        before = [word for word in options if str(word).startswith("-")]
        behind = [word for word in options if word not in before]
        words = ["nbdkit", "-f", "-U", self.socket]
        return [*words, *before, "file", self.image, *behind]

    def answers(self) -> bool:
        """Tell whether a connection is taken."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect(os.fspath(self.socket))
            except OSError:
                return False
            return True

    def pids(self) -> list[int]:
        """Return its processes, those of its connections included."""
        if self.kind == "nbd-server":
            running = support.marked_processes().items()
            return [pid for pid, words in running if str(self._conf) in words]
        alive = self._process is not None and self._process.poll() is None
        return [self._process.pid] if alive and self._process else []

    def _signal(self, number: signal.Signals) -> None:
        pids = self.pids()
        assert pids, f"{self.name} does not run"
        for pid in pids:
            os.kill(pid, number)

    def kill(self) -> None:
        """Kill it with SIGKILL; return once it is gone. One that aborted is gone."""
        if self._aborted():
            return
        self._signal(signal.SIGKILL)
        support.wait_until(lambda: not self.pids(), f"{self.name} to die")
        if self._process is not None:
            self._process.wait(10)

    def freeze(self) -> None:
        """Stop it from running, its connections stay open (SIGSTOP)."""
        for pid in self.pids():
            support.freeze(pid)

    def revive(self) -> None:
        """
        Start it again if it has aborted, as its unit would.

        nbdkit 1.32 may fail an assertion where a client goes away while its request
        is carried out: that is a death like any other, but none that a test plans.
        """
        if self._aborted():
            self.start()

    def _aborted(self) -> bool:
        return self._process is not None and self._process.poll() == -signal.SIGABRT

    def thaw(self) -> None:
        """Let it run again (SIGCONT)."""
        self._signal(signal.SIGCONT)
