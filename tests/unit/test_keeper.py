# SPDX-License-Identifier: BSD-3-Clause
"""
The keeper against real servers: it connects, checks, copies, and says what it does.

The volume is open in the test's own process and no door is in between, so a test can
look at the engine and at the keeper at the same moment. Servers are killed for real.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Processes, wait_until
from unit.volumes import HOLD_MS, REGION, SIZE, Remote, make_params

from nbd_mirror.rules.state import RemoteState, describe
from nbd_mirror.server.keeper import Keeper, RemotePolicy
from nbd_mirror.server.sample import BUSY_S
from nbd_mirror.volume import core
from nbd_mirror.volume.model import Disk

NR_REGIONS = SIZE // REGION


class Mirror:
    """An open volume with a keeper, and what the keeper logged."""

    def __init__(
        self, params: core.Params, uri: str, engine: type[core.Engine] = core.Engine
    ) -> None:
        self.params = params
        self.uri = uri
        self.log: list[str] = []
        self.engine = engine(params)
        self.engine.start()
        self.keeper: Keeper | None = None

    def keep(
        self,
        *,
        late_window_s: float = 0.0,
        hold_s: float = HOLD_MS / 1000,
        random: Callable[[], float] = lambda: 0.5,
    ) -> Keeper:
        """Start a keeper; its random numbers are all *random*'s."""
        policy = RemotePolicy(
            name="dr",
            uri=self.uri,
            deadline_s=2.0,
            hold_s=hold_s,
            late_window_s=late_window_s,
        )
        self.keeper = Keeper(self.engine, 0, policy, self._note, random=random)
        self.keeper.start()
        return self.keeper

    def _note(self, level: str, text: str) -> None:
        self.log.append(text)
        print(level, text)  # shown if the test fails

    def state(self) -> RemoteState:
        """Ask the engine."""
        return self.engine.remote_status(0).state

    def wait_for(self, state: RemoteState) -> None:
        """Wait until the remote is in *state*."""
        wait_until(lambda: self.state() is state, state.value)

    def reason(self) -> str:
        """Say what status would."""
        assert self.keeper is not None
        return describe(self.keeper.view().facts)[0]

    def close(self) -> None:
        """End the keeper and the volume."""
        if self.keeper is not None:
            self.keeper.end()
            self.engine.wake()
            assert self.keeper.join(15.0)
        self.engine.stop()
        self.engine.close()


@pytest.fixture
def remote(processes: Processes, run_dir: Path) -> Remote:
    """Give the remote, not started."""
    return Remote(processes, run_dir)


@pytest.fixture
def mirror(run_dir: Path, remote: Remote) -> Iterator[Mirror]:
    """Give a new volume, its remote all dirty, without a keeper."""
    params = make_params(run_dir)
    core.create(params)
    mirror = Mirror(params, remote.uri)
    yield mirror
    mirror.close()


@pytest.fixture
def synced(run_dir: Path, remote: Remote) -> Iterator[Mirror]:
    """Give a volume with random data, its remote a copy but not connected."""
    params = make_params(run_dir, assume=True)
    content = os.urandom(SIZE)
    Path(params.local).write_bytes(content)
    remote.image.write_bytes(content)
    core.create(params)
    mirror = Mirror(params, remote.uri)
    yield mirror
    mirror.close()


def same_images(mirror: Mirror, remote: Remote) -> bool:
    """Compare both disks byte for byte."""
    return Path(mirror.params.local).read_bytes() == remote.image.read_bytes()


