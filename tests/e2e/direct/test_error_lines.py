# SPDX-License-Identifier: BSD-3-Clause
"""What the direct door's log says of requests that failed."""

from __future__ import annotations

import errno
import re

import support
from e2e.direct import nbd_raw as raw
from e2e.direct.checks import transmitting
from e2e.direct.nbd_raw import RawClient
from e2e.lib.harness import MIB, Site

NR = 60
SHARING = 12
FAILED_WRITE = re.compile(r"a write of (\d+) bytes at (\d+): (.*)")


def lines(site: Site) -> list[tuple[int, int, str]]:
    """Return the length, the offset and the words of each failed write."""
    found = FAILED_WRITE.findall(site.log)
    return [(int(length), int(offset), words) for length, offset, words in found]


def test_failed_writes_are_logged_with_their_own_words(site: Site) -> None:
    """Of writes that fail together, each line's words are about that very write."""
    site.fill(site.local, MIB)
    site.create()
    site.serve(fault="local_write=error:ENOSPC")  # no remote: it does not start
    site.wait_state("out_of_sync")
    with RawClient(site.socket) as client:
        transmitting(client)
        expected = set()
        for i in range(NR):
            # Those up to 64 KiB are begun on one thread and completed on another.
            length = (4096, 128 * 1024, 512)[i % 3]
            at = i * 256 * 1024
            expected.add((length, at))
            client.send(client.request(raw.CMD_WRITE, at, payload=bytes(length))[1])
        for _ in range(NR):
            assert client.answer().error == errno.ENOSPC
    support.wait_until(lambda: len(lines(site)) == NR, "a line for each write")
    assert {(length, at) for length, at, _ in lines(site)} == expected
    for _, at, words in lines(site):
        assert words.startswith(f"the local disk failed to write at {at}: "), words
    site.stop()


def test_failed_flushes_are_not_logged_with_words_of_a_write(site: Site) -> None:
    """Writes with FUA that share a failed flush say so, not what failed before."""
    site.fill(site.local, MIB)
    site.create()
    faults = [f"local_write:{n}=error:ENOSPC" for n in range(1, SHARING + 1)]
    site.serve(fault=",".join([*faults, "local_flush:2=error"]))
    site.wait_state("out_of_sync")
    with RawClient(site.socket) as client:
        transmitting(client)
        for flags, error in ((0, errno.ENOSPC), (raw.FLAG_FUA, errno.EIO)):
            for i in range(SHARING):
                wire = client.request(
                    raw.CMD_WRITE, i * MIB, payload=bytes(128 * 1024), flags=flags
                )
                client.send(wire[1])
            for _ in range(SHARING):
                assert client.answer().error == error
    support.wait_until(lambda: len(lines(site)) == 2 * SHARING, "a line for each")
    words = [one for _, _, one in lines(site)]
    assert sum("to write at" in one for one in words) == SHARING
    assert any("failed to flush" in one for one in words)
    stopped = site.cli("stop", str(site.config), timeout_s=20, check=False)
    assert stopped.returncode == 12  # a failed flush is final
