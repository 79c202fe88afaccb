# SPDX-License-Identifier: BSD-3-Clause
"""
The keeper: the thread that keeps one remote connected and brings it up to date.

It reads the facts, asks `state.next_step` what to do, does it, and begins again. All
waiting is done in the engine's `wait_event`, without the GIL, which ends at any change
of the remote: so operator commands go straight to the engine and need no queue here.
The keeper is the only one that connects, compares, admits and copies.
"""

from __future__ import annotations

import functools
import random as _random
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .copier import Copier, Copying
from .errors import MirrorError
from .model import RemoteStatus
from .resync import Progress
from .sample import take_sample
from .state import (
    Action,
    Facts,
    RemoteState,
    Step,
    backoff_s,
    describe,
    hold_retry_s,
    next_step,
)

if TYPE_CHECKING:
    from .core import Engine

__all__ = ["Keeper", "Log", "RemotePolicy", "View"]

# Called with a level ("info", "warning", "error") and a line.
Log = Callable[[str, str], None]

SAMPLE_S = 5.0  # for the sample, but no longer than requests are held
MIN_CONNECT_S = 0.2
STEADY_S = 1.0  # a connection lost sooner than this is not retried at once

_LEVELS = {
    RemoteState.IN_SYNC: "info",
    RemoteState.RESYNCING: "info",
    RemoteState.PAUSED: "info",
    RemoteState.HOLDING: "warning",
    RemoteState.OUT_OF_SYNC: "warning",
    RemoteState.FAILED: "error",
}


@dataclass(frozen=True, slots=True)
class RemotePolicy:
    """What the configuration says of a remote, as far as its keeper is concerned."""

    name: str
    uri: str
    deadline_s: float
    hold_s: float
    late_window_s: float


@dataclass(frozen=True, slots=True)
class View:
    """A remote at one moment, for status."""

    facts: Facts
    status: RemoteStatus
    uri: str
    progress: Progress | None
    last_error: str


