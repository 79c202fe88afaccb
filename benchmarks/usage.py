# SPDX-License-Identifier: BSD-3-Clause
"""
What is used: time on a core by processes, and switches of context on the machine.

Read from /proc before and after, so it costs the measurement nothing. Switches are the
figure to look at first where requests are small: each is a wait, and a wake-up that
somebody paid for. They are the whole machine's, the client's included, because a
process keeps none for threads that have ended, and nbdkit's end with their connection.
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
    Return the time that processes have used so far, ended threads' too, in µs.

    Raises:
        OSError: one of them is not there.
    """
    ticks = 0
    for pid in pids:
        stat = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        ticks += int(stat[11]) + int(stat[12])  # user, system
    return ticks * 1e6 / os.sysconf("SC_CLK_TCK")


def switches() -> int:
    """Return how often the machine has switched context since it was started."""
    found = _SWITCHES.search((PROC / "stat").read_text())
    assert found is not None
    return int(found[1])
