# SPDX-License-Identifier: BSD-3-Clause
"""
Build the package without an activity log, in a copy of the tree.

The copy is kept under build/ and updated before each use, so it has the same code. Only
a compiler flag differs, which csrc/request/admit.c checks. The copy's own _build.py
compiles it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .model import BenchError
from .servers import ROOT, environment_of

__all__ = ["build_without_activity"]

COPY = ROOT / "build" / "no_activity"
FLAG = "-DNBDM_NO_ACTIVITY_LOG"


def build_without_activity() -> Path:
    """Update the copy and build it; return the folder of the package."""
    sources = [*(ROOT / "csrc").rglob("*.[ch]"), *(ROOT / "nbd_mirror").rglob("*.py*")]
    wanted = {path.relative_to(ROOT): path.read_bytes() for path in sources}
    _synchronise(wanted)
    done = subprocess.run(
        [sys.executable, "-m", "nbd_mirror._build"],
        cwd=COPY,
        env=environment_of({"CFLAGS": FLAG}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"the build without an activity log: {done.stderr[-2000:]}")
    return COPY


def _synchronise(wanted: dict[Path, bytes]) -> None:
    """Make the copy's sources equal to *wanted*, writing only what differs."""
    for folder in {COPY / path.parent for path in wanted}:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            source = old.suffix in (".c", ".h", ".py", ".pyi", ".typed")
            if source and old.relative_to(COPY) not in wanted:
                old.unlink()
    for compiled in (COPY / "nbd_mirror").rglob("__pycache__"):
        shutil.rmtree(compiled, ignore_errors=True)
    for path, content in wanted.items():
        target = COPY / path
        if not target.exists() or target.read_bytes() != content:
            target.write_bytes(content)
