# SPDX-License-Identifier: BSD-3-Clause
"""
Ctrl-C while there is nothing to undo: an end at once, and no traceback.

A command imports its modules first, and at last the interpreter ends. There
KeyboardInterrupt would be shown with a traceback, or swallowed.
"""

from __future__ import annotations

import os
import signal

__all__ = ["INTERRUPTED", "end_at_once", "raise_it"]

INTERRUPTED = 130  # as errors.py documents it


def _end(*_: object) -> None:
    os._exit(INTERRUPTED)


def end_at_once() -> None:
    """Have Ctrl-C end the process; one that was started to ignore it still does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_it() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, which the caller takes."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
