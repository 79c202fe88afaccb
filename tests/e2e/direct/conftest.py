# SPDX-License-Identifier: BSD-3-Clause
"""A volume for the tests of the direct door, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from e2e.direct.checks import (
    SIZE,
    Dial,
    assert_serves,
    transmitting,
)
from e2e.direct.nbd_raw import RawClient
from e2e.lib.harness import MIB, Site, shared_site


@pytest.fixture(scope="module")
def served() -> Iterator[Site]:
    """Give a volume in sync, shared by the tests of this file."""
    with shared_site("direct", size=SIZE, filled=4 * MIB) as site:
        yield site


@pytest.fixture
def dial(served: Site) -> Iterator[Dial]:
    """Give what connects a client; after the test a new one must be served."""
    with ExitStack() as open_ones:

        def connect() -> RawClient:
            return open_ones.enter_context(RawClient(served.socket))

        yield connect
        assert_serves(served)


@pytest.fixture
def fresh(dial: Dial) -> RawClient:
    """Give a client that has said hello, and nothing else."""
    client = dial()
    client.hello()
    return client


@pytest.fixture(params=["simple", "structured"])
def client(dial: Dial, request: pytest.FixtureRequest) -> RawClient:
    """Give a client in transmission, with either kind of replies."""
    return transmitting(dial(), structured=request.param == "structured")
