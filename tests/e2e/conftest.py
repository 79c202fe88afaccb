# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the end-to-end tests: a site to build a volume in, and the doors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
from e2e.lib.harness import Site

DOORS = ("direct", "python")


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
    """Run a test that takes a door with each of them."""
    chosen_there = any(
        "door" in mark.args[0]
        for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "door" not in metafunc.fixturenames or chosen_there:
        return
    metafunc.parametrize("door", DOORS)
