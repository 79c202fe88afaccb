# SPDX-License-Identifier: BSD-3-Clause
"""
The commands that look at a volume, and the socket they ask it over.

Their figures are compared with the test's own count of the map's bits and of the
images, never with another of their own figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable

import pytest
import support
from e2e.lib.clients import dirty_set
from e2e.lib.harness import MIB, Site

Sites = Callable[..., Site]

STATUS_KEYS = {
    "volume",
    "uuid",
    "size",
    "state",
    "local",
    "inflight",
    "active_extents",
    "persists",
    "policy",
    "fenced_reads",
    "remotes",
}
REMOTE_KEYS = {
    "name",
    "uri",
    "state",
    "reason",
    "hint",
    "connected",
    "dirty_bytes",
    "unflushed_bytes",
    "resync",
    "last_error",
    "since",
}


@pytest.fixture
def behind(site: Site) -> Site:
    """Give a volume out of sync, its remote behind by regions 3, 4, 5 and 100."""
    site.bring_up()
    site.dr.kill()
    site.wait_state("out_of_sync")
    handle = site.client()
    handle.pwrite(b"b" * 3 * site.region_size, 3 * site.region_size)
    handle.pwrite(b"b" * 512, 100 * site.region_size)
    handle.shutdown()
    assert dirty_set(site.map_path()) == {3, 4, 5, 100}
    return site


@pytest.mark.parametrize("running", [True, False])
def test_status_json_has_every_key(behind: Site, *, running: bool) -> None:
    """`status --json` prints what is documented, with and without a server."""
    site = behind
    if not running:
        site.stop()
    status = json.loads(site.cli("status", str(site.config), "--json").stdout)
    assert STATUS_KEYS <= status.keys()
    (remote,) = status["remotes"]
    assert REMOTE_KEYS <= remote.keys()
    assert remote["dirty_bytes"] == 4 * site.region_size
    assert remote["state"] == "out_of_sync"
    assert remote["reason"]
    assert status["state"] == ("out_of_sync" if running else "stopped")
    assert status["local"]["path"] == str(site.local)
    assert status["local"]["state"] == "ok"
    assert status["local"]["dirty_bytes"] == 0
    assert status["size"] == site.size


def test_status_names_reason_and_command(behind: Site) -> None:
    """`status` says why it is out of sync, and its command can be typed as it is."""
    site = behind
    said = site.cli("status", str(site.config)).stdout
    assert "out_of_sync" in said
    assert "256KiB dirty" in said
    assert re.search(r"why: .*Connection refused|why: .*connect", said)
    assert f"nbd-mirror resume {site.config} dr" in said


def test_wait_times_out_with_state_reason_hint(behind: Site) -> None:
    """`wait` that is over says state, reason and hint, with its own exit code."""
    site = behind
    said = site.refused(
        11,
        "not in_sync after",
        "dr is out_of_sync",
        str(site.dr.socket),
        commands=["wait", str(site.config), "--for", "in_sync", "--timeout", "300ms"],
    )
    assert f"try: nbd-mirror resume {site.config} dr" in said


def test_wait_returns_when_reached(behind: Site) -> None:
    """`wait` returns as soon as the state is reached."""
    site = behind
    site.dr.start()
    done = site.cli("wait", str(site.config), "--for", "in_sync", "--timeout", "60s")
    assert done.stdout == "dr: in_sync\n"


def test_wait_without_server_is_said(site: Site) -> None:
    """`wait` for a volume without a server ends with that cause."""
    site.create()
    done = site.cli(
        "wait", str(site.config), "--for", "in_sync", "--timeout", "200ms", check=False
    )
    assert done.returncode == 10
    assert "no server answers" in done.stderr
    assert f"try: nbd-mirror serve {site.config}" in done.stderr


def test_watch_without_terminal_prints_changes(behind: Site) -> None:
    """`watch` into a file prints a line a change, and no control codes."""
    site = behind
    out = site.folder / "watch.out"
    out.touch()
    shell = ["/bin/sh", "-c", 'exec "$@" >"$0" 2>&1', str(out)]
    watching = site.processes.start(
        [*shell, *site.command(), "watch", str(site.config), "--until", "in_sync"],
        env=site.environment(),
    )
    support.wait_until(lambda: "out_of_sync" in out.read_text(), "a first line")
    site.dr.start()
    assert watching.wait(20) == 0
    lines = out.read_text().splitlines()
    assert "dr: out_of_sync, 256KiB dirty" in lines[0]
    assert "dr: in_sync" in lines[-1]
    assert "\x1b" not in out.read_text()
    assert len(lines) == len(set(lines))


def test_watch_ends_with_its_reader(behind: Site) -> None:
    """`watch | head -n 1` ends, though nothing changes that could be written."""
    command = [*behind.command(), "watch", str(behind.config)]
    environment = os.environ | behind.environment()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watch_leaves_the_terminal_with_its_cursor(
    behind: Site, number: signal.Signals
) -> None:
    """Whatever signal ends it: also that of `timeout 10 nbd-mirror watch`."""
    ours, theirs = os.openpty()
    command = [*behind.command(), "watch", str(behind.config)]
    environment = os.environ | behind.environment() | {"TERM": "xterm"}
    shown = b""
    with subprocess.Popen(
        command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while part := os.read(ours, 4096):
                if b"out_of_sync" in part and b"out_of_sync" not in shown:
                    process.send_signal(number)
                shown += part
        os.close(ours)
        assert process.wait(20) == (0 if number is signal.SIGINT else -number)
    hidden, visible = b"\x1b[?25l", b"\x1b[?25h"
    assert hidden in shown
    assert shown.rindex(visible) > shown.rindex(hidden)


def test_inspect_counts_as_the_file_has_it(behind: Site) -> None:
    """`inspect` shows the counts, the longest runs and a picture of the map."""
    site = behind
    png = site.folder / "map.png"
    said = site.cli("inspect", str(site.config), "--png", str(png)).stdout
    regions = site.size // site.region_size
    assert f"dr: 4 dirty regions of {regions}" in said
    assert "256KiB" in said
    assert "192KiB at 192KiB" in said, "the longest run"
    assert "one cell is" in said
    picture = [line for line in said.splitlines() if line.startswith("  │")]
    dark = sum(cell in "░▒▓█" for line in picture for cell in line)
    assert 1 < dark <= 4
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    full = site.cli("inspect", str(site.config), "--png", "/dev/full", check=False)
    assert full.returncode == 8
    assert "try: another FILE" in full.stderr

    found = json.loads(site.cli("inspect", str(site.config), "--json").stdout)
    (remote,) = found["remotes"]
    assert remote["dirty_regions"] == 4
    assert remote["nr_regions"] == regions
    assert remote["runs"] == 2
    assert remote["longest_runs"] == [
        {"offset": 3 * site.region_size, "length": 3 * site.region_size},
        {"offset": 100 * site.region_size, "length": site.region_size},
    ]


def test_inspect_without_server_works(behind: Site) -> None:
    """`inspect` reads the map of a volume without a server."""
    site = behind
    site.stop()
    said = site.cli("inspect", str(site.config)).stdout
    assert "dr: 4 dirty regions" in said


def test_command_unknown_remote_is_refused(behind: Site) -> None:
    """A remote that does not exist is named, with those that do."""
    site = behind
    for what in ("pause", "resume", "invalidate"):
        site.refused(3, "nowhere", "dr", commands=[what, str(site.config), "nowhere"])


def test_command_speaks_of_the_remotes_that_the_server_has(behind: Site) -> None:
    """A remote that the file got since its start is neither paused nor in sync."""
    file, before = str(behind.config), behind.config.read_text()
    behind.config.write_text(before.replace('name = "dr"', 'name = "new"'))
    try:
        assert behind.cli("pause", file).stdout == "dr: paused\n"
        assert behind.cli("resume", file).stdout == "dr: resumed\n"
        words = "does not mirror to new", "it has: dr", "nbd-mirror stop"
        wait = ["wait", file, "--for", "in_sync"]
        for options in ([], ["--remote", "new"]):
            behind.refused(3, *words, commands=[*wait, *options])
        behind.refused(3, *words, commands=["watch", file, "--until", "in_sync"])
    finally:
        behind.config.write_text(before)


def test_command_without_server_is_said(site: Site) -> None:
    """Commands to a volume without a server end with that cause."""
    site.create()
    for what in ("stop", "pause", "resume"):
        site.refused(10, "no server", "serve", commands=[what, str(site.config)])


def test_control_socket_is_the_owners_alone(site: Site, door: str) -> None:
    """The control socket and the listening one have mode 0600, the folder 0700."""
    site.bring_up(door)
    for path, mode in (
        (site.state / "control", 0o600),
        (site.socket, 0o600),
        (site.state, 0o700),
    ):
        assert mode == stat.S_IMODE(path.stat().st_mode)


ASK = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
try:
    s.sendall(b'{"command": "stop"}\\n')
except BrokenPipeError:
    pass  # it has answered already
print(s.makefile().readline())
"""


