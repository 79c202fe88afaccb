# SPDX-License-Identifier: BSD-3-Clause
"""
Every request kind of NBD through each door, judged on both images.

One volume a door serves all of these tests; each uses a MiB of its own. What is
judged is what a client reads and what lies in the two files, not what was returned.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from e2e.conftest import DOORS
from e2e.lib.clients import connect, error_of, nbd
from e2e.lib.disks import small_disk
from e2e.lib.harness import MIB, Site, free_port, shared_site

Sites = Callable[..., Site]

REGION = 64 << 10


@pytest.fixture(scope="module", params=DOORS)
def served(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Give a volume in sync, shared by the tests of this file."""
    with shared_site(request.param, size=24 * MIB, filled=12 * MIB) as site:
        yield site


@pytest.fixture
def handle(served: Site) -> Iterator[Any]:
    """Give a client."""
    handle = served.client()
    yield handle
    handle.shutdown()


def test_write_any_length_is_on_both_disks(served: Site, handle: Any) -> None:
    """A write of a sector, across regions, or of many regions is on both disks."""
    for offset, length in ((MIB, 512), (MIB + REGION - 512, 1024), (2 * MIB, MIB)):
        content = os.urandom(length)
        handle.pwrite(content, offset)
        assert content == handle.pread(length, offset)
        assert content == served.on_both(offset, length)


def test_write_longest_is_taken(served: Site) -> None:
    """A write and a read as long as the size hints allow (the volume) work."""
    handle = served.client()
    content = os.urandom(8 * MIB)
    handle.pwrite(content, 16 * MIB)
    assert content == handle.pread(8 * MIB, 16 * MIB)
    assert content == served.on_both(16 * MIB, 8 * MIB)
    handle.shutdown()


def test_write_fua_leaves_nothing_unflushed(served: Site, handle: Any) -> None:
    """A write with FUA is durable on both: no region is unflushed after it."""
    handle.flush()
    content = os.urandom(4096)
    handle.pwrite(content, 4 * MIB, nbd.CMD_FLAG_FUA)
    assert content == served.on_both(4 * MIB, 4096)
    assert served.remote()["unflushed_bytes"] == 0


def test_flush_on_another_connection_covers_all(served: Site, handle: Any) -> None:
    """What multi-conn promises: a flush covers what other connections wrote."""
    assert handle.can_multi_conn()
    handle.pwrite(os.urandom(4096), 4 * MIB)
    other = served.client()
    other.flush()
    assert served.remote()["unflushed_bytes"] == 0
    other.shutdown()


def test_flags_all_are_advertised(handle: Any) -> None:
    """The flags offer a client everything that the doors can do."""
    assert handle.can_flush()
    assert handle.can_fua()
    assert handle.can_trim()
    assert handle.can_zero()
    assert handle.can_fast_zero()
    assert handle.can_cache()
    assert handle.can_meta_context("base:allocation")
    assert not handle.is_read_only()
    assert not handle.is_rotational()


def test_trim_reads_zero_on_both_disks(served: Site, handle: Any) -> None:
    """After a trim both disks read zeroes, and the bytes beside it are kept."""
    before = served.on_both(5 * MIB, MIB)
    handle.trim(3 * REGION + 512, 5 * MIB + REGION - 512)
    after = served.on_both(5 * MIB, MIB)
    assert after[REGION - 512 : 4 * REGION] == bytes(3 * REGION + 512)
    assert after[: REGION - 512] == before[: REGION - 512]
    assert after[4 * REGION :] == before[4 * REGION :]


@pytest.mark.parametrize("no_hole", [False, True])
def test_zero_reads_zero_on_both_disks(
    served: Site, handle: Any, *, no_hole: bool
) -> None:
    """Write zeroes, whether it may trim or not, leaves zeroes on both disks."""
    offset = (6 + no_hole) * MIB
    before = served.on_both(offset, MIB)
    handle.zero(2 * REGION, offset + 512, nbd.CMD_FLAG_NO_HOLE if no_hole else 0)
    after = served.on_both(offset, MIB)
    assert after == before[:512] + bytes(2 * REGION) + before[2 * REGION + 512 :]


