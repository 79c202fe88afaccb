# SPDX-License-Identifier: BSD-3-Clause
"""The virtual machine's row: what the guest prints becomes ratios, or an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.model import BenchError
from benchmarks.rows import chosen
from benchmarks.vm import gather, parse

RATES = {"ours": 1000.0, "md": 800.0, "drbd": 2000.0, "one_copy": 1250.0, "relay": 1e3}
USED = {"machine": 500.0, "switches": 12.0}


def measured(rounds: int) -> list[dict[str, Any]]:
    """Return what a guest measures; the second round's machine is half as quick."""
    return [
        {
            "round": number,
            "depth": depth,
            "set_up": key,
            "iops": rate * depth / (number + 1),
            "used": USED,
        }
        for number in range(rounds)
        for depth in (1, 16)
        for key, rate in RATES.items()
    ]


def test_output_other_lines_are_passed_over() -> None:
    """The guest also says what it does; only its measurements count."""
    lines = [f"measured {json.dumps(one)}" for one in measured(1)]
    text = "\n".join(["=== 0.1 s: setting up md", *lines, "code measured 3"])
    assert parse(text) == measured(1)


def test_ratio_is_taken_within_a_round() -> None:
    """A machine that becomes slow in the second round changes no ratio."""
    found = gather(measured(2), 2)
    assert found.values["qd1_md"] == [1.25, 1.25]
    assert found.values["qd16_drbd"] == [0.5, 0.5]
    assert any("ours 750/s with 12.0 context" in note for note in found.notes)


def test_every_claim_of_the_row_has_its_values() -> None:
    """A claim without a value would be judged by nothing."""
    (row,) = chosen(["vm"])
    assert gather(measured(1), 1).values.keys() == {one.key for one in row.claims}


def test_missing_measurement_is_an_error() -> None:
    """A guest that came to its end early has measured nothing."""
    with pytest.raises(BenchError, match="relay QD16 of round 2 is missing"):
        gather(measured(2)[:-1], 2)
