# SPDX-License-Identifier: BSD-3-Clause
"""
The direct door as a server of NBD: what it says to good, odd and evil clients.

The other files test what a volume does, through every door; this one tests the wire
of the door that is our own, byte by byte, and that no client can harm another. Most
tests share one volume, and after each of them a new client must be served.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import support
from e2e import nbd_raw as raw
from e2e.harness import MIB, Site, free_port
from e2e.nbd_raw import Export, OptionReply, RawClient

Dial = Callable[[], RawClient]

KIB = 1024
SIZE = 40 * MIB
LONGEST = 32 * MIB
CONTEXT = b"base:allocation"
DEADLINE_S = 5.0  # for what takes milliseconds, on a machine that is busy
# HAS_FLAGS, FLUSH, FUA, TRIM, ZEROES, MULTI_CONN, CACHE, FAST_ZERO; and DF.
FLAGS = 0x1 | 0x4 | 0x8 | 0x20 | 0x40 | 0x100 | 0x400 | 0x800
FLAG_DF = 0x80


@pytest.fixture(scope="module")
def served() -> Iterator[Site]:
    """Give a volume in sync, shared by the tests of this file."""
    folder = Path(tempfile.mkdtemp(prefix="nbdm-"))
    (folder / "logs").mkdir()
    processes = support.Processes(folder / "logs")
    try:
        site = Site(folder, processes, size=SIZE)
        site.fill(site.local, 4 * MIB)
        site.bring_up("direct")
        yield site
        site.stop()
        site.assert_equal()
    finally:
        processes.close()
        shutil.rmtree(folder)


@pytest.fixture
def dial(served: Site) -> Iterator[Dial]:
    """Give what connects a client; after the test a new one must be served."""
    with ExitStack() as open_ones:

        def connect() -> RawClient:
            return open_ones.enter_context(RawClient(served.socket))

        yield connect
        assert_serves(served)


@pytest.fixture
def fresh(dial: Dial) -> RawClient:
    """Give a client that has said hello, and nothing else."""
    client = dial()
    client.hello()
    return client


@pytest.fixture(params=["simple", "structured"])
def client(dial: Dial, request: pytest.FixtureRequest) -> RawClient:
    """Give a client in transmission, with either kind of replies."""
    return transmitting(dial(), structured=request.param == "structured")


def transmitting(client: RawClient, *, structured: bool = True) -> RawClient:
    """Take a new client through the handshake, and return it."""
    client.hello()
    if structured:
        client.use_structured()
        client.set_context()
    client.go()
    return client


def assert_serves(site: Site) -> None:
    """Fail unless the server lives, and a new client can write and read."""
    assert site.alive, site.log
    content = os.urandom(512)
    with RawClient(site.socket, timeout_s=DEADLINE_S) as client:
        transmitting(client)
        client.write(site.size - 512, content)
        assert content == client.read(site.size - 512, 512)


def on_both(site: Site, offset: int, length: int) -> bytes:
    """Return the bytes of both images, which must be the same."""
    found = []
    for image in (site.local, site.dr.image):
        with image.open("rb") as file:
            file.seek(offset)
            found.append(file.read(length))
    assert found[0] == found[1]
    return found[0]


def assert_goes_on(client: RawClient) -> None:
    """Fail unless the handshake goes on, to transmission and a read."""
    export = client.go()
    assert SIZE == export.size
    assert len(client.read(0, 512)) == 512


def errors_of(replies: list[OptionReply]) -> list[int]:
    """Return the types of replies."""
    return [one.type for one in replies]


# --- The handshake -------------------------------------------------------------


@pytest.mark.parametrize("no_zeroes", [False, True])
def test_export_name_tells_size_and_flags(dial: Dial, *, no_zeroes: bool) -> None:
    """The oldest option works, with the 124 zeroes and without."""
    client = dial()
    assert client.server_flags == raw.FIXED_NEWSTYLE | raw.NO_ZEROES
    client.hello(raw.FIXED_NEWSTYLE | (raw.NO_ZEROES if no_zeroes else 0))
    assert Export(SIZE, FLAGS) == client.export_name(zeroes=not no_zeroes)
    client.write(4 * MIB, b"n" * 512)
    assert client.read(4 * MIB, 512) == b"n" * 512


def test_export_name_any_name_after_structured_replies(fresh: RawClient) -> None:
    """The export goes by any name, and what was agreed before holds."""
    fresh.use_structured()
    fresh.send(raw.option(raw.OPT_EXPORT_NAME, b"any name \xff"))
    told = fresh.receive(10)
    assert SIZE == int.from_bytes(told[:8], "big")
    assert FLAGS | FLAG_DF == int.from_bytes(told[8:], "big")
    assert len(fresh.read(0, 4096)) == 4096


def test_hello_without_fixed_newstyle_is_served(dial: Dial) -> None:
    """A client from before options could fail has EXPORT_NAME."""
    client = dial()
    client.hello(0)
    assert Export(SIZE, FLAGS) == client.export_name(zeroes=True)
    assert len(client.read(0, 512)) == 512


@pytest.mark.parametrize("infos", [(), (raw.INFO_BLOCK_SIZE,), (raw.INFO_NAME, 3, 99)])
@pytest.mark.parametrize("name", [b"", b"x" * 4096])
def test_info_and_go_tell_the_same(
    fresh: RawClient, infos: tuple[int, ...], name: bytes
) -> None:
    """Both tell the export, and the block sizes to who asks for them."""
    data = raw.name_and_infos(*infos, name=name)
    info = fresh.ask(raw.OPT_INFO, data)
    go = fresh.ask(raw.OPT_GO, data)
    assert [(one.type, one.data) for one in info] == [
        (one.type, one.data) for one in go
    ]
    assert Export(SIZE, FLAGS) == RawClient.export_of(go)
    block_sizes = [one.data for one in go if one.data[:2] == b"\0\3"]
    expected = b"\0\3" + b"".join(n.to_bytes(4, "big") for n in (512, 4096, LONGEST))
    assert block_sizes == ([expected] if raw.INFO_BLOCK_SIZE in infos else [])
    assert len(fresh.read(0, 512)) == 512


def test_structured_replies_bring_df(fresh: RawClient) -> None:
    """The flag DF is offered with structured replies only."""
    before = RawClient.export_of(fresh.ask(raw.OPT_INFO, raw.name_and_infos()))
    fresh.use_structured()
    after = RawClient.export_of(fresh.ask(raw.OPT_INFO, raw.name_and_infos()))
    assert (before.flags, after.flags) == (FLAGS, FLAGS | FLAG_DF)
    assert_goes_on(fresh)


def test_list_has_one_export(fresh: RawClient) -> None:
    """There is the default export, and an ACK."""
    assert fresh.ask(raw.OPT_LIST) == [
        OptionReply(raw.OPT_LIST, raw.REP_SERVER, bytes(4)),
        OptionReply(raw.OPT_LIST, raw.REP_ACK, b""),
    ]
    assert_goes_on(fresh)


@pytest.mark.parametrize("number", [raw.OPT_LIST, raw.OPT_STRUCTURED_REPLY])
def test_option_with_data_it_may_not_have_is_invalid(
    fresh: RawClient, number: int
) -> None:
    """An option that takes no data is refused with some, and changes nothing."""
    assert errors_of(fresh.ask(number, b"data")) == [raw.REP_ERR_INVALID]
    assert_goes_on(fresh)


def test_abort_is_acknowledged_and_ends(fresh: RawClient) -> None:
    """ABORT has an ACK, and then the connection ends."""
    assert errors_of(fresh.ask(raw.OPT_ABORT)) == [raw.REP_ACK]
    fresh.assert_dropped()


@pytest.mark.parametrize("number", [0, 4, raw.OPT_STARTTLS, 11, 12345, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 8192])
def test_option_unknown_is_unsupported(
    fresh: RawClient, number: int, length: int
) -> None:
    """Options that are not known, TLS among them, are refused, and it goes on."""
    reply = fresh.ask(number, b"?" * length)
    assert errors_of(reply) == [raw.REP_ERR_UNSUP]
    assert_goes_on(fresh)


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), True),
        ((b"base:",), True),
        ((CONTEXT,), True),
        ((b"qemu:", CONTEXT, b"base:"), True),
        ((b"qemu:",), False),
        ((b"base",), False),
        ((b"base:allocatio",), False),
        ((b"base:allocation2",), False),
        ((b"",), False),
    ],
)
def test_list_meta_context(
    fresh: RawClient, queries: tuple[bytes, ...], *, found: bool
) -> None:
    """Listing finds the one context, by its name, its namespace, or for nothing."""
    fresh.use_structured()
    replies = fresh.ask(raw.OPT_LIST_META_CONTEXT, raw.meta_query(*queries))
    names = [one.data[4:] for one in replies if one.type == raw.REP_META_CONTEXT]
    assert names == ([CONTEXT] if found else [])
    assert raw.REP_ACK == replies[-1].type
    assert_goes_on(fresh)
    # Listing selects nothing.
    assert errno.EINVAL == fresh.call(raw.CMD_BLOCK_STATUS, 0, 4096).error


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), False),
        ((b"base:",), False),
        ((b"base:allocation2",), False),
        ((b"x" * 4096,), False),
        ((CONTEXT,), True),
        ((b"qemu:dirty-bitmap:x", CONTEXT), True),
    ],
)
def test_set_meta_context(
    fresh: RawClient, queries: tuple[bytes, ...], *, found: bool
) -> None:
    """Setting takes the context by its full name only, and then it can be used."""
    fresh.use_structured()
    replies = fresh.ask(raw.OPT_SET_META_CONTEXT, raw.meta_query(*queries, name=b"e"))
    expected = [raw.REP_META_CONTEXT] * found + [raw.REP_ACK]
    assert expected == errors_of(replies)
    assert_goes_on(fresh)
    status = fresh.call(raw.CMD_BLOCK_STATUS, 0, 4096)
    assert status.error == (0 if found else errno.EINVAL)


def test_set_meta_context_last_one_counts(fresh: RawClient) -> None:
    """A context set and then not set any more cannot be used."""
    fresh.use_structured()
    fresh.set_context()
    fresh.ask(raw.OPT_SET_META_CONTEXT, raw.meta_query(b"other:"))
    assert_goes_on(fresh)
    assert errno.EINVAL == fresh.call(raw.CMD_BLOCK_STATUS, 0, 4096).error


@pytest.mark.parametrize(
    "number", [raw.OPT_LIST_META_CONTEXT, raw.OPT_SET_META_CONTEXT]
)
def test_meta_context_without_structured_replies_is_invalid(
    fresh: RawClient, number: int
) -> None:
    """Contexts need structured replies; without, an error, and it goes on."""
    data = raw.meta_query(CONTEXT)
    assert errors_of(fresh.ask(number, data)) == [raw.REP_ERR_INVALID]
    assert_goes_on(fresh)
    assert errno.EINVAL == fresh.call(raw.CMD_BLOCK_STATUS, 0, 4096).error


BAD_NAMES = {
    "empty": b"",
    "cut": b"\0\0",
    "no count": raw.name_and_infos()[:-2],
    "half a count": raw.name_and_infos()[:-1],
    "name longer": raw.name_and_infos(name=b"abc", name_length=6),
    "name huge": raw.name_and_infos(name=b"abc", name_length=0xFFFFFFFF),
    "name 2 GiB": raw.name_and_infos(name=b"abc", name_length=1 << 31),
    "infos missing": raw.name_and_infos(3, nr=2),
    "infos many": raw.name_and_infos(3, nr=0xFFFF),
    "half an info": raw.name_and_infos(nr=1) + b"\0",
    "too much": raw.name_and_infos(3) + b"x",
}


@pytest.mark.parametrize("data", BAD_NAMES.values(), ids=BAD_NAMES.keys())
@pytest.mark.parametrize("number", [raw.OPT_INFO, raw.OPT_GO])
def test_go_malformed_is_invalid(fresh: RawClient, number: int, data: bytes) -> None:
    """Lengths that do not fit are refused, and the handshake goes on."""
    assert errors_of(fresh.ask(number, data)) == [raw.REP_ERR_INVALID]
    assert_goes_on(fresh)


BAD_QUERIES = {
    "empty": b"",
    "no count": bytes(4),
    "name huge": b"\xff\xff\xff\xff" + bytes(4),
    "queries missing": raw.meta_query(CONTEXT)[:4] + b"\0\0\0\2" + CONTEXT,
    "queries many": bytes(4) + b"\xff\xff\xff\xff" + b"\0\0\0\1a",
    "query huge": bytes(4) + b"\0\0\0\1" + b"\xff\xff\xff\xff" + CONTEXT,
    "too much": raw.meta_query(CONTEXT) + b"x",
}


@pytest.mark.parametrize("data", BAD_QUERIES.values(), ids=BAD_QUERIES.keys())
@pytest.mark.parametrize(
    "number", [raw.OPT_LIST_META_CONTEXT, raw.OPT_SET_META_CONTEXT]
)
def test_meta_context_malformed_is_invalid(
    fresh: RawClient, number: int, data: bytes
) -> None:
    """Queries that do not fit are refused and select nothing; it goes on."""
    fresh.use_structured()
    assert errors_of(fresh.ask(number, data)) == [raw.REP_ERR_INVALID]
    assert_goes_on(fresh)
    assert errno.EINVAL == fresh.call(raw.CMD_BLOCK_STATUS, 0, 4096).error


@pytest.mark.parametrize("length", [8193, 1 << 20, 0xFFFFFFFF])
def test_option_too_long_is_dropped(fresh: RawClient, length: int) -> None:
    """An option longer than any good one ends the connection, data unread."""
    fresh.send(raw.option(raw.OPT_GO, length=length))
    fresh.assert_dropped()


@pytest.mark.parametrize("flags", [4, 0x80000003, 0xFFFFFFFF])
def test_hello_unknown_flags_are_dropped(dial: Dial, flags: int) -> None:
    """A client that wants what we do not know is not served."""
    client = dial()
    client.hello(flags)
    client.assert_dropped()


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: nbd\r\n\r\n", bytes(64), b"\xff" * 64],
    ids=["http", "zeroes", "ones"],
)
@pytest.mark.parametrize("after_hello", [False, True])
def test_garbage_is_dropped(dial: Dial, garbage: bytes, *, after_hello: bool) -> None:
    """What is no NBD ends the connection, first or in the place of an option."""
    client = dial()
    if after_hello:
        client.hello()
    client.send(garbage)
    client.assert_dropped()


@pytest.mark.parametrize("size", [0, 2, 4, 12, 20, 22])
def test_handshake_left_midway_is_forgotten(dial: Dial, size: int) -> None:
    """A client may leave at any byte of the handshake."""
    wire = b"\0\0\0\3" + raw.option(raw.OPT_GO, raw.name_and_infos(3))
    client = dial()
    client.send(wire[:size])
    client.socket.shutdown(socket.SHUT_WR)
    client.assert_dropped()


def test_handshake_in_single_bytes_and_all_at_once(dial: Dial) -> None:
    """How the bytes are cut makes no difference, requests behind GO included."""
    hello = b"\0\0\0\3"
    options = raw.option(raw.OPT_LIST) + raw.option(raw.OPT_GO, raw.name_and_infos(3))
    wire = hello + options + raw.request(raw.CMD_READ, 0, 512, cookie=7)
    pieces: list[list[bytes]] = [[wire], [wire[i : i + 1] for i in range(len(wire))]]
    for cut in pieces:
        client = dial()
        for piece in cut:
            client.send(piece)
        assert len(client.option_replies(raw.OPT_LIST)) == 2
        assert len(client.option_replies(raw.OPT_GO)) == 3
        assert client.receive(16) == b"\x67\x44\x66\x98" + bytes(4) + bytes(7) + b"\7"
        assert len(client.receive(512)) == 512


# --- Transmission --------------------------------------------------------------


@pytest.mark.parametrize("length", [512, 4096, 64 * KIB, 64 * KIB + 512, 3 * MIB])
@pytest.mark.parametrize("flags", [0, raw.FLAG_FUA])
def test_write_and_read(
    served: Site, client: RawClient, length: int, flags: int
) -> None:
    """What is written is read, by the fast way and the other, and is on both disks."""
    content = os.urandom(length)
    offset = 4 * MIB + 512
    client.write(offset, content, flags=flags)
    assert content == client.read(offset, length)
    assert content == on_both(served, offset, length)
    if flags:
        client.call(raw.CMD_FLUSH)
        client.write(offset, content, flags=flags)
        assert served.remote()["unflushed_bytes"] == 0


def test_write_and_read_longest(served: Site, client: RawClient) -> None:
    """The longest request there may be works; one sector more is refused."""
    content = os.urandom(MIB) * 32
    client.write(6 * MIB, content)
    assert content == client.read(6 * MIB, LONGEST)
    assert content == on_both(served, 6 * MIB, LONGEST)
    assert errno.EINVAL == client.call(raw.CMD_READ, 0, LONGEST + 512).error
    found = client.call(raw.CMD_WRITE, payload=bytes(LONGEST + 512))
    assert errno.EINVAL == found.error
    client.call(raw.CMD_TRIM, 6 * MIB, LONGEST)


def test_answers_carry_cookies_of_any_kind(client: RawClient) -> None:
    """A cookie is the client's own: 0, all bits, twice the same."""
    for cookie in (0, 0xFFFFFFFFFFFFFFFF, 1 << 63, 0x0102030405060708, 0):
        for kind, length in ((raw.CMD_WRITE, 512), (raw.CMD_FLUSH, 0)):
            payload = b"c" * 512 if kind == raw.CMD_WRITE else b""
            client.send(
                raw.request(kind, 4 * MIB, length, cookie=cookie, payload=payload)
            )
            found = client.answer()
            assert (found.cookie, found.error) == (cookie, 0)


