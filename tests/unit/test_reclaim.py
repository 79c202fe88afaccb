# SPDX-License-Identifier: BSD-3-Clause
"""The engine's guard against waiting for memory that waits for its own disk."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from pathlib import Path

import pytest
from support import ROOT, Processes, requires, requires_program
from unit.volumes import make_params

from nbd_mirror.volume import core

START = """
import ctypes, json, pathlib, re, sys
from unit.volumes import make_params
from nbd_mirror.volume import core
engine = core.Engine(make_params(pathlib.Path(sys.argv[1])))
engine.start()
status = pathlib.Path("/proc/self/status").read_text()
locked = int(re.search(r"VmLck:\\s+(\\d+) kB", status)[1])
PR_GET_IO_FLUSHER = 58
zero = ctypes.c_ulong(0)  # a variadic function: no int will do
flusher = ctypes.CDLL(None).prctl(PR_GET_IO_FLUSHER, zero, zero, zero, zero)
engine.stop()
engine.close()
print(json.dumps({"locked_kib": locked, "flusher": flusher}))
"""


SYS_RESOURCE = 1 << 24  # the bit of CAP_SYS_RESOURCE


def may_use_resources() -> bool:
    """Tell whether this process has CAP_SYS_RESOURCE: in a container root may not."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)
    assert found
    return bool(int(found[1], 16) & SYS_RESOURCE)


@pytest.mark.parametrize("allowed", [True, False])
def test_memory_is_locked_and_io_flusher_set_where_allowed(
    run_dir: Path, processes: Processes, allowed: bool
) -> None:
    """With the privileges both are done; without them the volume runs all the same."""
    requires(os.geteuid() == 0, "only root has these privileges")
    requires_program("setpriv")
    core.create(make_params(run_dir))
    # Without the capability a hard limit that is lifted already would do for locking.
    drop = ["prlimit", "--memlock=65536:65536", "setpriv"]
    drop += ["--bounding-set=-sys_resource,-ipc_lock"]
    done = processes.run(
        [*([] if allowed else drop), sys.executable, "-c", START, run_dir],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    found = json.loads(done.stdout)
    privileged = allowed and may_use_resources()
    lifted = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY
    # Asking for the flag wants the privilege as well.
    assert found["flusher"] == (1 if privileged else -1)
    assert (found["locked_kib"] > 0) == (allowed and (privileged or lifted))
