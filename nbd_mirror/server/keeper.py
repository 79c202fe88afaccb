# SPDX-License-Identifier: BSD-3-Clause
"""
The keeper: the thread that keeps one remote connected and brings it up to date.

It reads the facts, asks `state.next_step` for the next step, executes it, and begins
again. It waits only in the engine's `wait`, without the GIL, and any change of the
remote ends that wait. So operators' commands go straight to the engine and need no
queue here. Only the keeper connects, compares, admits and copies.
"""

from __future__ import annotations

import random as _random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base.errors import MirrorError
from ..rules.reasons import describe
from ..rules.state import (
    Action,
    Facts,
    RemoteState,
    Step,
    backoff_s,
    hold_retry_s,
    next_step,
)
from ..rules.window import Answered
from ..volume.model import Disk, RemoteStatus
from ..volume.report import RemoteView
from .disk_keeper import DiskKeeper, Log

if TYPE_CHECKING:
    from ..volume.core import Engine

__all__ = ["Keeper", "RemotePolicy"]

SAMPLE_S = 5.0  # for the sample, but no longer than requests are held
MIN_CONNECT_S = 0.2
STEADY_S = 1.0  # a connection lost sooner counts as a failed attempt

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
    """The part of the configuration that a remote's keeper needs."""

    name: str
    uri: str
    deadline_s: float
    hold_s: float
    late_window_s: float


