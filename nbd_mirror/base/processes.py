# SPDX-License-Identifier: BSD-3-Clause
"""What the kernel says of a process, which may be another user's."""

from __future__ import annotations

from pathlib import Path

__all__ = ["START_TIME", "STATE", "stat_fields"]

STATE, START_TIME = 0, 19  # fields, counted from the one behind the name


def stat_fields(pid: int) -> list[str]:
    """
    Return the fields of /proc/PID/stat behind the process's name.

    A process gives itself a name of any bytes, so it is cut off before they are read.

    Raises:
        OSError: there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return stat.rpartition(b")")[2].decode().split()
