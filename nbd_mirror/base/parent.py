# SPDX-License-Identifier: BSD-3-Clause
"""
The server outlives the command that has started it.

nbdkit is handed its sockets, and then has the kernel end it with its parent. That fits
systemd, which never ends. Our parent is a command that returns to the shell: once the
server answers, or earlier, while a start still recovers. So a door undoes it before
anything that takes time, and this module imports nothing that does.
"""

from __future__ import annotations

import ctypes

__all__ = ["outlive_parent"]

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def outlive_parent() -> None:
    """
    Ask the kernel for no signal when the parent ends.

    Must be called on the main thread, the one the kernel would signal.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
