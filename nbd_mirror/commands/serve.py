# SPDX-License-Identifier: BSD-3-Clause
"""
Start and stop a volume's server: our own, or nbdkit with one of its two doors.

We bind the listening socket ourselves and hand it on (the protocol of
systemd's socket activation): so a socket in use is our own clear error, a
stale one of a killed server is replaced, and a unix socket is 0600 from its
first moment.  `exec` keeps the process: what started `serve --foreground`
watches the server itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib.util
import os
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..base import unix
from ..base.errors import (
    BusyError,
    MetadataFailedError,
    MirrorError,
    NotRunningError,
    UnsupportedError,
    WaitTimeoutError,
    from_errno,
)
from ..base.files import check_private, open_plain, opened_folder
from ..base.listen import Listen
from ..base.programs import clean_environment, find_program, run
from ..rules.state import LocalState
from ..volume.client import ask, ask_process, ask_status, serving_pid
from ..volume.config import CHOICE_VARIABLE, VolumeConfig, check_links
from ..volume.loops import check_remotes
from ..volume.offline import read_superblock

__all__ = ["DOORS", "ServerEndedError", "bind", "exec_server", "start", "stop"]

DOORS = ("direct", "native", "python")
PACKAGE = Path(__file__).resolve().parents[1]
NATIVE_PLUGIN = PACKAGE / "nbdkit-nbd-mirror-plugin.so"
PYTHON_PLUGIN = PACKAGE / "server" / "plugin.py"
# -P: `-m` would import from the folder we stand in, which may be another user's.
PYTHON = (sys.executable, "-P", "-m")

START_TIMEOUT_S = 30.0
STOP_SLACK_S = 10.0  # beyond the server's own limit: for its last words
KEPT_S = 3  # how long a process may be only a thread in the kernel
FOLDER_LOCK_S = 2.0  # for the lock of the listening socket's folder, then without
STALE_LOOKS, STALE_PAUSE_S = 3, 0.03  # at a socket on which no server answers
MAX_LOG_BYTES = 1 << 20  # of serve.log, before a start puts it aside as serve.log.1
_SAID = "nbd-mirror: ", "  try: ", "       "  # how a line of an error begins
_CHOICES = {"": [], "forced": ["--force"], "lost": ["--without-local"]}
_WORDS = 4096  # bytes there must be room for in serve.log
FALLOC_FL_KEEP_SIZE = 1  # <linux/falloc.h>
MAX_LISTENERS = 16  # NBDM_MAX_LISTENERS
BACKLOG = 128  # connections that wait to be accepted
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
        garbled, or of another volume. BusyError: it is served. ConfigError: the volume
        would be its own remote, or a log of it its disk.
    """
    check_private(config.state_dir, "serve")
    local = read_superblock(config).volume.local
    # One that has failed may hang, and the start leaves it alone.
    check_links(config, uses_local=local.state is not LocalState.FAILED)
    check_remotes(config)
    pid = serving_pid(config)
    if pid is not None:
        raise BusyError(
            f"volume {config.name} is served already, by process {pid}",
            "nbd-mirror stop CONFIG",
        )


# --- the listening socket ------------------------------------------------


class Listeners(contextlib.ExitStack):
    """The *sockets* a volume listens on; they are closed with it."""

    def __init__(self) -> None:
        super().__init__()
        self.sockets: list[socket.socket] = []

    def add(self, sock: socket.socket) -> None:
        """Take *sock* over."""
        self.sockets.append(self.enter_context(sock))


def bind(listen: Listen) -> Listeners:
    """
    Bind and listen; a socket file on which no server answers is replaced.

    A host's name, and no host at all, stand for several addresses: all of them are
    listened on that this host has.

    Raises:
        BusyError: another server listens there. MissingError, AccessError: the
        folder is not there or may not be written. ConfigError: no such address.
    """
    if listen.path is None:
        return _bind_tcp(listen)
    listeners = Listeners()
    listeners.add(_bind_unix(Path(listen.path)))
    return listeners


def _bind_unix(path: Path) -> socket.socket:
    try:
        with _locked_folder(path.parent):
            _remove_in_the_way(path)
            return unix.bind(path, BACKLOG)
    except MirrorError:
        raise
    except OSError as error:
        raise from_errno(
            error.errno or errno.EIO, f"cannot listen on {path}: {error.strerror}"
        ) from None


