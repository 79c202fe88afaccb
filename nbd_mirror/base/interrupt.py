# SPDX-License-Identifier: BSD-3-Clause
"""
Ctrl-C while there is nothing to undo: an end at once, and no traceback.

A command imports its modules first, and at last the interpreter ends. There
KeyboardInterrupt would be shown with a traceback, or swallowed. A server's start also
waits in C code, where Python handles no signal.
"""

from __future__ import annotations

import os
import signal

__all__ = [
    "INTERRUPTED",
    "end_at_once",
    "end_by_signal",
    "hold_back",
    "let_through",
    "raise_it",
]

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


def hold_back() -> None:
    """
    Keep Ctrl-C back, also from a program that this process executes.

    Python would show a traceback as it starts. The program's first step in Python is
    `end_by_signal`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def let_through() -> None:
    """Undo `hold_back`; a Ctrl-C that came since then is handled now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_by_signal() -> None:
    """Have the kernel end the process at Ctrl-C, even while C code runs."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    let_through()
