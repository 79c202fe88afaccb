# SPDX-License-Identifier: BSD-3-Clause
"""
The rows of the benchmark, and the rules from figures to a verdict: pure code.

Absolute figures drift from one minute to the next. So a row gives one value per round,
usually a ratio of two measurements taken directly after each other. The verdict is on
the median over the rounds, and is always reported with their spread.
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
    """The verdict on a median, compared with minimum and goal."""

    GOAL = "goal"
    MET = "met"
    MISSED = "missed"
    SHORT = "short"  # of its goal, and there is no minimum
    REPORTED = "reported"  # no bound was set


@dataclass(frozen=True, slots=True)
class Claim:
    """
    One figure of a row, and its bounds.

    Args:
        key: of its values in what the row measured.
        title: what is compared, after the row's own title.
        must, goal: minimum and goal; None: no such bound; without both it is only
            reported.
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
        # NaN reaches nothing.
        return value <= bound if self.lower else value >= bound


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise *values*, of which there is at least one."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(slots=True)
class Measured:
    """The result of a row: for each claim one value per round, and raw figures."""

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
        folder: its own, on tmpfs, removed at its end.
        output: the folder for the user's files.
        rounds: of measurements.
        seconds: of each measurement.
        size: of an image, bytes.
        stack: ends what the row started, even if it is interrupted.
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
    """Return *items* in an order that rotates with each round."""
    first = by % len(items)
    return [*items[first:], *items[:first]]
