# SPDX-License-Identifier: BSD-3-Clause
"""
A site: one volume with its local image, its secondaries and its server.

Everything is the real thing: the server is what `nbd-mirror serve` becomes, and
death is SIGKILL. Only what a test waits for again and again (status) is asked over
the control socket in this process, because the command costs half a second.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from e2e.lib.clients import Load, connect, differing_regions, dirty_set
from e2e.lib.faulty import Faulty
from e2e.lib.servers import Secondary

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.base.units import parse_size
from nbd_mirror.commands.create import create_volume
from nbd_mirror.volume import config as config_module
from nbd_mirror.volume import control

__all__ = ["MIB", "Site", "command", "free_port"]

MIB = 1 << 20


def command() -> list[str]:
    """Return the command `nbd-mirror`: the installed one, else from the checkout."""
    installed = Path(sys.executable).with_name("nbd-mirror")
    if installed.exists():
        return [str(installed)]
    return [sys.executable, "-m", "nbd_mirror"]


def free_port() -> int:
    """
    Return a TCP port of localhost on which no server listens.

    None that the kernel gives to clients: another test's would take it first.
    """
    lowest, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    while True:
        port = random.SystemRandom().randrange(1024, int(lowest))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def shared_site(door: str, *, size: int, filled: int) -> Iterator[Site]:
    """
    Give a volume in sync, for the tests of a whole file.

    At the end it is stopped cleanly, and its images must be equal.

    Args:
        door: that serves it.
        size: of it, bytes.
        filled: bytes of it that hold data.
    """
    folder = Path(tempfile.mkdtemp(prefix="nbdm-"))
    (folder / "logs").mkdir()
    processes = support.Processes(folder / "logs")
    try:
        site = Site(folder, processes, size=size)
        site.fill(site.local, filled)
        site.bring_up(door)
        yield site
        site.stop()
        site.assert_equal()
    finally:
        processes.close()
        shutil.rmtree(folder)


def copying(disk: dict[str, Any], timeout_s: float | None) -> dict[str, Any]:
    """
    Say how long `wait_until` may wait for a disk that may be copied to.

    Args:
        disk: its status, as it was seen last.
        timeout_s: as of `Site.wait_remote`.
    """
    if timeout_s is not None:
        return {"timeout_s": timeout_s}
    return {"progress": lambda: disk.get("copied_bytes")}


class Site:
    """
    A volume and all that belongs to it, in *folder*.

    Args:
        folder: with a short path, for sockets.
        processes: starts and surely ends them.
        size: of the volume, bytes.
        remotes: the kind of each secondary, or "faulty"; they are named dr, dr1, ...
        keys: of the configuration, in the place of the defaults below.
    """

    def __init__(
        self,
        folder: Path,
        processes: support.Processes,
        *,
        size: int = 32 * MIB,
        remotes: Iterable[str] = ("nbdkit",),
        **keys: str,
    ) -> None:
        self.folder = folder
        self.processes = processes
        self.size = size
        self.local = Path(keys.get("local", folder / "local.img"))
        self.state = folder / "state"
        self.socket = folder / "v.sock"
        self.config = folder / "v.toml"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.keys = {
            "name": "v",
            "size": "adopt",
            "local": str(self.local),
            "state": str(self.state),
            "listen": f"unix:{self.socket}",
            "region_size": "64KiB",
            "hold": "200ms",
            "late_write_window": "300ms",
            **keys,
        }
        self.deadline = "2s"
        self.secondaries = [
            (Faulty if kind == "faulty" else Secondary)(
                processes, folder, f"dr{i or ''}", kind
            )
            for i, kind in enumerate(remotes)
        ]
        self.region_size = parse_size(self.keys["region_size"])
        self.log_path = folder / "none"
        self._serves = 0
        self._server: subprocess.Popen[bytes] | None = None
        for image in (self.local, *(one.image for one in self.secondaries)):
            with image.open("wb") as file:
                file.truncate(size)
        self.write_config()

    @property
    def dr(self) -> Secondary:
        """The first secondary."""
        return self.secondaries[0]

    @property
    def faulty(self) -> Faulty:
        """The first secondary, of the kind "faulty"."""
        assert isinstance(self.dr, Faulty)
        return self.dr

    def write_config(self) -> None:
        """Write the configuration as *keys* and *secondaries* are by now."""
        lines = [
            f"{key} = {value}" if value.isdecimal() else f'{key} = "{value}"'
            for key, value in self.keys.items()
        ]
        for one in self.secondaries:
            lines += ["[[remote]]", f'name = "{one.name}"', f'uri = "{one.uri}"']
            lines += [f'deadline = "{self.deadline}"']
        self.config.write_text("\n".join(lines) + "\n")

    def fill(self, path: Path, length: int, seed: int = 1, offset: int = 0) -> None:
        """Write *length* bytes that compress badly into an image."""
        with path.open("r+b") as file:
            file.seek(offset)
            for block in range(-(-length // MIB)):
                content = bytes([seed + block & 0xFF or 1]) + os.urandom(4095)
                file.write((content * 256)[: min(MIB, length - block * MIB)])

    # --- commands and the server ---

    @staticmethod
    def command() -> list[str]:
        """Return the command `nbd-mirror`."""
        return command()

    @staticmethod
    def environment() -> dict[str, str]:
        """Return what a command needs: the checkout's modules, a width to draw in."""
        return {
            "PYTHONPATH": str(support.ROOT),
            "COLUMNS": "100",
            "PYTHONIOENCODING": "utf-8",
        }

    def cli(
        self, *words: str, check: bool = True, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run `nbd-mirror WORDS...`; no word of it may ever be a traceback."""
        done = self.processes.run(
            [*command(), *words],
            env=self.environment(),
            check=check,
            timeout_s=timeout_s,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    def refused(self, code: int, *words: str, commands: Iterable[str]) -> str:
        """
        Run a command that must fail with *code*, in one clear message.

        Args:
            code: the exit code.
            words: that its message must hold.
            commands: the command line.
        Returns:
            What it said.
        """
        done = self.cli(*commands, check=False)
        assert code == done.returncode, done.stdout + done.stderr
        lines = done.stderr.splitlines()
        causes = [line for line in lines if line.startswith("nbd-mirror: ")]
        steps = [line for line in lines if line.startswith(("  try: ", "       "))]
        # Nothing but the message: neither nbdkit's words nor a warning.
        assert len(lines) == len(causes) + len(steps), done.stderr
        assert causes
        for word in words:
            assert word in done.stderr
        return done.stderr

    def create(self, *assume: str, force: bool = False) -> None:
        """Create the volume, as `nbd-mirror create` does."""
        create_volume(config_module.load(self.config), list(assume), force=force)

    def serve(
        self,
        door: str = "direct",
        *,
        fault: str = "",
        ready: bool = True,
        output: Path | None = None,
    ) -> None:
        """
        Start `nbd-mirror serve --foreground`.

        Args:
            door: direct or python.
            fault: NBDM_FAULT for the server.
            ready: wait until it answers.
            output: where its log goes, if not to a file of its own.
        """
        assert self._server is None or self._server.poll() is not None
        self._serves += 1
        self.log_path = self.processes.log_dir / f"serve.{self._serves}.log"
        said = str(output or self.log_path)
        shell = ["/bin/sh", "-c", 'exec "$@" >>"$0" 2>&1', said]
        words = ["serve", str(self.config), "--foreground", "--door", door]
        self._server = self.processes.start(
            [*shell, *command(), *words],
            env={"PYTHONPATH": str(support.ROOT), "NBDM_FAULT": fault},
        )
        if ready:
            support.wait_until(
                self._is_ready,
                f"the server to answer ({door} door)",
                progress=lambda: support.cpu_s(self.pid),
            )

    def _is_ready(self) -> bool:
        assert self._server is not None
        if self._server.poll() is not None:
            pytest.fail(f"the server ended by itself:\n{self.log}")
        return self.answers()

    def answers(self) -> bool:
        """Tell whether a server answers for the volume."""
        try:
            control.call(self.state, "ping", 5.0)
        except MirrorError:
            return False
        return True

    @property
    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._server is not None and self._server.poll() is None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._server is not None
        return self._server.pid

    @property
    def log(self) -> str:
        """What the last server said so far."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def wait_log(self, words: str) -> None:
        """Wait until the server has said *words*: its log lags behind its state."""
        support.wait_until(lambda: words in self.log, f"the log to say {words!r}")

    def ended(self, timeout_s: float = 20) -> int:
        """Wait until the server has ended; return its exit code, or -signal."""
        assert self._server is not None
        return self._server.wait(timeout_s)

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self.ended()

    def leave_server(self) -> subprocess.Popen[bytes]:
        """Return the server, which ends by itself, and make room for another."""
        assert self._server is not None
        server, self._server = self._server, None
        return server

    def stop(self) -> None:
        """Stop the server cleanly, as `nbd-mirror stop` does."""
        assert control.call(self.state, "stop", 30.0) == {"clean": True}
        assert self.ended() == 0

    def tell(self, what: str, remote: str | None = "dr") -> None:
        """Send pause, resume or invalidate, as the command would."""
        arguments = {} if remote is None else {"remote": remote}
        control.call(self.state, what, 30.0, **arguments)

    def bring_up(self, door: str = "direct", **options: Any) -> None:
        """Start every secondary, create, serve, and wait until in_sync."""
        for one in self.secondaries:
            one.start()
        self.create()
        self.serve(door, **options)
        self.wait_in_sync()

    # --- what it says and holds ---

    def status(self) -> dict[str, Any]:
        """Return the server's status."""
        answer: dict[str, Any] = control.call(self.state, "status", 10.0)
        return answer

    def remote(self, name: str = "dr") -> dict[str, Any]:
        """Return a remote's part of the status."""
        found: dict[str, Any] = next(
            one for one in self.status()["remotes"] if one["name"] == name
        )
        return found

    def wait_remote(
        self,
        condition: Callable[[dict[str, Any]], object],
        what: str,
        *,
        name: str = "dr",
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """
        Wait until the remote's status fulfils *condition*, and return it.

        Args:
            condition: is given the status.
            what: completes the sentence "waited in vain for ...".
            name: of the remote.
            timeout_s: bounds the time, whatever happens; None: 20 s in which
                nothing is copied, as it takes as long as the machine needs.
        """
        last: dict[str, Any] = {}

        def holds() -> object:
            for secondary in self.secondaries:
                secondary.revive()
            last.update(self.remote(name))
            return condition(last)

        try:
            support.wait_until(holds, what, **copying(last, timeout_s))
        except pytest.fail.Exception as error:
            raise AssertionError(f"{error}; last seen: {last}") from None
        return last

    def wait_state(
        self, state: str, *, name: str = "dr", timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Wait for a remote's state; whatever the state, it has its reason."""
        found = self.wait_remote(
            lambda one: one["state"] == state,
            f"{name} to be {state}",
            name=name,
            timeout_s=timeout_s,
        )
        assert state == "in_sync" or found["reason"], found
        return found

    def wait_in_sync(self, timeout_s: float | None = None) -> None:
        """Wait until every remote is connected and in sync, with nothing dirty."""
        for one in self.secondaries:
            found = self.wait_remote(
                lambda one: one["state"] == "in_sync" and one["connected"],
                f"{one.name} to be in_sync",
                name=one.name,
                timeout_s=timeout_s,
            )
            assert found["dirty_bytes"] == 0

    def client(self, *, strict: bool = True) -> Any:
        """Return a connected libnbd handle."""
        return connect(self.uri, strict=strict)

    def load(self, **options: int) -> Load:
        """Start a load, stopped at the latest when the test ends."""
        load = Load(self.uri, self.size, **options)
        self.processes.on_exit(load._ending.set)
        return load

    def map_path(self, name: str = "dr") -> Path:
        """Return a remote's dirty map."""
        return self.state / f"dirty.{name}"

    def differing(self, secondary: Secondary | None = None) -> set[int]:
        """Return the regions in which local and the secondary's image differ."""
        image = (secondary or self.dr).image
        return set(differing_regions(self.local, image, self.region_size, self.size))

    def assert_covered(self, secondary: Secondary | None = None) -> set[int]:
        """
        Fail unless every difference between the disks lies under a dirty bit.

        The map is read last: a bit is set before its region may differ.

        Returns:
            The regions that differ.
        """
        one = secondary or self.dr
        differing = self.differing(one)
        missed = differing - dirty_set(self.map_path(one.name))
        assert not missed, f"these differ and are not dirty: {sorted(missed)}"
        return differing

    def on_both(self, offset: int, length: int) -> bytes:
        """Return the bytes of both images, which must be the same."""
        found = []
        for image in (self.local, self.dr.image):
            with image.open("rb") as file:
                file.seek(offset)
                found.append(file.read(length))
        assert found[0] == found[1]
        return found[0]

    def assert_equal(self) -> None:
        """Fail unless every secondary's image equals the local one."""
        for one in self.secondaries:
            assert self.differing(one) == set(), f"{one.name} differs from local"

    def copied(self, resyncs: int) -> list[int]:
        """Return the bytes of each resync the last server finished: so many of them."""

        def found() -> list[str]:
            return re.findall(r"resync_done: (\d+) bytes", self.log)

        # The log's line comes after the state.
        support.wait_until(lambda: len(found()) >= resyncs, f"{resyncs} resync_done")
        assert len(found()) == resyncs, self.log
        return [int(count) for count in found()]
