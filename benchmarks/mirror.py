# SPDX-License-Identifier: BSD-3-Clause
"""
Our own mirror as a set-up, in separate steps, for rows that do more than load it.

It asks the server over its control socket, and reads the dirty map from its file: the
first shows whether it mirrors, the second how far a resync is, at no cost for the
server.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbd_mirror.base.errors import NotRunningError
from nbd_mirror.volume import control
from nbd_mirror.volume.mapview import DirtyMaps, open_map

from .model import BenchError
from .servers import (
    ROOT,
    START_TIMEOUT_S,
    NbdkitFile,
    Proxy,
    QemuMirror,
    SetUp,
    TwoCopies,
    end,
    environment_of,
    listens,
    uri_of,
    wait_until,
)

__all__ = ["KINDS", "LibnbdMirror", "Mirror", "PythonMirror"]

REMOTE = "far"  # the name of the one remote


class Mirror(SetUp):
    """
    Our mirror, through the direct door unless a subclass names another.

    Args:
        state: the directory of its logs, if not beside the images.
        package: the folder of the package to serve with.
        keys: of the configuration, in addition to those of every mirror.
        far_socket: the socket that the mirror connects to, if not the remote's own.
    """

    key = "direct"
    title = "nbd_mirror, direct door"
    door = "direct"
    environment: Mapping[str, str] = {}

    def __init__(
        self,
        folder: Path,
        size: int,
        *,
        key: str = "",
        state: Path | None = None,
        package: Path = ROOT,
        keys: Mapping[str, str] | None = None,
        far_socket: Path | None = None,
    ) -> None:
        super().__init__(folder, size, key=key)
        self.state = state or self.folder / "state"
        self.package = package
        self.config = self.folder / "volume.toml"
        self.far_listens = self.folder / "remote.sock"
        self.far_socket = far_socket or self.far_listens
        self._keys = dict(keys or {})
        self._far: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._since = ""

    def start(self) -> None:
        """Create and serve a volume, and wait until it is in sync."""
        self.prepare()
        self.start_servers()

    @property
    def far_uri(self) -> str:
        """The address of the remote, for the mirror."""
        return uri_of(self.far_socket)

    # --- step by step, for rows that need more than `start` ---

    def prepare(self) -> None:
        """Make images and configuration."""
        self._image("local.img")
        self._image("remote.img")
        keys = {
            "name": f"bench-{self.key.replace('_', '-')}",
            "local": str(self.images[0]),
            "state": str(self.state),
            "listen": f"unix:{self.socket}",
            **self._keys,
        }
        lines = [f'{key} = "{value}"' for key, value in keys.items()]
        lines += [f"size = {self.size}", "", "[[remote]]", f'name = "{REMOTE}"']
        lines.append(f'uri = "{self.far_uri}"')
        self.config.write_text("\n".join(lines) + "\n")

    def start_servers(self, *options: str) -> None:
        """Create the volume with *options*, and serve it."""
        self.start_far()
        self.create(*options)
        self.serve()
        self.wait()

    def start_far(self, *options: str, filters: tuple[str, ...] = ()) -> None:
        """Start the remote's server."""
        self._far = self.nbdkit_file(
            self.images[1], self.far_listens, *options, filters=filters
        )

    def stop_far(self, *, kill: bool = False) -> None:
        """End the remote's server."""
        assert self._far
        if kill:
            self._far.kill()
        end(self._far)
        self._processes.remove(self._far)
        self._far = None

    def create(self, *options: str) -> None:
        """Format the state."""
        self.run_command("create", self.config, *options)

    def serve(self) -> None:
        """Start the server; return when its socket is there."""
        process = self.spawn_server()
        wait_until(
            lambda: listens(self.socket) or process.poll() is not None,
            lambda: f"{self.title} to listen",
        )

    def spawn_server(self) -> subprocess.Popen[bytes]:
        """Start the server without waiting for it."""
        command: list[str | Path] = [sys.executable, "-m", "nbd_mirror"]
        command += ["serve", self.config, "--foreground", "--door", self.door]
        self._server = self._spawn(command, self.package, self.environment)
        return self._server

    def wait(self, state: str = "in_sync") -> None:
        """Wait until the remote is in a state, and the server reports it."""
        wait_until(
            lambda: self.remote()["state"] == state,
            lambda: f"{self.title} to be {state}; it is {self._words()}",
        )

    def status(self) -> dict[str, Any]:
        """Return the server's status; waits for one that is still starting."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                found: dict[str, Any] = control.call(self.state, "status")
            except NotRunningError:
                running = self._server is not None and self._server.poll() is None
                if not running or time.monotonic() > deadline:
                    words = self.log_of(sys.executable).read_text(errors="replace")
                    raise BenchError(f"{self.title} ended: {words.strip()}") from None
                time.sleep(0.01)
            else:
                return found

    def remote(self) -> dict[str, Any]:
        """Return the status of the remote."""
        found: dict[str, Any] = self.status()["remotes"][0]
        return found

    def command(self, name: str) -> None:
        """Send the server a command about the remote."""
        control.call(self.state, name, remote=REMOTE)

    def maps(self) -> DirtyMaps:
        """Open the remote's dirty map; reading it costs the server nothing."""
        return open_map(self.state / f"dirty.{REMOTE}")

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._server
        return self._server.pid

    # --- what every set-up does ---

    def mark(self) -> None:
        """Store since when it is in sync."""
        self._since = self.remote()["since"]

    def check(self) -> None:
        """Check the server's status: a mirror that lost its remote would be fast."""
        remote = self.remote()
        if remote["state"] != "in_sync":
            raise BenchError(f"{self.title} is {self._words()}")
        if self._since and remote["since"] != self._since:
            raise BenchError(f"{self.title} was not in sync throughout")

    def stop_server(self) -> None:
        """Stop the mirror cleanly; its remote's server keeps running."""
        if self._server is not None:
            end(self._server)
            self._processes.remove(self._server)
            self._server = None

    def stop(self) -> None:
        """Stop the mirror first, so that it does not lose its remote."""
        self.stop_server()
        super().stop()
        self._far = None

    def run_command(self, *words: str | Path) -> None:
        """Run an nbd-mirror command."""
        command = [sys.executable, "-m", "nbd_mirror", *(str(word) for word in words)]
        done = subprocess.run(
            command,
            cwd=self.package,
            env=environment_of(self.environment),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BenchError(f"{self.title}: nbd-mirror {words[0]}: {done.stderr}")

    def _words(self) -> str:
        status = self.status()
        remote = status["remotes"][0]
        return f"{remote['state']}: {status['reason'] or remote['reason']}"


class LibnbdMirror(Mirror):
    """Our mirror, which sends to its remote through libnbd."""

    key = "libnbd"
    title = "nbd_mirror over libnbd's transport"
    environment: Mapping[str, str] = {"NBDM_TRANSPORT": "libnbd"}


class PythonMirror(Mirror):
    """Our mirror, the Python door."""

    key = "python"
    title = "nbd_mirror, Python door"
    door = "python"


KINDS: dict[str, type[SetUp]] = {
    kind.key: kind
    for kind in (
        NbdkitFile,
        Proxy,
        TwoCopies,
        Mirror,
        LibnbdMirror,
        PythonMirror,
        QemuMirror,
    )
}