def _remove_in_the_way(path: Path) -> None:
    """Remove the socket file of a server that has ended; nothing else."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise BusyError(f"{path} is there and is no socket: choose another")
    if not _is_stale(path):
        raise BusyError(f"socket in use: another server listens on {path}")
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """
    Let one process at a time look at and replace a socket in *folder*.

    Else two that start at once both find it stale, and the second removes the
    first one's. But any user who can read the folder can lock it, so the wait is
    short: without the lock `_is_stale` still looks more than once.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + FOLDER_LOCK_S
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _is_stale(path: Path) -> bool:
    """
    Say whether no server answers on a socket's name.

    Asked again after a moment: another server may have bound it just now, and not be
    listening yet.
    """
    first = path.lstat()
    for _ in range(STALE_LOOKS):
        if unix.answers(path):
            return False
        time.sleep(STALE_PAUSE_S)
    last = path.lstat()
    return (first.st_dev, first.st_ino) == (last.st_dev, last.st_ino)


def _bind_tcp(listen: Listen) -> Listeners:
    found = _addresses(listen)
    both = {family for family, _ in found} == {socket.AF_INET, socket.AF_INET6}
    listeners = Listeners()
    missing: OSError | None = None
    try:
        for family, address in found:
            try:
                listeners.add(_listen_on(family, address, v6only=both))
            except OSError as error:
                # "localhost" is ::1 as well on a host without IPv6.
                if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise
                missing = error
        if not listeners.sockets and missing is not None:
            raise missing
    except OSError as error:
        listeners.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"socket in use: another server listens on {listen}"
            ) from None
        number = errno.EINVAL if error is missing else error.errno
        raise from_errno(
            number or errno.EIO, f"cannot listen on {listen}: {error.strerror}"
        ) from None
    return listeners


