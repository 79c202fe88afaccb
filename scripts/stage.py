# SPDX-License-Identifier: BSD-3-Clause
"""
The base of the demonstration: text, commands that are shown and run, an end.

Each shown command is run by bash in the demonstration's own folder, and its output goes
straight to the terminal. Every process is a session of its own, so Ctrl-C reaches only
this program, which then ends everything in order: it unmounts a file system before it
stops the server.

A server outlives the command that has started it. The kernel gives its process to this
program then, which asks for that ("subreaper"). So this program is the parent, or a
parent's parent, of all that its commands have started, and of nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn
from urllib.parse import quote

from rich.console import Console
from rich.text import Text

__all__ = ["DemoError", "Stage", "interruptible"]


PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
END_S = 10.0  # for killed processes to end; one that the kernel keeps is left


class DemoError(Exception):
    """The demonstration cannot continue, or a check failed; the message says why."""


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def interruptible() -> None:
    """Let Ctrl-C, SIGTERM and a closed terminal end it in the same orderly way."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


class Stage:
    """
    The demonstration's folder, terminal and processes; a context manager.

    Args:
        steps: how many there will be.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._step = 0
        self._console = Console(highlight=False)
        self._stack = contextlib.ExitStack()
        self._began = time.monotonic()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.folder = Path(tempfile.mkdtemp(prefix="nbdm-demo-"))
        self.folder.chmod(0o755)
        # The user's nbd-mirror command is the one of this checkout.
        bin_dir = Path(sys.executable).parent
        path = f"{bin_dir}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        self._environment = {**os.environ, "PATH": path}
        os.environ["PATH"] = path
        self.on_exit(self._remove_folder)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # cleaning up is not cut short
        self._stack.close()

    def on_exit(self, clean_up: Callable[[], object]) -> None:
        """Call *clean_up* at the end, in any case; the last one added first."""
        self._stack.callback(clean_up)

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def uri(self, name: str) -> str:
        """Return the NBD URI of the socket *name* in the folder."""
        return f"nbd+unix:///?socket={quote(str(self.folder / name))}"

    # --- text ---

    def step(self, title: str) -> None:
        """Begin the next step."""
        self._step += 1
        text = Text.assemble("\n", (f" {self._step}/{self._steps} ", "reverse"), " ")
        self._print(text + Text(title, style="bold"))

    def say(self, text: str) -> None:
        """Print what happens, or why."""
        self._print(Text(text))

    def show_file(self, path: Path) -> None:
        """Print a file, indented."""
        for line in path.read_text().splitlines():
            self._print(Text(f"    {line}", style="dim"))

    def proven(self, text: str) -> None:
        """Print that a check passed."""
        self._print(Text.assemble(("ok  ", "bold green"), text))

    def check(self, fact: bool, proven: str, otherwise: str) -> None:
        """Print *proven*, or raise DemoError with *otherwise*."""
        if not fact:
            raise DemoError(otherwise)
        self.proven(proven)

    def _print(self, text: Text) -> None:
        self._console.print(text)
        sys.stdout.flush()

    def _show_command(self, command: str) -> None:
        self._console.print(
            Text.assemble(("$ ", "dim"), (command, "cyan")), soft_wrap=True
        )
        sys.stdout.flush()

    # --- commands ---

    def run(self, command: str, *, timeout_s: float = 60.0) -> None:
        """
        Show *command*, run it, and return when it has ended.

        Raises:
            DemoError: it failed, or was stopped after *timeout_s* seconds.
        """
        self._show_command(command)
        self.finish(self._spawn(command), command, timeout_s=timeout_s)

    def start(self, command: str, *, log: str = "") -> subprocess.Popen[bytes]:
        """
        Show *command*, start it in the background, and end it at the end.

        Args:
            log: a file in the folder for its output; else it goes to the terminal.
        """
        self._show_command(f"{command} &")
        process = self._spawn(command, log)
        self.on_exit(lambda: end(process))
        return process

    def finish(
        self, process: subprocess.Popen[bytes], command: str, *, timeout_s: float
    ) -> None:
        """Wait until *process*, which runs *command*, has ended with success."""
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DemoError(f"not done after {timeout_s:g} s: {command}") from None
        finally:
            end(process)
        if code != 0:
            raise DemoError(f"exit status {code}: {command}")

    def wait_until(
        self, condition: Callable[[], bool], what: str, *, timeout_s: float = 20.0
    ) -> None:
        """
        Return once *condition* is true.

        Raises:
            DemoError: it was not true within *timeout_s*; *what* names the condition.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise DemoError(f"waited {timeout_s:g} s in vain for {what}")
            time.sleep(0.002)

    def _spawn(self, command: str, log: str = "") -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as stack:
            out = stack.enter_context((self.folder / log).open("ab")) if log else None
            return subprocess.Popen(
                ["bash", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT if log else None,
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,
            )

    # --- the end ---

    def quietly(self, command: str, *, timeout_s: float = 30.0) -> bool:
        """Run *command* unseen, to clean up; return whether it succeeded."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                ["bash", "-c", command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                cwd=self.folder,
                env=self._environment,
                timeout=timeout_s,
                start_new_session=True,
                check=False,
            )
            return done.returncode == 0
        return False

    def unmount(self, name: str) -> None:
        """Unmount *name* if it is mounted; if it stays busy, detach it."""
        path = self.folder / name
        for attempt in range(20):
            if not mounted(path):
                return
            lazily = "-l " if attempt > 10 else ""
            fuse = f"fusermount3 -u {lazily.replace('l', 'z')}{name}"
            if not self.quietly(f"umount {lazily}{name} || {fuse}"):
                time.sleep(0.2)

    def _end_strays(self) -> None:
        """
        Kill what our commands have left: a server that was just starting.

        The children of a process that ends become ours, so none is left once there are
        no children. A child keeps its number until it is waited for here.
        """
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            for pid in _children():
                with contextlib.suppress(OSError):  # a set-uid program may be another's
                    os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.01)

    def _remove_folder(self) -> None:
        self._end_strays()
        # Do not look into a mount that could not be removed.
        if any(mounted(path) for path in self.folder.iterdir()):
            self.say(f"{self.folder} is left: something is still mounted in it")
            return
        shutil.rmtree(self.folder, ignore_errors=True)


def _children() -> list[int]:
    """Return the processes whose parent this one is."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # A process gives itself a name of any bytes.
            parent = entry.read_bytes().rpartition(b")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(entry.parent.name))
    return found


def mounted(path: Path) -> bool:
    """Return whether something is mounted on *path*."""
    # Read bytes, because other users' names are there too. Blanks are escaped.
    lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    name = re.sub(rb"[ \t\n\\]", lambda m: b"\\%03o" % m[0][0], os.fsencode(path))
    return name in (line.split(b" ")[4] for line in lines if line)


def end(process: subprocess.Popen[bytes]) -> None:
    """End *process* and its children: by request, else by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return
