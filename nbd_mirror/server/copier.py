# SPDX-License-Identifier: BSD-3-Clause
"""
The copying of one resync: its position, and its pace.

The engine copies in calls of many seconds, because the end of each leaves the link idle
for a while. `Pace` decides in a thread of its own how fast the copying is, and the
engine uses the new pace from the next copy on. This module carries the figures between
the three.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..rules.pace import Latency, Pace, Plan
from ..rules.window import Answered
from ..volume.model import Batch

__all__ = ["Copier", "Copying"]

CALL_S = 10.0  # limit of a call: its thread's other work waits so long
TICK_S = 0.05  # between two looks at the clients' latency
FIRST_TICK_S = 0.02
MAX_BYTES = 1 << 62  # time ends a call, not this
BUSY_FIRST_S, BUSY_LAST_S = 0.05, 1.0  # rests while clients hold all dirty regions


@dataclass(frozen=True, slots=True)
class Copying:
    """
    How a disk's dirty regions are copied: methods of the engine for that disk.

    Args:
        copy: copy from a region on, at most so many bytes and seconds, at a pace.
        set_pace: set the pace of the call that is under way.
        answered: what a remote has answered of copies; local answers nothing.
        latency: of clients' requests, since the start.
    """

    copy: Callable[[int, int, float, Plan], Batch]
    set_pace: Callable[[Plan], None]
    answered: Callable[[], Answered]
    latency: Callable[[], Latency]


class Copier:
    """Copies a disk's dirty regions, one call after the other, in rounds."""

    def __init__(self, copying: Copying, clock: Callable[[], float]) -> None:
        self._copying = copying
        self._clock = clock
        self._pace = Pace()  # a call's thread uses it while the call is under way
        self._next_region = 0
        self._empty_rounds = 0

    def copy(self) -> tuple[Batch, float]:
        """
        Copy until nothing is left, or for some seconds. Blocks.

        Returns:
            What was done, and the seconds to wait before the next call.
        """
        first = self._next_region
        # Decide before the call, which would otherwise begin as if a client were there.
        plan = self._judge()
        with self._keep_pace():
            batch = self._copying.copy(first, MAX_BYTES, CALL_S, plan)
        self._next_region = batch.next_region
        return batch, self._rest_s(first, batch.copied_bytes)

    @contextlib.contextmanager
    def _keep_pace(self) -> Iterator[None]:
        """Change the pace of a call while it runs, as `Pace` decides."""
        over, at_work = threading.Event(), threading.Lock()
        # Not threading.Thread: its start() waits forever for a thread that dies at
        # once, which may happen without free memory. Without this thread the call keeps
        # its first pace, which is low.
        with contextlib.suppress(RuntimeError):
            _thread.start_new_thread(self._drive, (over, at_work))
        try:
            yield
        finally:
            over.set()
            with at_work:
                pass

    def _drive(self, over: threading.Event, at_work: threading.Lock) -> None:
        tick_s = FIRST_TICK_S
        with at_work, contextlib.suppress(MemoryError):
            while not over.wait(tick_s):
                # Set it even if it is unchanged: the call may have begun only now.
                self._copying.set_pace(self._judge())
                tick_s = TICK_S

    def _judge(self) -> Plan:
        latency, answered = self._copying.latency(), self._copying.answered()
        return self._pace.judge(self._clock(), latency, answered)

    def _rest_s(self, first: int, copied_bytes: int) -> float:
        """
        Return the rest before the next call: 0, except after an empty round.

        A call that began at the first region and copied nothing found all regions
        clean, which ends the resync, or held by clients: an immediate next call would
        spin.
        """
        if copied_bytes > 0:
            self._empty_rounds = 0
        elif first == 0:
            self._empty_rounds += 1
        if self._empty_rounds == 0:
            return 0.0
        return min(BUSY_FIRST_S * 2.0 ** (self._empty_rounds - 1), BUSY_LAST_S)