def test_answers_of_many_kinds_under_way_have_their_own_cookies(
    served: Site, client: RawClient
) -> None:
    """Requests of all kinds sent together are each answered once."""
    served_before = on_both(served, 0, MIB)
    wanted: dict[int, int] = {}
    wire = b""
    for i in range(20):
        offset = 8 * MIB + i * 64 * KIB
        payload = bytes([i + 1]) * 4096
        for kind, at, length, data in (
            (raw.CMD_WRITE, offset, 4096, payload),
            (raw.CMD_READ, i * 4096, 4096, b""),
            (raw.CMD_READ, 0, 256 * KIB, b""),
            (raw.CMD_TRIM, offset + 8192, 4096, b""),
            (raw.CMD_WRITE_ZEROES, offset + 16384, 4096, b""),
            (raw.CMD_CACHE, 0, 4096, b""),
            (raw.CMD_FLUSH, 0, 0, b""),
            (99, 0, 0, b""),
        ):
            cookie, one = client.request(kind, at, length, payload=data)
            wanted[cookie] = kind
            wire += one
    client.send(wire)
    for _ in range(len(wanted)):
        found = client.answer()
        kind = wanted.pop(found.cookie)
        assert found.error == (errno.EINVAL if kind == 99 else 0)
        if kind == raw.CMD_READ:
            at = min(found.data) if client.structured else 0
            content = found.content
            whole = len(content) == 256 * KIB
            assert content in (
                [served_before[: 256 * KIB]]
                if whole
                else [served_before[at : at + 4096]]
                if client.structured
                else [served_before[i * 4096 : i * 4096 + 4096] for i in range(20)]
            )
    assert not wanted
    for i in range(20):
        assert on_both(served, 8 * MIB + i * 64 * KIB, 4096) == bytes([i + 1]) * 4096


