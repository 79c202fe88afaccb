# SPDX-License-Identifier: BSD-3-Clause
"""
The main job with the kernel's own NBD client, in a virtual machine.

guest_main.py does the job and prints result lines; here they are judged. Only a kernel
shows whether our server suits /dev/nbd0: its request sizes, its flushes, its
time-outs, and a file system that does not forgive.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from vm.vm import run_in_vm

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vm")]

GUEST = Path(__file__).with_name("guest_main.py")
# Of the guest. Much more than it takes on two idle cores: what takes long there is
# starting Python a dozen times, and an emulated CPU suffers most from neighbours.
DEADLINE_S = 900


def remote_of(results: dict[str, str], name: str) -> dict[str, Any]:
    """Return the only remote in the status that the guest printed as *name*."""
    (remote,) = json.loads(results[name])["remotes"]
    assert isinstance(remote, dict)
    return remote


@pytest.mark.timeout(DEADLINE_S + 60)
def test_kernel_device_secondary_killed_catches_up() -> None:
    """A file system on /dev/nbd0 lives through the secondary's death, both equal."""
    done = run_in_vm(GUEST, DEADLINE_S, ["direct"], modules=["nbd"])
    print(done.stdout)
    print(done.stderr[-4000:])
    results = dict(re.findall(r"^RESULT (\S+) (.*)$", done.stdout, re.MULTILINE))

    assert "failed" not in results, results["failed"]
    assert done.returncode == 0
    assert results["done"] == "yes"
    assert results["block_size"] == "4096"
    assert results["load_at_kill"] == "running"
    assert results["load_survived"] == "yes"

    after_kill = remote_of(results, "after_kill")
    assert after_kill["state"] == "out_of_sync"
    assert after_kill["reason"]
    assert after_kill["dirty_bytes"] > 0
    # What was written alone is dirty too: 8 MiB and more.
    alone = remote_of(results, "alone")
    assert alone["state"] == "out_of_sync"
    assert alone["dirty_bytes"] >= 8 << 20
    caught_up = remote_of(results, "caught_up")
    assert caught_up["state"] == "in_sync"
    assert caught_up["dirty_bytes"] == 0

    assert results["verified"] == "yes"
    assert results["device_size"] == "0"
    assert results["images"] == "equal"
    assert results["secondary_fsck"] == "clean"
    assert results["kernel_errors"] == "no"
