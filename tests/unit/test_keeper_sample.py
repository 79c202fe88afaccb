# SPDX-License-Identifier: BSD-3-Clause
"""
The keeper compares a remote's disk before it uses it, and a comparison of nothing is no
proof.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import wait_until
from unit.volumes import (
    DR,
    REGION,
    SIZE,
    Mirror,
    Remote,
    make_params,
    mirrored,
    same_images,
)

from nbd_mirror.rules.state import RemoteState
from nbd_mirror.server.sample import BUSY_S
from nbd_mirror.volume import core
from nbd_mirror.volume.model import Disk

NR_REGIONS = SIZE // REGION


class TestSample:
    """Another disk is noticed before it is written to."""

    def test_other_disk_is_failed_and_not_written_to(
        self, synced: Mirror, remote: Remote, run_dir: Path
    ) -> None:
        """Another disk is failed, with the region as reason, and is unchanged."""
        other = run_dir / "other.img"
        content = os.urandom(SIZE)
        other.write_bytes(content)
        remote.start(image=other)
        synced.engine.pwrite(os.urandom(REGION), 9 * REGION)
        synced.keep()
        synced.wait_for(RemoteState.FAILED)
        assert (
            "not the same disk as before, or local is not: region 0 (offset 0)"
            in synced.reason()
        )
        synced.engine.pwrite(os.urandom(REGION), 0)
        synced.engine.flush()
        remote.kill()
        assert content == other.read_bytes()

    def test_old_copy_is_caught_by_what_was_written_last(
        self, synced: Mirror, remote: Remote, run_dir: Path
    ) -> None:
        """A backup that differs only where clients wrote last is not trusted."""
        backup = run_dir / "backup.img"
        backup.write_bytes(remote.image.read_bytes())
        remote.start()
        keeper = synced.keep(random=lambda: 0.0)
        wait_until(lambda: synced.engine.remote_status(DR).admitted, "the connection")
        synced.engine.pwrite(os.urandom(REGION), 8 << 20)
        synced.engine.flush()
        remote.kill()
        remote.start(image=backup)
        synced.wait_for(RemoteState.FAILED)
        assert f"offset {8 << 20}" in synced.reason()
        assert backup.read_bytes() != Path(synced.params.local).read_bytes()
        # The right disk again, and the operator says so.
        remote.kill()
        remote.start()
        keeper.retry_now(remote.uri)
        synced.engine.reset(DR)
        synced.wait_for(RemoteState.IN_SYNC)
        assert same_images(synced, remote)

    def test_other_disk_once_invalidated_is_overwritten(
        self, synced: Mirror, remote: Remote
    ) -> None:
        """The operator wants it: everything is copied to it."""
        remote.image.write_bytes(os.urandom(SIZE))
        remote.start()
        keeper = synced.keep()
        synced.wait_for(RemoteState.FAILED)
        keeper.retry_now(remote.uri)
        synced.engine.invalidate(DR)
        synced.wait_for(RemoteState.IN_SYNC)
        synced.engine.flush()
        assert same_images(synced, remote)

    def test_first_region_and_last_region_are_always_compared(
        self, synced: Mirror, remote: Remote
    ) -> None:
        """One byte differs in the last region: noticed."""
        with remote.image.open("r+b") as image:
            image.seek(SIZE - 1)
            byte = image.read(1)
            image.seek(SIZE - 1)
            image.write(bytes([byte[0] ^ 1]))
        remote.start()
        synced.keep()
        synced.wait_for(RemoteState.FAILED)
        assert f"region {NR_REGIONS - 1} " in synced.reason()


class TestProof:
    """A sample that compared nothing is no proof."""

    def writer(self, synced: Mirror, count: int, offset: int) -> threading.Thread:
        """Begin a write, which waits for the remote as long as the hold lasts."""
        thread = threading.Thread(
            target=synced.engine.pwrite, args=(os.urandom(count), offset)
        )
        thread.start()
        wait_until(lambda: synced.engine.status().inflight > 0, "the write under way")
        return thread

    @pytest.fixture
    def holding_long(self, run_dir: Path, remote: Remote) -> Iterator[Mirror]:
        """Give `synced` with a hold that a busy machine does not outlast."""
        params = make_params(run_dir, assume=True, hold_ms=4000)
        with mirrored(params, remote.uri) as mirror:
            yield mirror

    def test_requests_hold_every_region_and_the_disk_is_another(
        self, holding_long: Mirror, remote: Remote
    ) -> None:
        """While nothing can be compared the log says so, and nothing is written."""
        synced = holding_long
        content = os.urandom(SIZE)
        remote.image.write_bytes(content)
        remote.start()
        writer = self.writer(synced, SIZE, 0)
        keeper = synced.keep()
        wait_until(lambda: "requests hold every region" in "".join(synced.log), "said")
        # After the hold every region is dirty, and with nothing to compare it copies.
        keeper.end()
        synced.engine.wake()
        assert keeper.join(15.0)
        assert not synced.engine.remote_status(DR).admitted
        writer.join(10.0)
        assert not writer.is_alive()
        assert synced.engine.comparable(DR, 0) is None
        assert remote.image.read_bytes() == content

    def test_stop_ends_a_sample_that_finds_every_region_held(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """Once woken the engine waits no more, and the sample does not spin on."""
        sampling = threading.Event()

        class Telling(core.Engine):
            def wait(self, disk: Disk, seen: int, timeout_s: float | None) -> int:
                if timeout_s == BUSY_S:
                    sampling.set()
                return super().wait(disk, seen, timeout_s)

        params = make_params(run_dir, assume=True, hold_ms=20000)
        core.create(params)
        mirror = Mirror(params, remote.uri, Telling)
        remote.start()
        writer = self.writer(mirror, SIZE, 0)
        keeper = mirror.keep(hold_s=20.0)
        try:
            assert sampling.wait(20)
            keeper.end()
            mirror.engine.wake()
            assert keeper.join(1.0)
        finally:
            mirror.close()
            writer.join(10.0)
        assert not writer.is_alive()

    def test_requests_hold_a_part_of_each_region(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """The bytes that no request holds are compared: another disk is found."""
        content = os.urandom(SIZE)
        params = make_params(run_dir, assume=True, hold_ms=20000)
        remote.image.write_bytes(content)
        Path(params.local).write_bytes(os.urandom(SIZE))
        with mirrored(params, remote.uri) as mirror:
            remote.start()
            writer = self.writer(mirror, SIZE - 4096, 0)
            mirror.keep(hold_s=20.0)
            mirror.wait_for(RemoteState.FAILED)
            writer.join(10.0)
            assert not writer.is_alive()
            assert remote.image.read_bytes() == content

    def test_one_clean_region_among_many_is_found(
        self, synced: Mirror, remote: Remote
    ) -> None:
        """The random choice does not hit it, and it is compared all the same."""
        clean = NR_REGIONS // 2 + 1
        with remote.image.open("r+b") as image:
            image.seek(clean * REGION + 100)
            image.write(b"another")
        wait_until(lambda: synced.state() is RemoteState.HOLDING, "the start")
        synced.engine.fail(DR, "so that all it misses is dirty")
        synced.engine.reset(DR)
        synced.engine.trim(clean * REGION, 0)
        synced.engine.trim(SIZE - (clean + 1) * REGION, (clean + 1) * REGION)
        assert synced.engine.comparable(DR, 0) == clean
        assert synced.engine.comparable(DR, clean + 1) is None
        remote.start()
        synced.keep(random=lambda: 0.0)
        synced.wait_for(RemoteState.FAILED)
        assert f"region {clean} " in synced.reason()
