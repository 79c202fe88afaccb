# SPDX-License-Identifier: BSD-3-Clause
"""
The load, and one measurement of it: fio's nbd engine, one connection per server.

fio prints a line of its own before the JSON, so its answer goes to a file and is read
from the first brace on.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .command import held_back
from .model import KIB, MIB, BenchError

__all__ = [
    "LATENCY_LOG",
    "RAMP_S",
    "Figures",
    "Fio",
    "Workload",
    "fill",
    "measure",
    "scatter",
]

RAMP_S = 0.5  # not counted: connections, first faults, caches
SLACK_S = 30.0  # fio's own start and end
FILL_TIMEOUT_S = 300.0
LATENCY_LOG = "latency_clat.1.log"  # of a Fio that was started with latency_log


@dataclass(frozen=True, slots=True)
class Workload:
    """
    The load that fio generates.

    Args:
        pattern: fio's rw.
        block_size: bytes.
        depth: requests under way.
        fsync_every: a flush after this many writes; 0: never.
        reads: per cent of a mixed pattern.
    """

    pattern: str
    block_size: int
    depth: int
    fsync_every: int = 0
    reads: int = 70

    @classmethod
    def writes(cls, depth: int, *, fsync_every: int = 0) -> Workload:
        """Write 4 KiB at random places."""
        return cls("randwrite", 4 * KIB, depth, fsync_every)

    def at(self, *, depth: int = 0, block_size: int = 0) -> Workload:
        """Return the same, deeper or larger."""
        return replace(
            self,
            depth=depth or self.depth,
            block_size=block_size or self.block_size,
        )

    @property
    def side(self) -> str:
        """The part of fio's report that has it."""
        if self.pattern in ("rw", "randrw"):
            return "mixed"
        return "read" if "read" in self.pattern else "write"

    def options(self) -> list[str]:
        """Return it as fio's options."""
        found = [
            f"--rw={self.pattern}",
            f"--bs={self.block_size}",
            f"--iodepth={self.depth}",
            "--norandommap",
            "--randrepeat=0",
        ]
        if self.fsync_every:
            found.append(f"--fsync={self.fsync_every}")
        if self.side == "mixed":
            found += [f"--rwmixread={self.reads}", "--unified_rw_reporting=1"]
        return found


@dataclass(frozen=True, slots=True)
class Figures:
    """The result of one measurement; latencies in microseconds."""

    iops: float
    bytes_per_s: float
    mean_us: float
    p50_us: float
    p99_us: float
    requests: float

    @classmethod
    def of(cls, job: dict[str, Any], workload: Workload) -> Figures:
        """Read them from fio's report of a job."""
        side = job[workload.side]
        if not side["total_ios"]:
            raise BenchError("fio made no request")
        latency = side["clat_ns"]
        return cls(
            iops=side["iops"],
            bytes_per_s=side["bw_bytes"],
            mean_us=latency["mean"] / 1000,
            p50_us=latency["percentile"]["50.000000"] / 1000,
            p99_us=latency["percentile"]["99.000000"] / 1000,
            requests=side["total_ios"],
        )

    @classmethod
    def mean(cls, several: Sequence[Figures]) -> Figures:
        """Return the mean of each figure: the view of one of several clients."""
        names = [one.name for one in fields(cls)]
        count = len(several)
        return cls(
            **{name: sum(getattr(x, name) for x in several) / count for name in names}
        )

    def as_dict(self) -> dict[str, float]:
        """Return the figures for JSON."""
        return asdict(self)