@pytest.mark.parametrize("flags", [0, raw.FLAG_FUA])
@pytest.mark.parametrize("kind", [raw.CMD_TRIM, raw.CMD_WRITE_ZEROES])
def test_trim_and_zeroes(
    served: Site, client: RawClient, kind: int, flags: int
) -> None:
    """Both leave zeroes on both disks, with FUA none of them unflushed."""
    client.write(4 * MIB, b"x" * MIB)
    client.call(raw.CMD_FLUSH)
    assert served.remote()["unflushed_bytes"] == 0
    found = client.call(kind, 4 * MIB + 512, MIB - 1024, flags=flags)
    assert found.error == 0
    expected = b"x" * 512 + bytes(MIB - 1024) + b"x" * 512
    assert expected == on_both(served, 4 * MIB, MIB) == client.read(4 * MIB, MIB)
    if flags:
        assert served.remote()["unflushed_bytes"] == 0


def test_zeroes_no_hole_and_fast(served: Site, client: RawClient) -> None:
    """NO_HOLE keeps the space; a fast zero is done or refused unchanged."""
    client.call(raw.CMD_TRIM, 4 * MIB, MIB)
    trimmed = served.local.stat().st_blocks
    found = client.call(raw.CMD_WRITE_ZEROES, 4 * MIB, MIB, flags=raw.FLAG_NO_HOLE)
    assert found.error == 0
    assert served.local.stat().st_blocks >= trimmed + MIB // 512
    client.write(4 * MIB, b"f" * MIB)
    found = client.call(raw.CMD_WRITE_ZEROES, 4 * MIB, MIB, flags=raw.FLAG_FAST_ZERO)
    assert found.error in (0, errno.EOPNOTSUPP)
    expected = b"f" * MIB if found.error else bytes(MIB)
    assert expected == on_both(served, 4 * MIB, MIB)


