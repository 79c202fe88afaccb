# SPDX-License-Identifier: BSD-3-Clause
"""The fault points of nodes: of their control, in Python, and of the engine's part."""

from __future__ import annotations

import re

from support import ROOT

__all__ = ["CONTROL_POINTS", "ENGINE_POINTS"]

_SERVER = (ROOT / "nbd_mirror" / "server").glob("*.py")
CONTROL_POINTS = {
    name
    for path in _SERVER
    for name in re.findall(r'reach\("(\w+)"\)', path.read_text())
}
# tests/c/test_nodes_killed.c ends a node's life at each point that it passes.
ENGINE_POINTS = {
    name
    for path in (ROOT / "csrc" / "life").glob("node_*.c")
    for name in re.findall(r'fault_point \("(\w+)"\)', path.read_text())
}
