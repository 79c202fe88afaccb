# SPDX-License-Identifier: BSD-3-Clause
"""
The server process: its signals, and its end.

nbdkit's own way does not fit a mirror: when asked to end, it first waits until every
client has disconnected, which the kernel's client never does. So this module handles
the signals: it stops the volume cleanly at once, requests that still arrive are
refused, and nbdkit is asked to end. If clients keep nbdkit, the process exits;
everything is durable by then. A stop that cannot complete also ends, after a time
limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from ..base.errors import MetadataFailedError, MirrorError
from ..base.hints import Asked
from ..base.threads import begin
from ..volume import core

__all__ = ["End", "execute_again", "log", "on_signal", "or_exit"]

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
LAST_WORDS_S = 2.0  # for the log, before the process ends

_T = TypeVar("_T")


def log(level: str, text: str) -> None:
    """Write a line of the log. Never raises."""
    core.write_log(level, text)


def or_exit(step: Callable[[], _T]) -> _T:
    """
    Run *step* of a server's start, or end the process with one clear line.

    It ends the process at once, without nbdkit's clean-up, which would print a second
    message. Nothing of ours needs cleaning up before the first client.
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
    Call *act*, in a thread of its own, at each signal to end.

    Must be called on the main thread before any other thread is made: all threads must
    have the signals blocked, or one could deliver them to nbdkit's own handler.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            log("info", f"{signal.Signals(number).name}: stopping")
            try:
                act()
            except Exception:
                # The next signal tries again, and `End` ends the process eventually.
                with contextlib.suppress(Exception):
                    log("error", f"stopping: {traceback.format_exc()}")

    begin(threading.Thread(target=wait, name="signals", daemon=True))


def execute_again(environment: Mapping[str, str]) -> None:
    """
    Replace this process by the same program, with more variables in its environment.

    It keeps the process's number, its output, and the sockets that were passed to it.
    Signals to end stay blocked: one that comes now stops the new program. Returns only
    if the kernel refuses.
    """
    core.flush_log(LAST_WORDS_S)
    core.hand_on_log()
    try:
        os.execve(  # noqa: S606
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**os.environ, **environment},
        )
    except OSError as error:
        core.write_text(f"nbd-mirror: cannot start again: {error.strerror}\n")


class End:
    """
    The end of the process, which is certain once it has begun.

    Its thread exists from the start: a process that must end because it cannot make
    threads could not make this one.

    Args:
        name: of the volume, for the log.
        limit_s: how long a stop may take.
        grace_s: how long remaining clients may keep the process after it.
        instead: called with the exit code before the process ends; may execute another
            program instead.
    """

    def __init__(
        self,
        name: str,
        limit_s: float,
        grace_s: float,
        instead: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._name = name
        self._limit_s = limit_s
        self._grace_s = grace_s
        self._instead = instead
        self._begun = threading.Event()
        self._stopped = threading.Event()
        self._closed = threading.Event()
        self._code = 0
        self.doing = ""  # what the stop waits for

    def start(self) -> None:
        """Start the thread. Raises MirrorError if it cannot be made."""
        begin(threading.Thread(target=self._wait, name="end", daemon=True))

    def begin(self) -> None:
        """Report that the stop begins. Calling it again has no effect."""
        self._begun.set()

    def stopped(self, code: int) -> None:
        """Report that all is durable, or never will be; *code* is the exit code."""
        self._code = code
        self._stopped.set()

    def closed(self) -> None:
        """Report that the process now ends by itself."""
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
        self._instead(self._code)
        core.flush_log(LAST_WORDS_S)
        os._exit(self._code)
