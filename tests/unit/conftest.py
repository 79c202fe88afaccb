# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the keeper's tests: a remote, and volumes of which it is the remote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Processes
from unit.volumes import SIZE, Mirror, Remote, make_params

from nbd_mirror.volume import core


@pytest.fixture
def remote(processes: Processes, run_dir: Path) -> Remote:
    """Give the remote, not started."""
    return Remote(processes, run_dir)


@pytest.fixture
def mirror(run_dir: Path, remote: Remote) -> Iterator[Mirror]:
    """Give a new volume, its remote all dirty, without a keeper."""
    params = make_params(run_dir)
    core.create(params)
    mirror = Mirror(params, remote.uri)
    yield mirror
    mirror.close()


@pytest.fixture
def synced(run_dir: Path, remote: Remote) -> Iterator[Mirror]:
    """Give a volume with random data, its remote a copy but not connected."""
    params = make_params(run_dir, assume=True)
    content = os.urandom(SIZE)
    Path(params.local).write_bytes(content)
    remote.image.write_bytes(content)
    core.create(params)
    mirror = Mirror(params, remote.uri)
    yield mirror
    mirror.close()
