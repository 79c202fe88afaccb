# SPDX-License-Identifier: BSD-3-Clause
"""
The outcomes as a table for the terminal, as Markdown, and as JSON.

docs/performance.md includes the Markdown, so it has the same lines as the table, and no
part of it is written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .model import Claim, Outcome, Row, Spread, Verdict

__all__ = ["NOTES", "as_json", "as_markdown", "figure", "missed", "show"]

NOTES = (
    "4 KiB: at random places; 1 MiB: in sequence; QD: how many requests the client "
    "keeps under way.",
    "One client (fio's nbd engine, one connection), unix sockets, images on tmpfs, "
    "already written once; every mirror's remote is a plain nbdkit file on the same "
    "machine. So what is measured is the software's own cost: no disk and no network "
    "is in it, and an fsync to tmpfs is free.",
    "A ratio is taken within a round, between measurements that follow each other in "
    "an order that rotates. Client and servers share the cores.",
    "One copy: nbdkit's file plugin. Two copies: two of them and two clients at once, "
    "the figure of one. qemu: qemu-storage-daemon's write-blocking mirror.",
    "After each measurement every mirror was asked whether it still mirrors, ours "
    "whether it had throughout, and at its end its images were compared byte for byte, "
    "but md's and DRBD's.",
)
WORDS = {
    Verdict.GOAL: "goal",
    Verdict.MET: "met",
    Verdict.MISSED: "MISSED",
    Verdict.SHORT: "below the goal",
    Verdict.REPORTED: "",
}
FAILED = "FAILED"
COLOURS = {
    "goal": "bold green",
    "met": "green",
    "MISSED": "bold red",
    "below the goal": "yellow",
    FAILED: "bold red",
    "": "",
}


def figure(value: float, unit: str) -> str:
    """Return *value* in the form for a table."""
    digits = 2 if unit in ("x", "s", "GiB", "us") and abs(value) < 100 else 0
    if unit == "x":
        return f"{value:.3f}" if 0.95 < value < 1.15 else f"{value:.2f}"
    return f"{value:,.{digits}f} {unit}"


def bound(claim: Claim, value: float | None) -> str:
    """Return a minimum or a goal in the form for a table."""
    if value is None:
        return "-"
    sign = (
        "\N{LESS-THAN OR EQUAL TO}" if claim.lower else "\N{GREATER-THAN OR EQUAL TO}"
    )
    unit = "" if claim.unit == "x" else f" {claim.unit}"
    return f"{sign} {value:g}{unit}"


def title(row: Row, claim: Claim) -> str:
    """Return the title of a line."""
    return f"{row.title}, {claim.title}" if claim.title else row.title


def spread_words(claim: Claim, spread: Spread) -> str:
    """Return median, minimum and maximum."""
    least, most = (figure(x, claim.unit) for x in (spread.least, spread.most))
    return f"{figure(spread.median, claim.unit)} ({least} .. {most})"


def lines(outcomes: Sequence[Outcome]) -> Iterator[tuple[Outcome, Claim, str, str]]:
    """Yield for each claim its measured value, and its verdict or FAILED."""
    for outcome in outcomes:
        spreads = outcome.spreads()
        for claim in outcome.row.claims:
            verdict = outcome.verdict(claim)
            if verdict is None:
                yield outcome, claim, "-", FAILED
            else:
                measured = spread_words(claim, spreads[claim.key])
                yield outcome, claim, measured, WORDS[verdict]


def missed(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines that missed their minimum."""
    return [
        title(outcome.row, claim)
        for outcome in outcomes
        for claim in outcome.row.claims
        if outcome.verdict(claim) is Verdict.MISSED
    ]


def show(
    console: Console, outcomes: Sequence[Outcome], about: Mapping[str, Any]
) -> None:
    """Print the table, the notes, and the machine."""
    table = Table(title="Median of the rounds (least .. most)")
    for head in ("row", "must", "goal", "measured", ""):
        table.add_column(head, justify="left" if head in ("row", "") else "right")
    for outcome, claim, measured, word in lines(outcomes):
        must, goal = bound(claim, claim.must), bound(claim, claim.goal)
        name = Text(title(outcome.row, claim))
        table.add_row(name, must, goal, measured, Text(word, style=COLOURS[word]))
    if table.row_count:
        console.print(table)
    for outcome in outcomes:
        for note in outcome.measured.notes if outcome.measured else ():
            console.print(Text(f"{outcome.row.key}: {note}"))
        if outcome.error:
            console.print(
                Text(f"{outcome.row.key} failed: {outcome.error}", style="bold red")
            )
    console.print(Text(machine_line(about)))
    for note in NOTES:
        console.print(Text(f"- {note}"))


def machine_line(about: Mapping[str, Any]) -> str:
    """Describe the machine in a sentence."""
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['memory_mib']:,} MiB, kernel "
        f"{about['kernel']}; images on {about['images_on']}, disk {about['disk']}; "
        f"nbd_mirror {about['commit']}, {about['nbdkit']}, libnbd {about['libnbd']}, "
        f"{about['fio']}, {about['qemu']}, Python {about['python']}; {about['time']}."
    )


def as_markdown(
    outcomes: Sequence[Outcome],
    about: Mapping[str, Any],
    options: Mapping[str, Any],
) -> str:
    """Return the table for docs/performance.md, with the machine."""
    text = [
        "| row | must | goal | median (least .. most) | |",
        "|---|---|---|---|---|",
    ]
    for outcome, claim, measured, word in lines(outcomes):
        must, goal = bound(claim, claim.must), bound(claim, claim.goal)
        strong = f"**{word}**" if word in ("MISSED", FAILED) else word
        name = f"{title(outcome.row, claim)} (`{outcome.row.key}`)"
        text.append(f"| {name} | {must} | {goal} | {measured} | {strong} |")
    text += ["", f"{options['rounds']} rounds. {machine_line(about)}", ""]
    for outcome in outcomes:
        for note in outcome.measured.notes if outcome.measured else ():
            text.append(f"- `{outcome.row.key}`: {note}")
        if outcome.error:
            text.append(
                f"- `{outcome.row.key}` failed: {outcome.error.splitlines()[0]}"
            )
    return "\n".join(text).rstrip() + "\n"


def _claim_json(outcome: Outcome, claim: Claim) -> dict[str, Any]:
    verdict = outcome.verdict(claim)
    values = outcome.measured.values.get(claim.key, []) if outcome.measured else []
    spread = outcome.spreads().get(claim.key)
    return {
        **asdict(claim),
        "values": values,
        **(asdict(spread) if spread else {}),
        "verdict": verdict.value if verdict else "failed",
    }


def as_json(
    outcomes: Sequence[Outcome],
    about: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything, with raw figures, for the file; NaN becomes null."""
    answer: dict[str, Any] = _finite(_everything(outcomes, about, options))
    return answer


def _finite(value: Any) -> Any:
    """Return *value* for JSON, which has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _everything(
    outcomes: Sequence[Outcome],
    about: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "machine": dict(about),
        "options": dict(options),
        "notes": list(NOTES),
        "rows": [
            {
                "key": outcome.row.key,
                "title": outcome.row.title,
                "seconds": round(outcome.seconds, 1),
                "error": outcome.error,
                "claims": [_claim_json(outcome, one) for one in outcome.row.claims],
                "rounds": outcome.measured.rounds if outcome.measured else [],
                "notes": outcome.measured.notes if outcome.measured else [],
                "files": [
                    path.name
                    for path in (outcome.measured.files if outcome.measured else ())
                ],
            }
            for outcome in outcomes
        ],
    }
