# SPDX-License-Identifier: BSD-3-Clause
"""
Threads that must not end before they are told to.

A keeper that dies leaves a remote alone for good, and nothing else would say so. So
whatever a turn of such a thread raises, also when memory or threads run out, is said
and waited out; then comes the next turn.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
import traceback
from collections.abc import Callable

from .errors import MirrorError, from_errno

__all__ = ["begin", "keep_going"]

REST_S = 1.0


def keep_going(
    turn: Callable[[], object],
    ended: Callable[[], bool],
    log: Callable[[str, str], object],
    name: str,
) -> None:
    """
    Call *turn* again and again until *ended*, whatever it raises.

    Args:
        turn: deals with the errors it expects.
        ended: asked before each turn.
        log: is told what a turn raised, as an error.
        name: of the thread, for the log.
    """
    while not ended():
        try:
            turn()
        except Exception:
            with contextlib.suppress(Exception):  # such as no memory for the words
                log("error", f"{name}: {traceback.format_exc()}")
            time.sleep(REST_S)


def begin(thread: threading.Thread) -> None:
    """
    Start a thread of a server that starts.

    Raises:
        MirrorError: the system gives no thread.
    """
    try:
        thread.start()
    except RuntimeError:
        raise no_thread(thread.name) from None


def no_thread(name: str) -> MirrorError:
    """Make the error for a thread that cannot be had."""
    return from_errno(
        errno.EAGAIN,
        f"cannot start the thread {name}: the limit of processes or memory is reached",
        "raise `ulimit -u`, or TasksMax= of the unit",
    )
