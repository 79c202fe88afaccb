# SPDX-License-Identifier: BSD-3-Clause
"""
A plain NBD client: connect to a volume's own server, read a little, pass the connection
on.

`attach` reads the content before the kernel has a device, and gives the kernel a new
connection after the server was restarted. nbd-client can do neither.
"""

from __future__ import annotations

import socket
import struct
import time

from ..base import strangers
from ..base.errors import MirrorIOError, NotRunningError
from ..base.unix import unix_socket
from ..volume.config import VolumeConfig

__all__ = ["Connection"]

TIMEOUT_S = 30.0
HELLO = b"NBDMAGICIHAVEOPT"
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_MAGIC, OPT_GO = b"IHAVEOPT", 7
REPLY_MAGIC, REP_ACK, REP_INFO = 0x3E889045565A9, 1, 3
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
REQUEST_MAGIC, SIMPLE_MAGIC = 0x25609513, 0x67446698
CMD_READ = 0
LONGEST = 1 << 20  # bytes of an option's reply


class Connection:
    """
    A connection after its handshake.

    Attributes:
        socket: the connection; the kernel may take it over.
        size: of the volume, in bytes.
        smallest: the smallest block that the server takes, in bytes.

    Args:
        config: of the volume.
    Raises:
        NotRunningError: no server listens. MirrorIOError: the server does not speak
        NBD, or refuses.
    """

    def __init__(self, config: VolumeConfig) -> None:
        self._where = config.listen.uri
        self.size, self.smallest, self._cookie = 0, 512, 0
        try:
            self.socket = _connect(config)
        except (OSError, ValueError) as error:  # the latter for a name of no host
            words = getattr(error, "strerror", None) or error
            raise NotRunningError(
                f"no server answers at {self._where}: {words}",
                "nbd-mirror serve CONFIG",
            ) from None
        try:
            self._shake_hands()
        except BaseException:
            strangers.close(self.socket)
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            strangers.close(self.socket)
        self.socket.close()  # only close it: the kernel may have it

    def read(self, offset: int, length: int) -> bytes:
        """
        Return *length* bytes from *offset*, less at the volume's end.

        Raises:
            MirrorIOError: they cannot be read.
        """
        first = offset - offset % 4096
        last = min(-(-(offset + length) // 4096) * 4096, self.size)
        if last <= first:
            return b""
        self._cookie += 1
        self._allow("does not end its answer")
        self._send(
            struct.pack(
                ">IHHQQI",
                *(REQUEST_MAGIC, 0, CMD_READ, self._cookie, first, last - first),
            )
        )
        magic, error, _ = struct.unpack(">IIQ", self._receive(16))
        if magic != SIMPLE_MAGIC:
            raise self._wrong("answers no NBD")
        if error:
            raise MirrorIOError(f"the volume cannot be read at {first}: error {error}")
        return self._receive(last - first)[offset - first :][:length]

    def _shake_hands(self) -> None:
        self._allow("does not end its handshake")
        if self._receive(len(HELLO)) != HELLO:
            raise self._wrong("is no NBD server")
        (flags,) = struct.unpack(">H", self._receive(2))
        flags &= FIXED_NEWSTYLE | NO_ZEROES
        asked = struct.pack(">IHH", 0, 1, INFO_BLOCK_SIZE)  # the export named ""
        self._send(
            struct.pack(">I", flags)
            + OPT_MAGIC
            + struct.pack(">II", OPT_GO, len(asked))
            + asked
        )
        try:
            while self._take_reply():
                pass
        except struct.error:
            raise self._wrong("is no NBD server") from None

    def _take_reply(self) -> bool:
        """Receive one reply to the option; return False if it was the last."""
        magic, _, kind, length = struct.unpack(">QIII", self._receive(20))
        if magic != REPLY_MAGIC or length > LONGEST:
            raise self._wrong("is no NBD server")
        said = self._receive(length)
        if kind == REP_ACK:
            return False
        if kind != REP_INFO:
            text = said.decode(errors="replace") or f"reply {kind:#x}"
            raise self._wrong(f"refuses the connection: {text}")
        (info,) = struct.unpack_from(">H", said)
        if info == INFO_EXPORT:
            (self.size,) = struct.unpack_from(">Q", said, 2)
        elif info == INFO_BLOCK_SIZE:
            (self.smallest,) = struct.unpack_from(">I", said, 2)
        return True

    def _allow(self, slow: str) -> None:
        """Give the next exchange a whole time-out, however small its pieces are."""
        self._until, self._slow = time.monotonic() + TIMEOUT_S, slow
        self._heard = False

    def _send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise self._wrong(f"ended the connection: {error.strerror}") from None

    def _receive(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            left_s = self._until - time.monotonic()
            if left_s <= 0:
                raise self._wrong(self._slow)
            try:
                self.socket.settimeout(left_s)
                more = strangers.receive(self.socket, count - len(got))
            except ValueError as error:
                raise self._wrong(f"is no NBD server: {error}") from None
            except OSError as error:
                if isinstance(error, TimeoutError) and self._heard:
                    continue
                raise self._wrong(f"does not answer: {error}") from None
            if not more:
                raise self._wrong("ended the connection")
            got += more
            self._heard = True
        return bytes(got)

    def _wrong(self, what: str) -> MirrorIOError:
        return MirrorIOError(f"the server at {self._where} {what}")


def _connect(config: VolumeConfig) -> socket.socket:
    if config.listen.path is None:
        address = (config.listen.client_host, config.listen.port)
        sock = socket.create_connection(address, TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = unix_socket()
    sock.settimeout(TIMEOUT_S)
    try:
        sock.connect(config.listen.path)
    except OSError:
        sock.close()
        raise
    return sock
