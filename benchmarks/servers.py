# SPDX-License-Identifier: BSD-3-Clause
"""
The compared set-ups, each with the servers that it needs.

All of them serve unix sockets, keep their images in one folder on tmpfs and mirror to
the same kind of remote, a plain `nbdkit file`. The set-ups of a row run side by side,
so that their measurements can follow each other at once; an idle one has no visible
cost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .images import same_content
from .model import BenchError

__all__ = [
    "ROOT",
    "START_TIMEOUT_S",
    "NbdkitFile",
    "Proxy",
    "QemuMirror",
    "SetUp",
    "TwoCopies",
    "end",
    "environment_of",
    "listens",
    "uri_of",
    "wait_until",
]

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 30.0
SYNC_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
# Transport and faults of a mirror; the package to use; libnbd's output.
FOREIGN = ("NBDM_", "PYTHON", "LIBNBD_")


class SetUp(ABC):
    """
    One set-up: its servers, the clients' addresses, and whether it still mirrors.

    Args:
        folder: on tmpfs; the set-up makes its own folder in it.
        size: of the disk, bytes.
        key: the name of that folder, if a row has two of a kind.
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
        """The clients' addresses, one each."""
        return [uri_of(self.socket)]

    @property
    def uri(self) -> str:
        """The only client's address."""
        return self.uris[0]

    @property
    def pids(self) -> list[int]:
        """The processes that serve it, its remote's included."""
        return [process.pid for process in self._processes]

    @abstractmethod
    def start(self) -> None:
        """Start the servers; return when the disk may be filled."""

    def ready(self) -> None:  # noqa: B027  most are
        """Bring it into the state to measure, once the disk was filled."""

    def mark(self) -> None:  # noqa: B027  one copy has nothing to check
        """Store what a measurement must not change."""

    def check(self) -> None:  # noqa: B027
        """Raise BenchError unless it has been in the state to measure since `mark`."""

    def settle(self) -> None:  # noqa: B027
        """Make images equal that need not be, after the last measurement."""

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
        self,
        command: Sequence[str | Path],
        cwd: Path,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a server, which `stop` ends, with `environment_of` *environment*."""
        with self.log_of(command[0]).open("ab") as out:
            process = subprocess.Popen(
                [os.fspath(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=environment_of(environment or {}),
                # Ctrl-C is only for this process: the servers end in order, after fio.
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def log_of(self, program: str | Path) -> Path:
        """Return the file in which a program of it reports errors."""
        return self.folder / f"{Path(program).name}.log"

    def _start(
        self, *command: str | Path, ready: Path, cwd: Path = ROOT
    ) -> subprocess.Popen[bytes]:
        """Start a server; return when it listens on the socket *ready*."""
        process = self._spawn(command, cwd)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not listens(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                words = self.log_of(command[0]).read_text(errors="replace").strip()
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
    """One copy, no mirror: the limit of the medium and the protocol."""

    key = "one_copy"
    title = "one nbdkit file"

    def start(self) -> None:
        """Start nbdkit's own file plugin."""
        self.nbdkit_file(self._image("disk.img"), self.socket)


class Proxy(SetUp):
    """One copy behind another nbdkit, which passes on and keeps nothing."""

    key = "proxy"
    title = "one nbdkit file behind nbdkit's nbd plugin"

    def start(self) -> None:
        """Start both."""
        far = self.folder / "remote.sock"
        self.nbdkit_file(self._image("disk.img"), far)
        command = ("nbdkit", "-f", "-U", self.socket, "nbd", f"uri={uri_of(far)}")
        self._start(*command, ready=self.socket)


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
        """Two clients wrote independently: there is nothing to compare."""
        return True


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


def environment_of(fixed: Mapping[str, str]) -> dict[str, str]:
    """Return our environment and *fixed*, without what would change the figures."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN)
    }
    return {**ours, **fixed}


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
    """Wait until *holds*; else raise BenchError with the condition *what*."""
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
        if "return" in answer:  # otherwise it is an event
            return answer["return"]


def listens(path: Path) -> bool:
    """Return whether a server accepts connections there."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        try:
            sock.connect(os.fspath(path))
        except OSError:
            return False
        return True


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and its children: by request, else by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            return
