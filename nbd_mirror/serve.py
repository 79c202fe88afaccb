# SPDX-License-Identifier: BSD-3-Clause
"""
Start and stop a volume's server: our own, or nbdkit with one of its two doors.

We bind the listening socket ourselves and hand it on (the protocol of
systemd's socket activation): so a socket in use is our own clear error, a
stale one of a killed server is replaced, and a unix socket is 0600 from its
first moment.  `exec` keeps the process: whoever started `serve --foreground`
watches the server itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from .client import ask, serving_pid
from .config import VolumeConfig
from .errors import (
    BusyError,
    MetadataFailedError,
    MirrorError,
    NotRunningError,
    UnsupportedError,
    WaitTimeoutError,
    from_errno,
)
from .listen import Listen
from .offline import read_superblock
from .programs import find_program, run

__all__ = ["DOORS", "ServerEndedError", "bind", "exec_server", "start", "stop"]

DOORS = ("direct", "native", "python")
PACKAGE = Path(__file__).resolve().parent
NATIVE_PLUGIN = PACKAGE / "nbdkit-nbd-mirror-plugin.so"
PYTHON_PLUGIN = PACKAGE / "plugin.py"

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0
MAX_LOG_BYTES = 1 << 20  # of serve.log, before it is put aside as serve.log.1
_WORDS = 4096  # bytes there must be room for in serve.log
_LISTEN_FD = 3  # the first descriptor of socket activation
# What the engine and the doors import, and nbdkit's own Python cannot find.
_IMPORTS = ("nbd_mirror", "_cffi_backend", "bitarray", "pydantic", "typing_inspection")


class ServerEndedError(MirrorError):
    """
    The server ended before it answered; *exit_code* is its own.

    Its message is what the server said, so it is printed as it is.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def check_startable(config: VolumeConfig) -> None:
    """
    Check what must be there before a server is started.

    Raises:
        MissingError: the volume was not created. FormatError: its superblock is
        garbled, or of another volume. BusyError: it is served.
    """
    read_superblock(config)
    pid = serving_pid(config)
    if pid is not None:
        raise BusyError(
            f"volume {config.name} is served already, by process {pid}",
            "nbd-mirror stop CONFIG",
        )


# --- the listening socket ------------------------------------------------


def bind(listen: Listen) -> socket.socket:
    """
    Bind and listen; a socket file that nobody answers is replaced.

    Raises:
        BusyError: somebody else listens there. MissingError, AccessError: the
        folder is not there or may not be written. ConfigError: no such address.
    """
    if listen.path is not None:
        return _bind_unix(Path(listen.path))
    return _bind_tcp(listen)


def _bind_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)
        with _locked_folder(path.parent):
            if path.exists() and not path.is_socket():
                raise BusyError(f"{path} is there and is no socket: choose another")
            if _unix_answers(path):
                raise BusyError(f"socket in use: another server listens on {path}")
            path.unlink(missing_ok=True)
            sock.bind(os.fspath(path))
            sock.listen(128)
    except MirrorError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise from_errno(
            error.errno or errno.EIO, f"cannot listen on {path}: {error.strerror}"
        ) from None
    return sock


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """
    Let one process at a time look at and replace a socket in *folder*.

    Else two that start at once both find it stale, and the second removes the
    first one's.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _unix_answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (TimeoutError, BlockingIOError):
            return True  # its queue is full: somebody has it open
        return True


def _bind_tcp(listen: Listen) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise from_errno(
            errno.EINVAL, f"cannot listen on {listen}: {error.strerror or error}"
        ) from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"socket in use: another server listens on {listen}"
            ) from None
        number = errno.EINVAL if error.errno == errno.EADDRNOTAVAIL else error.errno
        raise from_errno(
            number or errno.EIO, f"cannot listen on {listen}: {error.strerror}"
        ) from None
    return sock


# --- the server ----------------------------------------------------------


def exec_server(config: VolumeConfig, door: str) -> NoReturn:
    """
    Become the server: bind, then exec it.

    Args:
        config: of a volume that was created.
        door: one of DOORS.
    Raises:
        MirrorError: it cannot be started. What the engine finds wrong is
        printed by the door, which ends the process with the same exit codes.
    """
    check_startable(config)
    command = _command(config, door)
    sock = bind(config.listen)
    environment = _environment() | {
        "NBD_MIRROR_DOOR": door,
        "LISTEN_FDS": "1",
        "LISTEN_PID": str(os.getpid()),
    }
    sys.stdout.flush()
    if sock.fileno() == _LISTEN_FD:
        os.set_inheritable(_LISTEN_FD, True)
    else:
        os.dup2(sock.fileno(), _LISTEN_FD, inheritable=True)
    try:
        os.execve(command[0], command, environment)  # noqa: S606
    except OSError as error:
        raise UnsupportedError(
            f"{command[0]} cannot be started: {error.strerror}"
        ) from None


def _command(config: VolumeConfig, door: str) -> list[str]:
    if door == "direct":
        return [sys.executable, "-m", "nbd_mirror.direct", os.fspath(config.source)]
    nbdkit = find_program("nbdkit", "nbdkit")
    if door == "native":
        if not NATIVE_PLUGIN.exists():
            raise UnsupportedError(
                "the native door was not built with this installation",
                "nbd-mirror serve CONFIG --door python, or scripts/setup",
            )
        plugin = [os.fspath(NATIVE_PLUGIN)]
    else:
        _check_python_plugin(nbdkit)
        plugin = ["python", os.fspath(PYTHON_PLUGIN)]
    return [nbdkit, "-f", *plugin, f"config={config.source}"]


def _check_python_plugin(nbdkit: str) -> None:
    rc, said = run(nbdkit, "python", "--dump-plugin")
    if rc:
        raise UnsupportedError(
            f"nbdkit has no Python plugin: {said}",
            "apt-get install nbdkit-plugin-python",
        )


def _environment() -> dict[str, str]:
    """Return ours, with a PYTHONPATH that leads nbdkit's own Python to our modules."""
    folders: list[str] = []
    for name in _IMPORTS:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            origin = Path(spec.origin).resolve()
            package = spec.submodule_search_locations is not None
            folders.append(os.fspath(origin.parents[1 if package else 0]))
    before = os.environ.get("PYTHONPATH")
    path = list(dict.fromkeys(folders)) + ([before] if before else [])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def start(config: VolumeConfig, door: str) -> int:
    """
    Start the server in the background and wait until it answers.

    It is a session of its own, without input; what it says goes to `serve.log`
    in the state directory.

    Returns:
        Its process id.
    Raises:
        ServerEndedError: it ended at once, with its own exit code.
        WaitTimeoutError: it does not answer yet; it goes on starting.
    """
    check_startable(config)
    _command(config, door)  # say what is missing here and not in a log
    log = config.state_dir / "serve.log"
    with _open_log(log) as fd:
        begin = os.lseek(fd, 0, os.SEEK_END)
        command = [sys.executable, "-m", "nbd_mirror", "serve"]
        options = ["--foreground", "--door", door]
        process = subprocess.Popen(
            [*command, os.fspath(config.source), *options],
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            raise ServerEndedError(_last_words(log, begin), code if code > 0 else 1)
        with contextlib.suppress(MirrorError):
            if serving_pid(config) == process.pid:
                _pass_on_warnings(log, begin)
                return process.pid
        time.sleep(0.05)
    raise WaitTimeoutError(
        f"server {process.pid} does not answer after {START_TIMEOUT_S:g}s; "
        f"it goes on starting, and says why in {log}",
        "nbd-mirror status CONFIG",
    )


def _pass_on_warnings(log: Path, begin: int) -> None:
    """Repeat on standard error what the start found wrong with the volume itself."""
    for line in log.read_bytes()[begin:].decode(errors="replace").splitlines():
        _, _, warning = line.partition(" warning volume ")
        if warning:
            sys.stderr.write(f"nbd-mirror: warning: volume {warning}\n")


@contextlib.contextmanager
def _open_log(log: Path) -> Iterator[int]:
    try:
        if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_name("serve.log.1"))
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _log_error(log, error) from None
    try:
        _check_room(log, fd)
        yield fd
    finally:
        os.close(fd)


