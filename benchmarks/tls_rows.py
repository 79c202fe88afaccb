# SPDX-License-Identifier: BSD-3-Clause
"""
The rows of TLS: a remote over TCP with our TLS, without, and through a bare relay.

The relay (gnutls_relay.c) is GnuTLS and nothing else, so it shows what TLS costs at
least in processes of its own. All three have the same remote, nbdkit on this host.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from .fio_rows import begin, closely, compare, finish
from .load import Workload
from .mirror import Mirror
from .model import BenchError, Context, Measured
from .servers import ROOT, uri_of, wait_until

__all__ = ["HOST", "RelayMirror", "TcpMirror", "free_port", "over_tls"]

HOST = "127.0.0.1"
KEY = "bench:8f1d0cb7e4a25936d1f0b86e27c4a95d\n"
SOURCE = Path(__file__).resolve().parent / "gnutls_relay.c"


def free_port() -> int:
    """Return a port of HOST that no server has."""
    with contextlib.closing(socket.socket()) as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
    return port


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port)):
        return True
    return False


class TcpMirror(Mirror):
    """Our mirror to a remote over TCP, without TLS."""

    key = "tcp"
    title = "nbd_mirror, remote over TCP"

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__(folder, size)
        self.port = free_port()
        self.psk = self.folder / "keys.psk"
        self.psk.write_text(KEY)
        self.psk.chmod(0o600)

    @property
    def far_uri(self) -> str:
        """The remote's address."""
        return f"nbd://{HOST}:{self.port}"

    def start_far(self, *_: str, filters: tuple[str, ...] = ()) -> None:
        """Start the remote's server."""
        assert not filters
        self._far = self._spawn(
            [
                *("nbdkit", "-f", "-i", HOST, "-p", str(self.port)),
                *self.tls_options(),
                *("file", self.images[1]),
            ],
            ROOT,
        )
        wait_until(lambda: _answers(self.port), lambda: f"{self.title}: nbdkit")

    def tls_options(self) -> list[str]:
        """Return nbdkit's options of TLS."""
        return ["--tls=off"]


class TlsMirror(TcpMirror):
    """The same with TLS."""

    key = "tls"
    title = "nbd_mirror, remote over TCP with TLS"

    @property
    def far_uri(self) -> str:
        """The remote's address."""
        return f"nbds://bench@{HOST}:{self.port}/?tls-psk-file={self.psk}"

    def tls_options(self) -> list[str]:
        """Return nbdkit's options of TLS."""
        return ["--tls=require", f"--tls-psk={self.psk}"]


class RelayMirror(TcpMirror):
    """Our mirror without TLS, whose remote is behind a relay of TLS on each side."""

    key = "relay"
    title = "nbd_mirror, remote behind a bare GnuTLS relay"

    @property
    def far_uri(self) -> str:
        """The relay's address on the mirror's side."""
        return uri_of(self.folder / "near.sock")

    def start_far(self, *options: str, filters: tuple[str, ...] = ()) -> None:
        """Start the remote's server and both relays."""
        far, near = self.folder / "far.sock", self.folder / "near.sock"
        self.nbdkit_file(self.images[1], far, *options, filters=filters)
        program = _build_relay(self.folder)
        self._spawn([program, "server", str(self.port), far, self.psk], ROOT)
        wait_until(lambda: _answers(self.port), lambda: f"{self.title}: its far end")
        self._start(program, "client", near, str(self.port), self.psk, ready=near)


def _build_relay(folder: Path) -> Path:
    """Compile the relay into *folder*."""
    program = folder / "gnutls_relay"
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "gnutls"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    done = subprocess.run(
        ["cc", "-O2", SOURCE, "-o", program, *shlex.split(flags), "-lpthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"the relay does not compile: {done.stderr}")
    return program


def over_tls(workload: Workload, *peers: str) -> Callable[[Context], Measured]:
    """Return a row's run: with TLS against *peers*, of "tcp" and "relay"."""

    def run(ctx: Context) -> Measured:
        kinds = {"tcp": TcpMirror, "relay": RelayMirror}
        set_ups = [
            TlsMirror(ctx.folder, ctx.size),
            *(kinds[peer](ctx.folder, ctx.size) for peer in peers),
        ]
        for set_up in set_ups:
            begin(ctx, set_up)
        close = closely(ctx) if "relay" in peers else ctx
        measured = compare(close, workload, set_ups)
        for set_up in set_ups:
            finish(set_up)
        return measured

    return run
