# SPDX-License-Identifier: BSD-3-Clause
"""Facts of disks in all combinations, for the tests of their rules."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from nbd_mirror.rules.state import (
    STALLED_S,
    Facts,
    LocalFacts,
    LocalState,
    RemoteState,
)

AMOUNTS = st.integers(min_value=0, max_value=1 << 50)
TIMES = st.floats(min_value=0, max_value=1e6)
WORDS = st.sampled_from(["", "Connection refused"])
FACTS = st.builds(
    Facts,
    name=st.just("dr"),
    state=st.sampled_from(RemoteState),
    paused=st.booleans(),
    assumed=st.booleans(),
    admitted=st.booleans(),
    dirty_bytes=AMOUNTS,
    late_bytes=AMOUNTS,
    outstanding=st.integers(min_value=0, max_value=1000),
    reason=WORDS,
    last_error=WORDS,
    connecting=st.booleans(),
    retry_s=TIMES,
    late_s=TIMES,
    stalled_s=TIMES,
    volume_failed=st.booleans(),
)
LOCAL_FACTS = [
    LocalFacts(state, dirty, sources, reason, error, stalled_s)
    for state in LocalState
    for dirty in (0, 1, 5 << 30)
    for sources in (0, 2)
    for reason in ("", "the local disk failed to write at 0: Input/output error")
    for error in ("", "no remote that has it is connected")
    for stalled_s in (0.0, STALLED_S + 1)
]


def every_combination() -> list[Facts]:
    """Give all combinations of what a step can depend on."""
    flags = [False, True]
    amounts = [(0, 0), (100, 0), (100, 100), (100, 40)]
    return [
        Facts(
            name="dr",
            state=state,
            paused=paused,
            admitted=admitted,
            dirty_bytes=dirty,
            late_bytes=late,
            retry_s=retry_s,
            late_s=late_s,
            volume_failed=failed,
        )
        for state, paused, admitted, (dirty, late), retry_s, late_s, failed in (
            itertools.product(
                RemoteState, flags, flags, amounts, [0.0, 3.0], [0.0, 7.0], flags
            )
        )
    ]


def every_facts(test: Callable[[Any, Facts], None]) -> Callable[[Any], None]:
    """Run a method for every combination, as one test."""

    @functools.wraps(test)
    def run(self: object) -> None:
        for facts in every_combination():
            test(self, facts)

    # Else pytest takes the wrapped function's parameter for a fixture.
    del run.__wrapped__
    return run
