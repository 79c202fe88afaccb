# SPDX-License-Identifier: BSD-3-Clause
"""
What a row of the benchmark is, and how figures become a verdict: pure rules.

Absolute figures drift from one minute to the next, so a row gives one value a round,
as a rule a ratio of two measurements that followed each other in it. What is judged
is the median over the rounds; how far they spread is always told with it.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "BenchError",
    "Claim",
    "Context",
    "Measured",
    "Outcome",
    "Row",
    "Spread",
    "Verdict",
    "rotated",
]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
T = TypeVar("T")


class BenchError(Exception):
    """Something could not be run or measured; the message says what."""


class Verdict(Enum):
    """What a median is worth, against what was wanted."""

    GOAL = "goal"
    MET = "met"
    MISSED = "missed"
    SHORT = "short"  # of its goal, and there is no must
    REPORTED = "reported"  # nothing was wanted of it


@dataclass(frozen=True, slots=True)
class Claim:
    """
    One figure of a row, and what is wanted of it.

    Args:
        key: of its values in what the row measured.
        title: what is compared, after the row's own title.
        must, goal: None: it need not be reached; without both it is only reported.
        unit: printed behind the figure; "x" is a ratio.
        lower: less is better.
    """

    key: str
    title: str
    must: float | None = None
    goal: float | None = None
    unit: str = "x"
    lower: bool = False

    def verdict(self, median: float) -> Verdict:
        """Judge *median*; a bound that is reached exactly is met."""
        if self.must is None and self.goal is None:
            return Verdict.REPORTED
        if self.goal is not None and self._reaches(median, self.goal):
            return Verdict.GOAL
        if self.must is None:
            return Verdict.SHORT
        return Verdict.MET if self._reaches(median, self.must) else Verdict.MISSED

    def _reaches(self, value: float, bound: float) -> bool:
        # What is no number reaches nothing.
        return value <= bound if self.lower else value >= bound


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up *values*, of which there is at least one."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(slots=True)
class Measured:
    """What a row gave: by claim one value a round, and raw figures for the file."""

    values: dict[str, list[float]] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # plots

    def add(self, key: str, value: float) -> None:
        """Add a round's value for the claim *key*."""
        self.values.setdefault(key, []).append(value)


@dataclass(frozen=True, slots=True)
class Context:
    """
    What a row may use.

    Args:
        folder: its own, on tmpfs, removed when it is over.
        output: where files for the user go.
        rounds: of measurements.
        seconds: of each measurement.
        size: of an image, bytes.
        stack: ends what the row started, also when it is interrupted.
        say: shows a line of progress.
    """

    folder: Path
    output: Path
    rounds: int
    seconds: float
    size: int
    stack: contextlib.ExitStack
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One row: *run* measures it and gives values for every claim."""

    key: str
    title: str
    run: Callable[[Context], Measured]
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row that was run: what it measured, or why it failed."""

    row: Row
    measured: Measured | None
    seconds: float
    error: str = ""

    def spreads(self) -> Mapping[str, Spread]:
        """Return the spread of each claim that has values."""
        values = self.measured.values if self.measured else {}
        return {key: Spread.of(of) for key, of in values.items() if of}

    def verdict(self, claim: Claim) -> Verdict | None:
        """Judge *claim*; None: it was not measured."""
        spread = self.spreads().get(claim.key)
        return None if spread is None else claim.verdict(spread.median)


def rotated(items: Sequence[T], by: int) -> list[T]:
    """Return *items* beginning with another one each round."""
    first = by % len(items)
    return [*items[first:], *items[:first]]
