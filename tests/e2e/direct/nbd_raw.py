# SPDX-License-Identifier: BSD-3-Clause
"""
A small NBD client on a bare socket, for bytes that no correct client sends.

It speaks as doc/proto.md of the NBD project has it, and shares no code with the
server. A test can send any bytes at any time and in any pieces; what comes back is
taken apart strictly, so that a wrong byte of the server's is an error here.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

__all__ = [
    "Answer",
    "Export",
    "OptionReply",
    "RawClient",
    "meta_query",
    "name_and_infos",
    "option",
    "request",
]

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

FIXED_NEWSTYLE = 1
NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP = REP_ERROR + 1
REP_ERR_POLICY = REP_ERROR + 2
REP_ERR_INVALID = REP_ERROR + 3
REP_ERR_TLS_REQD = REP_ERROR + 5
REP_ERR_TOO_BIG = REP_ERROR + 9

INFO_EXPORT = 0
INFO_NAME = 1
INFO_BLOCK_SIZE = 3

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

FLAG_FUA = 1
FLAG_NO_HOLE = 2
FLAG_DF = 4
FLAG_REQ_ONE = 8
FLAG_FAST_ZERO = 16

CHUNK_DONE = 1
CHUNK_NONE = 0
CHUNK_DATA = 1
CHUNK_HOLE = 2
CHUNK_STATUS = 5
CHUNK_ERROR = 1 << 15


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return an option on the wire; *length* in the place of the data's own."""
    size = len(data) if length is None else length
    return struct.pack(">QII", IHAVEOPT, number, size) + data


def name_and_infos(
    *infos: int, name: bytes = b"", name_length: int | None = None, nr: int = -1
) -> bytes:
    """Return the data of INFO and GO; the lengths in it may be wrong ones."""
    size = len(name) if name_length is None else name_length
    count = len(infos) if nr < 0 else nr
    body = struct.pack(">I", size) + name + struct.pack(">H", count)
    return body + b"".join(struct.pack(">H", info) for info in infos)


