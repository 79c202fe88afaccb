# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the end-to-end tests: a site to build a volume in, and the doors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import support
from e2e.harness import Site

DOORS = ("direct", "native", "python")


@pytest.fixture
def new_site(run_dir: Path, processes: support.Processes) -> Callable[..., Site]:
    """Give a maker of this test's site; takes what Site takes."""

    def make(**options: object) -> Site:
        return Site(run_dir, processes, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def site(new_site: Callable[..., Site]) -> Site:
    """Give a site with one nbdkit secondary, nothing started yet."""
    return new_site()


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    """Give each door in turn."""
    return str(request.param)
