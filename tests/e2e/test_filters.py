# SPDX-License-Identifier: BSD-3-Clause
"""
What a remote is asked, and what happens while it thinks, by nbdkit's own filters.

The log filter tells what came over the wire, told by a program that is not ours; the
pause filter keeps requests inside a server that is otherwise well.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import support
from e2e.lib.harness import MIB, Site

Sites = Callable[..., Site]

KIB = 1024


def commands(log: Path) -> list[str]:
    """Return what the server was asked, as "Write id=1 offset=0x0 count=0x200"."""
    pattern = r"(Write|Zero|Trim|Flush) (id=\d+.*?) \.\.\.$"
    found = re.findall(pattern, log.read_text(), re.MULTILINE)
    return [f"{kind} {rest}" for kind, rest in found]


def test_remote_is_sent_each_byte_once(new_site: Sites) -> None:
    """In sync a request is one command; zeroes travel as zeroes, in resync as well."""
    site = new_site(size=8 * MIB)
    log = site.folder / "commands.log"
    site.fill(site.local, MIB, offset=2 * MIB)
    site.dr.start("--filter=log", f"logfile={log}")
    site.create()
    site.serve()
    site.wait_in_sync()
    first = commands(log)
    written = [int(x, 16) for c in first for x in re.findall(r"^Write.*count=(\w+)", c)]
    assert sum(written) == MIB, first
    assert any(c.startswith("Zero") for c in first)

    handle = site.client()
    handle.pwrite(os.urandom(4 * KIB), 64 * KIB)
    handle.pwrite(os.urandom(4 * KIB), 128 * KIB, 1)  # FUA
    handle.zero(64 * KIB, MIB)
    handle.trim(64 * KIB, 3 * MIB)
    handle.flush()
    handle.shutdown()
    since = [
        c.split()[0] + c[c.index(" offset") :]
        for c in commands(log)[len(first) :]
        if "offset" in c
    ]
    assert since == [
        "Write offset=0x10000 count=0x1000 fua=0",
        "Write offset=0x20000 count=0x1000 fua=1",
        "Zero offset=0x100000 count=0x10000 trim=1 fua=0 fast=0",
        "Zero offset=0x300000 count=0x10000 trim=1 fua=0 fast=0",
    ]
    site.stop()
    site.assert_equal()


def pause_control(path: Path, word: bytes) -> None:
    """Pause or resume a server; return once it has."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.settimeout(20)
        control.connect(os.fspath(path))
        control.sendall(word)
        assert control.recv(1).upper() == word.upper()


def test_paused_requests_within_the_deadline_are_only_late(
    new_site: Sites, door: str
) -> None:
    """A server that thinks for less than the deadline costs time and nothing else."""
    site = new_site(size=8 * MIB)
    site.deadline = "30s"
    site.write_config()
    control = site.folder / "pause.sock"
    site.dr.start("--filter=pause", f"pause-control={control}")
    site.create()
    site.serve(door)
    site.wait_in_sync()
    pause_control(control, b"p")
    answered = threading.Event()
    content = os.urandom(256 * KIB)

    def write() -> None:
        handle = site.client()
        handle.pwrite(content, MIB)
        answered.set()
        handle.shutdown()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        support.wait_until(lambda: site.status()["inflight"] == 1, "the request")
        assert not answered.is_set()
        assert site.remote()["state"] == "in_sync"
    finally:
        pause_control(control, b"r")
        writer.join(30)
    assert answered.is_set()
    assert site.remote()["state"] == "in_sync"
    assert "out_of_sync" not in site.log.split("resync_done")[-1]
    site.stop()
    site.assert_equal()


def test_paused_requests_past_the_deadline_are_dirty_and_late(new_site: Sites) -> None:
    """Past the deadline the client is answered; what comes later is copied over."""
    site = new_site(size=8 * MIB)
    site.deadline = "500ms"
    site.write_config()
    control = site.folder / "pause.sock"
    site.dr.start("--filter=pause", f"pause-control={control}")
    site.create()
    site.serve()
    site.wait_in_sync()
    pause_control(control, b"p")
    handle = site.client()
    handle.pwrite(b"1" * 64 * KIB, MIB)  # held in the server, answered all the same
    site.wait_state("out_of_sync")
    handle.pwrite(b"2" * 64 * KIB, MIB)
    site.assert_covered()
    pause_control(control, b"r")  # it carries out the first one now
    site.tell("resume")
    site.wait_in_sync()
    handle.shutdown()
    site.stop()
    site.assert_equal()
    support.wait_until(lambda: site.dr.image.read_bytes()[MIB:][:1] == b"2", "the copy")
