# SPDX-License-Identifier: BSD-3-Clause
"""
Output never matters: the volume is served and kept with any state of its log.

A command that cannot say what it did says that, with an exit code of its own.

The log's reader dies, stalls, its disk is full, its descriptor is closed; and each time
a remote is lost, comes back, is in sync again, and the server stops cleanly.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess

import pytest
import support
from e2e.lib.harness import MIB, Site


def serve(
    site: Site, door: str, output: int | None, *, shell: str = 'exec "$@"'
) -> subprocess.Popen[bytes]:
    """Start the server in the foreground with *output* as its output."""
    words = ["serve", str(site.config), "--foreground", "--door", door]
    server = subprocess.Popen(
        ["/bin/sh", "-c", shell, "sh", *site.command(), *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**os.environ, **site.environment()},
        start_new_session=True,
    )
    site.processes.on_exit(lambda: support.end(server))
    support.wait_until(site.answers, f"the server to answer ({door} door)")
    return server


def fill(fd: int, block: bytes) -> None:
    """Write until nothing goes any more: the disk is full, or the pipe."""
    with contextlib.suppress(OSError):
        while True:
            os.write(fd, block)


def lose_and_regain(site: Site) -> None:
    """Have the keepers say much: an outage, a resync, errors of clients, commands."""
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    site.dr.kill()
    site.wait_state("out_of_sync")
    handle.pwrite(b"b" * MIB, MIB)
    for _ in range(20):
        site.tell("pause")
        site.tell("resume")
    site.dr.start()
    site.tell("resume")
    site.wait_in_sync()
    handle.pwrite(b"c" * 4096, 2 * MIB)
    handle.shutdown()


def assert_stops(site: Site, server: subprocess.Popen[bytes]) -> None:
    """SIGTERM ends it cleanly, and both sides are equal."""
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    site.assert_equal()


def test_log_reader_dies(site: Site, door: str) -> None:
    """A log collector that ends takes the log with it, and nothing else."""
    site.dr.start()
    site.create()
    reading, writing = os.pipe()
    server = serve(site, door, writing)
    os.close(writing)
    site.wait_in_sync()
    os.close(reading)
    lose_and_regain(site)
    assert site.status()["log_lines_lost"] > 0
    assert "lost" in site.cli("status", str(site.config)).stdout
    assert_stops(site, server)


def test_log_reader_stalls(site: Site, door: str) -> None:
    """A reader that stops reading, with the pipe full, holds no thread up."""
    site.dr.start()
    site.create()
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    server = serve(site, door, writing)
    site.wait_in_sync()
    os.set_blocking(writing, False)
    fill(writing, b"x" * 512)
    os.set_blocking(writing, True)
    lose_and_regain(site)
    assert_stops(site, server)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("door", "closed"),
    [
        ("direct", "<&- >&- 2>&-"),
        ("direct", ">/dev/full 2>&1"),
        ("python", ">&- 2>&-"),
    ],
)
def test_log_without_output(site: Site, door: str, closed: str) -> None:
    """A server without an output, or on a full disk, is one all the same."""
    site.dr.start()
    site.create()
    server = serve(site, door, None, shell=f'exec "$@" {closed}')
    site.wait_in_sync()
    lose_and_regain(site)
    assert_stops(site, server)


def test_log_disk_full_and_room_again(site: Site, processes: support.Processes) -> None:
    """A log whose disk fills up lacks lines, and says so once there is room."""
    support.requires(os.geteuid() == 0, "only root may mount a tmpfs")
    small = site.folder / "small"
    small.mkdir()
    processes.run(["mount", "-t", "tmpfs", "-o", "size=1m", "nbdm-test", small])
    processes.on_exit(lambda: processes.run(["umount", "-l", small]))
    log = small / "log"
    site.dr.start()
    site.create()
    server = serve(site, "direct", None, shell=f'exec "$@" >>{log} 2>&1')
    site.wait_in_sync()
    filler = small / "filler"
    for path, block in ((filler, bytes(4096)), (log, b"\n")):
        with path.open("ab", buffering=0) as file:
            fill(file.fileno(), block)
    lose_and_regain(site)
    lost = site.status()["log_lines_lost"]
    assert lost > 0
    filler.unlink()
    site.tell("pause")
    site.tell("resume")
    site.dr.kill()
    support.wait_until(
        lambda: " lines were lost here" in log.read_text(), "the log to name the gap"
    )
    site.dr.start()
    site.wait_in_sync()
    assert_stops(site, server)


def test_log_of_a_server_that_cannot_start_is_complete(site: Site, door: str) -> None:
    """The only line about why it does not start reaches the command that waits."""
    site.create()
    site.local.unlink()
    done = site.cli(
        "serve", str(site.config), "--foreground", "--door", door, check=False
    )
    assert done.returncode == 4
    assert "does not exist" in done.stderr


@pytest.mark.parametrize(
    ("words", "redirection", "code"),
    [
        (["status", "v.toml"], ">/dev/full", 16),
        (["--help"], ">/dev/full", 16),
        (["watch", "v.toml"], ">/dev/full", 16),
        (["status", "none.toml"], ">/dev/full 2>&1", 4),
        (["status", "none.toml"], "2>&-", 4),
        (["status", "v.toml"], "<&- >&- 2>&-", 0),
        (["status", "v.toml"], "| true", 0),
    ],
)
def test_command_output_fails(
    site: Site, words: list[str], redirection: str, code: int
) -> None:
    """A full disk, a closed output, a reader that ends: the right exit code each."""
    site.create()
    script = f'"$@" {redirection}; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["/bin/bash", "-c", script, "bash", *site.command(), *words],
        cwd=site.folder,
        env={**os.environ, **site.environment()},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr
    assert (code == 16) == ("nbd-mirror: the output cannot be written" in done.stderr)
