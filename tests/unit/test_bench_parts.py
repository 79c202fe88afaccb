# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark's parts that compute or look at files, without any server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.images import data_runs, random_data, same_content
from benchmarks.link import LATE_S, Line
from benchmarks.load import Figures, Workload
from benchmarks.model import MIB, BenchError
from benchmarks.resync_rows import written_bytes

# --- the link ------------------------------------------------------------


def test_line_piece_arrives_after_its_bytes_and_the_delay() -> None:
    """An idle line begins with the piece."""
    line = Line(rate=1000, delay_s=0.5)
    assert (11.0, 11.5) == line.send(10.0, 1000)
    assert (20.1, 20.6) == line.send(20.0, 100)


def test_line_pieces_follow_each_other() -> None:
    """Two at once share the rate: the second waits for the first."""
    line = Line(rate=1000, delay_s=0.5)
    line.send(10.0, 1000)
    assert (12.0, 12.5) == line.send(10.2, 1000)


def test_line_waking_up_late_costs_nothing_if_bytes_had_waited() -> None:
    """Up to LATE_S; what came after an idle time begins when it came."""
    line = Line(rate=1000, delay_s=0.0)
    line.send(10.0, 1000)
    late = 11.0 + LATE_S / 2
    assert pytest.approx(12.0) == line.send(late, 1000, waited=True)[0]
    assert pytest.approx(13.0 + LATE_S) == line.send(12.0 + LATE_S, 1000)[0]
    much = 14.0 + 10 * LATE_S
    assert pytest.approx(much + 1 - LATE_S) == line.send(much, 1000, waited=True)[0]


# --- images --------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give a sparse image with two pieces of data."""
    path = tmp_path / "one"
    path.touch()
    os.truncate(path, 64 * MIB)
    random_data(path, [(0, MIB), (40 * MIB, 2 * MIB)])
    return path


def copy_of(path: Path) -> Path:
    """Return a copy that has no hole."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    return other


def test_random_data_lies_where_it_was_asked_for(image: Path) -> None:
    """The rest stays a hole, and no page of it is zero."""
    with image.open("rb") as file:
        runs = list(data_runs(file.fileno()))
    assert [(0, MIB), (40 * MIB, 42 * MIB)] == runs
    content = image.read_bytes()
    pages = [content[at : at + 4096] for at in range(0, MIB, 4096)]
    assert all(any(page) for page in pages)


def test_same_content_holes_are_zeroes(image: Path) -> None:
    """A copy without a hole holds the same."""
    assert same_content(image, copy_of(image))
    assert same_content(copy_of(image), image)


@pytest.mark.parametrize("at", [0, MIB - 1, 20 * MIB, 42 * MIB - 1, 64 * MIB - 1])
def test_same_content_one_byte_differs(image: Path, at: int) -> None:
    """Wherever it is, also in what is a hole in the other."""
    other = copy_of(image)
    with other.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert not same_content(image, other)
    assert not same_content(other, image)


def test_same_content_sizes_differ(image: Path) -> None:
    """A longer image is another one, though only zeroes are more."""
    other = copy_of(image)
    os.truncate(other, 65 * MIB)
    assert not same_content(image, other)


# --- what servers and fio say --------------------------------------------


def test_written_bytes_counts_writes_alone(tmp_path: Path) -> None:
    """Answers, zeroes and reads are no payload that was sent."""
    log = tmp_path / "log"
    log.write_text(
        "2026-01-01 10:00:00.1 connection=1 Write id=1 offset=0x0 count=0x10000 "
        "fua=0 ...\n"
        "2026-01-01 10:00:00.2 connection=1 ...Write id=1 return=0\n"
        "2026-01-01 10:00:00.3 connection=1 Zero id=2 offset=0x10000 count=0x10000 "
        "trim=1 fua=0 fast=0 ...\n"
        "2026-01-01 10:00:00.4 connection=1 Read id=3 offset=0x0 count=0x1000 ...\n"
        "2026-01-01 10:00:00.5 connection=2 Write id=1 offset=0x0 count=0x1000 "
        "fua=1 ...\n"
    )
    assert 0x11000 == written_bytes(log)


def side(rate: float, total: int = 10) -> dict[str, object]:
    """Return what fio reports of one direction."""
    latency = {"mean": 2000.0, "percentile": {"50.000000": 1000, "99.000000": 5000}}
    return {
        "iops": rate,
        "bw_bytes": 4096 * rate,
        "total_ios": total,
        "clat_ns": latency,
    }


def test_figures_are_those_of_the_direction() -> None:
    """Reads of a read load, both of a mixed one; nanoseconds become microseconds."""
    job = {"read": side(1.0), "write": side(2.0), "mixed": side(3.0)}
    rates = {"randread": 1.0, "write": 2.0, "randwrite": 2.0, "randrw": 3.0}
    for pattern, rate in rates.items():
        found = Figures.of(job, Workload(pattern, 4096, 1))
        assert Figures(rate, 4096 * rate, 2.0, 1.0, 5.0, 10) == found


def test_figures_of_nothing_are_an_error() -> None:
    """A server that answers nothing has no rate."""
    with pytest.raises(BenchError, match="no request"):
        Figures.of({"write": side(0.0, total=0)}, Workload("write", 4096, 1))


def test_figures_mean_is_one_client_of_several() -> None:
    """Two at once: what one of them saw."""
    one, other = Figures(*[1.0] * 6), Figures(*[3.0] * 6)
    assert Figures(*[2.0] * 6) == Figures.mean([one, other])
