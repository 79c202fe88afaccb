# SPDX-License-Identifier: BSD-3-Clause
"""
The resources used: CPU time of processes, and context switches of the machine.

They are read from /proc before and after, so it costs the measurement nothing. With
small requests, look at the context switches first: each is a wait, and a wake-up with
its cost. They are those of the whole machine, including the client, because a process
keeps no count for threads that have ended, and nbdkit's end with their connection.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["cpu_us", "switches"]

PROC = Path("/proc")
_SWITCHES = re.compile(r"^ctxt (\d+)$", re.MULTILINE)


def cpu_us(pids: Iterable[int]) -> float:
    """
    Return the CPU time of processes so far, with that of ended threads, in µs.

    Raises:
        OSError: one of them does not exist.
    """
    ticks = 0
    for pid in pids:
        stat = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        ticks += int(stat[11]) + int(stat[12])  # user, system
    return ticks * 1e6 / os.sysconf("SC_CLK_TCK")


def switches() -> int:
    """Return the number of context switches since the machine was started."""
    found = _SWITCHES.search((PROC / "stat").read_text())
    assert found is not None
    return int(found[1])
