# SPDX-License-Identifier: BSD-3-Clause
"""
Start a volume's server: our own, or nbdkit with the Python door.

listeners.py binds its listening sockets, which it gets by the protocol of systemd's
socket activation. `exec` keeps the process, so the program that started `serve
--foreground` watches the server itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from ..base.errors import (
    BusyError,
    ConfigError,
    MirrorError,
    SpaceError,
    UnsupportedError,
    WaitTimeoutError,
)
from ..base.files import check_private
from ..base.hints import Asked
from ..base.interrupt import hold_back, let_through
from ..base.interrupts import Interrupt, Signals, put_off
from ..base.programs import cannot_start, clean_environment
from ..rules.state import LocalState
from ..volume.client import serving_pid
from ..volume.config import (
    CHOICE_VARIABLE,
    GRANT_VARIABLE,
    HAND_OVER_VARIABLE,
    VolumeConfig,
    check_links,
    check_nodes,
)
from ..volume.config_nodes import NODE_VARIABLE
from ..volume.loops import check_remotes
from ..volume.offline import read_superblock
from ..volume.tls_files import check_own_certificate, check_tls
from .listeners import Listeners, bind_all
from .python_plugin import module_path, plugin_command
from .serve_log import LOG_ROOM, last_words, open_log, pass_on_warnings, said_since

__all__ = ["DOORS", "ServerEndedError", "exec_server", "start"]

DOORS = ("direct", "python")
PACKAGE = Path(__file__).resolve().parents[1]
PYTHON_PLUGIN = PACKAGE / "server" / "plugin.py"
# -P: `-m` would import from the current folder, which may be another user's.
PYTHON = (sys.executable, "-P", "-m")

START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0  # for a server whose start was interrupted
_CHOICES = {"": [], "forced": ["--force"], "lost": ["--without-local"]}
_LISTEN_FD = 3  # the first descriptor of socket activation


class ServerEndedError(MirrorError):
    """
    The server ended before it answered; *exit_code* is its own.

    Its message is the server's output, and is printed unchanged.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def check_startable(config: VolumeConfig) -> None:
    """
    Check the conditions for a server's start.

    Raises:
        MissingError: the volume was not created. FormatError: its superblock is
        garbled, or of another volume. BusyError: it is served. ConfigError: the volume
        would be its own remote, or one of its logs is a link to its disk. SpaceError:
        the process's limit of a file's size is too low. UnsupportedError: it has more
        than two nodes. And as check_tls.
    """
    check_nodes(config)
    check_private(config.state_dir, "serve")
    if config.listen.tls or config.node:
        check_tls(config)
        late = check_own_certificate(config)
        if late:
            sys.stderr.write(f"nbd-mirror: warning: {late}\n")
    volume = read_superblock(config).volume
    if config.size and config.size != volume.size:
        raise ConfigError(
            f"size is {config.size}, but the volume was made with {volume.size} bytes: "
            "a volume keeps its size, and nothing was changed",
            f"size = {volume.size} in the configuration, the same on all hosts",
        )
    local = volume.local
    # A failed local disk may hang, and the start does not touch it.
    uses_local = local.state is not LocalState.FAILED
    check_links(config, uses_local=uses_local)
    _check_file_size_limit(config, uses_local=uses_local)
    check_remotes(config)
    pid = serving_pid(config)
    if pid is not None:
        raise BusyError(
            f"volume {config.name} is served already, by process {pid}",
            "nbd-mirror stop CONFIG",
        )


