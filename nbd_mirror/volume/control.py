# SPDX-License-Identifier: BSD-3-Clause
"""
The control socket: how commands reach a running server.

It is a unix socket `control` in the state directory. A request is one line of JSON,
`{"command": ..., ...}`. The answer is another, `{"ok": true, "result": ...}` or `{"ok":
false, "error": {"class", "message", "hint", "exit_code"}}`. Then the connection ends.
With one request per connection neither end keeps any state, and a client that hangs
holds only its own thread, for a few seconds.

This module has the protocol and the client's side; server/control_server.py answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base import strangers, unix
from ..base.errors import (
    AccessError,
    FormatError,
    MirrorIOError,
    NotRunningError,
    WaitTimeoutError,
    from_name,
)

__all__ = ["call", "control_path", "encode", "exchange", "peer", "receive_line"]

MAX_ANSWER = 4 << 20  # bytes


def control_path(state_dir: str | os.PathLike[str]) -> Path:
    """Return the path of a volume's control socket."""
    return Path(state_dir) / "control"


def receive_line(sock: socket.socket, limit: int, deadline: float) -> bytes:
    """Read to the first newline; raises TimeoutError, or EOFError on an early end."""
    data = bytearray()
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        chunk = strangers.receive(sock, 65536)
        if not chunk:
            raise EOFError
        data += chunk
        if len(data) > limit:
            raise ValueError("line too long")
    return bytes(data)


def encode(answer: dict[str, Any]) -> bytes:
    """Write an answer or a request as one line of JSON."""
    return json.dumps(answer, separators=(",", ":")).encode() + b"\n"


def peer(sock: socket.socket) -> tuple[int, int]:
    """Return the process and the user of the other end, as the kernel reports them."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return pid, uid


def call(
    state_dir: str | os.PathLike[str],
    command: str,
    timeout_s: float = 10.0,
    **args: Any,
) -> Any:
    """
    Send a command to the server of a volume, and wait for its answer.

    Args:
        state_dir: the volume's state directory.
        command: one that the server's handler knows, such as "status".
        timeout_s: seconds for the whole exchange.
        args: the command's arguments, as JSON can carry them.
    Returns:
        The handler's result.
    Raises:
        NotRunningError: no server answers. WaitTimeoutError: no answer in time.
        AccessError: the socket is another user's. The handler's own error, of
        the same class.
    """
    return exchange(state_dir, command, timeout_s, args)[0]


def exchange(
    state_dir: str | os.PathLike[str],
    command: str,
    timeout_s: float,
    args: Mapping[str, Any],
) -> tuple[Any, int]:
    """
    Like `call`, but also return which process listens.

    Returns:
        The result, and the process as the kernel reports it, because a server of
        another user may send any number. 0: the process is in a namespace that is
        not visible here.
    """
    deadline = time.monotonic() + timeout_s
    request = encode({**args, "command": command})
    with strangers.closing(unix.unix_socket()) as sock:
        sock.settimeout(timeout_s)
        try:
            with unix.short_name(control_path(state_dir)) as name:
                sock.connect(name)
            pid, _ = peer(sock)
            # A user without permission is answered at once, perhaps before the request
            # is sent.
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(request)
            answer = json.loads(receive_line(sock, MAX_ANSWER, deadline))
        except (FileNotFoundError, NotADirectoryError, ConnectionError, EOFError):
            raise NotRunningError(
                "no server answers for this volume", "nbd-mirror serve CONFIG"
            ) from None
        except (TimeoutError, BlockingIOError):  # or its queue of connections is full
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
                "the program on the control socket is no nbd-mirror server"
            ) from None
        except OSError as error:
            raise MirrorIOError(
                f"the control socket: {error}", errno=error.errno
            ) from None
    return _result(answer), pid


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
            "the program on the control socket is no nbd-mirror server"
        ) from None
    raise raised
