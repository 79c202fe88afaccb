# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmark prints and writes, from outcomes that are made up."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from unit.pages import rows as table_rows

from benchmarks import report
from benchmarks.model import Claim, Measured, Outcome, Row

ABOUT = {
    "cpu": "a processor",
    "cores": 2,
    "memory_mib": 4096,
    "kernel": "6.1",
    "images_on": "tmpfs",
    "disk": "ext4",
    "commit": "abc",
    "nbdkit": "nbdkit 1",
    "libnbd": "1",
    "fio": "fio-3",
    "qemu": "qemu 7",
    "python": "3.11",
    "time": "2026-01-01",
}
OPTIONS = {"rounds": 3, "seconds": 1.0, "size": 64}
CLAIMS = (
    Claim("rate", "against qemu", 1.6, 2.2),
    Claim("rss", "resident", 256, 128, unit="MiB", lower=True),
    Claim("told", "its rate", unit="MB/s"),
)
ROW = Row("r", "A row", lambda _: Measured(), CLAIMS)


def measured(rate: float = 1.7, rss: float = 300.0) -> Outcome:
    """Return an outcome with three rounds."""
    found = Measured(notes=["a note"], files=[Path("x/p.png")])
    for step in (-0.1, 0.0, 0.1):
        found.add("rate", rate + step)
        found.add("rss", rss + 10 * step)
        found.add("told", 1234.0 + step)
    return Outcome(ROW, found, 2.5)


FAILED = Outcome(ROW, None, 0.1, "fio is gone\nand more")


def test_markdown_table_has_a_line_for_each_claim() -> None:
    """Bounds with their direction, median with spread, the verdict in words."""
    text = report.as_markdown([measured()], ABOUT, OPTIONS)
    assert [
        [
            "A row, against qemu (`r`)",
            "\N{GREATER-THAN OR EQUAL TO} 1.6",
            "\N{GREATER-THAN OR EQUAL TO} 2.2",
            "1.70 (1.60 .. 1.80)",
            "met",
        ],
        [
            "A row, resident (`r`)",
            "\N{LESS-THAN OR EQUAL TO} 256 MiB",
            "\N{LESS-THAN OR EQUAL TO} 128 MiB",
            "300 MiB (299 MiB .. 301 MiB)",
            "**MISSED**",
        ],
        [
            "A row, its rate (`r`)",
            "-",
            "-",
            "1,234 MB/s (1,234 MB/s .. 1,234 MB/s)",
            "",
        ],
    ] == list(table_rows(text))
    assert "- `r`: a note" in text
    assert "a processor, 2 cores" in text


def test_markdown_failed_row_has_no_figures() -> None:
    """It stands in the table as failed, and says why."""
    text = report.as_markdown([FAILED], ABOUT, OPTIONS)
    lines = list(table_rows(text))
    assert [["-", "**FAILED**"]] * 3 == [line[3:] for line in lines]
    assert "- `r` failed: fio is gone" in text


def test_missed_names_what_missed_its_must() -> None:
    """Neither a failed row nor a goal that is not reached is one."""
    assert ["A row, resident"] == report.missed([measured(), FAILED])
    assert [] == report.missed([measured(rss=200.0)])
    both = ["A row, against qemu", "A row, resident"]
    assert both == report.missed([measured(rate=1.0)])


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (1.0004, "x", "1.000"),
        (0.784, "x", "0.78"),
        (12.3456, "x", "12.35"),
        (0.3049, "s", "0.30 s"),
        (127.6, "MiB", "128 MiB"),
        (1.0199, "GiB", "1.02 GiB"),
        (1500.4, "MB/s", "1,500 MB/s"),
    ],
)
def test_figure_is_as_exact_as_it_is_of_use(
    value: float, unit: str, expected: str
) -> None:
    """Near 1, where bounds lie close together, a ratio has three digits."""
    assert expected == report.figure(value, unit)


def test_json_has_every_value_and_can_be_read_back() -> None:
    """Raw values, bounds, verdicts and errors are all in it."""
    answer = report.as_json([measured(), FAILED], ABOUT, OPTIONS)
    assert answer == json.loads(json.dumps(answer))
    first, second = answer["rows"]
    verdicts = [claim["verdict"] for claim in first["claims"]]
    assert ["met", "missed", "reported"] == verdicts
    assert [1.6, 1.7, 1.8] == pytest.approx(first["claims"][0]["values"])
    assert 1.7 == first["claims"][0]["median"]
    assert ["p.png"] == first["files"]
    assert ["failed"] * 3 == [claim["verdict"] for claim in second["claims"]]
    assert "fio is gone\nand more" == second["error"]


@pytest.mark.parametrize("terminal", [True, False])
def test_show_has_colour_only_on_a_terminal(terminal: bool) -> None:
    """The words are the same; escape sequences would spoil a file."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        width=120,
    )
    report.show(console, [measured(), FAILED], ABOUT)
    text = stream.getvalue()
    assert terminal == ("\x1b[" in text)
    for word in ("MISSED", "met", "FAILED", "a note", "fio is gone"):
        assert word in text
