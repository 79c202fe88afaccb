# SPDX-License-Identifier: BSD-3-Clause
"""A resync's call begins at the pace that is right, and gets every later one."""

from __future__ import annotations

import threading
import time

from nbd_mirror.rules.pace import Latency, Plan
from nbd_mirror.rules.window import Answered, Window
from nbd_mirror.server.copier import Copier, Copying
from nbd_mirror.volume.model import Batch

NOBODY = Latency(quiet=[[0] * 8], disturbed=[[0] * 8])
WAIT_S = 10.0


class Engine:
    """An engine without clients: its call ends when *calls* paces were set in it."""

    def __init__(self, *, calls: int, slow_s: float = 0.0) -> None:
        self.begun: list[Plan] = []
        self.set: list[Plan] = []
        self._calls = calls
        self._slow_s = slow_s
        self._enough = threading.Event()
        self._under_way = threading.Event()

    def copy(self, _first: int, _bytes: int, _seconds: float, plan: Plan) -> Batch:
        """Note the pace that it begins at, and wait."""
        self.begun.append(plan)
        self._under_way.set()
        assert self._enough.wait(WAIT_S)
        return Batch(next_region=0, copied_bytes=1, zero_bytes=0)

    def set_pace(self, plan: Plan) -> None:
        """Note it, if the call is under way: the engine forgets it else."""
        if self._under_way.is_set():
            self.set.append(plan)
        if len(self.set) >= self._calls:
            self._enough.set()

    def latency(self) -> Latency:
        """Take as long as a busy machine makes it."""
        self._under_way.wait(self._slow_s)
        return NOBODY

    def copier(self) -> Copier:
        """Return one that copies with it."""
        copying = Copying(
            copy=self.copy,
            set_pace=self.set_pace,
            answered=lambda: Answered(0, 0, 0.0),
            latency=self.latency,
        )
        return Copier(copying, time.monotonic)


def under_way(plan: Plan) -> int:
    """Return how much a pace has under way."""
    return plan.depth * plan.copy_bytes


def test_an_idle_volumes_first_call_fills_the_link_from_the_start() -> None:
    """The first call has the right pace, however late the pace's thread runs."""
    engine = Engine(calls=1, slow_s=0.2)
    engine.copier().copy()
    (plan,) = engine.begun
    assert plan.rest_s == 0
    assert under_way(plan) == Window.FIRST


def test_a_pace_that_has_not_changed_is_set_all_the_same() -> None:
    """The earlier setting may have come before the call could take it."""
    engine = Engine(calls=3)
    engine.copier().copy()
    assert len(engine.set) >= 3
    assert {under_way(plan) for plan in engine.set} == {Window.FIRST}
