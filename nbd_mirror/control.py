# SPDX-License-Identifier: BSD-3-Clause
"""
The control socket: how commands reach a running server.

A unix socket `control` in the state directory; a request is one line of JSON,
`{"command": ..., ...}`, the answer another, `{"ok": true, "result": ...}` or
`{"ok": false, "error": {"class", "message", "hint", "exit_code"}}`; then the
connection ends.  One request a connection keeps both ends free of any state,
and a client that hangs holds only its own thread, and that for seconds.

Only the owner may open it, twice over: the mode is 0600 from the moment the
socket is bound (set on the descriptor before, so no umask of the whole process
need change while nbdkit's threads make files), and the peer's uid is asked of
the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import (
    AccessError,
    BusyError,
    FormatError,
    MirrorError,
    MirrorIOError,
    NotRunningError,
    WaitTimeoutError,
    from_errno,
    from_name,
)

__all__ = ["ControlServer", "Handler", "call", "control_path"]

Handler = Callable[[str, dict[str, Any]], object]

MAX_REQUEST = 64 << 10  # bytes
MAX_ANSWER = 4 << 20  # bytes
MAX_UNIX_PATH = 107  # bytes; sun_path without its NUL
CLIENT_TIMEOUT_S = 5.0  # to send a request, and to take the answer
MAX_CLIENTS = 16  # at once; more wait in the kernel's queue


def control_path(state_dir: str | os.PathLike[str]) -> Path:
    """Return the path of a volume's control socket."""
    return Path(state_dir) / "control"


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """
    Give a name of *path* that fits into a socket address.

    A state directory may lie deeper than the 107 bytes an address holds; its
    entry under /proc/self/fd never does.
    """
    if len(os.fsencode(path)) <= MAX_UNIX_PATH:
        yield os.fspath(path)
        return
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)


def _receive_line(sock: socket.socket, limit: int, deadline: float) -> bytes:
    """Read to the first newline; raises TimeoutError, or EOFError on an early end."""
    data = bytearray()
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        chunk = sock.recv(65536)
        if not chunk:
            raise EOFError
        data += chunk
        if len(data) > limit:
            raise ValueError("line too long")
    return bytes(data)


