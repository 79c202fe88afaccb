# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark's plots show the figures they are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.load import Figures
from benchmarks.model import MIB, BenchError
from benchmarks.plots import (
    BLOCK_SIZES,
    DEPTHS,
    LABELS,
    SET_UPS,
    Timeline,
    binned,
    draw_latency,
    draw_resync,
    draw_throughput,
    read_latencies,
)

PNG = b"\x89PNG\r\n\x1a\n"


def rounds_of(points: tuple[int, ...]) -> list[dict[int, dict[str, Figures]]]:
    """Return three rounds in which every figure tells where it is from."""
    return [
        {
            point: {
                key: Figures(0, 1e6 * (point + bias + index), 0, point + bias, 0, 1)
                if index
                else Figures(0, 1e6 * (point + bias), 0, point + bias, 9 * point, 1)
                for index, key in enumerate(SET_UPS)
            }
            for point in points
        }
        for bias in (0, 2, 1)
    ]


def test_read_latencies_are_seconds_and_microseconds(tmp_path: Path) -> None:
    """A log of fio's has milliseconds of the wall clock, and nanoseconds."""
    log = tmp_path / "log"
    lines = ("1700000000250, 81000, 1, 4096, 0, 0", "1700000000251, 500, 0, 4, 8, 0")
    log.write_text("\n".join(lines) + "\n")
    expected = [(1700000000.25, 81.0), (1700000000.251, 0.5)]
    assert expected == read_latencies(log)


def test_binned_latencies_are_ranked_in_their_piece_of_time() -> None:
    """One slow request of a hundred is the p99 and not the p50; gaps stay gaps."""
    calm = [(10.0 + n / 1000, 1.0) for n in range(99)]
    found = binned([*calm, (10.05, 900.0), (10.31, 5.0)], 0.1)
    assert [(1.0, 900.0), (5.0, 5.0)] == [one[1:] for one in found]
    assert [10.05, 10.35] == pytest.approx([one[0] for one in found])


def test_latency_has_a_curve_of_medians_for_each_set_up(tmp_path: Path) -> None:
    """p50 on the left, p99 on the right; it can be saved as PNG."""
    figure = draw_latency(rounds_of(DEPTHS))
    left, right = figure.axes
    assert list(LABELS.values()) == [line.get_label() for line in left.lines]
    for line in left.lines:
        assert list(DEPTHS) == list(line.get_xdata())
        assert [depth + 1 for depth in DEPTHS] == list(line.get_ydata())
    assert [9 * depth for depth in DEPTHS] == list(right.lines[0].get_ydata())
    figure.savefig(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_throughput_is_in_megabytes_by_block_size() -> None:
    """Each set-up has its own curve."""
    (axes,) = draw_throughput(rounds_of(BLOCK_SIZES)).axes
    for index, line in enumerate(axes.lines):
        expected = [size + 1 + index for size in BLOCK_SIZES]
        assert expected == pytest.approx(list(line.get_ydata()))


def test_resync_is_drawn_above_the_latency_on_one_clock() -> None:
    """Both begin at the moment all became dirty; what lies outside is left out."""
    line = Timeline([98.0, 100.0, 102.0, 104.0], [1.0, 0.0, 0.5, 1.0], 100.0, 104.0)
    bins = [(90.0, 1.0, 2.0), (99.0, 3.0, 4.0), (103.0, 5.0, 6.0), (110.0, 7.0, 8.0)]
    figure = draw_resync(line, bins, 2048 * MIB)
    upper, lower = figure.axes
    assert [-2.0, 0.0, 2.0, 4.0] == list(upper.lines[0].get_xdata())
    assert [100.0, 0.0, 50.0, 100.0] == list(upper.lines[0].get_ydata())
    p99, p50 = lower.lines
    assert [-1.0, 3.0] == list(p99.get_xdata()) == list(p50.get_xdata())
    assert [4.0, 6.0] == list(p99.get_ydata())
    assert [3.0, 5.0] == list(p50.get_ydata())
    assert any("537 MB/s" in text.get_text() for text in figure.texts)
    with pytest.raises(BenchError, match="do not overlap"):
        draw_resync(line, bins[-1:], MIB)
