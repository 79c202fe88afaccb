# SPDX-License-Identifier: BSD-3-Clause
"""
A mirror inside the guest: served, attached, killed and served again.

Runs as one Python process, because starting one takes seconds on an emulated CPU:
only the server itself is started as a command. Nothing here waits without a bound,
so that the guest comes to its end, or says where it hangs, before it is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbd_mirror import attach, config, control, create
from nbd_mirror.errors import MirrorError

__all__ = ["Mirror", "note", "result", "run", "wait_until"]

BEGIN = time.monotonic()
WAIT_S = 120.0
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def note(words: str) -> None:
    """Say what is going on, for whoever has to find out why a test failed."""
    print(f"=== {time.monotonic() - BEGIN:6.1f} s: {words}", flush=True)


def result(name: str, value: object) -> None:
    """Print a line that the test looks at."""
    print(f"RESULT {name} {value}", flush=True)


def run(*command: str | Path, ok: tuple[int, ...] = (0,)) -> str:
    """Run a program to its end and return what it said; raises RuntimeError."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=WAIT_S,
        check=False,
        env={**os.environ, "PATH": PATH, "LC_ALL": "C.UTF-8"},
    )
    if done.returncode not in ok:
        message = f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}"
        raise RuntimeError(message)
    return done.stdout


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return once *condition* is true; raise RuntimeError if it never is."""
    until = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(0.02)


class Mirror:
    """
    A volume with one remote, an nbdkit over *far*.

    Args:
        folder: for sockets and logs.
        local: the local disk, a file or a block device.
        far: the remote's.
        device: such as /dev/nbd0.
        state: the state directory; not given: in *folder*.
        region_size: as in the configuration.
    """

    def __init__(
        self,
        folder: Path,
        local: Path,
        far: Path,
        device: str,
        *,
        state: Path | None = None,
        region_size: str = "64KiB",
    ) -> None:
        self.folder = folder
        self.local = local
        self.far = far
        self.device = device
        self.point = folder / "mnt"
        self.point.mkdir(parents=True)
        self._server: subprocess.Popen[bytes] | None = None
        self._secondary: subprocess.Popen[bytes] | None = None
        path = folder / "v.toml"
        path.write_text(
            f'name = "{folder.name}"\nsize = "adopt"\nlocal = "{local}"\n'
            f'state = "{state or folder / "state"}"\n'
            f'listen = "unix:{folder}/v.sock"\nhold = "1s"\n'
            f'region_size = "{region_size}"\n'
            'late_write_window = "1s"\n[[remote]]\nname = "far"\n'
            f'uri = "nbd+unix:///?socket={folder}/far.sock"\ndeadline = "20s"\n'
        )
        self.config = config.load(path)

    # --- processes ---

    def _start(self, log: str, *command: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as out:
            return subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def start_secondary(self) -> None:
        """Start the secondary and return once it takes connections."""
        path = self.folder / "far.sock"
        path.unlink(missing_ok=True)
        # By nbdkit itself: as of 1.32 it may fail an assertion when the primary is
        # killed, and its unit would start it again.
        self._secondary = self._start(
            "far.log", "nbdkit", "-f", "-U", path, "file", self.far
        )

        def listens() -> bool:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                return probe.connect_ex(str(path)) == 0

        wait_until(listens, "the secondary to listen")

    def revive_secondary(self) -> None:
        """Start the secondary unless it runs."""
        if self._secondary is None or self._secondary.poll() is not None:
            self.start_secondary()

    def kill_secondary(self) -> None:
        """Kill the secondary."""
        if self._secondary is not None:
            self._secondary.kill()
            self._secondary.wait()
            self._secondary = None

    def create(self, *assume: str) -> None:
        """Create the volume."""
        create.create_volume(self.config, assume, force=False)

    def serve(self) -> None:
        """Start the server; `wait_served` waits for it."""
        assert self._server is None
        command = (sys.executable, "-m", "nbd_mirror", "serve", self.config.source)
        self._server = self._start("serve.log", *command, "--foreground")

    def wait_served(self) -> None:
        """Return once the server answers."""
        wait_until(self._answers, "the server to answer")

    def _answers(self) -> bool:
        assert self._server is not None
        if self._server.poll() is not None:
            raise RuntimeError(f"the server ended: {self._server.returncode}")
        try:
            control.call(self.config.state_dir, "ping", 10.0)
        except MirrorError:
            return False
        return True

    def kill(self) -> None:
        """Kill the server as a crash would."""
        assert self._server is not None
        os.kill(self._server.pid, signal.SIGKILL)
        self._server.wait()
        self._server = None

    def pids(self) -> dict[str, int]:
        """Return the process ids of the server and of the secondary."""
        assert self._server is not None
        assert self._secondary is not None
        return {"primary": self._server.pid, "remote": self._secondary.pid}

    def stop(self) -> None:
        """Stop the server cleanly."""
        assert self._server is not None
        control.call(self.config.state_dir, "stop", WAIT_S)
        if self._server.wait(WAIT_S) != 0:
            raise RuntimeError(f"stop: exit code {self._server.returncode}")
        self._server = None

    def remote(self) -> dict[str, Any]:
        """Return the remote's part of the status."""
        status = control.call(self.config.state_dir, "status", 30.0)
        found: dict[str, Any] = status["remotes"][0]
        return found

    def wait_for(self, state: str) -> None:
        """Wait until the remote is in a state."""

        def reached() -> bool:
            if state == "in_sync":
                self.revive_secondary()
            return bool(self.remote()["state"] == state)

        wait_until(reached, f"{self.folder.name} to be {state}")

    # --- the device ---

    def attach(self) -> None:
        """Attach the kernel's device, with the time limits of `nbd-mirror attach`."""
        size = self.local_size()
        attach.attach(self.config, size, self.device)

    def local_size(self) -> int:
        """Return the size of the local disk."""
        with self.local.open("rb") as disk:
            return disk.seek(0, os.SEEK_END)

    def detach(self) -> None:
        """Detach it, whether its server lives or not."""
        attach.detach(self.config)

    def mount(self) -> None:
        """Mount the device; the file system replays its journal."""
        run("mount", self.device, self.point)

    def unmount(self) -> None:
        """Unmount it."""
        run("umount", self.point)

    def logs(self) -> str:
        """Return the ends of the logs."""
        parts = []
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-40:]
            parts.append("\n".join([f"--- {self.folder.name}/{log.name}", *lines]))
        return "\n".join(parts)