def test_flush_and_cache(client: RawClient) -> None:
    """Both are answered."""
    assert client.call(raw.CMD_FLUSH).error == 0
    assert client.call(raw.CMD_CACHE, 0, MIB).error == 0


def test_read_df_is_one_chunk(dial: Dial) -> None:
    """A read that may not be cut is not."""
    client = transmitting(dial())
    found = client.call(raw.CMD_READ, 0, 8 * MIB, flags=raw.FLAG_DF)
    assert (found.error, found.chunks, list(found.data)) == (0, 1, [0])
    assert len(found.content) == 8 * MIB


def test_block_status_tells_holes(dial: Dial) -> None:
    """Holes and data in order; REQ_ONE gives the first, cut to what was asked."""
    client = transmitting(dial())
    client.call(raw.CMD_TRIM, 4 * MIB, MIB)
    client.write(4 * MIB + 256 * KIB, b"d" * 64 * KIB)
    found = client.call(raw.CMD_BLOCK_STATUS, 4 * MIB, MIB)
    assert found.structured
    assert found.runs == [(256 * KIB, 3), (64 * KIB, 0), (704 * KIB, 3)]
    one = client.call(raw.CMD_BLOCK_STATUS, 4 * MIB, MIB, flags=raw.FLAG_REQ_ONE)
    assert one.runs == [(256 * KIB, 3)]
    cut = client.call(raw.CMD_BLOCK_STATUS, 4 * MIB, 4096, flags=raw.FLAG_REQ_ONE)
    assert cut.runs == [(4096, 3)]


