# SPDX-License-Identifier: BSD-3-Clause
"""The command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from support import ROOT

__all__ = ["nbd_mirror"]


def nbd_mirror(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "nbd_mirror", *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ("Traceback" in done.stderr) is (environment.get("NBD_MIRROR_DEBUG") == "1")
    return done
