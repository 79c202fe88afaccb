# SPDX-License-Identifier: BSD-3-Clause
"""
Build the package without an activity log, in a copy of the tree.

The copy is kept under build/ and brought up to date before each use, so that it is
the same code but for no_activity.h. It is compiled by its own copy of _build.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from .model import BenchError
from .servers import ROOT, environment_of

__all__ = ["build_without_activity", "without_activity"]

HEADER = Path(__file__).with_name("no_activity.h")
COPY = ROOT / "build" / "no_activity"
HOLDS = re.compile(r"\bactivity_(?:hold|release) \(")
HOLDER = "admit.c"  # the one file that holds extents
DEFINED = "activity.c"


def without_activity(name: str, text: str) -> str:
    """
    Return the C file *name*, whose content is *text*, as the copy has it.

    Raises:
        BenchError: it holds extents where it did not when no_activity.h was written.
    """
    if name in (DEFINED, "internal.h") or not HOLDS.search(text):
        if name == HOLDER:
            raise BenchError(f"{name} holds no extents any more: see no_activity.h")
        return text
    if name != HOLDER:
        raise BenchError(f"{name} holds extents too: no_activity.h knows only {HOLDER}")
    return f'#include "{HEADER.name}"\n#line 1 "{name}"\n{text}'


def build_without_activity() -> Path:
    """Bring the copy up to date and build it; return the folder of the package."""
    wanted = {Path("csrc") / HEADER.name: HEADER.read_bytes()}
    for path in sorted((ROOT / "csrc").glob("*.[ch]")):
        text = without_activity(path.name, path.read_text())
        wanted[Path("csrc") / path.name] = text.encode()
    for path in sorted((ROOT / "nbd_mirror").glob("*.py*")):
        wanted[Path("nbd_mirror") / path.name] = path.read_bytes()
    _synchronise(wanted)
    done = subprocess.run(
        [sys.executable, "-m", "nbd_mirror._build"],
        cwd=COPY,
        env=environment_of({}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"the build without an activity log: {done.stderr[-2000:]}")
    return COPY


def _synchronise(wanted: dict[Path, bytes]) -> None:
    """Make the copy's sources *wanted*, touching only what differs."""
    for folder in {COPY / path.parent for path in wanted}:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            source = old.suffix in (".c", ".h", ".py", ".pyi", ".typed")
            if source and old.relative_to(COPY) not in wanted:
                old.unlink()
    shutil.rmtree(COPY / "nbd_mirror" / "__pycache__", ignore_errors=True)
    for path, content in wanted.items():
        target = COPY / path
        if not target.exists() or target.read_bytes() != content:
            target.write_bytes(content)
