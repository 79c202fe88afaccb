# SPDX-License-Identifier: BSD-3-Clause
"""
The set-ups that are compared, each with the servers it needs.

All of them serve unix sockets, keep their images in one folder on tmpfs and mirror to
the same kind of remote, a plain `nbdkit file`. Those of a row run side by side, so
that a measurement of one can follow another's at once; an idle one costs nothing that
could be seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbd_mirror import control
from nbd_mirror.errors import NotRunningError
from nbd_mirror.mapview import DirtyMaps, open_map

from .images import same_content
from .model import BenchError

__all__ = [
    "KINDS",
    "ROOT",
    "Mirror",
    "NbdkitFile",
    "PythonMirror",
    "QemuMirror",
    "SetUp",
    "TwoCopies",
    "end",
    "listens",
    "wait_until",
]

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 30.0
SYNC_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
REMOTE = "far"  # the name of a mirror's one remote


class SetUp(ABC):
    """
    One set-up: its servers, where clients connect, whether it still mirrors.

    Args:
        folder: on tmpfs; the set-up makes one of its own in it.
        size: of the disk, bytes.
        key: the name of that folder, where a row has two of a kind.
    """

    key = ""
    title = ""

    def __init__(self, folder: Path, size: int, *, key: str = "") -> None:
        self.key = key or self.key
        self.folder = folder / self.key
        self.folder.mkdir()
        self.size = size
        self.socket = self.folder / "disk.sock"
        self.images: list[Path] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def uris(self) -> list[str]:
        """Where clients connect, one each."""
        return [uri_of(self.socket)]

    @property
    def uri(self) -> str:
        """Where the one client connects."""
        return self.uris[0]

    @abstractmethod
    def start(self) -> None:
        """Start the servers; return when the disk may be filled."""

    def ready(self) -> None:  # noqa: B027  most are
        """Make it what is to be measured, once the disk was filled."""

    def mark(self) -> None:  # noqa: B027  one copy has nothing to check
        """Remember what a measurement must not change."""

    def check(self) -> None:  # noqa: B027
        """Raise BenchError unless it is still what is to be measured, since `mark`."""

    def settle(self) -> None:  # noqa: B027
        """Make the images equal, after the last measurement, where they need not be."""

    def stop(self) -> None:
        """Stop the servers; the images stay."""
        for process in reversed(self._processes):
            end(process)
        self._processes.clear()

    def images_equal(self) -> bool:
        """Compare the images byte for byte."""
        return all(same_content(self.images[0], other) for other in self.images[1:])

    def _image(self, name: str, size: int | None = None) -> Path:
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(self.size if size is None else size)
        self.images.append(path)
        return path

    def _spawn(
        self, command: Sequence[str | Path], cwd: Path
    ) -> subprocess.Popen[bytes]:
        """Start a server, which `stop` ends."""
        with self._log(command[0]).open("ab") as out:
            process = subprocess.Popen(
                [os.fspath(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                # Ctrl-C is for us alone: the servers end in order, after fio.
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _log(self, program: str | Path) -> Path:
        return self.folder / f"{Path(program).name}.log"

    def _start(
        self, *command: str | Path, ready: Path, cwd: Path = ROOT
    ) -> subprocess.Popen[bytes]:
        """Start a server; return when it listens on the socket *ready*."""
        process = self._spawn(command, cwd)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not listens(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                words = self._log(command[0]).read_text(errors="replace").strip()
                raise BenchError(f"{self.title}: {command[0]} did not start: {words}")
            time.sleep(0.01)
        return process

    def nbdkit_file(
        self, image: Path, sock: Path, *options: str, filters: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """Start nbdkit's file plugin on *image*; `stop` ends it too."""
        sock.unlink(missing_ok=True)
        return self._start(
            "nbdkit",
            "-f",
            *("-U", os.fspath(sock)),
            *(f"--filter={one}" for one in filters),
            *("file", os.fspath(image), *options),
            ready=sock,
        )


