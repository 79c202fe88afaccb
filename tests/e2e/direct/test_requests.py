# SPDX-License-Identifier: BSD-3-Clause
"""The direct door's requests and answers, by the letter of the protocol and off it."""

from __future__ import annotations

import errno
import json
import os
import socket
from typing import Any

import pytest
import support
from e2e.direct import nbd_raw as raw
from e2e.direct.checks import (
    KIB,
    LONGEST,
    SIZE,
    Dial,
    assert_serves,
    transmitting,
)
from e2e.direct.nbd_raw import RawClient
from e2e.lib.harness import MIB, Site


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
    assert content == served.on_both(offset, length)
    if flags:
        client.call(raw.CMD_FLUSH)
        client.write(offset, content, flags=flags)
        assert served.remote()["unflushed_bytes"] == 0


@pytest.mark.parametrize("offset", [4 * MIB, 4 * MIB + 1])
def test_write_and_read_longest(served: Site, client: RawClient, offset: int) -> None:
    """The longest request there may be works; one sector more is refused."""
    content = os.urandom(MIB) * (LONGEST // MIB)
    client.write(offset, content)
    assert content == client.read(offset, LONGEST)
    assert content == served.on_both(offset, LONGEST)
    assert errno.EINVAL == client.call(raw.CMD_READ, 0, LONGEST + 512).error
    found = client.call(raw.CMD_WRITE, payload=bytes(LONGEST + 512))
    assert errno.EINVAL == found.error
    client.call(raw.CMD_TRIM, 4 * MIB, LONGEST + MIB)


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
    served_before = served.on_both(0, MIB)
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
        assert served.on_both(8 * MIB + i * 64 * KIB, 4096) == bytes([i + 1]) * 4096


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
    assert expected == served.on_both(4 * MIB, MIB) == client.read(4 * MIB, MIB)
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
    assert expected == served.on_both(4 * MIB, MIB)


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
    """More runs than fit an answer: it has the first of them, and no gap."""
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
    """A client that agreed on no context cannot ask for one."""
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
    "a byte over the end": (SIZE - 1, 2),
}


@pytest.mark.parametrize("where", BAD_RANGES.values(), ids=BAD_RANGES.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_range_bad_is_invalid(
    served: Site, client: RawClient, kind: int, where: tuple[int, int]
) -> None:
    """Nothing, or outside: EINVAL, nothing changes, and it goes on."""
    offset, length = where
    payload = b"!" * length if kind == raw.CMD_WRITE else b""
    found = client.call(kind, offset, length, payload=payload)
    # Past the end, NBD asks for ENOSPC on a write.
    writes = kind in (raw.CMD_WRITE, raw.CMD_WRITE_ZEROES)
    outside = writes and offset + length > SIZE
    assert found.error in ({errno.EINVAL, errno.ENOSPC} if outside else {errno.EINVAL})
    assert not found.data
    assert not found.runs
    assert client.read(0, 4096) == served.on_both(0, 4096)
    assert b"!" not in {served.on_both(0, 1), served.on_both(512, 1)}
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
    """A write of 96 MiB is EINVAL; what is behind its payload is a request."""
    before = served.on_both(0, MIB)
    cookie, wire = client.request(raw.CMD_WRITE, 0, 96 * MIB)
    client.send(wire)
    # Not 0, and it looks like requests: DISC, over and over.
    disc = raw.request(raw.CMD_DISC)
    block = (disc * (MIB // len(disc) + 1))[:MIB]
    for _ in range(96):
        client.send(block)
    found = client.answer()
    assert (found.cookie, found.error) == (cookie, errno.EINVAL)
    client.write(4 * MIB, b"behind" * 256)
    assert client.read(4 * MIB, 1536) == b"behind" * 256
    assert before == served.on_both(0, MIB)


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
    assert content == served.on_both(4 * MIB, 1024)


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
    # An answer to another request would show that it was taken in; there is none to
    # wait for, so the other client's answer has to do.
    assert_serves(served)
    client.send(wire[cut:])
    for _ in range(len(cookies)):
        found = client.answer()
        assert found.error == 0
        cookies.remove(found.cookie)
    assert content == served.on_both(4 * MIB, len(content))


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
    expected = served.on_both(0, 4 * MIB) if kind == raw.CMD_READ else b""
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
        written = served.on_both(8 * MIB, 300 * length)
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
    assert content == served.on_both(4 * MIB, len(content))


@pytest.mark.parametrize("disc", [False, True])
def test_closing_behind_writes_tears_none(
    served: Site, client: RawClient, *, disc: bool
) -> None:
    """A client goes before the answers: each write is whole, and the same on both."""
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
    found = served.on_both(4 * MIB, 64 * 4096)
    for i in range(0, len(found), 4096):
        assert found[i : i + 4096] in (before, after)


def test_doors_tell_the_same(site: Site) -> None:
    """What nbdinfo says of the direct and the Python door is the same but the uri."""
    told: dict[str, list[Any]] = {}
    site.fill(site.local, MIB, offset=MIB)
    for door in ("direct", "python"):
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
    assert told["direct"] == told["python"]
    export = told["direct"][0]["exports"][0]
    assert export["export-size"] == site.size
    assert export["contexts"] == ["base:allocation"]
    assert told["direct"][0]["structured"] is True
