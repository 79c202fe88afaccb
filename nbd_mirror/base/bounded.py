# SPDX-License-Identifier: BSD-3-Clause
"""
Run an operator's program that may hang, write without end, or leave processes behind.

The program is the leader of a process group of its own. At the end of its time the
whole group is killed. It gets nothing of the server: no socket that the server passes
to its own successor, and no blocked or ignored signal. So it is made by posix_spawn,
which sets both without running Python between fork and exec.

Its output goes to a pipe that is read until the program itself ends. A bounded part of
it becomes lines, and the rest is thrown away, so that no output can stop the program. A
process that it leaves behind can write no more: its output must go elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from .programs import cannot_start

__all__ = ["run_bounded"]

MOST_SAID = 16 << 10  # bytes of output that become lines
LINE_LENGTH = 500
PIECE = 4096
KILL_S = 5.0  # for a killed program to end, unless a disk that hangs keeps it
_KEPT = {signal.SIGKILL, signal.SIGSTOP}  # the kernel lets no process change them


class _Output:
    """Makes lines of a program's output, up to a limit."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._left = MOST_SAID
        self._begun = b""
        self.last = ""

    def take(self, data: bytes) -> None:
        """Take the next bytes; those beyond the limit are thrown away."""
        if self._left <= 0:
            return
        *lines, self._begun = (self._begun + data[: self._left]).split(b"\n")
        self._left -= len(data)
        for line in lines:
            self._line(line)
        if self._left <= 0:
            self.end()
            self._say("[more output is left out]")

    def end(self) -> None:
        """Say the line that has no end."""
        self._line(self._begun)
        self._begun = b""

    def _line(self, line: bytes) -> None:
        text = line.decode(errors="replace").expandtabs().strip()[:LINE_LENGTH]
        text = "".join(char if char.isprintable() else "?" for char in text)
        if text:
            self.last = text
            self._say(text)


def run_bounded(
    command: Sequence[str],
    environment: Mapping[str, str],
    timeout_s: float,
    say: Callable[[str], object],
    stop: int,
) -> str:
    """
    Run a program to its end, or kill it and its process group.

    Args:
        command: the program's path and its arguments.
        say: gets each line of its output.
        stop: a descriptor; the program is killed as soon as it can be read.
    Returns:
        Why it failed, or "": it ended with status 0.
    Raises:
        UnsupportedError: it cannot be started.
    """
    reads, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            os.set_blocking(writes, True)  # the program's end
            pid = _spawn(command, environment, writes)
        except OSError as error:
            raise cannot_start(command[0], error) from None
        finally:
            os.close(writes)
        output = _Output(say)
        pidfd = os.pidfd_open(pid)
        try:
            why = _wait(pidfd, reads, stop, timeout_s, output)
            if why:
                _kill(pid, pidfd)
                return why
            return _outcome(pidfd, output.last)
        finally:
            os.close(pidfd)
    finally:
        os.close(reads)


def _spawn(command: Sequence[str], environment: Mapping[str, str], out: int) -> int:
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, out, 1),
        (os.POSIX_SPAWN_DUP2, out, 2),
    ]
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  only the names count
        with contextlib.suppress(OSError):  # the listing's own is closed again
            if int(name) > 2 and os.get_inheritable(int(name)):
                actions.append((os.POSIX_SPAWN_CLOSE, int(name)))
    return os.posix_spawn(
        command[0],
        list(command),
        dict(environment),
        file_actions=actions,
        setsid=True,
        setsigmask=[],
        setsigdef=signal.valid_signals() - _KEPT,
    )


def _wait(pidfd: int, reads: int, stop: int, timeout_s: float, output: _Output) -> str:
    """Wait until the program has ended, or return why it is to be killed."""
    poll = select.poll()
    for fd in (pidfd, reads, stop):
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return f"did not end within {timeout_s:g}s, and was killed"
        ready = {fd for fd, _ in poll.poll(left_s * 1000)}
        if stop in ready:
            return "was killed, because the server has to go on without it"
        if reads in ready and not _read(reads, output):
            poll.unregister(reads)
        if pidfd in ready:
            # What it wrote last; a process that it left behind may write on.
            _read(reads, output)
            output.end()
            return ""


def _read(reads: int, output: _Output) -> bool:
    """Take what the pipe holds now, at most a pipe's size; False: it has ended."""
    for _ in range((64 << 10) // PIECE):
        try:
            data = os.read(reads, PIECE)
        except BlockingIOError:
            return True
        if not data:
            return False
        output.take(data)
    return True


def _kill(pid: int, pidfd: int) -> None:
    """Kill the process group; its leader is not waited for yet, so the number is it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(KILL_S * 1000)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def _outcome(pidfd: int, last: str) -> str:
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert ended is not None
    if ended.si_code == os.CLD_EXITED:
        if ended.si_status == 0:
            return ""
        why = f"ended with exit status {ended.si_status}"
    else:
        why = f"was ended by signal {ended.si_status}"
    return f"{why}: {last}" if last else why
