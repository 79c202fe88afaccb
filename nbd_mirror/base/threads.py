# SPDX-License-Identifier: BSD-3-Clause
"""
Threads that no exception may end.

If a keeper died, nothing would take care of its remote any more, and nothing would
report it. So the loop of such a thread logs whatever a turn raises, even if memory or
threads run out, waits, and starts the next turn.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable

from .errors import MirrorError, UnsupportedError

__all__ = ["begin", "keep_going", "no_thread"]

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
        turn: handles the errors that it expects.
        ended: checked before each turn.
        log: gets the exceptions of turns, as errors.
        name: of the thread, for the log.
    """
    while not ended():
        try:
            turn()
        except Exception:
            with contextlib.suppress(Exception):  # for example no memory for the text
                log("error", f"{name}: {traceback.format_exc()}")
            time.sleep(REST_S)


def begin(thread: threading.Thread) -> None:
    """
    Start a thread of a server during its start.

    Raises:
        MirrorError: the system gives no thread.
    """
    try:
        thread.start()
    except RuntimeError:
        raise no_thread(thread.name) from None


def no_thread(name: str) -> MirrorError:
    """Return the error for a thread that cannot be made."""
    return UnsupportedError(
        f"cannot start the thread {name}: the limit of processes or memory is reached",
        "raise `ulimit -u`, or TasksMax= of the unit",
    )