def test_zero_no_hole_allocates_local(served: Site, handle: Any) -> None:
    """Zeroes that may not trim keep their space in the local image."""
    handle.trim(MIB, 8 * MIB)
    trimmed = served.local.stat().st_blocks
    handle.zero(MIB, 8 * MIB, nbd.CMD_FLAG_NO_HOLE)
    assert served.local.stat().st_blocks >= trimmed + MIB // 512


def test_zero_fast_is_done_or_refused_unchanged(served: Site, handle: Any) -> None:
    """A fast zero is carried out whole, or refused with nothing changed."""
    before = served.on_both(9 * MIB, MIB)
    refused = 0
    try:
        handle.zero(MIB, 9 * MIB, nbd.CMD_FLAG_FAST_ZERO)
    except nbd.Error as error:
        refused = error.errnum
    assert refused in (0, errno.EOPNOTSUPP)
    assert served.on_both(9 * MIB, MIB) == (before if refused else bytes(MIB))


def test_zero_fast_slow_remote_is_refused_unchanged(new_site: Sites, door: str) -> None:
    """A remote that knows no zeroing makes fast zero fail, before a byte changed."""
    site = new_site(remotes=["nbd-server"], size=4 * MIB)
    site.fill(site.local, 4 * MIB)
    site.bring_up(door)
    before = site.local.read_bytes()
    handle = site.client()
    assert errno.EOPNOTSUPP == error_of(handle.zero, MIB, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert before == site.local.read_bytes()
    handle.zero(MIB, 0)
    handle.trim(MIB, 2 * MIB)
    handle.shutdown()
    site.stop()
    expected = bytes(MIB) + before[MIB : 2 * MIB] + bytes(MIB) + before[3 * MIB :]
    assert expected == site.local.read_bytes()
    site.assert_equal()


def test_block_status_local_holes_are_told(served: Site, handle: Any) -> None:
    """Holes of the local image are holes for clients, data is data, in order."""
    handle.trim(MIB, 10 * MIB)
    handle.pwrite(b"x" * REGION, 10 * MIB + 4 * REGION)
    runs: list[int] = []
    handle.block_status(2 * MIB, 10 * MIB, lambda _c, _o, found, _e: runs.extend(found))
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    told = list(zip(runs[::2], runs[1::2], strict=True))
    assert told[:3] == [
        (4 * REGION, hole),
        (REGION, 0),
        (11 * REGION, hole),
    ]


def test_block_status_req_one_gives_one_run(handle: Any) -> None:
    """A client that asks for one run gets one."""
    runs: list[int] = []
    handle.block_status(
        4 * MIB, 0, lambda _c, _o, found, _e: runs.extend(found), nbd.CMD_FLAG_REQ_ONE
    )
    assert len(runs) == 2


def test_cache_is_taken(handle: Any) -> None:
    """A cache request is answered."""
    handle.cache(MIB, 0)


def test_block_size_hints_are_told(served: Site) -> None:
    """A client (nbdinfo) sees 512, 4096 and 64 MiB, and multi-conn."""
    done = served.processes.run(["nbdinfo", "--json", served.uri])
    export = json.loads(done.stdout)["exports"][0]
    assert export["export-size"] == served.size
    assert export["block_size_minimum"] == 512
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 64 * MIB
    assert export["can_multi_conn"] is True


@pytest.mark.parametrize(
    ("offset", "length"),
    [(24 * MIB, 512), (24 * MIB, 1), (24 * MIB - 512, 1024), (24 * MIB - 1, 2)],
)
def test_request_outside_gets_einval(served: Site, offset: int, length: int) -> None:
    """What is not in the volume is refused, and changes nothing."""
    handle = served.client(strict=False)
    before = served.on_both(0, 24 * MIB)
    refused = {errno.EINVAL, errno.ENOSPC}  # NBD asks for the latter on a write
    assert error_of(handle.pread, length, offset) in refused
    assert error_of(handle.pwrite, b"x" * length, offset) in refused
    assert error_of(handle.zero, length, offset) in refused
    assert error_of(handle.trim, length, offset) in refused
    assert before == served.on_both(0, 24 * MIB)
    assert len(handle.pread(512, 0)) == 512, "the connection goes on"
    handle.shutdown()


@pytest.mark.parametrize(
    ("offset", "length"), [(1, 1), (1, 512), (512, 511), (700, 70_000), (511, MIB + 2)]
)
def test_request_of_any_bytes_is_served(served: Site, offset: int, length: int) -> None:
    """Ranges that are no sectors are read, written, zeroed and trimmed exactly."""
    handle = served.client(strict=False)
    at = 14 * MIB + offset
    handle.pwrite(b"\xee" * (2 * MIB), 14 * MIB)
    content = os.urandom(length)
    handle.pwrite(content, at)
    whole = b"\xee" * offset + content + b"\xee" * (2 * MIB - offset - length)
    assert content == handle.pread(length, at)
    assert whole == served.on_both(14 * MIB, 2 * MIB)
    handle.zero(length // 2 + 1, at)
    if length > 1:
        handle.trim(length // 2, at + length - length // 2)
    gone = b"\xee" * offset + bytes(length)
    assert gone + whole[offset + length :] == served.on_both(14 * MIB, 2 * MIB)
    runs: list[int] = []
    handle.block_status(length, at, lambda _c, _o, found, _e: runs.extend(found))
    assert 0 < sum(runs[::2]) <= length
    handle.cache(length, at)
    handle.shutdown()


def test_requests_many_at_once_overlapping_end_equal(served: Site) -> None:
    """Overlapping writes in flight together leave the same bytes on both disks."""
    job = served.folder / "overlap.fio"
    job.write_text(
        f"[global]\nioengine=nbd\nuri={served.uri}\nrw=randwrite\nbs=512-128k\n"
        "bsrange=512-131072\nbs_unaligned=0\nblocksize_range=512-131072\n"
        "iodepth=16\nsize=1m\noffset=12m\nnumber_ios=1500\nnorandommap=1\n"
        "[one]\n[two]\n"
    )
    served.processes.run(["fio", f"--output={served.folder}/fio.out", job])
    served.client().flush()
    served.on_both(12 * MIB, MIB)


def test_image_copied_in_and_out_is_the_same(served: Site) -> None:
    """A whole image through the volume, in and out with nbdcopy, is the same."""
    image, out = served.folder / "in.img", served.folder / "out.img"
    with image.open("wb") as file:
        file.truncate(served.size)
    served.fill(image, 5 * MIB, offset=2 * MIB)
    served.processes.run(["nbdcopy", "--flush", str(image), served.uri])
    served.processes.run(["nbdcopy", served.uri, str(out)])
    assert image.read_bytes() == out.read_bytes() == served.local.read_bytes()
    served.assert_equal()


def test_volume_over_4gib_far_offsets_are_mirrored(new_site: Sites, door: str) -> None:
    """Offsets past 4 GiB arrive at the same place on both disks."""
    size = 5 << 30
    site = new_site(size=size)
    site.bring_up(door)
    handle = site.client()
    assert handle.get_size() == size
    far = (4 << 30) + 12 * MIB
    for offset in (far, (4 << 30) - 512, size - 1024):
        content = os.urandom(1024)
        handle.pwrite(content, offset)
        assert content == handle.pread(1024, offset)
        assert content == site.on_both(offset, 1024)
    handle.trim(4096, far + 4096)
    handle.zero(512, far)
    assert bytes(512) == site.on_both(far, 512)
    site.dr.kill()
    handle.pwrite(os.urandom(512), far)
    handle.shutdown()
    site.wait_state("out_of_sync")
    assert site.remote()["dirty_bytes"] >= site.region_size
    site.dr.start()
    site.wait_in_sync()
    site.stop()
    site.on_both(far, 1024)


@pytest.mark.parametrize("odd", [512, 4096, 1])
def test_volume_odd_size_last_bytes_are_mirrored(
    new_site: Sites, door: str, odd: int
) -> None:
    """A size that is no multiple of the region, nor even of a sector, works."""
    size = 2 * MIB + odd
    site = new_site(size=size)
    site.fill(site.local, size)
    site.bring_up(door)
    site.assert_equal()
    handle = site.client()
    assert handle.get_size() == size
    content = os.urandom(odd)
    handle.pwrite(content, size - odd)
    assert content == site.on_both(size - odd, odd)
    assert handle.get_block_size(nbd.SIZE_MINIMUM) == (1 if odd == 1 else 512)
    handle.trim(odd, size - odd)
    handle.shutdown()
    site.stop()
    assert bytes(odd) == site.on_both(size - odd, odd)
    assert size == site.local.stat().st_size
    site.assert_equal()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_local_error_reaches_client_as_eio(
    new_site: Sites, door: str, kind: str
) -> None:
    """With no remote to take its place, local's error is the client's EIO."""
    site = new_site(size=4 * MIB)
    site.fill(site.local, 4 * MIB)
    site.bring_up(door)
    site.stop()
    # The sample reads local too: let the fault hit the client's request alone.
    point = "local_write:1" if kind == "write" else "local_read"
    site.dr.kill()
    site.serve(door, fault=f"{point}=error")
    site.wait_state("out_of_sync")
    handle = site.client()
    if kind == "read":
        assert errno.EIO == error_of(handle.pread, 512, 0)
        return
    assert errno.EIO == error_of(handle.pwrite, b"x" * 4096, MIB)
    assert site.status()["local"]["errors"] == 1
    # No remote could take its place, so it stays what it was.
    assert site.status()["local"]["state"] == "ok"
    handle.pwrite(b"y" * 4096, MIB)
    handle.shutdown()
    site.dr.start()
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


def test_local_error_in_sync_range_is_copied_again(new_site: Sites) -> None:
    """Under policy stop an error leaves both disks equal: local is copied again."""
    site = new_site(policy="stop")
    site.bring_up()
    site.stop()
    site.serve(fault="local_write:3=error")
    site.wait_in_sync()
    handle = site.client()
    handle.pwrite(b"a" * MIB, 0)
    handle.pwrite(b"b" * MIB, 4 * MIB)
    assert errno.EIO == error_of(handle.pwrite, b"c" * MIB, 8 * MIB)
    handle.shutdown()
    site.wait_in_sync()
    assert "resync" in site.log
    site.stop()
    site.assert_equal()


def test_local_full_reaches_client_as_enospc(site: Site) -> None:
    """Without a remote, an image that cannot grow is ENOSPC; both end up equal."""
    small_disk(site, 2)
    site.bring_up()
    site.dr.kill()
    site.wait_state("out_of_sync")
    handle = site.client()
    handle.pwrite(b"a" * MIB, 0)
    assert errno.ENOSPC == error_of(handle.pwrite, b"b" * 2 * MIB, 4 * MIB)
    assert b"a" * MIB == handle.pread(MIB, 0)
    handle.shutdown()
    site.dr.start()
    site.tell("resume")
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


def test_tcp_listen_serves(new_site: Sites, door: str) -> None:
    """A volume is served over TCP as well."""
    port = free_port()
    site = new_site(size=MIB, listen=f"tcp:127.0.0.1:{port}")
    site.bring_up(door)
    handle = connect(f"nbd://127.0.0.1:{port}")
    handle.pwrite(b"t" * 512, 0)
    handle.shutdown()
    site.stop()
    site.assert_equal()
