# SPDX-License-Identifier: BSD-3-Clause
"""
The kernel's device of adopted disks, and over restarts, in a virtual machine.

guest_attach.py does it; only a kernel refuses a file system of smaller sectors than a
device has, cuts partitions, and waits for a server that is started again.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
from vm.vm import run_in_vm

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vm")]

GUEST = Path(__file__).with_name("guest_attach.py")
DEADLINE_S = 900


@pytest.mark.timeout(DEADLINE_S + 60)
def test_device_suits_its_content_and_outlives_its_server() -> None:
    """Sectors of 512 mount and are whole; a restart is no error to a mounted disk."""
    seed = os.environ.get("NBDM_VM_SEED", str(random.getrandbits(32)))
    done = run_in_vm(GUEST, DEADLINE_S, [seed], modules=["nbd", "xfs"])
    print(f"NBDM_VM_SEED={seed}")
    print(done.stdout)
    print(done.stderr[-4000:])
    results = dict(re.findall(r"^RESULT (\S+) (.*)$", done.stdout, re.MULTILINE))

    assert done.returncode == 0
    assert results["done"] == "yes"
    assert results["gpt_chosen"] == results["gpt_block_size"] == "512"
    # The last one goes up to the copy of the table: 16 MiB less the first MiB, the
    # two before it, and 33 sectors, to a whole MiB.
    assert results["partitions"] == f"{4 * 2048},{2048},{9 * 2048}"
    assert results["asked_block_size"] == results["remembered_block_size"] == "4096"
    assert results["warning"] == "True"
    assert results["mounts_with_4096"] == "no"
    assert results["xfs_chosen"] == results["xfs_block_size"] == "512"
    assert results["survived_stop"] == results["survived_kill"] == "yes"
    assert int(results["answered"]) >= 30
    errors = re.findall(r".*I/O error.*nbd0.*", done.stderr)
    assert not errors
