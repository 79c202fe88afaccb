# SPDX-License-Identifier: BSD-3-Clause
"""
What the tests of the direct door share.

The other end-to-end tests are of what a volume does, through every door; these are of
the wire of the door that is our own, byte by byte, and of clients that must not be able
to harm another. Most share one volume, and after each of them a new client must be
served.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from e2e.direct.nbd_raw import OptionReply, RawClient
from e2e.lib.harness import MIB, Site

Dial = Callable[[], RawClient]

KIB = 1024
SIZE = 72 * MIB
LONGEST = 64 * MIB
CONTEXT = b"base:allocation"
DEADLINE_S = 5.0  # for what takes milliseconds, on a machine that is busy
# HAS_FLAGS, FLUSH, FUA, TRIM, ZEROES, MULTI_CONN, CACHE, FAST_ZERO; and DF.
FLAGS = 0x1 | 0x4 | 0x8 | 0x20 | 0x40 | 0x100 | 0x400 | 0x800
FLAG_DF = 0x80


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


def assert_goes_on(client: RawClient) -> None:
    """Fail unless the handshake goes on, to transmission and a read."""
    export = client.go()
    assert SIZE == export.size
    assert len(client.read(0, 512)) == 512


def errors_of(replies: list[OptionReply]) -> list[int]:
    """Return the types of replies."""
    return [one.type for one in replies]
