# SPDX-License-Identifier: BSD-3-Clause
"""
The keeper against real servers: it connects, copies, and says what it does.

The volume is open in the test's own process and no door is in between, so a test can
look at the engine and at the keeper at the same moment. Servers are killed for real.
"""

from __future__ import annotations

import os
import threading

from support import wait_until
from unit.volumes import DR, REGION, Mirror, Remote, same_images

from nbd_mirror.rules.state import RemoteState


class TestCatchingUp:
    """A remote that missed something becomes in_sync."""

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
        wait_until(lambda: synced.engine.remote_status(DR).admitted, "the connection")
        remote.kill()
        for region in (3, 7, 8):
            synced.engine.pwrite(os.urandom(REGION), region * REGION)
        assert synced.state() is RemoteState.OUT_OF_SYNC
        before = synced.engine.remote_status(DR).copied_bytes
        remote.start()
        synced.wait_for(RemoteState.IN_SYNC)
        synced.engine.flush()
        assert same_images(synced, remote)
        copied = synced.engine.remote_status(DR).copied_bytes - before
        assert copied == 3 * REGION

    def test_outage_shorter_than_the_hold_loses_no_write(
        self, synced: Mirror, remote: Remote
    ) -> None:
        """A write that waits is sent again on the new connection, and answered."""
        remote.start()
        synced.keep()
        wait_until(lambda: synced.engine.remote_status(DR).admitted, "the connection")
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


class TestPolicy:
    """When it acts, and when it does not."""

    def test_pause_holds_copying_until_resumed(
        self, mirror: Mirror, remote: Remote
    ) -> None:
        """Paused: connected, nothing copied; resumed: copied."""
        mirror.engine.pause(DR, paused=True)
        remote.start()
        mirror.keep()
        wait_until(lambda: mirror.engine.remote_status(DR).admitted, "the connection")
        assert mirror.state() is RemoteState.PAUSED
        assert "paused by an operator; 16.0 MiB wait" in mirror.reason()
        assert mirror.engine.remote_status(DR).copied_bytes == 0
        mirror.engine.pause(DR, paused=False)
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
        wait_until(lambda: synced.engine.remote_status(DR).admitted, "the connection")
        data = os.urandom(REGION)
        writer = threading.Thread(target=synced.engine.pwrite, args=(data, REGION))
        writer.start()
        wait_until(
            lambda: synced.engine.remote_status(DR).outstanding == 1, "the write sent"
        )
        remote.kill()
        remote.start()
        synced.wait_for(RemoteState.RESYNCING)
        assert "until then writes of the lost connection" in synced.reason()
        writer.join(10.0)
        assert not writer.is_alive()
        assert synced.engine.remote_status(DR).late_regions == 1
        synced.wait_for(RemoteState.IN_SYNC)
        synced.engine.flush()
        assert same_images(synced, remote)

    def test_end_while_waiting_is_immediate(self, synced: Mirror) -> None:
        """A keeper that waits for its next attempt ends at once when asked to."""
        keeper = synced.keep(random=lambda: 0.9)
        wait_until(lambda: keeper.view().facts.retry_s > 1.0, "a long wait")
        keeper.end()
        synced.engine.wake()
        assert keeper.join(0.5)
