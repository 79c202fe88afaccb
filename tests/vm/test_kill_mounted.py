# SPDX-License-Identifier: BSD-3-Clause
"""
kill -9 of the server under mounted file systems, in a virtual machine.

guest_kill.py does it; only a kernel shows what a file system makes of a disk that
vanishes under it and comes back, and only fsync tells what it may not lose.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
from vm.vm import run_in_vm

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vm")]

GUEST = Path(__file__).with_name("guest_kill.py")
DEADLINE_S = 900
ROUNDS = 3


@pytest.mark.timeout(DEADLINE_S + 60)
def test_server_killed_under_mounted_file_systems_loses_no_fsync() -> None:
    """What fsync answered for is there after each kill; both sides end up equal."""
    seed = os.environ.get("NBDM_VM_SEED", str(random.getrandbits(32)))
    done = run_in_vm(
        GUEST, DEADLINE_S, [seed, str(ROUNDS)], modules=["nbd", "xfs"], cpus=2
    )
    print(f"NBDM_VM_SEED={seed}")
    print(done.stdout)
    print(done.stderr[-4000:])
    results = dict(re.findall(r"^RESULT (\S+) (.*)$", done.stdout, re.MULTILINE))

    assert done.returncode == 0
    assert results["done"] == "yes"
    for fs in ("ext4", "xfs"):
        assert int(results[f"{fs}_kills"]) == ROUNDS
        # A handful is sure to be answered before each kill.
        assert int(results[f"{fs}_answered"]) >= 5 * ROUNDS
        assert results[f"{fs}_dirty"] == "0"
        assert results[f"{fs}_equal"] == "yes"