class Keeper:
    """
    Keeps the remote of index *remote*.

    Args:
        clock: gives seconds, monotonic.
        random: gives numbers in [0, 1).
    """

    def __init__(
        self,
        engine: Engine,
        remote: int,
        policy: RemotePolicy,
        log: Log,
        *,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self._engine = engine
        self._remote = remote
        self._policy = policy
        self._log = log
        self._clock = clock
        self._random = random
        self._ending = False
        self._thread = threading.Thread(
            target=self._run, name=f"keeper {policy.name}", daemon=True
        )
        # Only the thread uses these.
        self._seen: RemoteStatus | None = None  # at the last turn
        self._attempt = 0  # failed ones since the last progress
        self._admitted_at = 0.0
        self._progressed = False  # on this connection
        self._explained = ""
        self._copier: Copier | None = None
        # The lock guards what status reads beside the thread.
        self._lock = threading.Lock()
        self._uri = policy.uri
        self._retry_at = clock()
        self._late_until = 0.0
        self._error = ""  # why it does not work now
        self._last_error = ""  # the last one ever
        self._connecting = False
        self._asked = False  # to try at once, since the attempt under way began
        self._in_use = False  # admitted, and not noticed lost since
        self._progress: Progress | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Tell the thread to end; the caller also calls `Engine.wake`."""
        self._ending = True

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; says whether it did."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def retry_now(self, uri: str) -> None:
        """Try *uri* at once; the caller makes the engine wake the thread."""
        with self._lock:
            self._uri = uri
        self.forget_error()

    def forget_error(self) -> None:
        """Try at once, and give no old reason; the caller wakes the thread."""
        with self._lock:
            self._retry_at = self._clock()
            self._error = ""
            self._asked = True

    def view(self) -> View:
        """Report the remote as it is now. Does not block on I/O."""
        status = self._engine.remote_status(self._remote)
        with self._lock:
            facts = self._facts(status)
            last_error = self._last_error or self._error
            return View(facts, status, self._uri, self._progress, last_error)

    # --- the loop ---

    def _run(self) -> None:
        while not self._ending:
            try:
                status = self._engine.remote_status(self._remote)
                self._observe(status)
                with self._lock:
                    facts = self._facts(status)
                self._act(next_step(facts), status)
            except MirrorError as error:
                self._recover(str(error))
            except Exception as error:
                # A bug here must neither end the keeper nor be silent.
                self._log("error", f"{self._name}: {traceback.format_exc()}")
                self._recover(f"internal error: {error!r}")

    def _recover(self, words: str) -> None:
        """Wait out a failure that no step of its own deals with."""
        self._note_failure(words)
        wait_s = max(self._retry_at - self._clock(), 0.0)
        serial = self._engine.remote_status(self._remote).serial
        self._engine.wait_event(self._remote, serial, wait_s)

    def _act(self, step: Step, status: RemoteStatus) -> None:
        if step.action is Action.CONNECT:
            self._connect(status)
        elif step.action is Action.RELEASE_LATE:
            self._engine.release_late(self._remote)
        elif step.action is Action.RESYNC:
            self._resync()
            return
        else:
            self._engine.wait_event(self._remote, status.serial, step.wait_s)
        # What was waited for knowingly is no stall.
        with self._lock:
            if self._progress is not None and not self._error:
                self._progress.waited(self._clock())

    @property
    def _name(self) -> str:
        return f"remote {self._policy.name}"

    def _facts(self, status: RemoteStatus) -> Facts:
        """Put together what is known; the lock is held."""
        now = self._clock()
        volume = self._engine.status()
        region_size = volume.region_size
        dirty = min(status.dirty_regions * region_size, volume.size)
        stalled_s = 0.0
        if self._progress is not None:
            self._progress.update(now, dirty, status.copied_bytes)
            stalled_s = self._progress.stalled_s(now)
        return Facts(
            name=status.name,
            state=status.state,
            paused=status.paused,
            assumed=status.assumed,
            admitted=status.admitted,
            dirty_bytes=dirty,
            late_bytes=min(status.late_regions * region_size, volume.size),
            outstanding=status.outstanding,
            reason=status.reason,
            last_error=self._error,
            connecting=self._connecting,
            retry_s=max(self._retry_at - now, 0.0),
            late_s=max(self._late_until - now, 0.0),
            stalled_s=stalled_s,
            volume_failed=volume.failed,
        )

    # --- what changed ---

    def _observe(self, status: RemoteStatus) -> None:
        """Take notice of what changed since the last turn, and say so."""
        seen, self._seen = self._seen, status
        # Not by what was seen last: it may have come and gone in between.
        if self._in_use and not status.admitted:
            self._in_use = False
            self._lost(status)
        if status.admitted and status.state is RemoteState.IN_SYNC:
            self._note_progress()
        with self._lock:
            facts = self._facts(status)
        self._follow_resync(status, facts)
        if seen is None or seen.state is not status.state:
            reason, _ = describe(facts)
            before = f"{seen.state.value} -> " if seen is not None else ""
            because = f": {reason}" if reason else ""
            line = f"{self._name}: {before}{status.state.value}{because}"
            self._log(_LEVELS[status.state], line)

    def _lost(self, status: RemoteStatus) -> None:
        """
        Plan the next attempt after a connection was lost.

        At once if it had been of use. A server that takes connections but no data
        made no progress, so its back-off goes on growing.
        """
        words = status.reason or "the connection was lost"
        self._log("warning", f"{self._name}: disconnect: {words}")
        now = self._clock()
        if not self._progressed:
            self._attempt += 1
            wait_s = backoff_s(self._attempt, self._random())
        elif now - self._admitted_at < STEADY_S:
            wait_s = hold_retry_s(self._random())
        else:
            wait_s = 0.0
        with self._lock:
            self._error = self._last_error = words
            self._retry_at = now + wait_s

    def _follow_resync(self, status: RemoteStatus, facts: Facts) -> None:
        """Begin and end the progress shown, as the state says."""
        dirty = facts.dirty_bytes
        copying = status.state in (RemoteState.RESYNCING, RemoteState.PAUSED)
        progress = self._progress
        if status.admitted and copying:
            if progress is None:
                self._log("info", f"{self._name}: resync_start: {dirty} bytes dirty")
                progress = Progress(self._clock(), dirty, status.copied_bytes)
                self._copier = Copier(self._copying(), self._clock)
        elif progress is not None:
            done = f"{progress.done_bytes} bytes in {progress.elapsed_s:.1f} s"
            if status.state is RemoteState.IN_SYNC:
                self._log("info", f"{self._name}: resync_done: {done}")
            else:
                text = f"resync_interrupted: {done}, {dirty} bytes left"
                self._log("warning", f"{self._name}: {text}")
            progress = self._copier = None
        with self._lock:
            self._progress = progress

    def _copying(self) -> Copying:
        engine, remote = self._engine, self._remote

        def answered() -> tuple[int, float]:
            status = engine.remote_status(remote)
            return status.answered_bytes, status.answer_s

        return Copying(
            copy=functools.partial(engine.resync, remote),
            set_pace=functools.partial(engine.resync_pace, remote),
            answered=answered,
            latency=engine.latency,
        )

    def _note_progress(self) -> None:
        self._progressed = True
        self._attempt = 0
        with self._lock:
            self._error = ""

    def _note_failure(self, words: str) -> None:
        """Remember why an attempt failed, and when the next may be made."""
        state = self._engine.remote_status(self._remote).state
        if state is RemoteState.HOLDING:
            wait_s = hold_retry_s(self._random())
        else:
            self._attempt += 1
            wait_s = backoff_s(self._attempt, self._random())
        if words != self._error and not self._ending:
            self._log("warning", f"{self._name}: {words}")
        with self._lock:
            if self._asked:  # perhaps at another uri than the one that failed
                self._asked, wait_s = False, 0.0
            self._error = self._last_error = words
            self._retry_at = self._clock() + wait_s

    # --- connecting ---

    def _connect(self, status: RemoteStatus) -> None:
        with self._lock:
            uri, self._connecting, self._asked = self._uri, True, False
        try:
            self._connect_to(uri, status)
        finally:
            with self._lock:
                self._connecting = False

    def _connect_to(self, uri: str, status: RemoteStatus) -> None:
        timeout_s, sample_s = self._policy.deadline_s, SAMPLE_S
        if status.state is RemoteState.HOLDING:
            # An attempt that outlasts the hold is of no use to those who wait.
            timeout_s = max(min(timeout_s, self._policy.hold_s), MIN_CONNECT_S)
            sample_s = self._policy.hold_s / 2
        try:
            self._engine.connect(self._remote, uri, timeout_s)
        except MirrorError as error:
            self._explain(f"{uri}: {error}")
            return
        try:
            self._check_and_admit(uri, sample_s)
        except MirrorError as error:
            words = f"{uri}: connected, but not usable: {error}"
            self._engine.drop(self._remote, words)
            self._explain(words)
        except Exception as error:
            # A bug of ours must not leave a connection nobody uses or ends.
            self._engine.drop(self._remote, f"internal error: {error!r}")
            raise

    def _check_and_admit(self, uri: str, budget_s: float) -> None:
        sample = take_sample(
            self._engine,
            self._remote,
            random=self._random,
            clock=self._clock,
            budget_s=budget_s,
        )
        if sample.differs is None:
            self._admit(uri, sample.same)
        else:
            self._refuse(uri, sample.differs)

    def _explain(self, words: str) -> None:
        self._note_failure(words)
        if words != self._explained:
            self._explained = words
            self._engine.explain(self._remote, words)

    def _refuse(self, uri: str, region: int) -> None:
        """Make the remote failed: one of the two is not what it was; write nothing."""
        offset = region * self._engine.status().region_size
        where = f"region {region} (offset {offset}) differs; nothing was written to it"
        # The address comes last: it may be longer than the engine keeps.
        words = f"this is not the disk that was left, or local is not: {where}: {uri}"
        with self._lock:
            self._error = self._last_error = words
        self._engine.fail(self._remote, words)

    def _admit(self, uri: str, same: int) -> None:
        now = self._clock()
        self._admitted_at, self._progressed, self._explained = now, False, ""
        with self._lock:
            # Before it is admitted: held requests are sent at once, and what the
            # lost connection still carries counts from now on.
            self._late_until = now + self._policy.late_window_s
        self._engine.admit(self._remote)
        self._in_use = True
        with self._lock:
            # Its last error stays the reason until something was copied.
            self._retry_at = now
        self._log("info", f"{self._name}: connect: {uri}, {same} regions compared")

    # --- copying ---

    def _resync(self) -> None:
        """Copy for a while; a remote lost over it is dealt with at the next turn."""
        assert self._copier is not None
        batch, wait_s = self._copier.copy()
        if batch.copied_bytes > 0:
            self._note_progress()
        if batch.error is None:
            with self._lock:
                self._retry_at = self._clock() + wait_s
        elif self._engine.remote_status(self._remote).admitted:
            self._note_failure(str(batch.error))