def _check_file_size_limit(config: VolumeConfig, *, uses_local: bool) -> None:
    """
    Check that the server may write the volume's files to their ends.

    Otherwise a write to the local disk would fail, and a remote take its place.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return
    files = [Path(config.local)] if uses_local else []
    with contextlib.suppress(OSError):
        files += config.state_dir.iterdir()
    for path in files:
        if path.name.startswith("serve.log."):
            continue  # set aside
        with contextlib.suppress(OSError):
            found = path.stat()
            if stat.S_ISREG(found.st_mode) and found.st_size + LOG_ROOM > limit:
                raise SpaceError(
                    f"{path} has {found.st_size} bytes, and the limit of a file's size "
                    f"is {limit} bytes: the server could not write to it",
                    "raise `ulimit -f`, or LimitFSIZE= of the unit",
                )


def exec_server(
    config: VolumeConfig, door: str, choice: str = "", asked: Asked | None = None
) -> NoReturn:
    """
    Become the server: bind, then exec it.

    Args:
        config: of a volume that was created.
        door: one of DOORS.
        choice: the operator's choice for the local disk: "forced", "lost" or "".
        asked: the user's command and options, for the server's hints.
    Raises:
        MirrorError: it cannot be started. The door prints errors of the engine, and
        ends the process with the same exit codes.
    """
    check_startable(config)
    command = _command(config, door)
    listeners = bind_all(config)
    environment = _environment(asked, config.node) | listeners.environment()
    environment |= {"NBD_MIRROR_DOOR": door, CHOICE_VARIABLE: choice}
    sys.stdout.flush()
    try:
        _hand_on(listeners)
        os.chdir("/")  # so that the current folder can be unmounted
        hold_back()
        os.execve(command[0], command, environment)  # noqa: S606
    except OSError as error:
        let_through()
        raise cannot_start(command[0], error) from None


def _hand_on(listeners: Listeners) -> None:
    """Give the sockets the descriptors from _LISTEN_FD on, for the executed program."""
    behind = _LISTEN_FD + len(listeners.sockets)
    # Copy them first, so that none is overwritten before its turn.
    copies = [
        fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, behind)
        for sock in listeners.sockets
    ]
    for number, fd in enumerate(copies, _LISTEN_FD):
        os.dup2(fd, number, inheritable=True)


def _command(config: VolumeConfig, door: str) -> list[str]:
    if door == "direct":
        return [*PYTHON, "nbd_mirror.server", os.fspath(config.source)]
    if config.node:
        raise UnsupportedError(
            f"the {door} door cannot serve a node: other nodes connect to the direct "
            "door alone",
            "nbd-mirror serve CONFIG --door direct",
        )
    if config.listen.tls:
        raise UnsupportedError(
            f'the {door} door has no TLS, and listen = "{config.listen}" needs it',
            "nbd-mirror serve CONFIG --door direct",
        )
    return plugin_command(
        "plugin.py",
        config=os.fspath(config.source),
        hint="nbd-mirror serve CONFIG --door direct",
    )


def _environment(asked: Asked | None, node: str = "") -> dict[str, str]:
    """
    Return the server's environment, with a PYTHONPATH to our modules for any Python.

    It leads nowhere else: not to the current folder, nor to the caller's modules.
    """
    words = asked.dump() if asked else {}
    # A name that the user gave, or the host's: the server is this node for good.
    mine = {NODE_VARIABLE: node} if node else {}
    environment = clean_environment() | {"PYTHONPATH": module_path()} | mine | words
    # Only a server that executes itself again has a role to pass on.
    for name in (GRANT_VARIABLE, HAND_OVER_VARIABLE):
        environment.pop(name, None)
    return environment


def _start(
    command: list[str], output: int, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise cannot_start(command[0], error) from None


@contextlib.contextmanager
def _ended_by_signal(
    process: subprocess.Popen[bytes], signals: Signals
) -> Iterator[None]:
    """
    End the server if a signal ends the command that waits for its start.

    The server has a session of its own, so Ctrl-C and the end of the terminal do not
    reach it; and it may be about to overwrite the remotes, which the operator has just
    seen to be a mistake. The command ends by that signal a little later.
    """
    try:
        with signals.let_through():
            yield
    except Interrupt:
        process.terminate()
        sys.stderr.write(
            f"nbd-mirror: interrupted: server {process.pid} was told to end, which is "
            "a clean stop if it serves already\n"
        )
        deadline = time.monotonic() + END_TIMEOUT_S
        seen = len(signals.came)
        while process.poll() is None and time.monotonic() < deadline:
            if len(signals.came) > seen:
                break  # the operator does not wait
            time.sleep(0.05)
        raise


def _wait_for_answer(
    config: VolumeConfig,
    process: subprocess.Popen[bytes],
    log: Path,
    said: Callable[[], list[str]],
) -> None:
    """Wait until the server answers; *said* gives the log since its start."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            words = last_words(log, said())
            raise ServerEndedError(words, code if code > 0 else 1)
        with contextlib.suppress(MirrorError):
            if serving_pid(config) == process.pid:
                pass_on_warnings(said())
                return
        time.sleep(0.05)
    raise WaitTimeoutError(
        f"server {process.pid} does not answer after {START_TIMEOUT_S:g}s; "
        f"it goes on starting, and says why in {log}",
        "nbd-mirror status CONFIG",
    )


def start(
    config: VolumeConfig, door: str, choice: str = "", asked: Asked | None = None
) -> int:
    """
    Start the server in the background and wait until it answers.

    It gets a session of its own, without input; its output goes to `serve.log` in the
    state directory. A signal that ends this command while it waits ends the server too.

    Returns:
        Its process id.
    Raises:
        ServerEndedError: it ended at once, with its own exit code.
        WaitTimeoutError: it does not answer yet, and is still starting.
        UnsupportedError: the kernel does not start it.
    """
    check_startable(config)
    _command(config, door)  # report a missing program here, not in a log
    log = config.state_dir / "serve.log"
    with open_log(log) as fd:
        said = functools.partial(said_since, fd, os.lseek(fd, 0, os.SEEK_END))
        command = [*PYTHON, "nbd_mirror", "serve"]
        options = ["--foreground", "--door", door, *_CHOICES[choice]]
        command += [os.fspath(config.source), *options]
        # No signal ends this command between the server's start and the wait for it.
        with put_off() as signals:
            process = _start(command, fd, _environment(asked, config.node))
            with _ended_by_signal(process, signals):
                _wait_for_answer(config, process, log, said)
    return process.pid