class ControlServer:
    """
    Answers requests with *handler*, each in its own thread.

    *handler* gets the command and its arguments and returns what JSON can
    carry; a MirrorError it raises goes to the client, any other exception too,
    as a bug, and never ends the server.

    Args:
        path: of the socket.  The caller holds the volume's lock: a socket
            file that nobody answers is a dead server's and is replaced.
        handler: called from several threads at once.
        timeout_s: for a client to send its request, and to take the answer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        handler: Handler,
        *,
        timeout_s: float = CLIENT_TIMEOUT_S,
    ) -> None:
        self._path = Path(path)
        self._handler = handler
        self._timeout_s = timeout_s
        self._slots = threading.BoundedSemaphore(MAX_CLIENTS)
        self._lock = threading.Lock()  # guards _workers
        self._workers: set[threading.Thread] = set()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._wake_r = self._wake_w = -1

    def start(self) -> None:
        """
        Bind the socket and begin to answer.

        Raises:
            BusyError: another server answers on it. MirrorError of another
            class: the socket cannot be made.
        """
        if self._listener is not None:
            raise RuntimeError("the control server is started already")
        self._listener = self._bind()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC)
        self._acceptor = threading.Thread(target=self._accept, name="control")
        self._acceptor.start()

    def close(self) -> None:
        """
        Stop answering, remove the socket, and join every thread.

        A request under way is answered first; bounded by its handler and the
        client's time-out.  From a handler's own thread it joins all but that.
        """
        listener, self._listener = self._listener, None
        if listener is None:
            return
        # Remove the name first: nobody may connect to what will not answer.
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.write(self._wake_w, b"x")
        if self._acceptor is not None:
            self._acceptor.join()
        listener.close()
        with self._lock:
            workers = list(self._workers)
        for worker in workers:
            if worker is not threading.current_thread():
                worker.join()
        os.close(self._wake_r)
        os.close(self._wake_w)

    def __enter__(self) -> ControlServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(self) -> socket.socket:
        sock = _socket()
        try:
            os.fchmod(sock.fileno(), 0o600)
            with _short(self._path) as name:
                if _answers(name):
                    raise BusyError(
                        f"another server answers on {self._path}: "
                        "the volume is served already"
                    )
                with contextlib.suppress(FileNotFoundError):
                    Path(name).unlink()
                sock.bind(name)
            sock.listen(64)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            if isinstance(error, MirrorError):
                raise
            raise from_errno(
                error.errno or errno.EIO,
                f"the control socket {self._path} cannot be made: {error.strerror}",
            ) from None
        except MirrorError:
            sock.close()
            raise
        return sock

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None
        while True:
            ready, _, _ = select.select([listener.fileno(), self._wake_r], [], [])
            if self._wake_r in ready:
                return
            if not self._slots.acquire(timeout=self._timeout_s):
                continue
            try:
                client, _ = listener.accept()
            except OSError:
                # The client went away again, or descriptors ran out.
                self._slots.release()
                continue
            worker = threading.Thread(
                target=self._serve, args=(client,), name="control-client"
            )
            with self._lock:
                self._workers.add(worker)
            worker.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                answer = self._answer(client)
                if answer is not None:
                    client.settimeout(self._timeout_s)
                    client.sendall(answer)
        except OSError:
            pass  # the client is gone; nobody is left to be told
        finally:
            with self._lock:
                self._workers.discard(threading.current_thread())
            self._slots.release()

    def _answer(self, client: socket.socket) -> bytes | None:
        try:
            try:
                deadline = time.monotonic() + self._timeout_s
                line = _receive_line(client, MAX_REQUEST, deadline)
                # Only now: closed on before it has sent its request, a client gets
                # a broken pipe and not the refusal. Nothing of it is looked at.
                _check_peer(client)
                request = json.loads(line)
                command = request.pop("command")
                if not isinstance(command, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise FormatError(
                    "the request is no line of JSON with a command"
                ) from None
            except (EOFError, TimeoutError):
                return None
            result = self._handler(command, request)
            return _encode({"ok": True, "result": result})
        except MirrorError as error:
            return _encode_error(type(error).__name__, error)
        except Exception as error:  # a bug in a command must not end the server
            text = f"internal error in the server: {type(error).__name__}: {error}"
            return _encode_error("MirrorError", MirrorError(text))


def _encode(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode() + b"\n"


def _encode_error(name: str, error: MirrorError) -> bytes:
    fields = {
        "class": name,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    return _encode({"ok": False, "error": fields})


def _check_peer(client: socket.socket) -> None:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack(
        "3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    if uid not in (0, os.geteuid()):
        raise AccessError(f"only the server's owner may command it, not uid {uid}")


def _answers(name: str) -> bool:
    """Say whether a connect to the socket is taken."""
    with _socket() as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(name)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (TimeoutError, BlockingIOError):
            return True  # its queue is full: somebody has it open
        return True


def call(
    state_dir: str | os.PathLike[str],
    command: str,
    timeout_s: float = 10.0,
    **args: Any,
) -> Any:
    """
    Ask the server of a volume, and wait for its answer.

    Args:
        state_dir: the volume's state directory.
        command: what the server's handler knows, such as "status".
        timeout_s: seconds for all of it.
        args: the command's arguments, as JSON can carry them.
    Returns:
        The handler's result.
    Raises:
        NotRunningError: nobody answers. WaitTimeoutError: no answer in time.
        AccessError: the socket is somebody else's. The handler's own error, of
        the same class.
    """
    deadline = time.monotonic() + timeout_s
    request = _encode({**args, "command": command})
    with socket.socket(
        socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC
    ) as sock:
        sock.settimeout(timeout_s)
        try:
            with _short(control_path(state_dir)) as name:
                sock.connect(name)
            # Who may not ask is answered at once, perhaps before we have asked.
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(request)
            answer = json.loads(_receive_line(sock, MAX_ANSWER, deadline))
        except (FileNotFoundError, NotADirectoryError, ConnectionError, EOFError):
            raise NotRunningError(
                "no server answers for this volume", "nbd-mirror serve CONFIG"
            ) from None
        except TimeoutError:
            raise WaitTimeoutError(
                f'the server did not answer "{command}" within {timeout_s:g}s'
            ) from None
        except PermissionError:
            raise AccessError(
                "the control socket is another user's",
                "run it as that user, or as root",
            ) from None
        except (ValueError, RecursionError):
            raise FormatError(
                "what answers on the control socket is no nbd-mirror server"
            ) from None
        except OSError as error:
            raise MirrorIOError(
                f"the control socket: {error}", errno=error.errno
            ) from None
    return _result(answer)


def _result(answer: Any) -> Any:
    try:
        if answer["ok"] is True:
            return answer["result"]
        error = answer["error"]
        name, message, hint = (error[key] for key in ("class", "message", "hint"))
        if not all(isinstance(text, str) for text in (name, message, hint)):
            raise TypeError
        raised = from_name(name, message, hint)
    except (KeyError, TypeError):
        raise FormatError(
            "what answers on the control socket is no nbd-mirror server"
        ) from None
    raise raised