class Keeper(DiskKeeper):
    """
    Keeps a remote.

    Args:
        refuse: returns why a uri must not be connected to, or "".
        clock: gives seconds, monotonic.
        random: gives numbers in [0, 1).
    """

    def __init__(
        self,
        engine: Engine,
        disk: Disk,
        policy: RemotePolicy,
        log: Log,
        *,
        refuse: Callable[[str], str] = lambda _: "",
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(
            engine,
            disk,
            f"remote {policy.name}",
            f"keeper {policy.name}",
            log,
            clock=clock,
            random=random,
        )
        self._policy = policy
        self._refuse_uri = refuse
        # Only the thread uses these.
        self._seen: RemoteStatus | None = None  # at the last turn
        self._attempt = 0  # failed attempts since the last progress
        self._admitted_at = 0.0
        self._progressed = False  # on this connection
        self._explained = ""
        # The lock guards what status also reads.
        self._uri = policy.uri
        self._retry_at = clock()
        self._late_until = 0.0
        self._last_error = ""  # the last one ever
        self._connecting = False
        self._asked = False  # to try at once, since the attempt under way began
        self._in_use = False  # admitted, and no loss noticed since

    def retry_now(self, uri: str) -> None:
        """Try *uri* at once; the caller must wake the thread through the engine."""
        with self._lock:
            self._uri = uri
        self.forget_error()

    def forget_error(self) -> None:
        """Try at once, and drop the old reason; the caller must wake the thread."""
        with self._lock:
            self._retry_at = self._clock()
            self._error = ""
            self._asked = True

    def view(self) -> RemoteView:
        """Report the remote as it is now. Does not block on I/O."""
        status = self._engine.remote_status(self._disk)
        with self._lock:
            facts = self._facts(status)
            last_error = self._last_error or self._error
            return RemoteView(facts, status, self._uri, self._progress, last_error)

    # --- the loop ---

    def _look_and_act(self) -> None:
        status = self._engine.remote_status(self._disk)
        self._observe(status)
        with self._lock:
            facts = self._facts(status)
        self._act(next_step(facts), status)

    def _recover(self, words: str) -> None:
        self._note_failure(words)
        wait_s = max(self._retry_at - self._clock(), 0.0)
        serial = self._engine.remote_status(self._disk).serial
        self._engine.wait(self._disk, serial, wait_s)

    def _act(self, step: Step, status: RemoteStatus) -> None:
        if step.action is Action.CONNECT:
            self._connect(status)
        elif step.action is Action.RELEASE_LATE:
            self._engine.release_late(self._disk)
        elif step.action is Action.RESYNC:
            self._resync()
            return
        else:
            self._engine.wait(self._disk, status.serial, step.wait_s)
        # A wait that the keeper chose is no stall.
        with self._lock:
            if self._progress is not None and not self._error:
                self._progress.waited(self._clock())

    def _facts(self, status: RemoteStatus) -> Facts:
        """Collect the facts; the caller holds the lock."""
        now = self._clock()
        volume = self._engine.status()
        dirty = volume.bytes_of(status.dirty_regions)
        return Facts(
            name=status.name,
            state=status.state,
            paused=status.paused,
            assumed=status.assumed,
            admitted=status.admitted,
            dirty_bytes=dirty,
            late_bytes=volume.bytes_of(status.late_regions),
            outstanding=status.outstanding,
            reason=status.reason,
            last_error=self._error,
            connecting=self._connecting,
            retry_s=max(self._retry_at - now, 0.0),
            late_s=max(self._late_until - now, 0.0),
            stalled_s=self._update_progress(dirty, status.copied_bytes),
            volume_failed=volume.failed,
        )

    # --- what changed ---

    def _observe(self, status: RemoteStatus) -> None:
        """Act on and log what changed since the last turn."""
        seen, self._seen = self._seen, status
        # Not the status of the last turn: the connection may have come and gone since.
        if self._in_use and not status.admitted:
            self._in_use = False
            self._lost(status)
        if status.admitted and status.state is RemoteState.IN_SYNC:
            self._note_progress()
        with self._lock:
            facts = self._facts(status)
        under_way = status.state in (RemoteState.RESYNCING, RemoteState.PAUSED)
        self._follow_resync(
            facts.dirty_bytes,
            status.copied_bytes,
            copying=status.admitted and under_way,
            in_sync=status.state is RemoteState.IN_SYNC,
        )
        if seen is None or seen.state is not status.state:
            reason, _ = describe(facts)
            before = f"{seen.state.value} -> " if seen is not None else ""
            because = f": {reason}" if reason else ""
            line = f"{self._title}: {before}{status.state.value}{because}"
            self._log(_LEVELS[status.state], line)

    def _lost(self, status: RemoteStatus) -> None:
        """
        Plan the next attempt after a connection was lost.

        Try at once if it had worked for a while. Otherwise the back-off grows further:
        a server may accept connections and no data, or close each one once it is used.
        If an operator asked for an attempt since the loss, that has priority.
        """
        words = status.reason or "the connection was lost"
        self._log("warning", f"{self._title}: disconnect: {words}")
        now = self._clock()
        if self._progressed and now - self._admitted_at >= STEADY_S:
            self._attempt, wait_s = 0, 0.0
        else:
            self._attempt += 1
            wait_s = backoff_s(self._attempt, self._random())
            if status.state is RemoteState.HOLDING:
                # Requests wait for it, so at least one attempt must fit into the hold.
                wait_s = min(wait_s, self._policy.hold_s / 2)
        self._plan_retry(words, wait_s)

    def _plan_retry(self, words: str, wait_s: float) -> None:
        """Store why it does not work; the next attempt may come after *wait_s*."""
        with self._lock:
            if self._asked:  # perhaps at another uri than the one that failed
                self._asked, wait_s = False, 0.0
            self._error = self._last_error = words
            self._retry_at = self._clock() + wait_s

    def _answered(self) -> Answered:
        status = self._engine.remote_status(self._disk)
        zeroes = status.answered_zero_bytes
        return Answered(status.answered_bytes - zeroes, zeroes, status.answer_s)

    def _note_progress(self) -> None:
        self._progressed = True
        with self._lock:
            self._error = ""

    def _note_failure(self, words: str) -> None:
        """Store why an attempt failed, and when the next may come."""
        state = self._engine.remote_status(self._disk).state
        if state is RemoteState.HOLDING:
            wait_s = hold_retry_s(self._random())
        else:
            self._attempt += 1
            wait_s = backoff_s(self._attempt, self._random())
        self._log_failure(words)
        self._plan_retry(words, wait_s)

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
        why = self._refuse_uri(uri)
        if why:
            self._explain(f"{uri}: {why}")
            return
        timeout_s, sample_s = self._policy.deadline_s, SAMPLE_S
        if status.state is RemoteState.HOLDING:
            # An attempt that outlasts the hold does not help the waiting requests.
            timeout_s = max(min(timeout_s, self._policy.hold_s), MIN_CONNECT_S)
            sample_s = self._policy.hold_s / 2
        try:
            self._engine.connect(self._disk, uri, timeout_s)
        except MirrorError as error:
            self._explain(f"{uri}: {error}")
            return
        try:
            self._check_and_admit(uri, sample_s)
        except MirrorError as error:
            words = f"{uri}: connected, but not usable: {error}"
            self._engine.drop(self._disk, words)
            self._explain(words)
        except Exception as error:
            # After a bug of ours no connection may stay that no thread uses or ends.
            self._engine.drop(self._disk, f"internal error: {error!r}")
            raise

    def _check_and_admit(self, uri: str, budget_s: float) -> None:
        sample = self._sample(self._disk, budget_s)
        if sample.differs is None:
            self._admit(uri, sample.same)
        else:
            self._refuse(uri, sample.differs)

    def _explain(self, words: str) -> None:
        self._note_failure(words)
        if words != self._explained:
            self._explained = words
            self._engine.explain(self._disk, words)

    def _refuse(self, uri: str, region: int) -> None:
        """Make the remote failed: one of the two disks has changed. Write nothing."""
        offset = region * self._engine.status().region_size
        where = f"region {region} (offset {offset}) differs; nothing was written to it"
        # The address comes last: it may be longer than the engine keeps.
        words = f"this is not the same disk as before, or local is not: {where}: {uri}"
        with self._lock:
            self._error = self._last_error = words
        self._engine.fail(self._disk, words)
        with self._lock:
            asked = self._asked
        if asked:
            # During the attempt an operator said that the remote may be used again,
            # perhaps at another address, so only an attempt that begins after that
            # counts. A command that comes after this check finds the remote failed, and
            # resets it.
            self._engine.reset(self._disk)
            self._plan_retry(words, 0.0)

    def _admit(self, uri: str, same: int) -> None:
        now = self._clock()
        self._admitted_at, self._progressed, self._explained = now, False, ""
        with self._lock:
            # Set this before it is admitted: held requests are sent at once, and the
            # late-write window of the lost connection begins now.
            self._late_until = now + self._policy.late_window_s
        self._use()
        self._in_use = True
        with self._lock:
            # Its last error stays the reason until something was copied.
            self._retry_at = now
        self._log("info", f"{self._title}: connect: {uri}, {same} regions compared")

    def _use(self) -> None:
        self._engine.admit(self._disk)

    # --- copying ---

    def _resync(self) -> None:
        """Copy for a while; the next turn handles a remote that was lost."""
        assert self._copier is not None
        batch, wait_s = self._copier.copy()
        if batch.copied_bytes > 0:
            self._attempt = 0  # even if it is lost soon: some regions became clean
            self._note_progress()
        if batch.error is None:
            with self._lock:
                self._retry_at = self._clock() + wait_s
        elif self._engine.remote_status(self._disk).admitted:
            self._note_failure(str(batch.error))
