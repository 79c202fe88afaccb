# SPDX-License-Identifier: BSD-3-Clause
"""The direct door's handshake: what it agrees on, and what it drops."""

from __future__ import annotations

import errno
import socket

import pytest
from e2e.direct import nbd_raw as raw
from e2e.direct.checks import (
    CONTEXT,
    FLAG_DF,
    FLAGS,
    LONGEST,
    SIZE,
    Dial,
    assert_goes_on,
    errors_of,
)
from e2e.direct.nbd_raw import Export, OptionReply, RawClient
from e2e.lib.harness import MIB


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
    """Both tell the export, and the block sizes to a client that asks for them."""
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


@pytest.mark.parametrize("length", [8193, 32 << 10, 1 << 20])
@pytest.mark.parametrize("number", [raw.OPT_GO, raw.OPT_SET_META_CONTEXT, 12345])
def test_option_too_long_is_refused(fresh: RawClient, number: int, length: int) -> None:
    """An option longer than any good one is read and refused, and it goes on."""
    found = fresh.ask(number, b"l" * length)
    assert errors_of(found) == [raw.REP_ERR_TOO_BIG]
    assert str(length).encode() in found[0].data
    assert_goes_on(fresh)


@pytest.mark.parametrize("length", [(32 << 20) + 1, 0xFFFFFFFF])
def test_option_of_no_sane_length_is_dropped(fresh: RawClient, length: int) -> None:
    """The server does not wait for 4 GiB of an option."""
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
