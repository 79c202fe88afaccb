# SPDX-License-Identifier: BSD-3-Clause
"""The fault points of the control of nodes, which is in Python."""

from __future__ import annotations

import re

from support import ROOT

__all__ = ["CONTROL_POINTS"]

_SERVER = (ROOT / "nbd_mirror" / "server").glob("*.py")
CONTROL_POINTS = {
    name
    for path in _SERVER
    for name in re.findall(r'reach\("(\w+)"\)', path.read_text())
}