def test_control_socket_other_user_is_refused(
    site: Site, processes: support.Processes
) -> None:
    """Another user cannot command the server, not even where the mode would let him."""
    support.requires(os.geteuid() == 0, "only root may become another user")
    site.bring_up()
    control = site.state / "control"
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    ask = [*as_nobody, "/usr/bin/python3", "-c", ASK, str(control)]
    # Let him get as far as the socket: /tmp's session folder is 0700.
    reach = [site.folder.parent, site.folder, site.state]
    for folder in reach:
        folder.chmod(0o755)
    denied = processes.run(ask, check=False)
    assert denied.returncode != 0
    assert "PermissionError" in denied.stderr
    control.chmod(0o666)
    answered = processes.run(ask)
    assert '"ok":false' in answered.stdout
    assert "owner" in answered.stdout
    assert site.remote()["state"] == "in_sync"


@pytest.mark.parametrize(
    "garbage",
    [b"\n", b"{}\n", b"\xff\xfe\n", b"[1]\n", b'{"command": 7}\n', b"x" * 70000, b""],
)
def test_control_socket_garbage_does_not_disturb(site: Site, garbage: bytes) -> None:
    """Garbage on the control socket is refused, and the server goes on."""
    site.create()
    site.serve()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(site.state / "control"))
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    if answer:
        assert json.loads(answer)["ok"] is False
    assert site.status()["volume"] == "v"
    assert "Traceback" not in site.log