class NbdkitFile(SetUp):
    """One copy, no mirror: what the medium and the protocol allow."""

    key = "one_copy"
    title = "one nbdkit file"

    def start(self) -> None:
        """Start nbdkit's own file plugin."""
        self.nbdkit_file(self._image("disk.img"), self.socket)


class TwoCopies(SetUp):
    """Two copies, no mirror: two servers, and a client for each at the same time."""

    key = "two_copies"
    title = "two nbdkit files, two clients"

    @property
    def uris(self) -> list[str]:
        """Both."""
        return [uri_of(self.folder / f"disk{number}.sock") for number in (0, 1)]

    def start(self) -> None:
        """Start both."""
        for number in (0, 1):
            sock = self.folder / f"disk{number}.sock"
            self.nbdkit_file(self._image(f"disk{number}.img"), sock)

    def images_equal(self) -> bool:
        """Two clients wrote what each liked: there is nothing to compare."""
        return True


class Mirror(SetUp):
    """
    Our mirror, through the native door unless a subclass names another.

    Args:
        state: the directory of its logs, if not beside the images.
        package: the folder that holds the package to serve with.
        keys: of the configuration, beyond those every mirror has.
        far_socket: what the mirror connects to, if not the far server itself.
    """

    key = "native"
    title = "nbd_mirror, native door"
    door = "native"

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
        lines.append(f'uri = "{uri_of(self.far_socket)}"')
        self.config.write_text("\n".join(lines) + "\n")

    def start_servers(self, *options: str) -> None:
        """Create the volume, *options* being those of create, and serve it."""
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
        """Start the server and do not wait for it."""
        command: list[str | Path] = [sys.executable, "-m", "nbd_mirror"]
        command += ["serve", self.config, "--foreground", "--door", self.door]
        self._server = self._spawn(command, self.package)
        return self._server

    def wait(self, state: str = "in_sync") -> None:
        """Wait until the remote is in a state, and the server knows it."""
        wait_until(
            lambda: self.remote()["state"] == state,
            lambda: f"{self.title} to be {state}; it is {self._words()}",
        )

    def status(self) -> dict[str, Any]:
        """Ask the server how it is; waits for one that is still starting."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                found: dict[str, Any] = control.call(self.state, "status")
            except NotRunningError:
                running = self._server is not None and self._server.poll() is None
                if not running or time.monotonic() > deadline:
                    words = self._log(sys.executable).read_text(errors="replace")
                    raise BenchError(f"{self.title} ended: {words.strip()}") from None
                time.sleep(0.01)
            else:
                return found

    def remote(self) -> dict[str, Any]:
        """Return the status of the remote."""
        found: dict[str, Any] = self.status()["remotes"][0]
        return found

    def command(self, name: str) -> None:
        """Give the server a command that concerns the remote."""
        control.call(self.state, name, remote=REMOTE)

    def maps(self) -> DirtyMaps:
        """Open the remote's dirty map, which costs the server nothing to look at."""
        return open_map(self.state / f"dirty.{REMOTE}")

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._server
        return self._server.pid

    # --- what every set-up does ---

    def mark(self) -> None:
        """Remember since when it is in sync."""
        self._since = self.remote()["since"]

    def check(self) -> None:
        """Ask the server: a mirror that lost its remote would be fast."""
        remote = self.remote()
        if remote["state"] != "in_sync":
            raise BenchError(f"{self.title} is {self._words()}")
        if self._since and remote["since"] != self._since:
            raise BenchError(f"{self.title} was not in sync throughout")

    def stop_server(self) -> None:
        """Stop the mirror, cleanly; its remote's server goes on."""
        if self._server is not None:
            end(self._server)
            self._processes.remove(self._server)
            self._server = None

    def stop(self) -> None:
        """Stop the mirror first: else it would notice how its remote goes."""
        self.stop_server()
        super().stop()
        self._far = None

    def run_command(self, *words: str | Path) -> None:
        """Run an nbd-mirror command."""
        command = [sys.executable, "-m", "nbd_mirror", *(str(word) for word in words)]
        done = subprocess.run(
            command, cwd=self.package, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise BenchError(f"{self.title}: nbd-mirror {words[0]}: {done.stderr}")

    def _words(self) -> str:
        status = self.status()
        remote = status["remotes"][0]
        return f"{remote['state']}: {status['reason'] or remote['reason']}"


class PythonMirror(Mirror):
    """Our mirror, the Python door."""

    key = "python"
    title = "nbd_mirror, Python door"
    door = "python"


class QemuMirror(SetUp):
    """qemu's blockdev-mirror, which answers a write when both disks have it."""

    key = "qemu"
    title = "qemu write-blocking mirror"

    def start(self) -> None:
        """Start the daemon, begin the mirror job, wait until it is ready."""
        local, remote = self._image("local.img"), self._image("remote.img")
        far, monitor = self.folder / "remote.sock", self.folder / "qmp.sock"
        self.nbdkit_file(remote, far)
        self._start(
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,filename={local},node-name=source"),
            "--blockdev",
            f"driver=nbd,server.type=unix,server.path={far},node-name=target",
            *("--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off"),
            *("--monitor", "chardev=qmp"),
            *("--nbd-server", f"addr.type=unix,addr.path={self.socket}"),
            *("--export", "type=nbd,id=disk,node-name=source,name=,writable=on"),
            ready=self.socket,
        )
        self._qmp(
            "blockdev-mirror",
            **{
                "job-id": "mirror",
                "device": "source",
                "target": "target",
                "sync": "full",
                "copy-mode": "write-blocking",
            },
        )
        wait_until(
            lambda: self._job_status() == "ready",
            lambda: f"{self.title} to be ready; it is {self._job_status()}",
        )

    def check(self) -> None:
        """Ask the daemon whether the job is still there and ready."""
        status = self._job_status()
        if status != "ready":
            raise BenchError(f"{self.title}: its job is {status}")

    def _job_status(self) -> str:
        jobs = self._qmp("query-jobs")
        return str(jobs[0]["status"]) if jobs else "gone"

    def _qmp(self, command: str, **arguments: str) -> Any:
        """Run one command on a connection of its own."""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.settimeout(START_TIMEOUT_S)
            sock.connect(os.fspath(self.folder / "qmp.sock"))
            with sock.makefile("rw", encoding="utf-8") as stream:
                stream.readline()  # the greeting
                _exchange(stream, {"execute": "qmp_capabilities"})
                return _exchange(stream, {"execute": command, "arguments": arguments})


KINDS: dict[str, type[SetUp]] = {
    kind.key: kind for kind in (NbdkitFile, TwoCopies, Mirror, PythonMirror, QemuMirror)
}


def uri_of(sock: Path) -> str:
    """Return the URI of the server on a unix socket."""
    return f"nbd+unix:///?socket={sock}"


def wait_until(
    holds: Callable[[], bool],
    what: Callable[[], str],
    *,
    timeout_s: float = SYNC_TIMEOUT_S,
    interval_s: float = 0.02,
) -> None:
    """Wait until *holds*; else raise BenchError that *what* was waited for in vain."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {timeout_s:g} s in vain for {what()}")
        time.sleep(interval_s)


def _exchange(stream: Any, message: dict[str, Any]) -> Any:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
    while True:
        line = stream.readline()
        if not line:
            raise BenchError(f"qemu closed its monitor at {message['execute']}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"qemu: {message['execute']}: {answer['error']['desc']}")
        if "return" in answer:  # else it is an event
            return answer["return"]


def listens(path: Path) -> bool:
    """Say whether somebody takes connections there."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        try:
            sock.connect(os.fspath(path))
        except OSError:
            return False
        return True


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and whatever it started: by request, else by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            return
