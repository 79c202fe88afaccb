# SPDX-License-Identifier: BSD-3-Clause
"""
Let the server outlive the command that has started it.

nbdkit gets its sockets from its parent, and then has the kernel end it with its parent.
That fits systemd, which never ends. Our parent is a command that returns to the shell
once the server answers, or earlier, while a start still recovers. So a door undoes this
before anything that takes time, and this module imports nothing that takes time.
"""

from __future__ import annotations

import ctypes

__all__ = ["outlive_parent"]

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def outlive_parent() -> None:
    """
    Tell the kernel to send no signal when the parent ends.

    Must be called on the main thread, which would get the signal.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
