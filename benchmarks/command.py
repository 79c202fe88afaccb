# SPDX-License-Identifier: BSD-3-Clause
"""The common part of the benchmarks' commands: signals, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

__all__ = ["SIGNALS", "held_back", "put", "run_command"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """
    Hold SIGNALS back: a signal that arrives inside is raised at the end.

    Not by a mask: a mask belongs to one thread, and another thread would take the
    signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run only in the main thread
        return
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    old = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def run_command(
    name: str, run: Callable[[], int], errors: tuple[type[Exception], ...]
) -> int:
    """
    Run a command, and return its exit status.

    Args:
        name: begins each line about an error.
        errors: that are no bugs, besides OSError: a line and exit status 1.
    """
    known: tuple[type[Exception], ...] = (OSError, *errors)
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        status = run()
        put("")
    except KeyboardInterrupt:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        print(f"{name}: interrupted; all is cleaned up", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader ended early, and knows it
        status = 1
    except known as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 1
    _give_up_output()
    return status


def put(text: str) -> None:
    """Write *text* to standard output; a system error does not name that file."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        words = f"standard output cannot be written: {error.strerror}"
        raise OSError(words) from None


def _give_up_output() -> None:
    """Redirect output that cannot be written: at exit it would cause an error."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
