# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark's table is the one that was asked for: no row, no bound left out."""

from __future__ import annotations

import pytest

from benchmarks.rows import ROWS, chosen

# Row, claim: must, goal, whether less is better.
WANTED = {
    ("write_4k_qd1", "qemu"): (1.05, 1.2, False),
    ("write_4k_qd16", "two_copies"): (0.8, 1.2, False),
    ("write_4k_qd16", "qemu"): (1.6, 2.2, False),
    ("write_4k_qd64", "two_copies"): (0.8, 1.2, False),
    ("write_4k_qd64", "qemu"): (1.6, 2.2, False),
    ("write_1m_qd8", "two_copies"): (0.7, 0.95, False),
    ("write_1m_qd8", "qemu"): (2.4, 3, False),
    ("flush_4k_qd16", "qemu"): (1.3, 2, False),
    ("read_4k_qd16", "one_copy"): (0.95, 1.0, False),
    ("read_1m", "one_copy"): (0.95, 1.0, False),
    ("degraded_4k_qd16", "one_copy"): (0.85, 0.95, False),
    ("activity_log", "off"): (0.97, 1.0, False),
    ("transport_4k_qd16", "libnbd"): (1.25, None, False),
    ("tls_4k_qd16", "tcp"): (0.75, 0.85, False),
    ("tls_1m_qd8", "relay"): (0.9, 1.0, False),
    ("nodes_4k_qd16", "tcp"): (0.95, 1.1, False),
    ("nodes_tls_4k_qd16", "nodes"): (0.75, 0.85, False),
    ("nodes_tls_1m_qd8", "relay"): (0.9, 1.0, False),
    ("resync_full", "nbdcopy"): (0.9, 1.1, False),
    ("resync_link", "share"): (0.8, 0.95, False),
    ("resync_scattered", "sent"): (1.1, 1.0, True),
    ("first_sync_sparse", "sent"): (1.02, None, True),
    ("first_sync_sparse", "time"): (None, 1.1, True),
    ("resync_p99", "p99"): (3, 1.5, True),
    ("memory_16t", "rss"): (256, 128, True),
    ("rate_16t", "small"): (0.95, 1.0, False),
    ("start_16t", "large"): (2, 0.3, True),
    ("vm", "qd1_md"): (1.0, None, False),
    ("vm", "qd16_md"): (1.0, None, False),
}


def test_table_has_every_must_and_goal() -> None:
    """Every figure that is judged stands here with its bounds, and no other is."""
    found = {
        (row.key, claim.key): (claim.must, claim.goal, claim.lower)
        for row in ROWS
        for claim in row.claims
        if (claim.must, claim.goal) != (None, None)
    }
    assert WANTED == found


def test_table_python_door_is_reported() -> None:
    """It is measured against both, and nothing is asked of it."""
    (row,) = chosen(["python_door"])
    assert {"qemu", "direct"} == {claim.key for claim in row.claims}


def test_table_resync_from_the_file_is_reported() -> None:
    """Nbdcopy without a server is quicker: its figure is shown, without a bound."""
    (row,) = chosen(["resync_full"])
    assert {"nbdcopy", "file", "rate"} == {claim.key for claim in row.claims}


def test_table_names_are_unique() -> None:
    """A row is called by its key; a claim's line is known by its title."""
    assert len(ROWS) == len({row.key for row in ROWS})
    for row in ROWS:
        assert len(row.claims) == len({claim.key for claim in row.claims})
        assert len(row.claims) == len({claim.title for claim in row.claims})


def test_chosen_rows_keep_the_tables_order() -> None:
    """All without a name; else those named, once, in order."""
    assert list(ROWS) == chosen([])
    keys = [row.key for row in chosen(["read_1m", "write_4k_qd1", "read_1m"])]
    assert ["write_4k_qd1", "read_1m"] == keys
    plots = {row.key for row in chosen(["plots"])}
    assert {"plot_latency", "plot_throughput", "plot_resync"} == plots
    with pytest.raises(KeyError, match="no_such"):
        chosen(["write_4k_qd1", "no_such"])
