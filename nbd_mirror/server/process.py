# SPDX-License-Identifier: BSD-3-Clause
"""
What the server process does about signals, and about its end.

nbdkit has a way of its own that does not fit a mirror: when told to end it first waits
for every client to go away, which one in the kernel never does. So the signals are
ours: the volume is stopped cleanly at once, requests that still come are refused,
nbdkit is asked to end, and if clients keep it, the process exits: everything is durable
by then. A stop that cannot be completed has an end too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from ..base.errors import MetadataFailedError, MirrorError
from ..base.hints import Asked
from ..base.threads import begin
from ..volume import core

__all__ = ["End", "log", "on_signal", "or_exit"]

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
LAST_WORDS_S = 2.0  # for the log, before the process ends

_T = TypeVar("_T")


def log(level: str, text: str) -> None:
    """Write a line of the log; whatever becomes of it, the caller goes on."""
    core.write_log(level, text)


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
        core.write_text(traceback.format_exc())
        _exit(MirrorError(f"internal error: {error!r}"))


def _exit(error: MirrorError) -> NoReturn:
    asked = Asked.load()
    hint = asked.name(error.hint) if asked else error.hint
    hint = hint and "\n  try: " + hint.replace("\n", "\n       ")
    core.write_text(f"nbd-mirror: {error}{hint}\n")
    core.flush_log(LAST_WORDS_S)
    os._exit(error.exit_code)


def on_signal(act: Callable[[], object]) -> None:
    """
    Have *act* called, in a thread of its own, at each signal to end.

    Must be called on the main thread before any other one is made: all of them are
    to have the signals blocked, or one could take them to nbdkit's own handler.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            log("info", f"{signal.Signals(number).name}: stopping")
            try:
                act()
            except Exception:
                # The next signal tries again, and `End` ends the process at last.
                with contextlib.suppress(Exception):
                    log("error", f"stopping: {traceback.format_exc()}")

    begin(threading.Thread(target=wait, name="signals", daemon=True))


class End:
    """
    The end of the process, which comes for certain once it has begun.

    Its thread is there from the start: a process that is to end because threads run
    out could not make one.

    Args:
        name: of the volume, for the log.
        limit_s: how long a stop may take.
        grace_s: how long clients that stay may keep the process after it.
    """

    def __init__(self, name: str, limit_s: float, grace_s: float) -> None:
        self._name = name
        self._limit_s = limit_s
        self._grace_s = grace_s
        self._begun = threading.Event()
        self._stopped = threading.Event()
        self._closed = threading.Event()
        self._code = 0
        self.doing = ""  # what the stop waits for

    def start(self) -> None:
        """Start the thread; raises MirrorError if there is none."""
        begin(threading.Thread(target=self._wait, name="end", daemon=True))

    def begin(self) -> None:
        """Say that the stop begins. Again: no effect."""
        self._begun.set()

    def stopped(self, code: int) -> None:
        """Say that all is durable, or never will be; *code* is the exit code."""
        self._code = code
        self._stopped.set()

    def closed(self) -> None:
        """Say that the process ends by itself from here."""
        self._closed.set()

    def _wait(self) -> None:
        self._begun.wait()
        if not self._stopped.wait(self._limit_s):
            log(
                "error",
                f"volume {self._name}: not stopped within {self._limit_s:g}s, while "
                f"{self.doing}; the process ends now, and the next start recovers as "
                "after a crash",
            )
            self._code = MetadataFailedError.exit_code
        elif self._closed.wait(self._grace_s):
            return
        core.flush_log(LAST_WORDS_S)
        os._exit(self._code)
