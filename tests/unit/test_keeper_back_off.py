# SPDX-License-Identifier: BSD-3-Clause
"""When the keeper makes its next attempt: after losses, and when it is asked."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from support import wait_until
from unit.volumes import DR, SIZE, Remote, make_params, mirrored

from nbd_mirror.rules.state import RemoteState
from nbd_mirror.volume import core
from nbd_mirror.volume.model import Disk


@contextlib.contextmanager
def set_at_end(event: threading.Event) -> Iterator[None]:
    """Set the event at the end, so that no thread waits for it any more."""
    try:
        yield
    finally:
        event.set()


class TestBackOff:
    """When the next attempt is made."""

    def test_connection_that_dies_at_once_is_noticed_and_backed_off(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """
        The keeper never saw it admitted, but still reports each loss, and waits after
        it.
        """

        class Dying(core.Engine):
            def admit(self, disk: Disk) -> None:
                super().admit(disk)
                self.drop(disk, "gone at once")

        with mirrored(make_params(run_dir), remote.uri, Dying) as mirror:
            remote.start()
            mirror.keep()
            wait_until(lambda: sum("connect: nbd" in x for x in mirror.log) >= 3, "3")
        events = [x.split()[2] for x in mirror.log if "connect: " in x]
        assert events[:5] == ["connect:", "disconnect:"] * 2 + ["connect:"]

    def test_connection_lost_soon_after_each_sample_is_backed_off(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """A remote that is in sync only for moments is not tried at once."""

        class Closing(core.Engine):
            def wait(self, disk: Disk, seen: int, timeout_s: float | None) -> int:
                if self.remote_status(DR).admitted:
                    self.drop(disk, "closed")
                return super().wait(disk, seen, timeout_s)

        params = make_params(run_dir, assume=True)
        with mirrored(params, remote.uri, Closing) as mirror:
            remote.start()
            keeper = mirror.keep()
            wait_until(lambda: keeper.view().facts.retry_s > 0.75, "a wait near 0.8 s")
        assert 3 <= sum(" connect: " in line for line in mirror.log) <= 5
        assert sum("-> in_sync" in line for line in mirror.log) >= 2

    def test_held_requests_are_tried_for_after_early_losses(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """The keeper tries within the hold, however long the back-off has become."""

        class Flapping(core.Engine):
            drops = 4
            tried_held = 0

            def connect(self, disk: Disk, uri: str, timeout_s: float) -> None:
                if self.remote_status(disk).state is RemoteState.HOLDING:
                    self.tried_held += 1
                super().connect(disk, uri, timeout_s)

            def wait(self, disk: Disk, seen: int, timeout_s: float | None) -> int:
                if self.drops and self.remote_status(DR).admitted:
                    self.drops -= 1
                    self.drop(disk, "closed")
                return super().wait(disk, seen, timeout_s)

        params = make_params(run_dir, assume=True)
        with mirrored(params, remote.uri, Flapping) as mirror:
            engine = mirror.engine
            assert isinstance(engine, Flapping)
            remote.start()
            mirror.keep()
            wait_until(
                lambda: not engine.drops and engine.remote_status(DR).admitted,
                "the connection that is kept",
            )
            before = engine.tried_held
            remote.kill()
            mirror.wait_for(RemoteState.HOLDING)
            mirror.wait_for(RemoteState.OUT_OF_SYNC)
            assert engine.tried_held > before

    def test_asked_during_an_attempt_tries_again_when_it_fails(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """An operator's resume during an attempt counts, even if that attempt fails."""
        trying, go_on = threading.Event(), threading.Event()

        class Slow(core.Engine):
            def connect(self, disk: Disk, uri: str, timeout_s: float) -> None:
                if "nowhere" in uri:
                    trying.set()
                    assert go_on.wait(20)
                super().connect(disk, uri, timeout_s)

        nowhere = "nbd+unix:///?socket=/nowhere"
        with mirrored(make_params(run_dir), nowhere, Slow) as mirror, set_at_end(go_on):
            remote.start()
            keeper = mirror.keep()
            assert trying.wait(20)
            keeper._attempt = 30  # the back-off by now: half a minute
            keeper.retry_now(remote.uri)
            mirror.engine.explain(DR, "an operator resumed it")
            go_on.set()
            mirror.wait_for(RemoteState.IN_SYNC)

    def test_asked_after_a_loss_tries_again_at_once(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """A resume before the keeper notices the loss overrides the back-off."""
        lost, go_on = threading.Event(), threading.Event()

        class Losing(core.Engine):
            def admit(self, disk: Disk) -> None:
                super().admit(disk)
                if not lost.is_set():
                    self.drop(disk, "lost at once")
                    lost.set()
                    assert go_on.wait(20)

        params = make_params(run_dir)
        with mirrored(params, remote.uri, Losing) as mirror, set_at_end(go_on):
            remote.start()
            keeper = mirror.keep()
            assert lost.wait(20)
            keeper._attempt = 30  # the back-off by now: half a minute
            keeper.retry_now(remote.uri)
            mirror.engine.pause(DR, paused=False)
            go_on.set()
            mirror.wait_for(RemoteState.IN_SYNC)
        assert any("disconnect: lost at once" in line for line in mirror.log)

    def test_asked_while_a_difference_is_found_tries_again(
        self, run_dir: Path, remote: Remote
    ) -> None:
        """A resume during an attempt counts, even if it finds a difference."""
        failing, go_on = threading.Event(), threading.Event()

        class Failing(core.Engine):
            def fail(self, disk: Disk, reason: str) -> None:
                failing.set()
                assert go_on.wait(20)
                super().fail(disk, reason)

        params = make_params(run_dir, assume=True)
        other = run_dir / "other.img"
        other.write_bytes(os.urandom(SIZE))
        with mirrored(params, remote.uri, Failing) as mirror, set_at_end(go_on):
            remote.start(image=other)
            keeper = mirror.keep()
            assert failing.wait(20)
            remote.kill()
            remote.start()
            keeper.retry_now(remote.uri)
            mirror.engine.reset(DR)
            mirror.engine.pause(DR, paused=False)
            go_on.set()
            mirror.wait_for(RemoteState.IN_SYNC)
