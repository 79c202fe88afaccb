# SPDX-License-Identifier: BSD-3-Clause
"""
The benchmark runs from end to end, with disks too small to mean anything.

That it runs, compares, writes its files and cleans up is tested; no figure is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import support

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("benchmark")]

SHM = Path("/dev/shm")
COMMAND = (sys.executable, "-m", "benchmarks.bench")
TINY = ("--rounds", "2", "--seconds", "0.1", "--size", "64")


def folders() -> set[Path]:
    """Return the folders in memory that our benchmark's processes work in now."""
    said = " ".join(support.marked_processes().values())
    return {SHM / name for name in re.findall(r"nbd-mirror-bench\.\w+", said)}


def left(seen: set[Path]) -> list[Path]:
    """Return which of the folders are still there. Other users have theirs."""
    assert seen
    return [folder for folder in seen if folder.exists()]


@pytest.fixture(autouse=True)
def _able() -> None:
    support.requires_program("fio", "qemu-storage-daemon", "nbdcopy")
    support.requires(os.access(SHM, os.W_OK), f"{SHM} cannot be written")


def test_one_row_is_measured_and_written_down(tmp_path: Path) -> None:
    """A row by name: its ratio in JSON and Markdown, nothing left in memory."""
    command = [*COMMAND, *TINY, "--output", str(tmp_path), "degraded_4k_qd16"]
    process = subprocess.Popen(
        command,
        cwd=support.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    support.wait_until(folders, "the benchmark to begin")
    seen = folders()
    out, err = process.communicate()
    assert process.returncode == 0, err
    (row,) = json.loads((tmp_path / "partial.json").read_text())["rows"]
    assert ("degraded_4k_qd16", "") == (row["key"], row["error"])
    (claim,) = row["claims"]
    ratios = [
        one["degraded"]["iops"] / one["one_copy"]["iops"] for one in row["rounds"]
    ]
    assert len(ratios) == 2
    assert ratios == claim["values"]
    assert min(ratios) > 0
    assert "`degraded_4k_qd16`" in (tmp_path / "partial.md").read_text()
    assert "remote lost" in out
    assert "\x1b" not in out
    assert not left(seen)


def test_interrupted_leaves_nothing(tmp_path: Path) -> None:
    """SIGINT while servers and fio run: exit status 130, and all are gone."""
    command = [*COMMAND, "--seconds", "60", "--size", "64"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path), "write_4k_qd1"],
        cwd=support.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def measuring() -> bool:
        return any("--runtime=" in one for one in support.marked_processes().values())

    support.wait_until(measuring, "fio to measure")
    seen = folders()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert b"interrupted" in said
    assert not measuring()
    assert not left(seen)


def test_no_such_row_is_wrong_usage() -> None:
    """It is said before anything is started."""
    done = subprocess.run(
        [*COMMAND, "no_such_row"],
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no_such_row" in done.stderr
