# SPDX-License-Identifier: BSD-3-Clause
"""The direct door."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from ...base.threads import no_thread
from ..model import TlsFiles
from .boundary import c_text, check, ffi, lib, text_of, whole_ms
from .engine import Engine
from .node_calls import TEXT_LEN, Call, ListenerKind, make_call


def _bounded(text: str) -> bytes:
    """Encode a text for another node without cutting a character."""
    return c_text(text)[:TEXT_LEN].decode(errors="ignore").encode()


def _c_files(files: TlsFiles) -> tuple[Any, list[Any]]:
    """Make a struct nbdm_tls; the list keeps its strings alive for the call."""
    paths = (files.psk, files.certificate, files.private_key, files.ca)
    texts = [
        ffi.NULL if path is None else ffi.new("char[]", os.fsencode(path))
        for path in paths
    ]
    tls = ffi.new("struct nbdm_tls *")
    tls.psk, tls.certificate, tls.private_key, tls.ca = texts
    return tls, texts


def _c_names(names: Sequence[str]) -> tuple[Any, list[Any]]:
    """Make an array of names; the list keeps them alive for the call."""
    texts = [ffi.new("char[]", name.encode()) for name in names]
    return ffi.new("char *[]", texts), texts


def check_certificate(files: TlsFiles, names: Sequence[str]) -> str:
    """
    Check a node's own certificate as the other nodes will.

    Args:
        names: it must have one of these: the node's name first, its address last.
    Returns:
        "", or that only its time is wrong.
    Raises:
        MirrorError: the other nodes will refuse it, or a file cannot be used.
    """
    tls, _files = _c_files(files)
    with_names, alive = _c_names(names)
    rc = lib.nbdm_tls_check(tls, with_names, len(alive))
    if rc == -errno.ETIME:
        return text_of(lib.nbdm_last_error())
    check(rc, "TLS")
    return ""


class Server:
    """
    The direct door: serves an engine to the clients of listening sockets.

    Args:
        engine: must stay open as long as this object.
        listen_fds: the caller keeps and closes them.
        max_clients: the limit, lowered if there are too few descriptors.
        max_memory: bytes for the requests of all clients together; 0: the default.
    Raises:
        MirrorError: no memory, or no descriptor.
    """

    def __init__(
        self,
        engine: Engine,
        listen_fds: Sequence[int],
        *,
        max_clients: int = 0,
        max_memory: int = 0,
    ) -> None:
        """Accept no client yet."""
        server = ffi.new("struct direct_server **")
        fds = ffi.new("int[]", list(listen_fds))
        limits = ffi.new("struct nbdm_limits *")
        limits.max_clients, limits.max_memory = max_clients, max_memory
        rc = lib.nbdm_server_open(engine.handle, fds, len(fds), limits, server)
        check(rc, "serve")
        self._handle = server[0]

    def require_tls(self, listener: int, files: TlsFiles) -> None:
        """
        Let clients of a listening socket in only with TLS; before `run`.

        Args:
            listener: the socket's index in *listen_fds*.
            files: that prove this server, and check its clients.
        Raises:
            MirrorError: a file is missing or wrong, or others may read a secret.
        """
        tls, _alive = _c_files(files)
        check(lib.nbdm_server_tls(self._handle, listener, tls), "TLS")

    def set_listener(self, listener: int, kind: ListenerKind, text: str = "") -> None:
        """
        Change what clients of a listening socket get; at any time, from any thread.

        Args:
            listener: the socket's index in *listen_fds*.
            kind: CLIENTS until the first call.
            text: CLOSED: why, and which command helps; cut to TEXT_LEN bytes.
        """
        words = _bounded(text)
        rc = lib.nbdm_server_listener(self._handle, listener, kind.value, words)
        check(rc, "serve")

    def next_call(self, timeout_s: float) -> Call | None:
        """
        Wait for the next call of another node; ended sessions come first.

        Returns:
            None: none has come within *timeout_s*.
        Raises:
            NotRunningError: `run` has returned, and no call is left.
        """
        taken = ffi.new("struct nbdm_call *")
        ms = whole_ms(timeout_s)
        rc = lib.nbdm_server_next_call(self._handle, taken, ms)
        if rc == -errno.EAGAIN:
            return None
        check(rc, "wait for a call")
        return make_call(taken)

    def take_ended(self) -> list[Call]:
        """
        Take the calls of sessions that have ended, without waiting.

        Call it between `fence` and the answer to the claim, and store what an unclean
        session leaves behind: once the next session writes, its regions are active too.
        """
        taken = ffi.new("struct nbdm_call *")
        calls = []
        while lib.nbdm_server_next_ended(self._handle, taken) == 0:
            calls.append(make_call(taken))
        return calls

    def answer(self, call: Call, content: bytes = b"") -> bool:
        """
        Grant a claim (without content), reply to a META, or serve a DIRTY its map.

        Returns:
            False: the other node does not get the answer: it has left, or its time is
            over, or a connection of the claimed session has ended.
        Raises:
            ConfigError: the content is longer than the kind of call allows.
        """
        return self._answer(call, 0, content)

    def refuse(self, call: Call, text: str) -> bool:
        """Refuse a call with a *text*, cut to TEXT_LEN bytes; as `answer`."""
        return self._answer(call, -errno.EPERM, _bounded(text))

    def _answer(self, call: Call, verdict: int, content: bytes) -> bool:
        rc = lib.nbdm_server_answer(
            self._handle, call.number, verdict, content, len(content)
        )
        if rc in (-errno.ENOENT, -errno.ESTALE):
            return False
        check(rc, "answer a call")
        return True

    def why_not_of(self, call: Call, names: Sequence[str]) -> str:
        """
        Say why a call is not of the node with these *names*; before its answer.

        Its certificate is known only as long as it waits: a node that has left proves
        nothing, and nothing is done for it.

        Returns:
            "": it is, or no certificate tells.
        """
        with_names, alive = _c_names(names)
        rc = lib.nbdm_server_proves(self._handle, call.number, with_names, len(alive))
        if rc > 0:
            return ""
        has = text_of(lib.nbdm_last_error())
        if rc < 0:
            return has
        return f"its certificate is not of {names[0]}: the certificate's names: {has}"

    def fence(self, timeout_s: float, keep: Call | None = None) -> int:
        """
        Cut the sessions of all claims, and wait for their requests at the disk.

        No request of theirs changes the disk after this returns. Blocks up to
        *timeout_s*. Only the thread that answers claims calls it.

        Args:
            timeout_s: then it fails; the sessions are cut all the same.
            keep: the connections that this claim's answer granted stay.
        Returns:
            How many connections were cut; then `take_ended` reports their sessions.
        Raises:
            RemoteError: some requests are still at the disk, or under way to it.
        """
        number = 0 if keep is None else keep.number
        rc: int = lib.nbdm_server_fence(self._handle, number, whole_ms(timeout_s))
        return check(rc, "fence")

    @property
    def max_clients(self) -> int:
        """The limit of clients, as far as there are descriptors."""
        return int(lib.nbdm_server_max_clients(self._handle))

    def start(self) -> None:
        """
        Start the threads for requests; `run` serves.

        Raises:
            MirrorError: the system gives no thread.
        """
        rc: int = lib.nbdm_server_start(self._handle)
        if rc == -errno.EAGAIN:
            raise no_thread("requests")
        check(rc, "serve")

    def run(self) -> None:
        """Serve. Blocks until `end`, and then until requests under way are answered."""
        lib.nbdm_server_run(self._handle)

    def hand_on(self) -> None:
        """
        Let the sockets go on listening after the end; before `end`.

        New clients wait for the program that this process executes next.
        """
        lib.nbdm_server_hand_on(self._handle)

    def end(self) -> None:
        """Make `run` return. May be called from any thread, any number of times."""
        lib.nbdm_server_end(self._handle)

    def drain(self, timeout_s: float) -> bool:
        """
        Like `end`, and wait until requests under way are answered.

        Blocks up to *timeout_s*.

        Returns:
            True: all clients are answered and disconnected.
        """
        return bool(lib.nbdm_server_drain(self._handle, whole_ms(timeout_s)) == 0)

    def close(self) -> None:
        """Free it. `run` must have returned, and no `end` may follow."""
        lib.nbdm_server_close(self._handle)
