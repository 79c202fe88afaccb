# SPDX-License-Identifier: BSD-3-Clause
"""
The common part of the keepers of the local disk and of a remote.

A keeper is the only thread that brings its disk up to date: it reads the disk's status,
logs what changed, does one step, and begins again. This module has the thread, which no
error ends, and the resync with its progress. The states of a disk, and when it may be
used, differ by kind: see each keeper.
"""

from __future__ import annotations

import functools
import random as _random
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..base.errors import MirrorError
from ..base.threads import begin, keep_going
from ..rules.progress import Progress
from ..rules.window import Answered
from .copier import Copier, Copying
from .sample import Sample, take_sample

if TYPE_CHECKING:
    from ..volume.core import Engine
    from ..volume.model import Disk

__all__ = ["DiskKeeper", "Log"]

# Called with a level ("info", "warning", "error") and a line.
Log = Callable[[str, str], None]


class DiskKeeper(ABC):
    """
    Keeps one disk of the volume.

    Args:
        title: names the disk in the log.
        thread: names the thread.
        clock: gives seconds, monotonic.
        random: gives numbers in [0, 1).
    """

    def __init__(
        self,
        engine: Engine,
        disk: Disk,
        title: str,
        thread: str,
        log: Log,
        *,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self._engine = engine
        self._disk = disk
        self._title = title
        self._log = log
        self._clock = clock
        self._random = random
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=thread, daemon=True)
        self._copier: Copier | None = None  # only for the thread
        # The lock guards what status also reads.
        self._lock = threading.Lock()
        self._error = ""  # why it does not work now
        self._progress: Progress | None = None

    @property
    def name(self) -> str:
        """The thread's name."""
        return self._thread.name

    def start(self) -> None:
        """Start the thread. Raises MirrorError if it cannot be made."""
        begin(self._thread)

    def end(self) -> None:
        """Tell the thread to end; the caller also calls `Engine.wake`."""
        self._ending = True

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; says whether it did."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the loop ---

    def _run(self) -> None:
        # An exception in the recovery does not end the keeper either.
        keep_going(self._turn, lambda: self._ending, self._log, self._title)

    def _turn(self) -> None:
        try:
            self._look_and_act()
        except MirrorError as error:
            self._recover(str(error))
        except Exception as error:
            # A bug here must neither end the keeper nor be silent.
            self._log("error", f"{self._title}: {traceback.format_exc()}")
            self._recover(f"internal error: {error!r}")

    @abstractmethod
    def _look_and_act(self) -> None:
        """Do one step, or wait until there is something to do."""

    @abstractmethod
    def _recover(self, words: str) -> None:
        """Wait after a failure that no step handles."""

    def _log_failure(self, words: str) -> None:
        """Log once why it does not work."""
        if words != self._error and not self._ending:
            self._log("warning", f"{self._title}: {words}")

    def _sample(self, remote: Disk, budget_s: float) -> Sample:
        """Compare clean regions of local and *remote*, for at most *budget_s*."""
        return take_sample(
            self._engine,
            remote,
            random=self._random,
            clock=self._clock,
            budget_s=budget_s,
            ending=lambda: self._ending,
        )

    # --- resync ---

    def _copying(self) -> Copying:
        """Return how this disk's dirty regions are copied."""
        engine, disk = self._engine, self._disk
        return Copying(
            copy=functools.partial(engine.resync, disk),
            set_pace=functools.partial(engine.resync_pace, disk),
            answered=self._answered,
            latency=engine.latency,
        )

    @abstractmethod
    def _answered(self) -> Answered:
        """Return the value of `Copying.answered`."""

    def _say_resync(self, text: str) -> None:
        """Log that a resync began, continues or is done."""
        self._log("info", f"{self._title}: {text}")

    def _update_progress(self, dirty_bytes: int, copied_bytes: int) -> float:
        """
        Update the progress that status shows; the caller holds the lock.

        Returns:
            The seconds since a region was last finished; 0 without a resync.
        """
        if self._progress is None:
            return 0.0
        now = self._clock()
        self._progress.update(now, dirty_bytes, copied_bytes)
        return self._progress.stalled_s(now)

    def _follow_resync(
        self, dirty_bytes: int, copied_bytes: int, *, copying: bool, in_sync: bool
    ) -> None:
        """
        Begin or end the copying and its progress, by the disk's state.

        Args:
            copying: the disk is used, and misses something.
            in_sync: it misses nothing.
        """
        progress = self._progress
        if copying and progress is None:
            self._say_resync(f"resync_start: {dirty_bytes} bytes dirty")
            progress = Progress(self._clock(), dirty_bytes, copied_bytes)
            self._copier = Copier(self._copying(), self._clock)
        elif not copying and progress is not None:
            done = self._done(progress)
            if in_sync:
                self._say_resync(f"resync_done: {done}")
            else:
                text = f"resync_interrupted: {done}, {dirty_bytes} bytes left"
                self._log("warning", f"{self._title}: {text}")
            progress = self._copier = None
        with self._lock:
            self._progress = progress

    @staticmethod
    def _done(progress: Progress) -> str:
        """Say how much a resync has copied."""
        return f"{progress.done_bytes} bytes in {progress.elapsed_s:.1f} s"