def meta_query(*queries: bytes, name: bytes = b"") -> bytes:
    """Return the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    body = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return body + b"".join(struct.pack(">I", len(one)) + one for one in queries)


def request(
    kind: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 0,
    payload: bytes = b"",
    magic: int = REQUEST_MAGIC,
) -> bytes:
    """Return a request on the wire, its payload included."""
    head = struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length)
    return head + payload


@dataclass(frozen=True)
class OptionReply:
    """What came for an option."""

    option: int
    type: int
    data: bytes


@dataclass(frozen=True)
class Export:
    """What the handshake says of the disk."""

    size: int
    flags: int


@dataclass
class Answer:
    """
    A request's whole answer.

    Args:
        cookie: of the request.
        structured: whether it came in chunks.
        error: 0, or what the server says.
        data: read, by offset; of a simple answer at 0.
        runs: of a block status: (length, status).
        chunks: how many there were.
    """

    cookie: int
    structured: bool
    error: int = 0
    data: dict[int, bytes] = field(default_factory=dict)
    runs: list[tuple[int, int]] = field(default_factory=list)
    chunks: int = 0

    @property
    def content(self) -> bytes:
        """The bytes read, which must be one piece."""
        offsets = sorted(self.data)
        end = offsets[0] if offsets else 0
        for offset in offsets:
            assert offset == end, f"a gap or an overlap at {offset}"
            end += len(self.data[offset])
        return b"".join(self.data[offset] for offset in offsets)


class RawClient:
    """
    A connection to an NBD server, with the greeting read.

    Args:
        address: of the server: a unix socket's path, or a host and a port.
        timeout_s: that any send or receive may take.
        source: the address to connect from; None: any.
    """

    def __init__(
        self,
        address: Path | tuple[str, int],
        *,
        timeout_s: float = 15.0,
        source: tuple[str, int] | None = None,
    ) -> None:
        where = str(address) if isinstance(address, Path) else address
        family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET
        self.socket = socket.socket(family)
        self.structured = False
        self._reads: dict[int, int] = {}  # cookie -> length, for simple answers
        self._next_cookie = 0x0123_4567_89AB_0000
        try:
            self.socket.settimeout(timeout_s)
            if source:
                self.socket.bind(source)
            self.socket.connect(where)
            magic, opt, self.server_flags = struct.unpack(">QQH", self.receive(18))
        except BaseException:
            self.socket.close()
            raise
        assert (magic, opt) == (NBDMAGIC, IHAVEOPT)

    def __enter__(self) -> RawClient:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connection, whatever is under way."""
        self.socket.close()

    # --- bytes ---

    def send(self, data: bytes) -> None:
        """Send all of *data*."""
        self.socket.sendall(data)

    def receive(self, size: int) -> bytes:
        """Return exactly *size* bytes; ConnectionError if they end before."""
        data = bytearray(size)
        view = memoryview(data)
        while view:
            got = self.socket.recv_into(view)
            if got == 0:
                raise ConnectionError(f"the server left, {len(view)} bytes too early")
            view = view[got:]
        return bytes(data)

    def assert_dropped(self) -> None:
        """Fail unless the server closes the connection without another byte."""
        try:
            rest = self.socket.recv(4096)
        except ConnectionResetError:
            return
        assert rest == b"", f"the server said {rest!r}"

    # --- handshake ---

    def hello(self, flags: int = FIXED_NEWSTYLE | NO_ZEROES) -> None:
        """Send the client's flags."""
        self.send(struct.pack(">I", flags))

    def option_reply(self) -> OptionReply:
        """Return the next answer to an option."""
        magic, number, kind, size = struct.unpack(">QIII", self.receive(20))
        assert magic == REPLY_MAGIC
        return OptionReply(number, kind, self.receive(size))

    def option_replies(self, number: int) -> list[OptionReply]:
        """Return all answers to option *number*: the last is an ACK or an error."""
        found = [self.option_reply()]
        while found[-1].type not in {REP_ACK} and found[-1].type < REP_ERROR:
            found.append(self.option_reply())
        assert all(one.option == number for one in found), found
        return found

    def ask(self, number: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option, and return all answers to it."""
        self.send(option(number, data))
        return self.option_replies(number)

    def export_name(self, *, zeroes: bool) -> Export:
        """Send EXPORT_NAME, and return what it is answered with."""
        self.send(option(OPT_EXPORT_NAME))
        size, flags = struct.unpack(">QH", self.receive(10))
        if zeroes:
            assert bytes(124) == self.receive(124)
        return Export(size, flags)

    def use_structured(self) -> None:
        """Agree on structured replies."""
        assert [OptionReply(OPT_STRUCTURED_REPLY, REP_ACK, b"")] == self.ask(
            OPT_STRUCTURED_REPLY
        )
        self.structured = True

    def set_context(self) -> int:
        """Agree on base:allocation, and return its number."""
        found = self.ask(OPT_SET_META_CONTEXT, meta_query(b"base:allocation"))
        assert [REP_META_CONTEXT, REP_ACK] == [one.type for one in found]
        assert found[0].data[4:] == b"base:allocation"
        return int.from_bytes(found[0].data[:4], "big")

    def go(self) -> Export:
        """Send GO, and return what the server says of the disk."""
        found = self.ask(OPT_GO, name_and_infos())
        assert found[-1].type == REP_ACK, found
        return self.export_of(found)

    @staticmethod
    def export_of(replies: list[OptionReply]) -> Export:
        """Return the export of the answers to INFO or GO."""
        infos = [one.data for one in replies if one.type == REP_INFO]
        kind, size, flags = struct.unpack(
            ">HQH", next(one for one in infos if one[:2] == b"\0\0")
        )
        assert kind == INFO_EXPORT
        return Export(size, flags)

    # --- transmission ---

    def request(
        self,
        kind: int,
        offset: int = 0,
        length: int | None = None,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> tuple[int, bytes]:
        """
        Make a request with a cookie of its own, and do not send it.

        Args:
            kind: CMD_*.
            offset: bytes.
            length: bytes; None: the payload's.
            flags: FLAG_*.
            payload: of a write.
        Returns:
            The cookie, and the request on the wire.
        """
        size = len(payload) if length is None else length
        self._next_cookie += 0x0001_0000_0001
        cookie = self._next_cookie
        if kind == CMD_READ:
            self._reads[cookie] = size
        wire = request(kind, offset, size, flags=flags, cookie=cookie, payload=payload)
        return cookie, wire

    def answer(self) -> Answer:
        """Return the next whole answer; chunks of different ones may not mix."""
        magic = int.from_bytes(self.receive(4), "big")
        if magic == SIMPLE_MAGIC:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            simple = Answer(cookie, structured=False, error=error)
            length = self._reads.pop(cookie, None)
            if length is not None:
                assert not self.structured, "a read must be answered in chunks"
                if error == 0:
                    simple.data[0] = self.receive(length)
            return simple
        found: Answer | None = None
        while True:
            assert magic == CHUNK_MAGIC, f"{magic:#x} is no magic number"
            assert self.structured, "chunks, which were not agreed on"
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            if found is None:
                found = Answer(cookie, structured=True)
            assert found.cookie == cookie
            self._take_chunk(found, kind, self.receive(length))
            if flags & CHUNK_DONE:
                self._reads.pop(cookie, None)
                return found
            magic = int.from_bytes(self.receive(4), "big")

    @staticmethod
    def _take_chunk(found: Answer, kind: int, body: bytes) -> None:
        found.chunks += 1
        if kind & CHUNK_ERROR:
            found.error, length = struct.unpack_from(">IH", body)
            assert found.error != 0
            assert len(body) >= 6 + length
        elif kind == CHUNK_DATA:
            assert len(body) > 8
            found.data[int.from_bytes(body[:8], "big")] = body[8:]
        elif kind == CHUNK_HOLE:
            offset, length = struct.unpack(">QI", body)
            found.data[offset] = bytes(length)
        elif kind == CHUNK_STATUS:
            assert len(body) > 4
            found.runs += struct.iter_unpack(">II", body[4:])
        else:
            assert kind == CHUNK_NONE, f"a chunk of kind {kind}"
            assert body == b""

    def call(
        self,
        kind: int,
        offset: int = 0,
        length: int | None = None,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> Answer:
        """Send one request (see *request*), and return its answer."""
        cookie, wire = self.request(kind, offset, length, flags=flags, payload=payload)
        self.send(wire)
        found = self.answer()
        assert cookie == found.cookie
        return found

    def read(self, offset: int, length: int) -> bytes:
        """Return what lies on the disk."""
        found = self.call(CMD_READ, offset, length)
        assert found.error == 0
        assert list(found.data) == [offset if self.structured else 0]
        assert len(found.content) == length
        return found.content

    def write(self, offset: int, content: bytes, *, flags: int = 0) -> None:
        """Write, which must succeed."""
        assert self.call(CMD_WRITE, offset, payload=content, flags=flags).error == 0
