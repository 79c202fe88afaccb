# SPDX-License-Identifier: BSD-3-Clause
"""
The workloads, and one measurement of one: fio's nbd engine, one connection.

fio prints a line of its own ahead of the JSON, so its answer goes to a file and is
read from the first brace on.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from servers import BenchError

__all__ = ["WORKLOADS", "Figures", "Workload", "fill", "measure"]

KIB, MIB = 1 << 10, 1 << 20
RAMP_S = 0.5  # not counted: connections, first faults, caches
SLACK_S = 30.0  # fio's own start and end


@dataclass(frozen=True, slots=True)
class Workload:
    """What fio does: *fsync_every* counts writes, 0 is never."""

    key: str
    title: str
    pattern: str  # fio's rw
    block_size: int  # bytes
    depth: int
    fsync_every: int = 0
    optional: bool = False


WORKLOADS = (
    Workload("write_4k_qd1", "4K write QD1", "randwrite", 4 * KIB, 1),
    Workload("write_4k_qd16", "4K write QD16", "randwrite", 4 * KIB, 16),
    Workload(
        *("write_4k_qd64", "4K write QD64", "randwrite", 4 * KIB, 64),
        optional=True,
    ),
    Workload("write_1m_qd8", "1M write QD8", "write", MIB, 8),
    Workload("read_4k_qd16", "4K read QD16", "randread", 4 * KIB, 16),
    Workload(
        *("fsync_4k_qd16", "4K fsync QD16", "randwrite", 4 * KIB, 16),
        fsync_every=32,
    ),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one measurement gave; latencies in microseconds."""

    iops: float
    bytes_per_s: float
    mean_us: float
    p50_us: float
    p99_us: float
    requests: int

    def as_dict(self) -> dict[str, float]:
        """Return the figures for JSON."""
        return asdict(self)


def _fio(uri: str, folder: Path, timeout_s: float, *options: str) -> dict[str, Any]:
    output = folder / "fio.json"
    command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", *options]
    command += [f"--output={output}", "--output-format=json"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"fio on {uri} did not end within {timeout_s:g} s") from None
    text = output.read_text(errors="replace") if output.exists() else ""
    output.unlink(missing_ok=True)
    if done.returncode != 0 or "{" not in text:
        raise BenchError(f"fio on {uri} failed: {done.stderr.strip() or text.strip()}")
    job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    if job["error"]:
        raise BenchError(f"fio on {uri} got error {job['error']}")
    return job


def fill(uri: str, folder: Path, size: int) -> None:
    """Write the whole disk once: no measurement shall pay for first allocations."""
    options = ("--rw=write", "--bs=1m", "--iodepth=8", f"--size={size}")
    _fio(uri, folder, 300.0, *options)


def measure(
    uri: str, folder: Path, workload: Workload, size: int, seconds: float
) -> Figures:
    """
    Run *workload* for *seconds* on the disk at *uri*.

    Args:
        folder: where fio's answer may be kept meanwhile.
        size: of the disk, bytes.
    Raises:
        BenchError: fio failed, got an I/O error, or did nothing.
    """
    options = [
        f"--rw={workload.pattern}",
        f"--bs={workload.block_size}",
        f"--iodepth={workload.depth}",
        f"--size={size}",
        "--time_based",
        f"--runtime={round(seconds * 1000)}ms",
        f"--ramp_time={round(RAMP_S * 1000)}ms",
        "--norandommap",
        "--randrepeat=0",
    ]
    if workload.fsync_every:
        options.append(f"--fsync={workload.fsync_every}")
    job = _fio(uri, folder, seconds + RAMP_S + SLACK_S, *options)
    side = job["read" if "read" in workload.pattern else "write"]
    if not side["total_ios"]:
        raise BenchError(f"fio on {uri} made no request")
    latency = side["clat_ns"]
    return Figures(
        iops=side["iops"],
        bytes_per_s=side["bw_bytes"],
        mean_us=latency["mean"] / 1000,
        p50_us=latency["percentile"]["50.000000"] / 1000,
        p99_us=latency["percentile"]["99.000000"] / 1000,
        requests=side["total_ios"],
    )