class Fio:
    """
    A running fio; `wait` for its report, or `end` it.

    Args:
        uri: of the server.
        folder: its own, for its answer and logs while it runs.
        latency_log: store each request's latency in LATENCY_LOG, by the wall clock.
    """

    def __init__(
        self, uri: str, folder: Path, *options: str, latency_log: bool = False
    ) -> None:
        self.uri = uri
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._output = folder / "fio.json"
        self._output.unlink(missing_ok=True)
        self._words = folder / "fio.log"
        # Its job is a thread: a process would survive a killed fio.
        command = ["fio", "--thread", "--name=bench", "--ioengine=nbd"]
        command += [f"--uri={uri}", *options]
        command += [f"--output={self._output}", "--output-format=json"]
        if latency_log:
            command += [f"--write_lat_log={folder / 'latency'}", "--log_unix_epoch=1"]
        process: subprocess.Popen[bytes] | None = None
        try:
            # A Ctrl-C between fio's start and the assignment would leave it running.
            with held_back(), self._words.open("wb") as out:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    start_new_session=True,
                )
        except KeyboardInterrupt:
            if process:
                _kill(process)
            raise
        self._process = process

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Return the report of its job; raises BenchError if there is none."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise BenchError(
                f"fio on {self.uri} did not end within {timeout_s:g} s"
            ) from None
        finally:
            self.end()
        text = self._output.read_text(errors="replace") if self._output.exists() else ""
        if code != 0 or "{" not in text:
            words = self._words.read_text(errors="replace").strip()
            raise BenchError(f"fio on {self.uri} failed: {words or text.strip()}")
        job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        if job["error"]:
            raise BenchError(f"fio on {self.uri} got error {job['error']}")
        return job

    def interrupt(self) -> None:
        """Make it end now and write its logs; raises BenchError if it does not."""
        if not self.running:
            self.wait(1.0)  # it failed, and reports why
            raise BenchError(f"fio on {self.uri} ended too early")
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(SLACK_S)
        except subprocess.TimeoutExpired:
            raise BenchError(f"fio on {self.uri} does not end") from None

    def end(self) -> None:
        """Kill it if it still runs."""
        _kill(self._process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()


def _run(fio: Fio, timeout_s: float) -> dict[str, Any]:
    try:
        return fio.wait(timeout_s)
    finally:
        fio.end()


def fill(uri: str, folder: Path, size: int) -> None:
    """Write the first *size* bytes, so that no measurement includes allocations."""
    options = ["--rw=write", f"--bs={MIB}", "--iodepth=8", f"--size={size}"]
    options += ["--end_fsync=1", "--refill_buffers"]
    _run(Fio(uri, folder / "fio", *options), FILL_TIMEOUT_S)


def scatter(uri: str, folder: Path, size: int, count: int, block_size: int) -> None:
    """Write *count* different blocks at random places in *size* bytes."""
    options = ["--rw=randwrite", f"--bs={block_size}", "--iodepth=4"]
    options += [f"--size={size}", f"--io_size={count * block_size}", "--randrepeat=0"]
    _run(Fio(uri, folder / "fio", *options, "--refill_buffers"), FILL_TIMEOUT_S)


def measure(
    uris: Sequence[str], folder: Path, workload: Workload, size: int, seconds: float
) -> Figures:
    """
    Run *workload* for *seconds* on the disks at *uris*, one client each, in parallel.

    Args:
        folder: for fio's answers while it runs.
        size: of the range that is used, bytes.
    Returns:
        The view of one client: the mean over them.
    Raises:
        BenchError: fio failed, got an I/O error, or did nothing.
    """
    options = [
        *workload.options(),
        f"--size={size}",
        "--time_based",
        f"--runtime={round(seconds * 1000)}ms",
        f"--ramp_time={round(RAMP_S * 1000)}ms",
    ]
    running: list[Fio] = []
    deadline = time.monotonic() + seconds + RAMP_S + SLACK_S
    try:
        for number, uri in enumerate(uris):
            running.append(Fio(uri, folder / f"fio{number}", *options))
        jobs = [fio.wait(max(deadline - time.monotonic(), 0.1)) for fio in running]
    finally:
        for fio in running:
            fio.end()
    return Figures.mean([Figures.of(job, workload) for job in jobs])