class TestCatchingUp:
    """From whatever was missed to in_sync."""

    def test_new_remote_is_copied_and_becomes_in_sync(
        self, mirror: Mirror, remote: Remote
    ) -> None:
        """The first resync copies everything, and says when it began and ended."""
        mirror.engine.pwrite(os.urandom(REGION), 5 * REGION)
        remote.start()
        mirror.keep()
        mirror.wait_for(RemoteState.IN_SYNC)
        mirror.engine.flush()
        assert same_images(mirror, remote)
        wait_until(
            lambda: any("resync_done" in line for line in mirror.log), "resync_done"
        )
        assert any("resync_start" in line for line in mirror.log)

    def test_remote_that_is_not_there_is_out_of_sync_with_its_reason(
        self, mirror: Mirror, remote: Remote
    ) -> None:
        """No server at start is a state with a reason; it is tried until one is."""
        keeper = mirror.keep()
        wait_until(lambda: keeper.view().last_error, "an error")
        assert mirror.state() is RemoteState.OUT_OF_SYNC
        assert "No such file" in mirror.reason()
        assert "attempt" in mirror.reason() or "trying" in mirror.reason()
        remote.start()
        mirror.wait_for(RemoteState.IN_SYNC)
        # The engine has it in sync before the keeper's next turn notices.
        wait_until(lambda: not keeper.view().facts.last_error, "the error to go")

    def test_outage_copies_only_what_was_missed(
        self, synced: Mirror, remote: Remote
    ) -> None:
        """Killed, written to, back: only the dirty regions travel."""
        remote.start()
        synced.keep()
        wait_until(lambda: synced.engine.remote_status(0).admitted, "the connection")
        remote.kill()
        for region in (3, 7, 8):
            synced.engine.pwrite(os.urandom(REGION), region * REGION)
        assert synced.state() is RemoteState.OUT_OF_SYNC
        before = synced.engine.remote_status(0).copied_bytes
        remote.start()
        synced.wait_for(RemoteState.IN_SYNC)
        synced.engine.flush()
        assert same_images(synced, remote)
        copied = synced.engine.remote_status(0).copied_bytes - before
        assert copied == 3 * REGION

    def test_outage_shorter_than_the_hold_loses_no_write(
        self, synced: Mirror, remote: Remote
    ) -> None:
        """A write that waits is sent again on the new connection, and answered."""
        remote.start()
        synced.keep()
        wait_until(lambda: synced.engine.remote_status(0).admitted, "the connection")
        remote.kill()
        data = os.urandom(REGION)
        writer = threading.Thread(target=synced.engine.pwrite, args=(data, REGION))
        writer.start()
        remote.start()
        writer.join(10.0)
        assert not writer.is_alive()
        synced.wait_for(RemoteState.IN_SYNC)
        synced.engine.flush()
        assert same_images(synced, remote)