def test_control_socket_silent_client_holds_up_nobody(site: Site) -> None:
    """Clients that connect and say nothing do not keep others from being answered."""
    site.create()
    site.serve()
    silent = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    for sock in silent:
        sock.connect(str(site.state / "control"))
    assert site.status()["volume"] == "v"
    for sock in silent:
        sock.close()
    site.stop()


def test_help_lists_every_exit_code(site: Site) -> None:
    """`--help` shows the exit codes that the commands use."""
    said = site.cli("--help").stdout
    for code in (*range(16), 130):
        assert re.search(rf"^ +{code} ", said, re.MULTILINE), code


def test_wrong_usage_has_its_own_exit_code(site: Site) -> None:
    """An option that does not exist ends with 2."""
    assert site.cli("status", "--nonsense", check=False).returncode == 2
    assert site.cli("wait", str(site.config), check=False).returncode == 2


def test_version_is_printed(site: Site) -> None:
    """`--version` prints the version."""
    from nbd_mirror import __version__

    assert __version__ in site.cli("--version").stdout


def test_attach_without_kernel_nbd_shows_other_ways(site: Site) -> None:
    """Without the kernel's nbd, attach says so and shows nbdfuse and QEMU."""
    support.requires(
        not os.path.exists("/dev/nbd0") and sys.platform == "linux",  # noqa: PTH110
        "this kernel has nbd, so attach would work",
    )
    site.create()
    site.serve()
    done = site.cli("attach", str(site.config), check=False)
    assert done.returncode == 14
    assert "nbdfuse" in done.stderr
    assert "qemu" in done.stderr.lower()


def test_status_of_two_remotes_is_the_worst(new_site: Sites) -> None:
    """The volume's state is its worst remote's, with the reason."""
    site = new_site(remotes=["nbdkit", "nbdkit"], size=4 * MIB)
    site.bring_up()
    assert site.status()["state"] == "in_sync"
    site.secondaries[1].kill()
    site.wait_state("out_of_sync", name="dr1")
    status = site.status()
    assert status["state"] == "out_of_sync"
    assert "dr1" in status["reason"]
    assert site.remote("dr")["state"] == "in_sync"
