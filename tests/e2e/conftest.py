# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the end-to-end tests: a site to build a volume in, and the doors."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
from e2e.lib.harness import Site

DOORS = ("direct", "native", "python")


@pytest.fixture
def new_site(run_dir: Path, processes: support.Processes) -> Callable[..., Site]:
    """Give a maker of this test's site; takes what Site takes."""

    def make(**options: Any) -> Site:
        return Site(run_dir, processes, **options)

    return make


@pytest.fixture
def site(new_site: Callable[..., Site]) -> Site:
    """Give a site with one nbdkit secondary, nothing started yet."""
    return new_site()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """
    Run a test that takes a door with the direct one, and with one of nbdkit's two.

    The test's name decides which of the two. The engine behind them is the same, so
    each test with each door would show little more and take a third longer. The
    requests themselves go through all three doors in test_requests.py.
    """
    chosen_there = any(
        "door" in mark.args[0]
        for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "door" not in metafunc.fixturenames or chosen_there:
        return
    direct, *nbdkits = DOORS
    number = zlib.crc32(metafunc.function.__name__.encode())
    metafunc.parametrize("door", [direct, nbdkits[number % len(nbdkits)]])
