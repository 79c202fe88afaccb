# SPDX-License-Identifier: BSD-3-Clause
"""The fault points of nodes: of their control, in Python, and of the engine's part."""

from __future__ import annotations

import re
from pathlib import Path

from support import ROOT

__all__ = ["CONTROL_POINTS", "ENGINE_POINTS", "RESOLVE_POINTS"]

_SERVER = ROOT / "nbd_mirror" / "server"


def _points(path: Path) -> set[str]:
    return set(re.findall(r'reach\("(\w+)"\)', path.read_text()))


CONTROL_POINTS = {name for path in _SERVER.glob("*.py") for name in _points(path)}
# Of these, tests/e2e/test_resolve.py kills a node at those of a resolved split brain.
RESOLVE_POINTS = _points(_SERVER / "node_resolve.py")
# tests/c/test_nodes_killed.c ends a node's life at each point that it passes.
ENGINE_POINTS = {
    name
    for path in (ROOT / "csrc" / "life").glob("node_*.c")
    for name in re.findall(r'fault_point \("(\w+)"\)', path.read_text())
}
