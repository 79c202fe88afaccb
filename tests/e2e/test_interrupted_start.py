# SPDX-License-Identifier: BSD-3-Clause
"""
A start that is interrupted, by Ctrl-C or another signal, at each of its instants.

It leaves no server behind, and shows no traceback.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import support
from e2e.conftest import DOORS
from e2e.lib.harness import Site


@pytest.mark.parametrize(
    ("door", "number"),
    [
        *((door, signal.SIGINT) for door in DOORS),
        ("direct", signal.SIGTERM),
        ("direct", signal.SIGHUP),
        ("python", signal.SIGTERM),
        ("python", signal.SIGHUP),
    ],
)
def test_start_that_is_interrupted_is_none(
    site: Site, door: str, number: signal.Signals
) -> None:
    """Ctrl-C ends the server too, which the terminal cannot reach; so does SIGTERM."""
    site.create()
    gate = site.folder / "gate"
    command = [*site.command(), "serve", str(site.config), "--door", door]
    fault = {"NBDM_FAULT": f"superblock_write:1=wait:{gate}"}
    environment = os.environ | site.environment() | fault
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        support.wait_until(Path(f"{gate}.reached").exists, "the start to be under way")
        pid = int((site.state / "lock").read_text())
        process.send_signal(number)
        ended = 130 if number is signal.SIGINT else -number
        assert process.wait(30) == ended
        assert f"server {pid} was told to end" in process.stderr.readline()
    gate.touch()
    support.wait_until(lambda: not support.is_running(pid), "the server to end")
    site.cli("serve", str(site.config))
    site.cli("stop", str(site.config))


# `nbd-mirror serve`, with a signal that comes as its server has just been started.
SIGNALLED = """
import os, signal, sys
from nbd_mirror.commands import cli, serve
number = int(sys.argv.pop(1))
begin = serve._start

def start(*arguments):
    process = begin(*arguments)
    os.kill(os.getpid(), number)
    return process

serve._start = start
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_right_after_the_servers_start_ends_it(
    site: Site, number: signal.Signals
) -> None:
    """At no instant does the command end and leave the server that it has started."""
    site.create()
    done = site.processes.run(
        [sys.executable, "-c", SIGNALLED, str(int(number)), "serve", str(site.config)],
        env=site.environment(),
        check=False,
    )
    assert done.returncode == (130 if number is signal.SIGINT else -number)
    found = re.search(r"server (\d+) was told to end", done.stderr)
    assert found is not None, done.stderr
    pid = int(found[1])
    support.wait_until(lambda: not support.is_running(pid), "the server to end")


def test_end_of_the_terminal_is_ignored_under_nohup(site: Site) -> None:
    """A signal that the command ignores does not end the start."""
    site.create()
    shell = ["/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    command = [sys.executable, "-c", SIGNALLED, str(int(signal.SIGHUP))]
    site.processes.run(
        [*shell, *command, "serve", str(site.config)], env=site.environment()
    )
    site.cli("stop", str(site.config))


@pytest.mark.parametrize("door", DOORS)
def test_interrupt_ends_a_start_in_the_foreground(site: Site, door: str) -> None:
    """At once, though C code waits for a disk: a start may take minutes there."""
    site.create()
    gate = site.folder / "gate"
    site.serve(door, ready=False, fault=f"superblock_write:1=wait:{gate}")
    support.wait_until(Path(f"{gate}.reached").exists, "the start to be under way")
    os.kill(site.pid, signal.SIGINT)
    assert site.ended() == -signal.SIGINT
    assert "Traceback" not in site.log
    assert "KeyboardInterrupt" not in site.log


# `nbd-mirror serve`, whose server gets Ctrl-C as its interpreter starts.
EARLY = """
import os, sys
from nbd_mirror.commands import cli, serve
early, make = sys.argv.pop(1), serve._environment

def environment(*about):
    made = make(*about)
    return made | {"PYTHONPATH": f"{early}:{made['PYTHONPATH']}"}

serve._environment = environment
cli.main()
"""
INTERRUPTS = """
import os, signal, sys
module = os.environ.get("INTERRUPT_AT")

class Interrupts:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

if os.environ.get("NBD_MIRROR_DOOR"):
    sys.meta_path.insert(0, Interrupts())
    if not module:
        os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("module", ["", "nbd_mirror.server.volume"])
@pytest.mark.parametrize("door", DOORS)
def test_interrupt_over_the_imports_of_a_door_is_no_traceback(
    site: Site, door: str, module: str
) -> None:
    """Neither Python nor nbdkit has a word to say, at any instant of the start."""
    site.create()
    early = site.folder / "early"
    early.mkdir()
    (early / "sitecustomize.py").write_text(INTERRUPTS)
    words = ["serve", str(site.config), "--foreground", "--door", door]
    done = site.processes.run(
        [sys.executable, "-c", EARLY, str(early), *words],
        env=site.environment() | {"INTERRUPT_AT": module},
        check=False,
    )
    assert (-signal.SIGINT, "") == (done.returncode, done.stderr)
