# SPDX-License-Identifier: BSD-3-Clause
"""
The set-ups that are compared, each with the servers it needs.

All of them serve a unix socket, keep their images in one folder on tmpfs and
mirror to the same kind of remote, a plain `nbdkit file`. They run side by side for
the whole benchmark, so that a measurement of one can follow another's at once; an
idle one costs nothing that could be seen.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from nbd_mirror import control

__all__ = ["KINDS", "BenchError", "Mirror", "NbdkitFile", "QemuMirror", "SetUp"]

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 30.0
SYNC_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


class BenchError(Exception):
    """Something could not be run or measured; the message says what."""


class SetUp(ABC):
    """
    One set-up: its servers, where clients connect, whether it still mirrors.

    Args:
        folder: on tmpfs; the set-up makes one of its own in it.
        size: of the disk, bytes.
    """

    key = ""
    title = ""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder / self.key
        self.folder.mkdir()
        self.size = size
        self.socket = self.folder / "disk.sock"
        self.images: list[Path] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def uri(self) -> str:
        """Where clients connect."""
        return f"nbd+unix:///?socket={self.socket}"

    @abstractmethod
    def start(self) -> None:
        """Start the servers; return when the disk may be measured."""

    def check(self) -> None:  # noqa: B027  one copy has nothing to check
        """Raise BenchError unless every write still goes to every disk."""

    def stop(self) -> None:
        """Stop the servers; the images stay."""
        for process in reversed(self._processes):
            _end(process)
        self._processes.clear()

    def images_equal(self) -> bool:
        """Compare the images byte for byte, of which one copy has no second."""
        return all(
            filecmp.cmp(self.images[0], other, shallow=False)
            for other in self.images[1:]
        )

    def _image(self, name: str) -> Path:
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(self.size)
        self.images.append(path)
        return path

    def _start(self, *command: str | Path, ready: Path) -> None:
        """Start a server; return when it listens on the socket *ready*."""
        log = self.folder / f"{Path(command[0]).name}.{len(self._processes)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [os.fspath(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                # Ctrl-C is for us alone: the servers end in order, after fio.
                start_new_session=True,
            )
        self._processes.append(process)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _listens(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                words = log.read_text(errors="replace").strip()
                raise BenchError(f"{self.title}: {command[0]} did not start: {words}")
            time.sleep(0.02)

    def _nbdkit_file(self, image: Path, sock: Path) -> None:
        self._start("nbdkit", "-f", "-U", sock, "file", image, ready=sock)


class NbdkitFile(SetUp):
    """One copy, no mirror: what the medium and the protocol allow."""

    key = "one_copy"
    title = "one nbdkit file"

    def start(self) -> None:
        """Start nbdkit's own file plugin."""
        self._nbdkit_file(self._image("disk.img"), self.socket)


class Mirror(SetUp):
    """Our mirror, through the door that a subclass names."""

    door = ""

    def start(self) -> None:
        """Create and serve a volume, and wait until it is in sync."""
        local, remote = self._image("local.img"), self._image("remote.img")
        far = self.folder / "remote.sock"
        self._nbdkit_file(remote, far)
        state = self.folder / "state"
        config = self.folder / "volume.toml"
        config.write_text(
            f'name = "bench-{self.door}"\nsize = {self.size}\nlocal = "{local}"\n'
            f'state = "{state}"\nlisten = "unix:{self.socket}"\n\n'
            f'[[remote]]\nname = "far"\nuri = "nbd+unix:///?socket={far}"\n'
        )
        self._nbd_mirror("create", config)
        self._start(
            *(sys.executable, "-m", "nbd_mirror", "serve", config),
            *("--foreground", "--door", self.door),
            ready=self.socket,
        )
        timeout = f"{SYNC_TIMEOUT_S:g}s"
        self._nbd_mirror("wait", config, "--for", "in_sync", "--timeout", timeout)

    def check(self) -> None:
        """Ask the server: a mirror that lost its remote would be fast."""
        status = control.call(self.folder / "state", "status")
        if status["state"] != "in_sync":
            why = status["reason"] or status["remotes"][0]["reason"]
            raise BenchError(f"{self.title} is {status['state']}: {why}")

    def _nbd_mirror(self, *words: str | Path) -> None:
        command = [sys.executable, "-m", "nbd_mirror", *(str(word) for word in words)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise BenchError(f"{self.title}: nbd-mirror {words[0]}: {done.stderr}")


class NativeMirror(Mirror):
    """Our mirror, the native door."""

    key = "native"
    title = "nbd_mirror, native door"
    door = "native"


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
        self._nbdkit_file(remote, far)
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
        deadline = time.monotonic() + SYNC_TIMEOUT_S
        while self._job_status() != "ready":
            if time.monotonic() > deadline:
                raise BenchError(f"{self.title}: is {self._job_status()}, never ready")
            time.sleep(0.1)

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


KINDS: tuple[type[SetUp], ...] = (NbdkitFile, NativeMirror, PythonMirror, QemuMirror)


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


def _listens(path: Path) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        try:
            sock.connect(os.fspath(path))
        except OSError:
            return False
        return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and whatever it started: by request, else by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            return
