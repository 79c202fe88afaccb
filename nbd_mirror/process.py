# SPDX-License-Identifier: BSD-3-Clause
"""
What the server process does about its parent, about signals, and about its end.

nbdkit has ways of its own that do not fit a mirror: it ends with its parent, and when
told to end it first waits for every client to go away, which one in the kernel never
does. So the signals are ours: the volume is stopped cleanly at once, requests that
still come are refused, nbdkit is asked to end, and if clients keep it, the process
exits: everything is durable by then.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NoReturn, TypeVar

from .errors import MirrorError

__all__ = ["exit_after", "log", "on_signal", "or_exit", "outlive_parent"]

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_T = TypeVar("_T")


def log(level: str, text: str) -> None:
    """Write a line of the log, in one piece: threads share standard error."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    sys.stderr.write(f"{now} {level} {text}\n")
    sys.stderr.flush()


def or_exit(step: Callable[[], _T]) -> _T:
    """
    Do *step* of a server's start, or end the process with one clear line.

    At once and without nbdkit's own clean-up: it would print a second message, and
    there is nothing of ours to clean up before the first client.
    """
    try:
        return step()
    except MirrorError as error:
        _exit(error)
    except Exception as error:
        traceback.print_exc()
        _exit(MirrorError(f"internal error: {error!r}"))


def _exit(error: MirrorError) -> NoReturn:
    hint = f"\n  try: {error.hint}" if error.hint else ""
    sys.stderr.write(f"nbd-mirror: {error}{hint}\n")
    sys.stderr.flush()
    os._exit(error.exit_code)


def outlive_parent() -> None:
    """
    Undo what nbdkit does where it is handed its socket: it ends with its parent.

    That fits systemd, which never ends; ours is a command that returns to the shell.
    Must be called on the main thread, the one the kernel would signal.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)


def on_signal(act: Callable[[], object]) -> None:
    """
    Have *act* called, in a thread of its own, at the first signal to end.

    Must be called on the main thread before any other one is made: all of them are
    to have the signals blocked, or one could take them to nbdkit's own handler.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        number = signal.sigwait(SIGNALS)
        log("info", f"{signal.Signals(number).name}: stopping")
        act()

    threading.Thread(target=wait, name="signals", daemon=True).start()


def exit_after(ended: threading.Event, grace_s: float, code: int) -> None:
    """Exit with *code* unless *ended* is set within *grace_s*; returns at once."""

    def wait() -> None:
        if not ended.wait(grace_s):
            sys.stderr.flush()
            os._exit(code)

    threading.Thread(target=wait, name="exit", daemon=True).start()
