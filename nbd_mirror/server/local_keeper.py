# SPDX-License-Identifier: BSD-3-Clause
"""
The local keeper: the thread that copies back what the local disk misses.

After an error of the local disk, with a remote in its place, the engine continues
without the local disk and records in a map what it misses. An operator decides when it
may be used again (`resume`: the same disk works again; `invalidate`: it was replaced).
Then this thread copies back. For a single sector that could not be read it does so
without an operator. It waits only in the engine, without the GIL. The operator's two
commands run in the control socket's thread, one at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import random as _random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..base.errors import BusyError, MirrorError, RemoteError, WrongDiskError
from ..rules.progress import Progress
from ..rules.reasons import describe_local
from ..rules.state import LocalFacts, LocalState
from ..rules.window import Answered
from ..volume.model import LOCAL, LocalStatus, VolumeStatus, disk_of
from ..volume.report import LocalView
from .disk_keeper import DiskKeeper, Log

if TYPE_CHECKING:
    from ..volume.core import Engine

__all__ = ["LocalKeeper"]

RETRY_S = 1.0  # until the next batch, if no event shows that it would work
LOG_EVERY_S = 10.0  # progress, and repairs: a dying disk has many
SAMPLE_S = 5.0
COMMAND_S = 5.0  # how long an operator's command waits for another one
_REPLACED = (
    "correct `local`; or, if it was replaced, nbd-mirror invalidate CONFIG local "
    "(overwrites it with a full copy)"
)


class LocalKeeper(DiskKeeper):
    """
    Keeps the local disk, at *path* as far as is known.

    Args:
        nr_remotes: how many remotes there are to copy from.
        asked: the operator's name of the volume, for hints in the log.
        clock: gives seconds, monotonic.
        random: gives numbers in [0, 1).
    """

    def __init__(
        self,
        engine: Engine,
        path: str,
        nr_remotes: int,
        log: Log,
        *,
        asked: str = "CONFIG",
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(
            engine, LOCAL, "local", "keeper local", log, clock=clock, random=random
        )
        self._remotes = [disk_of(index) for index in range(nr_remotes)]
        self._asked = asked
        self._command = threading.Lock()  # one operator's command at a time
        # Only the thread uses these.
        self._seen: LocalStatus | None = None  # at the last turn
        self._repairing = False  # it was ok: a sector is rewritten, not a whole disk
        self._admitted = False  # by an operator, and not ok since
        self._log_progress_at = 0.0  # when to log the progress again
        self._log_repairs_at = 0.0
        self._repairs_logged = 0
        self._path = path  # guarded by the lock

    def view(self) -> LocalView:
        """Report the local disk as it is now. Does not block on I/O."""
        volume = self._engine.status()
        with self._lock:
            facts = self._facts(volume)
            return LocalView(facts, volume.local, self._path, self._progress)

    def why_not_used(self) -> str:
        """
        Return why the local disk is not used at a start, and what helps; "" if it is.

        No remote is connected yet, so the text does not mention remotes.
        """
        facts = dataclasses.replace(self.view().facts, sources=1)
        return self._why(facts) if facts.state is LocalState.FAILED else ""

    def _why(self, facts: LocalFacts) -> str:
        reason, hint = describe_local(facts, self._asked)
        return f"{reason}; try: {hint}"

    # --- an operator's commands ---

    def resume(self, path: str) -> None:
        """
        Use the same disk again, once a sample has shown that it is the same.

        Blocks for as long as the sample takes.

        Raises:
            BusyError: it has not failed, or the disk is in use. WrongDiskError: it
            is another disk than before. RemoteError: no remote is connected to compare
            it with. MissingError, MirrorIOError: it does not work yet.
        """
        with self._only_command():
            self._attach(path)
            with self._dropped_on_error():
                self._check_is_the_same(path)
                self._admit(path)

    @contextlib.contextmanager
    def _only_command(self) -> Iterator[None]:
        """
        Exclude other commands, and do not wait long for one that a hanging disk keeps.

        Each command holds a thread of the control socket, which has few.
        """
        if not self._command.acquire(timeout=COMMAND_S):
            raise BusyError(
                "an earlier command waits for the local disk, which does not answer",
                "nbd-mirror status CONFIG",
            )
        try:
            yield
        finally:
            self._command.release()

    def _attach(self, path: str) -> None:
        try:
            self._engine.local_attach(path, replaced=False)
        except WrongDiskError as error:
            error.hint = _REPLACED
            raise

    def replace(self, path: str) -> None:
        """
        Use another disk in its place: all of it is overwritten.

        Raises:
            MirrorError: as for `resume`, except for the sample.
        """
        with self._only_command():
            self._engine.local_attach(path, replaced=True)
            with self._dropped_on_error():
                self._admit(path)

    @contextlib.contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        """Close the attached disk again where it cannot be used."""
        try:
            yield
        except BaseException as error:
            # Not if it is in use already, or if the volume ends.
            with contextlib.suppress(MirrorError):
                self._engine.drop(LOCAL, str(error))
            raise

    def _admit(self, path: str) -> None:
        with self._lock:
            self._error = ""  # of an earlier resync; the next one begins at once
        self._admitted = True  # before the thread can see the new state
        try:
            self._engine.admit(LOCAL)
        except BaseException:
            self._admitted = False
            raise
        with self._lock:
            self._path = path

    def _check_is_the_same(self, path: str) -> None:
        compared = False
        for remote in self._remotes:
            if not self._engine.remote_status(remote).admitted:
                continue
            compared = True
            sample = self._sample(remote, SAMPLE_S)
            if sample.differs is not None:
                raise self._another_disk(path, sample.differs)
            if sample.same > 0:
                return
        # With every region dirty no proof is needed: all of it is copied.
        if compared and self._engine.status().local.unproven:
            raise WrongDiskError(
                f"this may not be the same disk as before: it is another device, and "
                f"none of its content could be compared; nothing was written to it: "
                f"{path}",
                _REPLACED,
            )
        if not compared:
            raise RemoteError(
                "no remote is connected to show whether this is the same disk as "
                f"before: {path}",
                "nbd-mirror resume CONFIG, then nbd-mirror resume CONFIG local",
            )

    def _another_disk(self, path: str, region: int) -> WrongDiskError:
        offset = region * self._engine.status().region_size
        return WrongDiskError(
            f"this is not the same disk as before: region {region} (offset {offset}) "
            f"differs; nothing was written to it: {path}",
            _REPLACED,
        )

    # --- the loop ---

    def _look_and_act(self) -> None:
        volume = self._engine.status()
        self._observe(volume)
        self._act(volume)

    def _act(self, volume: VolumeStatus) -> None:
        """Copy a batch back, or wait until there is something to copy."""
        if volume.failed or self._copier is None:
            self._engine.wait(LOCAL, volume.local.serial, None)
            return
        batch, wait_s = self._copier.copy()
        if batch.copied_bytes > 0 or batch.error is None:
            # Everything that can be copied now was copied, even if a part was refused.
            with self._lock:
                self._error = ""
            if wait_s > 0:
                self._wait(wait_s)
        elif batch.error.errno == errno.ENOTCONN:
            self._wait_for_remote(str(batch.error))
        else:
            self._recover(str(batch.error))

    def _wait(self, wait_s: float) -> None:
        local = self._engine.status().local
        if local.state is LocalState.RESYNCING:
            self._engine.wait(LOCAL, local.serial, wait_s)

    def _wait_for_remote(self, words: str) -> None:
        """Wait until a lost remote is back, or for a while."""
        self._note(words)
        for remote in self._remotes:
            status = self._engine.remote_status(remote)
            if not status.admitted:
                self._engine.wait(remote, status.serial, RETRY_S)
                return
        self._wait(RETRY_S)

    def _recover(self, words: str) -> None:
        self._note(words)
        # Wait in any state: a step that fails at once would fail again at once.
        self._engine.wait(LOCAL, self._engine.status().local.serial, RETRY_S)

    def _note(self, words: str) -> None:
        """Store why copying does not work, and log it once."""
        self._log_failure(words)
        with self._lock:
            self._error = words

    def _facts(self, volume: VolumeStatus) -> LocalFacts:
        """Collect the facts; the caller holds the lock."""
        local = volume.local
        dirty = volume.bytes_of(local.dirty_regions)
        remotes = map(self._engine.remote_status, self._remotes)
        return LocalFacts(
            state=local.state,
            dirty_bytes=dirty,
            sources=sum(one.admitted for one in remotes),
            reason=local.reason,
            last_error=self._error,
            stalled_s=self._update_progress(dirty, local.copied_bytes),
            silent_s=local.silent_s,
        )

    # --- what changed ---

    def _observe(self, volume: VolumeStatus) -> None:
        """Act on and log what changed since the last turn."""
        seen, self._seen = self._seen, volume.local
        before = LocalState.OK if seen is None else seen.state
        state = volume.local.state
        with self._lock:
            if before is not state:
                self._error = ""  # it belonged to the last state
            facts = self._facts(volume)
        if before is not state and state is LocalState.RESYNCING:
            came_from_ok = before is LocalState.OK and seen is not None
            self._repairing = came_from_ok and not self._admitted
        elif before is not state:
            self._admitted = False
            if state is LocalState.FAILED and seen is not None:
                self._log("error", f"local_failed: {self._why(facts)}")
        under_way = self._progress is not None
        self._follow_resync(
            facts.dirty_bytes,
            volume.local.copied_bytes,
            copying=state is LocalState.RESYNCING,
            in_sync=state is LocalState.OK,
        )
        self._say_progress(facts.dirty_bytes, went_on=under_way)
        self._say_repairs(volume.local)

    def _say_progress(self, dirty_bytes: int, *, went_on: bool) -> None:
        """Log the progress of a resync from time to time."""
        if self._progress is None:
            return
        if went_on and self._clock() < self._log_progress_at:
            return
        self._log_progress_at = self._clock() + LOG_EVERY_S
        if went_on:
            rate = f"{self._progress.bytes_per_s:.0f}/s"
            self._log(
                "info", f"local: resync_progress: {dirty_bytes} bytes left, {rate}"
            )

    @staticmethod
    def _done(progress: Progress) -> str:
        rate = progress.done_bytes / max(progress.elapsed_s, 1e-3)
        return f"{DiskKeeper._done(progress)}, {rate:.0f} bytes/s"

    def _answered(self) -> Answered:
        return Answered(0, 0, 0.0)  # one copy at a time: there is no link to fill

    def _say_resync(self, text: str) -> None:
        """Log this for a whole disk; a repaired sector is only counted."""
        if not self._repairing:
            super()._say_resync(text)

    def _say_repairs(self, local: LocalStatus) -> None:
        new = local.repaired - self._repairs_logged
        if new > 0 and self._clock() >= self._log_repairs_at:
            self._log_repairs_at = self._clock() + LOG_EVERY_S
            self._repairs_logged = local.repaired
            self._log(
                "warning",
                f"local: bad sectors: {new} regions could not be read, and were "
                f"rewritten from a remote; {local.repaired} since the start",
            )
