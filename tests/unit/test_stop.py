# SPDX-License-Identifier: BSD-3-Clause
"""`stop`, and what it says of a server that does not end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import support
from support import ROOT
from unit.answers import a_remote, a_status
from unit.volumes import make_file

from nbd_mirror.server.control_server import ControlServer
from nbd_mirror.volume.config import load
from nbd_mirror.volume.control import control_path


def test_stop_names_no_process_that_the_kernel_does_not(tmp_path: Path) -> None:
    """A server of another process namespace cannot have root kill what it names."""
    support.requires(os.geteuid() == 0, "only root can make a process namespace")
    support.requires_program("unshare")
    config = load(make_file(tmp_path))
    answers = {
        "ping": {"volume": "v", "pid": os.getpid()},
        "status": a_status(a_remote()),
        "stop": {},
    }
    script = (
        "import sys\n"
        "from nbd_mirror.commands import stop\n"
        "from nbd_mirror.volume import config\n"
        "volume = config.load(sys.argv[1])\n"
        "stop.STOP_SLACK_S = 1 - volume.stop_limit_s\n"
        "try: stop.stop(volume)\n"
        "except stop.WaitTimeoutError as error: print(error.message, error.hint)\n"
    )
    python = [sys.executable, "-c", script, str(config.source)]
    with ControlServer(control_path(config.state_dir), lambda one, _: answers[one]):
        done = subprocess.run(
            ["unshare", "--pid", "--fork", *python],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert "has not ended" in done.stdout, done.stderr
    assert str(os.getpid()) not in done.stdout