def test_block_status_many_runs_are_told_in_parts(dial: Dial) -> None:
    """More runs than fit an answer: it tells the first of them, and no gap."""
    client = transmitting(dial())
    client.call(raw.CMD_TRIM, 8 * MIB, 8 * MIB)
    for i in range(700):
        client.send(client.request(raw.CMD_WRITE, 8 * MIB + i * 8192, 4096)[1])
        client.send(b"r" * 4096)
    for _ in range(700):
        assert client.answer().error == 0
    runs: list[tuple[int, int]] = []
    told = 0
    while told < 700 * 8192:
        found = client.call(raw.CMD_BLOCK_STATUS, 8 * MIB + told, 700 * 8192 - told)
        assert found.error == 0
        assert found.runs
        runs += found.runs
        told = sum(length for length, _ in runs)
    assert runs == [(4096, 0), (4096, 3)] * 700


def test_block_status_without_context_is_invalid(client: RawClient, dial: Dial) -> None:
    """Who agreed on no context cannot ask for one."""
    plain = transmitting(dial(), structured=False)
    assert errno.EINVAL == plain.call(raw.CMD_BLOCK_STATUS, 0, 4096).error
    chunked = dial()
    chunked.hello()
    chunked.use_structured()
    chunked.go()
    assert errno.EINVAL == chunked.call(raw.CMD_BLOCK_STATUS, 0, 4096).error
    assert len(chunked.read(0, 512)) == 512


KINDS = {
    "read": raw.CMD_READ,
    "write": raw.CMD_WRITE,
    "trim": raw.CMD_TRIM,
    "cache": raw.CMD_CACHE,
    "zeroes": raw.CMD_WRITE_ZEROES,
    "status": raw.CMD_BLOCK_STATUS,
}
BAD_RANGES = {
    "nothing": (0, 0),
    "at the end": (SIZE, 512),
    "over the end": (SIZE - 512, 1024),
    "far": (1 << 62, 512),
    "wraps": ((1 << 64) - 512, 1024),
    "offset in a sector": (1, 512),
    "length in a sector": (512, 511),
}


@pytest.mark.parametrize("where", BAD_RANGES.values(), ids=BAD_RANGES.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_range_bad_is_invalid(
    served: Site, client: RawClient, kind: int, where: tuple[int, int]
) -> None:
    """Nothing, outside, or not in sectors: EINVAL, nothing changes, and it goes on."""
    offset, length = where
    payload = b"!" * length if kind == raw.CMD_WRITE else b""
    found = client.call(kind, offset, length, payload=payload)
    # Past the end, NBD asks for ENOSPC on a write.
    writes = kind in (raw.CMD_WRITE, raw.CMD_WRITE_ZEROES)
    outside = writes and offset + length > SIZE
    assert found.error in ({errno.EINVAL, errno.ENOSPC} if outside else {errno.EINVAL})
    assert not found.data
    assert not found.runs
    assert client.read(0, 4096) == on_both(served, 0, 4096)
    assert b"!" not in {on_both(served, 0, 1), on_both(served, 512, 1)}
    assert served.local.stat().st_size == SIZE


@pytest.mark.parametrize("kind", [8, 9, 255, 0x8001, 0xFFFF])
def test_command_unknown_is_invalid(client: RawClient, kind: int) -> None:
    """A command that is not known is EINVAL, and it goes on."""
    assert errno.EINVAL == client.call(kind, 0, 4096).error
    assert len(client.read(0, 512)) == 512


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (raw.CMD_READ, 0x100),
        (raw.CMD_WRITE, raw.FLAG_DF),
        (raw.CMD_WRITE, 0x8000),
        (raw.CMD_TRIM, raw.FLAG_NO_HOLE),
        (raw.CMD_FLUSH, 0x20),
        (raw.CMD_WRITE_ZEROES, raw.FLAG_REQ_ONE),
    ],
)
def test_flag_unknown_is_invalid(client: RawClient, kind: int, flags: int) -> None:
    """A flag that is not known, or not of that command, is EINVAL, as nbdkit's is."""
    length = 0 if kind == raw.CMD_FLUSH else 512
    payload = bytes(512) if kind == raw.CMD_WRITE else b""
    found = client.call(kind, 4 * MIB, length, flags=flags, payload=payload)
    assert errno.EINVAL == found.error


@pytest.mark.parametrize("kind", [raw.CMD_READ, raw.CMD_CACHE, raw.CMD_FLUSH])
def test_flag_fua_is_taken_with_any_command(client: RawClient, kind: int) -> None:
    """FUA means nothing for a command that writes nothing, and is no error."""
    length = 0 if kind == raw.CMD_FLUSH else 512
    assert client.call(kind, 0, length, flags=raw.FLAG_FUA).error == 0


