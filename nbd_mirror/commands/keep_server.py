# SPDX-License-Identifier: BSD-3-Clause
"""
Serve the image of a keep file read-only on a unix socket: by nbdkit, with our plugin.

The doors of a volume serve an engine, and this image has none.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ..base import unix
from ..base.errors import BusyError, MirrorError
from ..base.programs import cannot_start, clean_environment
from .python_plugin import module_path, plugin_command

__all__ = ["serve_image"]

POLL_S = 0.05
END_S = 10.0


def serve_image(
    keep: Path, local: str, socket: Path, ready: Callable[[], object]
) -> None:
    """
    Serve until Ctrl-C ends the process, which takes nbdkit with it.

    Args:
        keep: the keep file. local: the disk that has all other regions.
        socket: its path, which must not exist; the owner alone may connect.
        ready: called once clients may connect.
    Raises:
        BusyError: the socket's path is taken. MirrorError: nbdkit is not there, or it
        ended by itself.
    """
    command = plugin_command(
        "keep_plugin.py",
        # nbdkit would log each error of a read with Python's trace. The plugin says
        # what a person needs to know.
        options=["-r", "--exit-with-parent", "--log=null", "-U", os.fspath(socket)],
        keep=os.fspath(keep),
        local=local,
    )
    if os.path.lexists(socket):
        raise BusyError(f"{socket} exists already")
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=clean_environment() | {"PYTHONPATH": module_path()},
            umask=0o077,
        )
    except OSError as error:
        raise cannot_start(command[0], error) from None
    try:
        while process.poll() is None and not _answers(socket):
            time.sleep(POLL_S)
        if process.returncode is None:
            ready()
        status = process.wait()
        words = shlex.join(word for word in command if word != "--log=null")
        raise MirrorError(
            f"nbdkit ended with exit status {status}",
            f"PYTHONPATH={shlex.quote(module_path())} {words}, to see why",
        )
    finally:
        _end(process)
        with contextlib.suppress(OSError):
            socket.unlink()


def _answers(socket: Path) -> bool:
    with contextlib.suppress(OSError):
        return socket.exists() and unix.answers(socket)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