def _check_room(log: Path, fd: int) -> None:
    """Check that a disk too full for the logs can be said in this one."""
    end = os.lseek(fd, 0, os.SEEK_END)
    try:
        os.posix_fallocate(fd, end, _WORDS)
    except OSError as error:
        raise _log_error(log, error) from None
    finally:
        os.ftruncate(fd, end)


def _log_error(log: Path, error: OSError) -> MirrorError:
    hint = f"make room in {log.parent}" if error.errno == errno.ENOSPC else ""
    text = f"cannot write {log}: {error.strerror}"
    return from_errno(error.errno or errno.EIO, text, hint)


def _last_words(log: Path, begin: int) -> str:
    """Return what the server said before it ended: our own lines if there are any."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read(64 << 10).decode(errors="replace").splitlines()
    ours = [line for line in lines if line.startswith(("nbd-mirror: ", "  try: "))]
    said = "\n".join(ours or lines[-3:])
    return said or f"nbd-mirror: the server ended without a word; see {log}"


def stop(config: VolumeConfig) -> None:
    """
    Stop the server cleanly and wait until its process is gone.

    Raises:
        NotRunningError: there is none. WaitTimeoutError: it is still stopping.
        MetadataFailedError: it has ended, but could not persist everything.
    """
    pid = int(ask(config, "ping", 5.0)["pid"])
    try:
        process = os.pidfd_open(pid)
    except OSError:
        process = -1  # ended just now, or of another process namespace
    unclean: MetadataFailedError | None = None
    try:
        try:
            ask(config, "stop", STOP_TIMEOUT_S)
        except MetadataFailedError as error:
            unclean = error  # it ends all the same
        if not _wait_gone(config, process):
            raise WaitTimeoutError(
                f"server {pid} has not ended {STOP_TIMEOUT_S:g}s after it was told to; "
                "it is still writing out what it holds",
                "nbd-mirror status CONFIG",
            )
    finally:
        if process >= 0:
            os.close(process)
    if config.listen.path is not None:
        _remove_stale(Path(config.listen.path))
    if unclean is not None:
        raise unclean


def _wait_gone(config: VolumeConfig, process: int) -> bool:
    if process >= 0:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(STOP_TIMEOUT_S * 1000))
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            ask(config, "ping", 1.0)
        except NotRunningError:
            return True
        except MirrorError:
            pass
        time.sleep(0.1)
    return False


def _remove_stale(path: Path) -> None:
    """Remove a socket file whose server has ended; nbdkit leaves it behind."""
    with contextlib.suppress(OSError), _locked_folder(path.parent):
        if path.is_socket() and not _unix_answers(path):
            path.unlink()