def test_write_far_too_long_is_skipped(served: Site, client: RawClient) -> None:
    """A write of 64 MiB is EINVAL; what is behind its payload is a request."""
    before = on_both(served, 0, MIB)
    cookie, wire = client.request(raw.CMD_WRITE, 0, 64 * MIB)
    client.send(wire)
    # Not 0, and it looks like requests: DISC, over and over.
    disc = raw.request(raw.CMD_DISC)
    block = (disc * (MIB // len(disc) + 1))[:MIB]
    for _ in range(64):
        client.send(block)
    found = client.answer()
    assert (found.cookie, found.error) == (cookie, errno.EINVAL)
    client.write(4 * MIB, b"behind" * 256)
    assert client.read(4 * MIB, 1536) == b"behind" * 256
    assert before == on_both(served, 0, MIB)


def test_request_bad_magic_is_dropped(served: Site, client: RawClient) -> None:
    """After something that is no request nothing can be understood any more."""
    client.send(raw.request(raw.CMD_WRITE, 0, 512, magic=0x12345678))
    client.assert_dropped()
    served.wait_log("without the magic number")


def test_requests_in_single_bytes(served: Site, client: RawClient) -> None:
    """Requests may come byte by byte."""
    content = os.urandom(1024)
    cookie, write = client.request(raw.CMD_WRITE, 4 * MIB, payload=content)
    read_cookie, read = client.request(raw.CMD_READ, 4 * MIB, 1024)
    for byte in write:
        client.send(bytes([byte]))
    found = client.answer()
    assert (found.cookie, found.error) == (cookie, 0)
    for byte in read:
        client.send(bytes([byte]))
    found = client.answer()
    assert (found.cookie, found.content) == (read_cookie, content)
    assert content == on_both(served, 4 * MIB, 1024)


@pytest.mark.parametrize("cut", [1, 27, 28, 29, 4096, 131071, 131072, 131073])
def test_requests_cut_anywhere(served: Site, client: RawClient, cut: int) -> None:
    """A stream of writes cut in two anywhere, the buffer's end included."""
    content = os.urandom(256 * KIB)
    wire, cookies = b"", set()
    for i in range(0, len(content), 8192):
        cookie, one = client.request(
            raw.CMD_WRITE, 4 * MIB + i, payload=content[i : i + 8192]
        )
        wire += one
        cookies.add(cookie)
    client.send(wire[:cut])
    # An answer to something else would tell that it was taken in; there is none to
    # wait for, so the other client's answer has to do.
    assert_serves(served)
    client.send(wire[cut:])
    for _ in range(len(cookies)):
        found = client.answer()
        assert found.error == 0
        cookies.remove(found.cookie)
    assert content == on_both(served, 4 * MIB, len(content))


@pytest.mark.parametrize("length", [512, 4096, 128 * KIB])
@pytest.mark.parametrize("kind", [raw.CMD_READ, raw.CMD_WRITE])
def test_requests_more_than_may_be_under_way(
    served: Site, client: RawClient, kind: int, length: int
) -> None:
    """300 requests are sent before an answer is read: each is answered."""
    if (kind, length) == (raw.CMD_WRITE, 128 * KIB):
        length = 16 * KIB  # their payloads alone are more than sockets hold
    cookies = {}
    wire = bytearray()
    for i in range(300):
        payload = i.to_bytes(2, "big") * (length // 2) if kind == raw.CMD_WRITE else b""
        at = (8 * MIB if kind == raw.CMD_WRITE else 0) + i * (length % (64 * KIB))
        cookie, one = client.request(kind, at, length, payload=payload)
        cookies[cookie] = at
        wire += one
    expected = on_both(served, 0, 4 * MIB) if kind == raw.CMD_READ else b""
    client.socket.settimeout(30)
    client.send(bytes(wire))
    for _ in range(300):
        found = client.answer()
        at = cookies.pop(found.cookie)
        assert found.error == 0
        if kind == raw.CMD_READ:
            assert found.content == expected[at : at + length]
    assert not cookies
    if kind == raw.CMD_WRITE:
        written = on_both(served, 8 * MIB, 300 * length)
        for i in range(300):
            assert written[i * length :][:2] == i.to_bytes(2, "big")


@pytest.mark.parametrize("how", ["disc", "half-close"])
def test_leaving_behind_writes_loses_none(
    served: Site, client: RawClient, how: str
) -> None:
    """Writes right before the end of a client are answered and on both disks."""
    content = os.urandom(64 * 4096)
    wire = b"".join(
        client.request(raw.CMD_WRITE, 4 * MIB + i, payload=content[i : i + 4096])[1]
        for i in range(0, len(content), 4096)
    )
    if how == "disc":
        client.send(wire + raw.request(raw.CMD_DISC))
    else:
        client.send(wire)
        client.socket.shutdown(socket.SHUT_WR)
    for _ in range(64):
        assert client.answer().error == 0
    client.assert_dropped()
    assert content == on_both(served, 4 * MIB, len(content))


@pytest.mark.parametrize("disc", [False, True])
def test_closing_behind_writes_tears_none(
    served: Site, client: RawClient, *, disc: bool
) -> None:
    """Who is gone before the answers: each write is whole, and the same on both."""
    before, after = os.urandom(4096), os.urandom(4096)
    client.write(4 * MIB, before * 64)
    wire = b"".join(
        client.request(raw.CMD_WRITE, 4 * MIB + i * 4096, payload=after)[1]
        for i in range(64)
    )
    client.send(wire + (raw.request(raw.CMD_DISC) if disc else b""))
    client.close()
    support.wait_until(
        lambda: served.status()["clients"] == 0, "the client to be forgotten"
    )
    found = on_both(served, 4 * MIB, 64 * 4096)
    for i in range(0, len(found), 4096):
        assert found[i : i + 4096] in (before, after)


# --- The same disk through another door ----------------------------------------


def test_doors_tell_the_same(site: Site) -> None:
    """What nbdinfo says of the direct and the native door is the same but the uri."""
    told: dict[str, list[Any]] = {}
    site.fill(site.local, MIB, offset=MIB)
    for door in ("direct", "native"):
        if door == "direct":
            site.bring_up(door)
        else:
            site.serve(door)
            site.wait_in_sync()
        info = site.processes.run(["nbdinfo", "--json", site.uri]).stdout
        mapped = site.processes.run(["nbdinfo", "--map", "--json", site.uri]).stdout
        listed = site.processes.run(["nbdinfo", "--list", "--json", site.uri]).stdout
        told[door] = [json.loads(one) for one in (info, mapped, listed)]
        for one in (told[door][0], told[door][2]):
            for export in one["exports"]:
                export.pop("uri", None)
        site.stop()
    assert told["direct"] == told["native"]
    export = told["direct"][0]["exports"][0]
    assert export["export-size"] == site.size
    assert export["contexts"] == ["base:allocation"]
    assert told["direct"][0]["structured"] is True


# --- Clients that do harm ------------------------------------------------------


def send_reads(client: RawClient, count: int, length: int) -> None:
    """Send reads, and read no answer."""
    client.send(
        b"".join(client.request(raw.CMD_READ, 0, length)[1] for _ in range(count))
    )


def assert_quick(site: Site) -> None:
    """Fail unless a client can do everything within the deadline."""
    start = time.monotonic()
    with RawClient(site.socket, timeout_s=DEADLINE_S) as client:
        transmitting(client)
        for i in range(50):
            client.write(i * 4096, bytes([i + 1]) * 4096)
        client.write(0, b"w" * MIB)
        assert client.read(0, MIB) == b"w" * MIB
        assert client.call(raw.CMD_FLUSH).error == 0
        assert client.call(raw.CMD_TRIM, 0, 4096).error == 0
        assert client.call(raw.CMD_BLOCK_STATUS, 0, MIB).error == 0
    assert time.monotonic() - start < DEADLINE_S


@pytest.mark.parametrize("length", [4096, MIB])
def test_client_that_never_reads_harms_nobody(site: Site, length: int) -> None:
    """It keeps neither another client nor `nbd-mirror stop`."""
    site.bring_up("direct")
    with RawClient(site.socket) as deaf:
        transmitting(deaf)
        send_reads(deaf, 400, length)
        assert_quick(site)
        # Its own writes, in the ranges others write to, behind the reads.
        with RawClient(site.socket) as other:
            transmitting(other)
            for i in range(50):
                other.send(
                    other.request(raw.CMD_WRITE, 4096 * i, payload=bytes(4096))[1]
                )
            send_reads(other, 400, length)
            assert_quick(site)
        done = site.cli("stop", str(site.config), timeout_s=20)
        assert "stopped cleanly" in done.stdout
        assert site.ended() == 0
    site.assert_equal()


def test_clients_that_never_read_leave_workers_for_others(site: Site) -> None:
    """Not even as many of them as there are workers keep another client."""
    site.bring_up("direct")
    with ExitStack() as open_ones:
        for _ in range(140):
            deaf = open_ones.enter_context(RawClient(site.socket))
            transmitting(deaf)
            send_reads(deaf, 2, MIB)
        assert_quick(site)
        site.cli("stop", str(site.config), timeout_s=20)
        assert site.ended() == 0
    site.assert_equal()


def test_client_that_asks_and_never_reads_in_handshake_keeps_nobody(
    site: Site,
) -> None:
    """Options without end, whose answers nobody reads, end with the server."""
    site.bring_up("direct")
    with RawClient(site.socket) as deaf:
        deaf.hello()
        deaf.socket.settimeout(1)
        # Far more than sockets hold: it is stuck before the end.
        with pytest.raises((TimeoutError, ConnectionError)):
            deaf.send(raw.option(raw.OPT_LIST) * MIB)
        assert_quick(site)
        site.cli("stop", str(site.config), timeout_s=20)
        assert site.ended() == 0
    site.assert_equal()


KILLED = """
import sys
from pathlib import Path
from e2e import nbd_raw as raw
client = raw.RawClient(Path(sys.argv[1]))
client.hello()
client.go()
client.send(client.request(raw.CMD_WRITE, 4 << 20, 1 << 20)[1] + b"k" * 600000)
print("sent", flush=True)
sys.stdin.read()
"""


def test_client_killed_amid_a_payload_writes_nothing(served: Site, dial: Dial) -> None:
    """Half a write is no write, and keeps no range from anybody."""
    client = transmitting(dial())
    before = os.urandom(MIB)
    client.write(4 * MIB, before)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(served.socket)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(support.ROOT / "tests")},
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"sent\n"
        victim.kill()
        assert victim.wait(10) == -9
    assert before == client.read(4 * MIB, MIB) == on_both(served, 4 * MIB, MIB)
    client.write(4 * MIB, b"after" * 1024)
    assert client.read(4 * MIB, 5120) == b"after" * 1024


def test_client_gone_while_its_remote_is_frozen(site: Site) -> None:
    """Requests that wait for a remote outlive their client, and harm nobody."""
    site.bring_up("direct")
    site.dr.freeze()
    with ExitStack() as open_ones:
        for n in range(4):
            gone = open_ones.enter_context(RawClient(site.socket))
            transmitting(gone)
            for i in range(40):
                at = (8 * n + i % 8) * 256 * KIB
                length = (4096, 128 * KIB)[i % 2]
                gone.send(gone.request(raw.CMD_WRITE, at, payload=bytes(length))[1])
            send_reads(gone, 40, 128 * KIB)
            gone.send(gone.request(raw.CMD_FLUSH)[1])
            if n % 2:
                gone.send(raw.request(raw.CMD_DISC))
    with RawClient(site.socket) as other:
        transmitting(other)
        assert len(other.read(0, 4096)) == 4096
    site.dr.thaw()
    support.wait_until(
        lambda: site.status()["clients"] == 0, "the clients to be forgotten"
    )
    site.wait_in_sync()
    assert_quick(site)
    site.stop()
    site.assert_equal()


@pytest.mark.parametrize("reset", [False, True])
def test_tcp_clients_that_leave_harm_nobody(
    new_site: Callable[..., Site], *, reset: bool
) -> None:
    """Over TCP: clients that close, or reset, with requests under way."""
    port = free_port()
    site = new_site(listen=f"tcp:127.0.0.1:{port}")
    site.bring_up("direct")
    for i in range(40):
        with RawClient(("127.0.0.1", port)) as client:
            transmitting(client, structured=bool(i % 2))
            client.send(client.request(raw.CMD_WRITE, 0, payload=bytes(4096))[1])
            send_reads(client, 40, (4096, MIB)[i % 4 // 2])
            client.send(client.request(raw.CMD_WRITE, 0, MIB)[1] + b"half")
            if reset:
                linger = struct.pack("ii", 1, 0)
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    support.wait_until(
        lambda: site.status()["clients"] == 0, "the clients to be forgotten"
    )
    with RawClient(("127.0.0.1", port)) as client:
        transmitting(client)
        client.write(0, b"t" * MIB)
        assert client.read(0, MIB) == b"t" * MIB
        site.stop()
    site.assert_equal()


def test_clients_idle_in_handshake_keep_nobody(site: Site) -> None:
    """50 connections that say nothing, or half of it, keep neither client nor stop."""
    site.bring_up("direct")
    with ExitStack() as open_ones:
        for i in range(50):
            idle = open_ones.enter_context(RawClient(site.socket))
            idle.send(
                (b"\0\0\0\3" + raw.option(raw.OPT_GO, length=100) + b"a" * 50)[: 2 * i]
            )
        assert_quick(site)
        done = site.cli("stop", str(site.config), timeout_s=20)
        assert "stopped cleanly" in done.stdout
        assert site.ended() == 0
    site.assert_equal()


def test_connections_many_one_after_another_leave_nothing(
    served: Site, dial: Dial
) -> None:
    """Clients that come and go leave no descriptors and no threads behind."""
    process = Path("/proc") / str(served.pid)

    def counts() -> tuple[int, int]:
        return len(list((process / "fd").iterdir())), len(
            list((process / "task").iterdir())
        )

    def come_and_go(how: int) -> None:
        with RawClient(served.socket) as client:
            if how > 0:
                transmitting(client)
            if how > 1:
                send_reads(client, 20, 4096)
            if how > 2:
                client.send(client.request(raw.CMD_WRITE, 0, 4096)[1] + b"half")

    fds, _ = counts()
    for i in range(200):
        come_and_go(i % 4)
    support.wait_until(lambda: counts()[0] <= fds, "the descriptors to be closed")


# --- Clients of others ---------------------------------------------------------


def qemu_io(site: Site, *commands: str) -> str:
    """Run qemu-io's commands on the volume."""
    words = [word for one in commands for word in ("-c", one)]
    done = site.processes.run(["qemu-io", "-f", "raw", *words, site.uri])
    # It reports a pattern that differs, and exits with 0 in some releases.
    assert "Pattern verification failed" not in done.stdout
    assert "error" not in done.stdout.lower()
    return done.stdout


def test_interop_qemu_io_and_nbdcopy(served: Site) -> None:
    """What qemu-io writes, nbdcopy copies out, and qemu-img finds the same."""
    support.requires_program("qemu-io", "qemu-img", "nbdcopy")
    qemu_io(
        served,
        "write -P 0xa5 16M 3M",
        "write -f -P 0x5a 17M 64k",
        "write -z -u 18M 64k",
        "discard 18880k 64k",
        "flush",
    )
    out = served.folder / "qemu.img"
    served.processes.run(["nbdcopy", served.uri, str(out)])
    content = out.read_bytes()
    assert content == served.local.read_bytes()
    assert content[16 * MIB : 17 * MIB] == b"\xa5" * MIB
    assert content[17 * MIB : 17 * MIB + 64 * KIB] == b"\x5a" * 64 * KIB
    assert content[18 * MIB : 18 * MIB + 64 * KIB] == bytes(64 * KIB)
    words = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(out), served.uri]
    assert "identical" in served.processes.run(words).stdout
    served.assert_equal()


def test_interop_nbdcopy_in_and_qemu_img_out(served: Site) -> None:
    """An image copied in by nbdcopy comes out of qemu-img the same."""
    support.requires_program("qemu-img", "nbdcopy")
    image, out = served.folder / "in.img", served.folder / "out.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    served.fill(image, 5 * MIB, offset=2 * MIB, seed=7)
    served.processes.run(["nbdcopy", "--flush", str(image), served.uri])
    words = ["qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri, str(out)]
    served.processes.run(words)
    assert image.read_bytes() == out.read_bytes() == served.local.read_bytes()
    served.assert_equal()


def test_interop_nbdsh_and_qemu_io(served: Site) -> None:
    """What libnbd's shell writes, qemu-io reads, and the other way."""
    support.requires_program("nbdsh", "qemu-io")
    # It calls python3, which must be the one that has the module nbd.
    system = {"PATH": "/usr/bin:/bin"}
    program = "h.pwrite(b'\\x3c' * 65536, 20 << 20, nbd.CMD_FLAG_FUA)"
    served.processes.run(["nbdsh", "-u", served.uri, "-c", program], env=system)
    qemu_io(served, "read -P 0x3c 20M 64k", "write -P 0xc3 20M 64k")
    program = "assert h.pread(65536, 20 << 20) == b'\\xc3' * 65536"
    served.processes.run(["nbdsh", "-u", served.uri, "-c", program], env=system)
    served.assert_equal()


def test_interop_fio_writes_and_nbdcopy_reads(served: Site) -> None:
    """What fio writes from two jobs at once it verifies, and nbdcopy reads."""
    support.requires_program("fio", "nbdcopy")
    job = served.folder / "direct.fio"
    job.write_text(
        f"[global]\nioengine=nbd\nuri={served.uri}\nrw=randwrite\nbs=4k\n"
        "iodepth=16\nsize=4m\nverify=crc32c\nverify_fatal=1\nverify_state_save=0\n"
        "[one]\noffset=24m\n[two]\noffset=28m\nbsrange=512-128k\n"
    )
    served.processes.run(["fio", f"--output={served.folder}/direct.out", str(job)])
    out = served.folder / "fio.img"
    served.processes.run(["nbdcopy", served.uri, str(out)])
    content = out.read_bytes()
    assert content == served.local.read_bytes()
    assert bytes(4096) not in (content[24 * MIB :][:4096], content[28 * MIB :][:4096])
    served.assert_equal()
