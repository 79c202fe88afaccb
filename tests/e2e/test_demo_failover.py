# SPDX-License-Identifier: BSD-3-Clause
"""The demonstration of a failover, as README names it; it checks what it prints."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import support

pytestmark = pytest.mark.slow


def test_demonstration_of_a_failover(processes: support.Processes) -> None:
    """Every committed transaction is there after it, and both images are equal."""
    support.requires(os.geteuid() == 0, "network namespaces need root")
    support.requires(Path("/dev/fuse").exists(), "the disk is mounted over FUSE")
    support.requires_program("ip", "nbdfuse", "mkfs.ext4", "e2fsck")
    done = processes.run(
        [sys.executable, str(support.ROOT / "scripts" / "demo_failover.py")],
        timeout_s=180,
    )
    assert "all as it should be" in done.stdout
