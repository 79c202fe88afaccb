# SPDX-License-Identifier: BSD-3-Clause
"""
What was counted, and how it compares: pure, apart from nothing it is given.

Instructions, because they are the same on a machine that is idle and on one that is
not: two runs of one build differ by a few in a million, so that a change of one
percent is a fact about the code. Times are kept beside them and never judged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Change",
    "CountError",
    "Figures",
    "as_json",
    "compare",
    "differing_tools",
    "figures",
    "from_json",
    "parse_dumps",
    "parse_lines",
    "read",
    "uncompared",
]

TRIGGER = re.compile(r"^desc: Trigger: Client Request: (.+)$", re.MULTILINE)
TOTALS = re.compile(r"^totals: (\d+)$", re.MULTILINE)
# A count depends on these as much as on our code.
TOOLS = ("compiler", "flags", "valgrind", "libisal", "cpu")
# What reading a file of another kind raises.
NO_COUNTS = (
    *(ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, RecursionError),
)


class CountError(Exception):
    """What a tool printed, or a file holds, is not what it should be."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one case: instructions a call, and nanoseconds a call if they were taken."""

    instructions: float
    ns: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A case in two runs; *percent* is positive where it became worse."""

    case: str
    before: float
    after: float

    @property
    def percent(self) -> float:
        """How many percent more instructions it takes now."""
        return (self.after - self.before) / self.before * 100

    def is_worse(self, limit_percent: float) -> bool:
        """Tell whether it takes more than *limit_percent* more."""
        return self.percent > limit_percent


def parse_dumps(texts: Iterable[str]) -> dict[str, int]:
    """
    Return the instructions of each case's batch from callgrind's dumps.

    The dump at the program's end, which no case has asked for, is passed over.
    """
    found: dict[str, int] = {}
    for text in texts:
        name = TRIGGER.search(text)
        if name is None:
            continue
        totals = TOTALS.search(text)
        if totals is None:
            raise CountError(f"callgrind's dump of {name[1]} has no totals")
        if name[1] in found:
            raise CountError(f"callgrind dumped {name[1]} twice")
        found[name[1]] = int(totals[1])
    return found


def parse_lines(text: str) -> dict[str, tuple[int, float]]:
    """Return what micro printed: by case the calls of a batch, and ns a call."""
    found = {}
    for line in text.splitlines():
        try:
            name, calls, ns = line.split()
            found[name] = (int(calls), float(ns))
        except ValueError:
            raise CountError(f"micro printed {line!r}") from None
    return found


def figures(
    totals: Mapping[str, int],
    counted: Mapping[str, tuple[int, float]],
    timed: Mapping[str, tuple[int, float]],
) -> dict[str, Figures]:
    """
    Put together what was counted under callgrind and timed without it.

    Args:
        totals: instructions of a batch.
        counted: what micro printed under callgrind.
        timed: what it printed without; may be empty.
    Raises:
        CountError: a case was run and not counted.
    """
    missing = counted.keys() - totals.keys()
    if missing:
        raise CountError(f"callgrind counted nothing of {', '.join(sorted(missing))}")
    return {
        name: Figures(
            instructions=round(totals[name] / calls, 3),
            ns=timed[name][1] if name in timed else None,
        )
        for name, (calls, _) in counted.items()
    }


def as_json(cases: Mapping[str, Figures], about: Mapping[str, str]) -> str:
    """Return the text of a file that `from_json` reads."""
    by_name = {
        name: {"instructions": one.instructions}
        | ({} if one.ns is None else {"ns": one.ns})
        for name, one in cases.items()
    }
    whole = {"about": dict(about), "cases": by_name}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> tuple[dict[str, Figures], dict[str, str]]:
    """
    Read what `as_json` wrote: the cases, and what they were counted with.

    Raises:
        CountError: it is something else.
    """
    try:
        whole: dict[str, Any] = json.loads(text)
        cases = {
            name: Figures(float(one["instructions"]), one.get("ns"))
            for name, one in whole["cases"].items()
        }
        about = {str(key): str(value) for key, value in whole["about"].items()}
    except NO_COUNTS as error:
        raise CountError(f"no counts of ours: {error!r}") from None
    for name, one in cases.items():
        if not 0 < one.instructions < math.inf:  # nor is NaN a count
            raise CountError(f"no counts of ours: {name} has {one.instructions:g}")
    return cases, about


def read(path: Path) -> tuple[dict[str, Figures], dict[str, str]]:
    """Read a file that holds what `as_json` wrote; raises CountError if not."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise CountError(f"{path}: no counts of ours: it is no UTF-8 text") from None
    except CountError as error:
        raise CountError(f"{path}: {error}") from None


def compare(
    before: Mapping[str, Figures], after: Mapping[str, Figures]
) -> list[Change]:
    """Return how the cases that both runs have changed, in the order of *after*."""
    return [
        Change(name, before[name].instructions, one.instructions)
        for name, one in after.items()
        if name in before
    ]


def uncompared(
    before: Mapping[str, Figures], after: Mapping[str, Figures], *, whole: bool
) -> list[str]:
    """
    Return the cases that should have been compared, and were not.

    Args:
        whole: *after* is a run of all cases: what it lacks is gone. Else it is only
            asked for anything that both have.
    """
    if whole:
        return [name for name in before if name not in after]
    return [] if before.keys() & after.keys() else list(after)


def differing_tools(
    before: Mapping[str, str], after: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Return, with both values, what a difference may be due to beside our code."""
    return [
        (tool, before.get(tool, "unknown"), after.get(tool, "unknown"))
        for tool in TOOLS
        if before.get(tool) != after.get(tool)
    ]