class TestSample:
    """Another disk is noticed before it is written to."""

    def test_other_disk_is_failed_and_not_written_to(
        self, synced: Mirror, remote: Remote, run_dir: Path
    ) -> None:
        """A disk that was not left here: failed, with the region, and unchanged."""
        other = run_dir / "other.img"
        content = os.urandom(SIZE)
        other.write_bytes(content)
        remote.start(image=other)
        synced.engine.pwrite(os.urandom(REGION), 9 * REGION)
        synced.keep()
        synced.wait_for(RemoteState.FAILED)
        assert (
            "not the disk that was left, or local is not: region 0 (offset 0)"
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
        wait_until(lambda: synced.engine.remote_status(0).admitted, "the connection")
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
        synced.engine.reset(0)
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
        synced.engine.invalidate(0)
        synced.wait_for(RemoteState.IN_SYNC)
        synced.engine.flush()
        assert same_images(synced, remote)


class TestBackOff:
    """When the next attempt is made."""

    def test_connection_that_dies_at_once_is_noticed_and_backed_off(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """It was never seen admitted, and still each loss is told and waited out."""

        class Dying(core.Engine):
            def admit(self, disk: Disk) -> None:
                super().admit(disk)
                self.drop(disk, "gone at once")

        params = make_params(run_dir)
        core.create(params)
        mirror = Mirror(params, remote.uri, Dying)
        try:
            remote.start()
            mirror.keep()
            wait_until(lambda: sum("connect: nbd" in x for x in mirror.log) >= 3, "3")
        finally:
            mirror.close()
        events = [x.split()[2] for x in mirror.log if "connect: " in x]
        assert events[:5] == ["connect:", "disconnect:"] * 2 + ["connect:"]

    def test_connection_lost_soon_after_each_sample_is_backed_off(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """In sync for a moment, again and again, is no reason to try at once."""

        class Closing(core.Engine):
            def wait(self, disk: Disk, seen: int, timeout_s: float | None) -> int:
                if self.remote_status(0).admitted:
                    self.drop(disk, "closed")
                return super().wait(disk, seen, timeout_s)

        params = make_params(run_dir, assume=True)
        core.create(params)
        mirror = Mirror(params, remote.uri, Closing)
        try:
            remote.start()
            keeper = mirror.keep()
            wait_until(lambda: keeper.view().facts.retry_s > 0.75, "a wait near 0.8 s")
        finally:
            mirror.close()
        assert 3 <= sum(" connect: " in line for line in mirror.log) <= 5
        assert sum("-> in_sync" in line for line in mirror.log) >= 2

    def test_held_requests_are_tried_for_after_early_losses(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """However long the back-off is by then, the hold does not pass without one."""

        class Flapping(core.Engine):
            drops = 4
            tried_held = 0

            def connect(self, remote: int, uri: str, timeout_s: float) -> None:
                if self.remote_status(remote).state is RemoteState.HOLDING:
                    self.tried_held += 1
                super().connect(remote, uri, timeout_s)

            def wait(self, disk: Disk, seen: int, timeout_s: float | None) -> int:
                if self.drops and self.remote_status(0).admitted:
                    self.drops -= 1
                    self.drop(disk, "closed")
                return super().wait(disk, seen, timeout_s)

        params = make_params(run_dir, assume=True)
        core.create(params)
        mirror = Mirror(params, remote.uri, Flapping)
        engine = mirror.engine
        assert isinstance(engine, Flapping)
        try:
            remote.start()
            mirror.keep()
            wait_until(
                lambda: not engine.drops and engine.remote_status(0).admitted,
                "the connection that is kept",
            )
            before = engine.tried_held
            remote.kill()
            mirror.wait_for(RemoteState.HOLDING)
            mirror.wait_for(RemoteState.OUT_OF_SYNC)
            assert engine.tried_held > before
        finally:
            mirror.close()

    def test_asked_during_an_attempt_tries_again_when_it_fails(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """An operator's resume amid an attempt is not lost to that one's back-off."""
        trying, go_on = threading.Event(), threading.Event()

        class Slow(core.Engine):
            def connect(self, remote: int, uri: str, timeout_s: float) -> None:
                if "nowhere" in uri:
                    trying.set()
                    assert go_on.wait(20)
                super().connect(remote, uri, timeout_s)

        params = make_params(run_dir)
        core.create(params)
        mirror = Mirror(params, "nbd+unix:///?socket=/nowhere", Slow)
        try:
            remote.start()
            keeper = mirror.keep()
            assert trying.wait(20)
            keeper._attempt = 30  # the back-off by now: half a minute
            keeper.retry_now(remote.uri)
            mirror.engine.explain(0, "an operator resumed it")
            go_on.set()
            wait_until(lambda: mirror.state() is RemoteState.IN_SYNC, "in_sync")
        finally:
            go_on.set()
            mirror.close()

    def test_asked_after_a_loss_tries_again_at_once(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """A resume that comes before the keeper sees the loss outdoes the back-off."""
        lost, go_on = threading.Event(), threading.Event()

        class Losing(core.Engine):
            def admit(self, disk: Disk) -> None:
                super().admit(disk)
                if not lost.is_set():
                    self.drop(disk, "lost at once")
                    lost.set()
                    assert go_on.wait(20)

        params = make_params(run_dir)
        core.create(params)
        mirror = Mirror(params, remote.uri, Losing)
        try:
            remote.start()
            keeper = mirror.keep()
            assert lost.wait(20)
            keeper._attempt = 30  # the back-off by now: half a minute
            keeper.retry_now(remote.uri)
            mirror.engine.pause(0, paused=False)
            go_on.set()
            mirror.wait_for(RemoteState.IN_SYNC)
        finally:
            go_on.set()
            mirror.close()
        assert any("disconnect: lost at once" in line for line in mirror.log)

    def test_asked_while_a_difference_is_found_tries_again(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """A resume amid an attempt is not lost to the difference that one finds."""
        failing, go_on = threading.Event(), threading.Event()

        class Failing(core.Engine):
            def fail(self, remote: int, reason: str) -> None:
                failing.set()
                assert go_on.wait(20)
                super().fail(remote, reason)

        params = make_params(run_dir, assume=True)
        core.create(params)
        other = run_dir / "other.img"
        other.write_bytes(os.urandom(SIZE))
        mirror = Mirror(params, remote.uri, Failing)
        try:
            remote.start(image=other)
            keeper = mirror.keep()
            assert failing.wait(20)
            remote.kill()
            remote.start()
            keeper.retry_now(remote.uri)
            mirror.engine.reset(0)
            mirror.engine.pause(0, paused=False)
            go_on.set()
            mirror.wait_for(RemoteState.IN_SYNC)
        finally:
            go_on.set()
            mirror.close()


class TestPolicy:
    """When it acts, and when it does not."""

    def test_pause_holds_copying_until_resumed(
        self, mirror: Mirror, remote: Remote
    ) -> None:
        """Paused: connected, nothing copied; resumed: copied."""
        mirror.engine.pause(0, paused=True)
        remote.start()
        mirror.keep()
        wait_until(lambda: mirror.engine.remote_status(0).admitted, "the connection")
        assert mirror.state() is RemoteState.PAUSED
        assert "paused by an operator; 16.0 MiB wait" in mirror.reason()
        assert mirror.engine.remote_status(0).copied_bytes == 0
        mirror.engine.pause(0, paused=False)
        mirror.wait_for(RemoteState.IN_SYNC)

    def test_remote_that_refuses_every_copy_is_not_hammered(
        self, mirror: Mirror, remote: Remote
    ) -> None:
        """A connect is no progress: the waits go on doubling from one to the next."""
        remote.start(
            "--filter=error", "error-pwrite=ENOSPC", "error-zero=ENOSPC",
            "error-pwrite-rate=100%", "error-zero-rate=100%",
        )  # fmt: skip
        mirror.engine.pwrite(os.urandom(REGION), 0)
        keeper = mirror.keep()
        wait_until(lambda: keeper.view().facts.retry_s > 0.75, "a wait near 0.8 s")
        connects = [line for line in mirror.log if " connect: " in line]
        assert 3 <= len(connects) <= 5
        assert "No space left" in mirror.reason()
        assert mirror.state() is RemoteState.OUT_OF_SYNC

    def test_late_regions_are_copied_after_the_window(
        self, synced: Mirror, remote: Remote
    ) -> None:
        """A write cut off by a crash stays dirty for the window, and says why."""
        remote.start("--filter=delay", "wdelay=60")
        synced.keep(late_window_s=1.5)
        wait_until(lambda: synced.engine.remote_status(0).admitted, "the connection")
        data = os.urandom(REGION)
        writer = threading.Thread(target=synced.engine.pwrite, args=(data, REGION))
        writer.start()
        wait_until(
            lambda: synced.engine.remote_status(0).outstanding == 1, "the write sent"
        )
        remote.kill()
        remote.start()
        synced.wait_for(RemoteState.RESYNCING)
        assert "until then writes of the lost connection" in synced.reason()
        writer.join(10.0)
        assert not writer.is_alive()
        assert synced.engine.remote_status(0).late_regions == 1
        synced.wait_for(RemoteState.IN_SYNC)
        synced.engine.flush()
        assert same_images(synced, remote)

    def test_end_while_waiting_is_immediate(self, synced: Mirror) -> None:
        """A keeper that waits for its next attempt ends at once when told to."""
        keeper = synced.keep(random=lambda: 0.9)
        wait_until(lambda: keeper.view().facts.retry_s > 1.0, "a long wait")
        keeper.end()
        synced.engine.wake()
        assert keeper.join(0.5)

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
    """What compared nothing is no proof."""

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
        params = dataclasses.replace(make_params(run_dir, assume=True), hold_ms=4000)
        core.create(params)
        mirror = Mirror(params, remote.uri)
        yield mirror
        mirror.close()

    def test_requests_hold_every_region_and_the_disk_is_another(
        self, holding_long: Mirror, remote: Remote
    ) -> None:
        """While nothing could be compared it is said, and nothing is written."""
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
        assert not synced.engine.remote_status(0).admitted
        writer.join(10.0)
        assert not writer.is_alive()
        assert synced.engine.comparable(0, 0) is None
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

        params = dataclasses.replace(make_params(run_dir, assume=True), hold_ms=20000)
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
        self, synced: Mirror, remote: Remote
    ) -> None:
        """What no request holds is compared: another disk is found at once."""
        content = os.urandom(SIZE)
        remote.image.write_bytes(content)
        remote.start()
        writer = self.writer(synced, SIZE - 4096, 0)
        synced.keep()
        synced.wait_for(RemoteState.FAILED)
        writer.join(10.0)
        assert not writer.is_alive()
        assert remote.image.read_bytes() == content

    def test_one_clean_region_among_many_is_found(
        self, synced: Mirror, remote: Remote
    ) -> None:
        """Chance does not hit it; it is compared nonetheless."""
        clean = NR_REGIONS // 2 + 1
        with remote.image.open("r+b") as image:
            image.seek(clean * REGION + 100)
            image.write(b"another")
        wait_until(lambda: synced.state() is RemoteState.HOLDING, "the start")
        synced.engine.fail(0, "so that all it misses is dirty")
        synced.engine.reset(0)
        synced.engine.trim(clean * REGION, 0)
        synced.engine.trim(SIZE - (clean + 1) * REGION, (clean + 1) * REGION)
        assert synced.engine.comparable(0, 0) == clean
        assert synced.engine.comparable(0, clean + 1) is None
        remote.start()
        synced.keep(random=lambda: 0.0)
        synced.wait_for(RemoteState.FAILED)
        assert f"region {clean} " in synced.reason()
