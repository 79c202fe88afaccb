# SPDX-License-Identifier: BSD-3-Clause
"""How the benchmark judges: medians, spreads and bounds, in both directions."""

from __future__ import annotations

import math

import pytest

from benchmarks.model import Claim, Measured, Outcome, Row, Spread, Verdict, rotated

MORE = Claim("k", "", 0.8, 1.2)
LESS = Claim("k", "", 3, 1.5, lower=True)


@pytest.mark.parametrize(
    ("claim", "median", "expected"),
    [
        (MORE, 1.2, Verdict.GOAL),
        (MORE, 1.1999, Verdict.MET),
        (MORE, 0.8, Verdict.MET),
        (MORE, 0.7999, Verdict.MISSED),
        (LESS, 1.5, Verdict.GOAL),
        (LESS, 1.5001, Verdict.MET),
        (LESS, 3.0, Verdict.MET),
        (LESS, 3.0001, Verdict.MISSED),
        (MORE, math.nan, Verdict.MISSED),
        (LESS, math.nan, Verdict.MISSED),
        (Claim("k", ""), 0.0, Verdict.REPORTED),
        (Claim("k", "", 1.02, lower=True), 1.0, Verdict.MET),
        (Claim("k", "", 1.02, lower=True), 1.03, Verdict.MISSED),
        (Claim("k", "", None, 1.1, lower=True), 1.1, Verdict.GOAL),
        (Claim("k", "", None, 1.1, lower=True), 1.2, Verdict.SHORT),
    ],
)
def test_verdict_median_and_direction_decide(
    claim: Claim, median: float, expected: Verdict
) -> None:
    """A bound that is reached exactly is met; what is no number reaches none."""
    assert expected is claim.verdict(median)


def test_spread_is_median_least_and_most() -> None:
    """One wild round moves the median little, and the report names it."""
    assert Spread(1.0, 0.9, 7.0) == Spread.of([1.0, 7.0, 0.9])
    assert Spread(1.5, 1.0, 2.0) == Spread.of([1.0, 2.0])
    assert Spread(1.0, 1.0, 1.0) == Spread.of([1.0])


def test_rotated_every_item_is_first_in_turn() -> None:
    """Over as many rounds as items each begins once; none is left out."""
    rounds = [rotated("abc", number) for number in range(4)]
    assert ["abc", "bca", "cab", "abc"] == ["".join(one) for one in rounds]


def test_outcome_verdict_by_the_median_of_the_rounds() -> None:
    """One round below the must does not decide, two of three do."""
    row = Row("r", "a row", lambda _: Measured(), (MORE,))
    for values, expected in (
        ([0.1, 0.9, 0.9], Verdict.MET),
        ([0.1, 0.1, 0.9], Verdict.MISSED),
    ):
        measured = Measured()
        for value in values:
            measured.add("k", value)
        assert expected is Outcome(row, measured, 1.0).verdict(MORE)


def test_outcome_without_values_has_no_verdict() -> None:
    """A row that failed has neither met nor missed anything."""
    row = Row("r", "a row", lambda _: Measured(), (MORE,))
    assert Outcome(row, None, 1.0, "it broke").verdict(MORE) is None
