# SPDX-License-Identifier: BSD-3-Clause
"""
A mirror inside the guest: served, attached, killed and served again.

Runs as one Python process, because starting one takes seconds on an emulated CPU.
Commands of nbd-mirror are forks of it: from their arguments on they are what a shell
would have started. Nothing here waits without a bound, so that the guest comes to its
end, or says where it hangs, before it is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.commands import create
from nbd_mirror.commands.cli import main as command_line
from nbd_mirror.device import attach
from nbd_mirror.rules.content import Choice
from nbd_mirror.volume import config, control

__all__ = ["Mirror", "command", "note", "result", "run", "wait_until"]

BEGIN = time.monotonic()
WAIT_S = 120.0
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def note(words: str) -> None:
    """Say what is going on, to find out why a test failed."""
    print(f"=== {time.monotonic() - BEGIN:6.1f} s: {words}", flush=True)


def result(name: str, value: object) -> None:
    """Print a line that the test looks at."""
    print(f"RESULT {name} {value}", flush=True)


def run(*command: str | Path, timeout_s: float = WAIT_S) -> str:
    """Run a program to its end and return what it said; raises RuntimeError."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
        env={**os.environ, "PATH": PATH, "LC_ALL": "C.UTF-8"},
    )
    if done.returncode != 0:
        message = f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}"
        raise RuntimeError(message)
    return done.stdout


def wait_until(
    condition: Callable[[], object], what: str, *, rest: float = 4.0
) -> None:
    """
    Return once *condition* is true; raise RuntimeError if it never is.

    Args:
        condition: what to look at.
        what: is waited for.
        rest: so many times as long as a look took nothing is done before the next one.
            The guest's CPU is what all that is waited for needs too.
    """
    until = time.monotonic() + WAIT_S
    while True:
        begin = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        if now > until:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(min(max(0.02, rest * (now - begin)), 1.0))


def hanging() -> str:
    """Say of each thread of a program where it is in the kernel, and its CPU time."""
    found = []
    for task in sorted(Path("/proc").glob("[0-9]*/task/[0-9]*")):
        try:
            words = (task / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            stat = (task / "stat").read_text().rpartition(")")[2].split()
            stack = (task / "stack").read_text().split("\n")[:4]
        except OSError:
            continue
        if stat[0] == "Z":
            words = f"ended: status {stat[-1]}"
        if words:  # the kernel's own threads have none
            ticks = int(stat[11]) + int(stat[12])
            found.append(f"{task} {stat[0]} {ticks} ticks {words[:90]} {stack}")
    return "\n".join(found)


class Process(Protocol):
    """What is used of a subprocess.Popen."""

    pid: int
    returncode: Any

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; raises subprocess.TimeoutExpired."""

    def kill(self) -> None:
        """Kill it."""


class Command:
    """
    `nbd-mirror` with some arguments, in a fork of this process.

    Args:
        words: the arguments.
        out: where its output goes, errors too.
    """

    def __init__(self, words: list[str], out: IO[bytes]) -> None:
        sys.stdout.flush()
        self.words = words
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(out.fileno())

    def _become(self, out: int) -> NoReturn:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            os.environ |= {"PATH": PATH, "LC_ALL": "C.UTF-8"}
            sys.argv = ["nbd-mirror", *self.words]
            command_line()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; raises TimeoutExpired."""
        until = time.monotonic() + (WAIT_S if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.words, WAIT_S)
            time.sleep(0.02)  # between two looks
        return code

    def kill(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)


def command(*words: str | Path, ok: tuple[int, ...] = (0,)) -> str:
    """Run a command of nbd-mirror and return what it said; raises RuntimeError."""
    text = [str(word) for word in words]
    note(f"nbd-mirror {' '.join(text)}")
    with tempfile.TemporaryFile() as out:
        code = Command(text, out).wait(150)
        out.seek(0)
        said = out.read().decode(errors="replace")
    if code:
        note(f"exit code {code}: {said}")
    if code not in ok:
        raise RuntimeError(f"nbd-mirror {text}: exit code {code}\n{said}")
    return said


class Mirror:
    """
    A volume with one remote, an nbdkit over *far*.

    Args:
        folder: for sockets and logs.
        local: the local disk, a file or a block device.
        far: the remote's.
        device: such as /dev/nbd0.
        state: the state directory; not given: in *folder*.
        region_size, deadline, late_write_window: as in the configuration.
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
        deadline: str = "20s",
        late_write_window: str = "1s",
    ) -> None:
        self.folder = folder
        self.local = local
        self.far = far
        self.device = device
        self.point = folder / "mnt"
        self.point.mkdir(parents=True)
        self._server: Process | None = None
        self._secondary: subprocess.Popen[bytes] | None = None
        path = folder / "v.toml"
        path.write_text(
            f'name = "{folder.name}"\nsize = "adopt"\nlocal = "{local}"\n'
            f'state = "{state or folder / "state"}"\n'
            f'listen = "unix:{folder}/v.sock"\nhold = "1s"\n'
            f'region_size = "{region_size}"\n'
            f'late_write_window = "{late_write_window}"\n[[remote]]\nname = "far"\n'
            f'uri = "nbd+unix:///?socket={folder}/far.sock"\ndeadline = "{deadline}"\n'
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
        words = ["serve", str(self.config.source), "--foreground"]
        with (self.folder / "serve.log").open("ab") as out:
            self._server = Command(words, out)

    def wait_served(self) -> None:
        """Return once the server answers."""
        try:
            wait_until(self._answers, "the server to answer")
        except RuntimeError:
            note(hanging())
            raise

    def _answers(self) -> bool:
        # None: a command has started it, in the background.
        if self._server is not None and self._server.poll() is not None:
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

    def attach(self, asked: str = "") -> Choice:
        """Attach the kernel's device as `nbd-mirror attach --block-size` does."""
        size = self.local_size()
        return attach.attach(self.config, size, self.device, asked=asked)[1]

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
        state = Path(self.config.state_dir)
        for log in sorted([*self.folder.glob("*.log"), *state.glob("*.log")]):
            lines = log.read_text(errors="replace").splitlines()[-40:]
            parts.append("\n".join([f"--- {self.folder.name}/{log.name}", *lines]))
        return "\n".join(parts)
