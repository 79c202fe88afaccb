# SPDX-License-Identifier: BSD-3-Clause
"""
The control socket's server: it answers the commands for a running volume.

volume/control.py has the protocol. With one request per connection neither end keeps
any state, and a client that hangs holds only its own thread, for a few seconds.

Only the owner may open the socket. Two checks enforce this. The mode is 0600 from the
moment the socket is bound (it is set on the descriptor before, so the umask of the
process stays unchanged while nbdkit's threads make files). And the kernel reports the
peer's uid.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..base import unix
from ..base.errors import (
    AccessError,
    BusyError,
    FormatError,
    MirrorError,
    from_errno,
)
from ..base.threads import begin, keep_going
from ..volume.control import encode, peer, receive_line

__all__ = ["MAX_REQUEST", "ControlServer", "Handler"]

Handler = Callable[[str, dict[str, Any]], object]

MAX_REQUEST = 64 << 10  # bytes
CLIENT_TIMEOUT_S = 5.0  # to send a request, and to receive the answer
MAX_CLIENTS = 8  # at the same time; more wait in the kernel's queue
BACKLOG = 64
STACK_BYTES = 1 << 20  # of a client's thread: stacks may be locked in memory
LOOK_S = 2.0  # between two checks that the socket's name still exists
SHORT_S = 0.1  # until the next try, while there are no descriptors


def _ignore(level: str, text: str) -> None:
    """Log nothing: the next turn tries again."""


class ControlServer:
    """
    Answers requests with *handler*, each in its own thread.

    *handler* gets the command and its arguments and returns what JSON can carry. A
    MirrorError that it raises goes to the client. So does any other exception, as a
    bug, and it never ends the server.

    Args:
        path: of the socket. The caller holds the volume's lock, so a socket file on
            which no server answers is left from a dead server, and is replaced.
        handler: called from several threads at once.
        timeout_s: for a client to send its request, and to receive the answer.
        log: gets a bug's traceback; the thread continues.
        prepare: called on each thread before it waits for a client, so that what the
            handler needs on each thread is allocated while there is memory.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        handler: Handler,
        *,
        timeout_s: float = CLIENT_TIMEOUT_S,
        log: Callable[[str, str], object] = _ignore,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        self._path = Path(path)
        self._handler = handler
        self._timeout_s = timeout_s
        self._log = log
        self._prepare = prepare
        self._lock = threading.Lock()  # guards the listener and the reserve
        self._listener: socket.socket | None = None
        self._workers = [
            threading.Thread(target=self._work, name="control", daemon=True)
            for _ in range(MAX_CLIENTS)
        ]
        self._closing = False
        self._folder = -1  # opened, for what is removed: the path may lead elsewhere
        self._wake_r = self._wake_w = -1
        self._reserve = -1  # a descriptor to close when none is left

    def bind(self) -> None:
        """
        Bind the socket; a client that connects now waits for `start`.

        Raises:
            BusyError: another server answers on it. MirrorError of another
            class: the socket cannot be made.
        """
        if self._listener is not None:
            raise RuntimeError("the control server is started already")
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._folder = os.open(self._path.parent, flags)
        except OSError as error:
            raise self._cannot_make(error) from None
        self._listener = self._bind()
        try:
            self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            raise self._cannot_make(error) from None
        self._keep_reserve()

    def start(self) -> None:
        """
        Begin to answer, on a socket that is bound first if `bind` was not called.

        Raises:
            MirrorError: the socket, or a thread, cannot be made.
        """
        if self._listener is None:
            self.bind()
        # Start all of them now: a thread that is started without free memory may die on
        # its first step, and Thread.start() then waits for it forever.
        before = threading.stack_size(STACK_BYTES)
        try:
            for worker in self._workers:
                begin(worker)
        finally:
            threading.stack_size(before)

    def close(self) -> None:
        """
        Stop answering, remove the socket, and join every thread.

        A request under way is answered first; its handler and the client's time-out
        limit the wait. Called from a handler's own thread, it joins all threads but
        that one.
        """
        if self._listener is None or self._closing:
            return
        self._closing = True
        # Remove the name first, so that no client connects to a server that ends.
        with contextlib.suppress(OSError):
            self._unlink()
        os.write(self._wake_w, b"x")
        for worker in self._workers:
            if worker.ident is not None and worker is not threading.current_thread():
                worker.join()
        self._listener.close()
        for fd in (self._wake_r, self._wake_w, self._reserve, self._folder):
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> ControlServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(self) -> socket.socket:
        try:
            if unix.answers(self._path, self._folder):
                raise BusyError(
                    f"another server answers on {self._path}: "
                    "the volume is served already"
                )
            with contextlib.suppress(FileNotFoundError):
                self._unlink()
            sock = unix.bind(self._path, BACKLOG)
        except MirrorError:
            raise
        except OSError as error:
            raise self._cannot_make(error) from None
        sock.setblocking(False)
        return sock

    def _unlink(self) -> None:
        os.unlink(self._path.name, dir_fd=self._folder)

    def _cannot_make(self, error: OSError) -> MirrorError:
        return from_errno(
            error.errno or errno.EIO,
            f"the control socket {self._path} cannot be made: {error.strerror}",
        )

    def _work(self) -> None:
        """Serve clients until the end, also while memory or descriptors run out."""
        self._prepare()
        keep_going(self._serve_one, lambda: self._closing, self._log, "control")

    def _serve_one(self) -> None:
        if not self._wait_for_client():
            return
        with self._lock:
            listener = self._listener
            client = None if self._closing or listener is None else self._take(listener)
        if client is not None:
            self._serve(client)
        else:
            self._rest(SHORT_S)

    def _wait_for_client(self) -> bool:
        """Wait a while for a client, and keep the socket and the reserve in order."""
        with self._lock:
            assert self._listener is not None
            fd = self._listener.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._wake_r, select.POLLIN)
        found = poll.poll(LOOK_S * 1000)
        with self._lock:
            self._keep_reserve()
            if not found:
                self._keep_name()
        return any(one == fd for one, _ in found)

    def _rest(self, seconds: float) -> None:
        """Sleep, but not beyond the end."""
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        poll.poll(seconds * 1000)

    def _take(self, listener: socket.socket) -> socket.socket | None:
        """Accept a client if there still is one; the lock is held."""
        try:
            return listener.accept()[0]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or self._reserve < 0:
                return None  # another thread has it, it went away, no memory
        # One client at a time is served on the reserve.
        os.close(self._reserve)
        self._reserve = -1
        try:
            return listener.accept()[0]
        except OSError:
            return None

    def _keep_reserve(self) -> None:
        if self._reserve < 0:
            with contextlib.suppress(OSError):
                self._reserve = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _keep_name(self) -> None:
        """Bind again if the socket was removed, as by a clean-up of old files."""
        if self._closing or os.path.lexists(self._path):
            return
        with contextlib.suppress(MirrorError, OSError):
            old, self._listener = self._listener, self._bind()
            if old is not None:
                old.close()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                answer = self._answer(client)
                if answer is not None:
                    client.settimeout(self._timeout_s)
                    client.sendall(answer)
        except OSError:
            pass  # the client is gone

    def _answer(self, client: socket.socket) -> bytes | None:
        try:
            try:
                deadline = time.monotonic() + self._timeout_s
                line = receive_line(client, MAX_REQUEST, deadline)
                # Check only now: a client whose connection is closed before it has sent
                # its request gets a broken pipe instead of the refusal. Its request is
                # not evaluated before the check.
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
            return encode({"ok": True, "result": result})
        except MirrorError as error:
            return _encode_error(type(error).__name__, error)
        except Exception as error:  # a bug in a command must not end the server
            self._log("error", f"control: {traceback.format_exc()}")
            text = f"internal error in the server: {type(error).__name__}: {error}"
            return _encode_error("MirrorError", MirrorError(text))


def _encode_error(name: str, error: MirrorError) -> bytes:
    fields = {
        "class": name,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    return encode({"ok": False, "error": fields})


def _check_peer(client: socket.socket) -> None:
    _, uid = peer(client)
    if uid not in (0, os.geteuid()):
        raise AccessError(f"only the server's owner may command it, not uid {uid}")
