# SPDX-License-Identifier: BSD-3-Clause
"""An operator's program that hangs, floods, leaves processes behind, or is missing."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import support

from nbd_mirror.base.bounded import MOST_SAID, run_bounded
from nbd_mirror.base.errors import UnsupportedError

GLIBC_S = 0b11 << 31  # glibc's own signals, 32 and 33, which posix_spawn ignores
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


@pytest.fixture
def stop() -> Iterator[int]:
    """Give a descriptor that ends the program once it is written to."""
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def shell(script: str, stop: int, timeout_s: float = 20) -> tuple[str, list[str]]:
    """Run a script; give why it failed, and its lines."""
    said: list[str] = []
    words = ["/bin/sh", "-c", script]
    return run_bounded(words, ENVIRONMENT, timeout_s, said.append, stop), said


def gone(pid: int) -> bool:
    """Tell whether a process has ended; one that nobody waits for counts as ended."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        )
    except OSError:
        return True


def test_the_end_and_the_last_line_are_told(stop: int) -> None:
    """Both outputs become lines, also the line without an end."""
    assert shell("echo one; echo two >&2", stop) == ("", ["one", "two"])
    why, said = shell("printf 'umount: busy\\033'; exit 32", stop)
    assert why == "ended with exit status 32: umount: busy?"
    assert said == ["umount: busy?"]
    assert shell("kill -TERM $$", stop)[0] == "was ended by signal 15"


def test_a_program_that_hangs_is_killed_with_its_group(
    stop: int, tmp_path: Path
) -> None:
    """A process that it began, and that ignores signals, ends too."""
    begun = tmp_path / "pid"
    script = f"(trap '' TERM HUP; echo $$; exec sleep 300) & echo $! >{begun}; wait"
    started = time.monotonic()
    why, _ = shell(script, stop, timeout_s=1)
    assert why == "did not end within 1s, and was killed"
    assert time.monotonic() - started < 15
    pid = int(begun.read_text())
    support.wait_until(lambda: gone(pid), "the program's process to end")


def test_a_program_is_killed_at_once_when_the_server_ends(stop: int) -> None:
    """The server does not wait for the time-out."""
    timer = threading.Timer(0.2, lambda: os.eventfd_write(stop, 1))
    timer.start()
    why, _ = shell("sleep 300", stop, timeout_s=200)
    timer.join()
    assert "the server has to go on" in why


def test_a_flood_of_output_is_cut_and_stops_nothing(stop: int) -> None:
    """The program ends as if all was read; a line without an end is cut as well."""
    why, said = shell(
        "head -c 3000000 /dev/zero | tr '\\0' 'a'; yes | head -n 99999", stop
    )
    assert why == ""
    assert said[-1] == "[more output is left out]"
    assert sum(map(len, said)) <= MOST_SAID + 100


def test_a_process_left_behind_keeps_nobody_waiting(stop: int, tmp_path: Path) -> None:
    """It holds the output open, and it lives on: it may be the service."""
    begun = tmp_path / "pid"
    why, said = shell(f"sleep 300 & echo $! >{begun}; echo done", stop)
    assert (why, said) == ("", ["done"])
    pid = int(begun.read_text())
    assert not gone(pid)
    os.kill(pid, signal.SIGKILL)


def test_it_gets_no_socket_and_no_blocked_signal(stop: int) -> None:
    """The server blocks the signals to end, and passes its sockets to its successor."""
    blocked = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    with socket.socket() as listener:
        listener.set_inheritable(True)
        old = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            script = (
                "ls /proc/self/fd | wc -l; grep -E 'SigBlk|SigIgn' /proc/self/status"
            )
            why, said = shell(script, stop)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
    # Input, output, errors, and the folder that ls reads.
    assert (why, said[0]) == ("", "4")
    masks = [int(line.split()[1], 16) & ~GLIBC_S for line in said[1:]]
    assert masks == [0, 0]


def test_no_program_is_one_clear_error(stop: int) -> None:
    """Nothing has been started then."""
    with pytest.raises(UnsupportedError, match="/nowhere cannot be started: No such"):
        run_bounded(["/nowhere"], ENVIRONMENT, 1, print, stop)