def _addresses(listen: Listen) -> Sequence[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(
            listen.host or None,
            listen.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
    except OSError as error:
        raise from_errno(
            errno.EINVAL, f"cannot listen on {listen}: {error.strerror or error}"
        ) from None
    unique = list(dict.fromkeys((one[0], one[4]) for one in found))
    if len(unique) > MAX_LISTENERS:
        raise from_errno(
            errno.EINVAL,
            f"cannot listen on {listen}: it stands for {len(unique)} addresses, "
            f"more than {MAX_LISTENERS}",
        )
    return unique


def _listen_on(
    family: socket.AddressFamily, address: Any, *, v6only: bool
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Beside one for IPv4; alone, "[::]" takes IPv4 too.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


# --- the server ----------------------------------------------------------


def exec_server(config: VolumeConfig, door: str, choice: str = "") -> NoReturn:
    """
    Become the server: bind, then exec it.

    Args:
        config: of a volume that was created.
        door: one of DOORS.
        choice: what the operator says of the local disk: "forced", "lost" or "".
    Raises:
        MirrorError: it cannot be started. What the engine finds wrong is
        printed by the door, which ends the process with the same exit codes.
    """
    check_startable(config)
    command = _command(config, door)
    listeners = bind(config.listen)
    environment = _environment() | {
        "NBD_MIRROR_DOOR": door,
        CHOICE_VARIABLE: choice,
        "LISTEN_FDS": str(len(listeners.sockets)),
        "LISTEN_PID": str(os.getpid()),
    }
    sys.stdout.flush()
    _hand_on(listeners)
    os.chdir("/")  # whatever folder we stood in can be unmounted
    try:
        os.execve(command[0], command, environment)  # noqa: S606
    except OSError as error:
        raise UnsupportedError(
            f"{command[0]} cannot be started: {error.strerror}"
        ) from None


def _hand_on(listeners: Listeners) -> None:
    """Make the sockets the descriptors from _LISTEN_FD on, for what is executed."""
    behind = _LISTEN_FD + len(listeners.sockets)
    # First out of the way, so that none is overwritten before its turn.
    copies = [
        fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, behind)
        for sock in listeners.sockets
    ]
    for number, fd in enumerate(copies, _LISTEN_FD):
        os.dup2(fd, number, inheritable=True)


def _command(config: VolumeConfig, door: str) -> list[str]:
    if door == "direct":
        return [*PYTHON, "nbd_mirror.server.direct", os.fspath(config.source)]
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
    """
    Return the server's, with a PYTHONPATH that leads any Python to our modules.

    And to nothing else: not to the current folder, nor to what the caller has there.
    """
    folders: list[str] = []
    for name in _IMPORTS:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            origin = Path(spec.origin).resolve()
            package = spec.submodule_search_locations is not None
            folders.append(os.fspath(origin.parents[1 if package else 0]))
    path = os.pathsep.join(dict.fromkeys(folders))
    return clean_environment() | {"PYTHONPATH": path}


def start(config: VolumeConfig, door: str, choice: str = "") -> int:
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
        command = [*PYTHON, "nbd_mirror", "serve"]
        options = ["--foreground", "--door", door, *_CHOICES[choice]]
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
                words = _last_words(log, _said_since(fd, begin))
                raise ServerEndedError(words, code if code > 0 else 1)
            with contextlib.suppress(MirrorError):
                if serving_pid(config) == process.pid:
                    _pass_on_warnings(_said_since(fd, begin))
                    return process.pid
            time.sleep(0.05)
    raise WaitTimeoutError(
        f"server {process.pid} does not answer after {START_TIMEOUT_S:g}s; "
        f"it goes on starting, and says why in {log}",
        "nbd-mirror status CONFIG",
    )


def _said_since(fd: int, begin: int) -> list[str]:
    """Return what was said since *begin*: in this file, whatever has its name now."""
    return os.pread(fd, 64 << 10, begin).decode(errors="replace").splitlines()


def _pass_on_warnings(said: list[str]) -> None:
    """Repeat on standard error what the start found wrong with the volume itself."""
    for line in said:
        _, _, warning = line.partition(" warning volume ")
        if warning:
            sys.stderr.write(f"nbd-mirror: warning: volume {warning}\n")


@contextlib.contextmanager
def _open_log(log: Path) -> Iterator[int]:
    """
    Open the log to append to it; what a server that runs says there stays as it is.

    This start does not know yet whether one does: a socket may have been removed.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    try:
        with opened_folder(log.parent) as dir_fd:
            _put_aside(log.name, dir_fd)
            try:
                fd = open_plain(log.name, flags, dir_fd)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                # A link, say, from where others could write here: not followed.
                os.unlink(log.name, dir_fd=dir_fd)
                fd = open_plain(log.name, flags | os.O_EXCL, dir_fd)
    except OSError as error:
        raise _log_error(log, error) from None
    try:
        _check_room(log, fd)
        yield fd
    finally:
        os.close(fd)


def _put_aside(name: str, dir_fd: int) -> None:
    """
    Begin a new log where the old one is long, unless a server has the volume.

    A server does it by itself, but only as long as the name leads to its file.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_size <= MAX_LOG_BYTES:
            return
        with _volume_lock(dir_fd) as ours:
            for older, newer in ((".2", ".1"), (".1", "")) if ours else ():
                with contextlib.suppress(FileNotFoundError):
                    os.rename(
                        name + newer, name + older, src_dir_fd=dir_fd, dst_dir_fd=dir_fd
                    )


@contextlib.contextmanager
def _volume_lock(dir_fd: int) -> Iterator[bool]:
    """Take the volume's lock for a moment; say whether that was possible."""
    with contextlib.ExitStack() as stack:
        try:
            # Where there is none, or a link, the server makes one or says so.
            fd = open_plain("lock", os.O_RDWR, dir_fd)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _check_room(log: Path, fd: int) -> None:
    """
    Check that a disk too full for the logs can be said in this one.

    Room is taken beyond the end of the file, and the file does not become longer. So
    there is nothing to undo, and no line of another process to be cut off with it.
    """
    end = os.lseek(fd, 0, os.SEEK_END)
    libc = ctypes.CDLL(None, use_errno=True)
    off_t = ctypes.c_int64
    if libc.fallocate64(fd, FALLOC_FL_KEEP_SIZE, off_t(end), off_t(_WORDS)) == 0:
        return
    number = ctypes.get_errno()
    if number in {errno.EOPNOTSUPP, errno.ENOSYS}:
        found = os.fstatvfs(fd)
        # ramfs counts no blocks at all.
        full = found.f_blocks > 0 and found.f_bavail * found.f_frsize < _WORDS
        number = errno.ENOSPC if full else 0
    if number:
        raise _log_error(log, OSError(number, os.strerror(number)))


def _log_error(log: Path, error: OSError) -> MirrorError:
    hint = f"make room in {log.parent}" if error.errno == errno.ENOSPC else ""
    text = f"cannot write {log}: {error.strerror}"
    return from_errno(error.errno or errno.EIO, text, hint)


def _last_words(log: Path, said: list[str]) -> str:
    """Return what the server said before it ended: our own lines if there are any."""
    ours = [line for line in said if line.startswith(_SAID)]
    words = "\n".join(ours or said[-3:])
    return words or f"nbd-mirror: the server ended without a word; see {log}"


def stop(config: VolumeConfig) -> None:
    """
    Stop the server cleanly and wait until its process is gone.

    Raises:
        NotRunningError: there is none. WaitTimeoutError: it is still stopping.
        MetadataFailedError: it has ended, but could not persist everything.
    """
    server = ask_process(config)
    pid = server.pid if server.seen else 0
    words, kill = _words_for(pid)
    limit_s = config.stop_limit_s + STOP_SLACK_S
    hangs = _what_hangs(config)
    process = -1  # of another process namespace, or ended just now
    if pid > 0:
        with contextlib.suppress(OSError):
            process = os.pidfd_open(pid)
    unclean: MetadataFailedError | None = None
    answered = True
    try:
        try:
            ask(config, "stop", limit_s)
        except MetadataFailedError as error:
            unclean = error  # it ends all the same
        except NotRunningError:
            # A signal ended it just now, or it was still stopping at its limit.
            answered = False
        if not _wait_gone(config, pid, process, limit_s):
            if answered and unclean is None and _is_kept(pid):
                raise WaitTimeoutError(
                    f"volume {config.name} was stopped cleanly, but the kernel keeps a "
                    f"thread of {words}, which ends when the local disk answers; "
                    "the volume can be served again, without that disk until then",
                )
            raise WaitTimeoutError(
                f"{words} has not ended {limit_s:g}s after it was told to{hangs}; "
                "nothing that was answered is lost if it is killed: the next start "
                "recovers as after a crash",
                f"{kill}, then nbd-mirror serve CONFIG",
            )
    finally:
        if process >= 0:
            os.close(process)
    if config.listen.path is not None:
        _remove_stale(Path(config.listen.path))
    if unclean is not None:
        raise unclean
    if not answered and not read_superblock(config).volume.clean:
        raise MetadataFailedError(
            f"{words} ended without a clean stop: the next start recovers "
            "as after a crash"
        )


def _words_for(pid: int) -> tuple[str, str]:
    """
    Give what to call a server, and how to kill it.

    Args:
        pid: as the kernel has it; 0 if it shows none. The number that the server says
            may then be that of any process here.
    """
    if pid == 0:
        return "the server", "kill it in its own process namespace"
    return f"server {pid}", f"kill -KILL {pid}"


def _what_hangs(config: VolumeConfig) -> str:
    """Say that the local disk hangs; then no signal ends the process either."""
    try:
        local = ask_status(config, 5.0).local
    except NotRunningError:
        raise
    except MirrorError:
        # One of another version can be stopped all the same, and so can one that
        # waits for a disk and gives no status meanwhile.
        return ""
    if local.state != "silent":
        return ""
    return ": the local disk has not answered, and the process ends when it does"


def _is_kept(pid: int) -> bool:
    """Tell whether only threads that no signal ends are left of the process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"


def _wait_gone(config: VolumeConfig, pid: int, process: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    if process >= 0:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        kept = 0
        # A process that ends is its zombie for a moment, and readable here after it.
        while time.monotonic() < deadline and kept < KEPT_S:
            if poll.poll(1000):
                return True
            kept = kept + 1 if _is_kept(pid) else 0
        return False
    while time.monotonic() < deadline:
        try:
            ask_process(config, 1.0)
        except NotRunningError:
            return True
        except MirrorError:
            pass
        time.sleep(0.1)
    return False


def _remove_stale(path: Path) -> None:
    """Remove a socket file whose server has ended; nbdkit leaves it behind."""
    with contextlib.suppress(OSError), _locked_folder(path.parent):
        if stat.S_ISSOCK(path.lstat().st_mode) and _is_stale(path):
            path.unlink()
