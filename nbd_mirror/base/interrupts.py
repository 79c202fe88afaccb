# SPDX-License-Identifier: BSD-3-Clause
"""Steps of a command that must not be torn apart."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["Interrupt", "Signals", "put_off"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Interrupt(KeyboardInterrupt):
    """A signal came that ends the command when `put_off` ends."""


class Signals:
    """The signals that came since `put_off` began."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self._raises = False

    def note(self, number: int, _: object) -> None:
        """Handle a signal."""
        self.came.append(number)
        if self._raises:
            self._raises = False  # only once: the caller's clean-up is not torn apart
            raise Interrupt

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """
        Let a signal end a block that waits.

        Raises:
            Interrupt: one came, perhaps before the block or at its end.
        """
        self._raises = True
        try:
            self._check()
            yield
            self._check()
        finally:
            self._raises = False

    def _check(self) -> None:
        if self.came:
            raise Interrupt


@contextlib.contextmanager
def put_off() -> Iterator[Signals]:
    """
    Put off Ctrl-C, a request to end and the end of the terminal until the block ends.

    Signals that the command ignores stay ignored. Only the main thread can put signals
    off; in another one the block runs as it is.
    """
    signals = Signals()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for one in dict.fromkeys(signals.came):
            signal.raise_signal(one)
