# SPDX-License-Identifier: BSD-3-Clause
"""
The command line's output: a failure there is one clear error, or none.

A command has done its work when it prints. A reader that ends early is no error. A full
disk is an error, with an exit code of its own, and never counts as a bug. A closed
output means that no output is wanted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import unicodedata
from typing import Any

from ..base.errors import OutputError

__all__ = [
    "finish_output",
    "guard_output",
    "keep_descriptors",
    "one_line",
    "plain",
    "reader_ended",
]


# The bidirectional classes of characters that make a terminal reorder text.
_ORDERS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


class _Output(io.FileIO):
    """
    Standard output or error.

    The first write that fails raises OutputError. After that all output is dropped, so
    that nothing can fail at the interpreter's end.
    """

    def __init__(self, fd: int, *, tell: bool) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._tell = tell
        self._failed = False

    def write(self, data: Any) -> int:
        size = len(memoryview(data).cast("B"))
        if self._failed:
            return size
        try:
            return self._write(data)
        except OSError as error:
            self._failed = True
            if not self._tell:
                return size
            raise _output_error(error) from None

    def _write(self, data: Any) -> int:
        # It returns None if another process that shares the file made it non-blocking.
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        return written


def _output_error(error: OSError) -> OutputError:
    text = (
        f"the output cannot be written: {error.strerror}; the command was carried out"
    )
    return OutputError(text, quiet=error.errno == errno.EPIPE)


def keep_descriptors() -> None:
    """
    Open descriptors 0 to 2 if they are closed.

    Otherwise a log of the volume, or its socket, could get such a number, and an error
    message would go into it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # It gets the lowest free number, which is this one.
            os.open("/dev/null", os.O_RDWR)
            os.set_inheritable(fd, True)


def guard_output() -> None:
    """Make output fail only with OutputError; replace unencodable characters by '?'."""
    sys.stdout = _text(1, sys.stdout, tell=True)
    sys.stderr = _text(2, sys.stderr, tell=False)


def _text(fd: int, before: Any, *, tell: bool) -> io.TextIOWrapper:
    raw = _Output(fd, tell=tell)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="replace",
        line_buffering=raw.isatty() or fd == 2,
    )


def plain(text: str) -> str:
    """
    Return *text* with "?" in place of characters that control a terminal.

    A server may belong to another user, and its text is shown to root.
    """
    return "".join(
        "?" if _controls(char) and char not in "\n\t" else char for char in text
    )


def one_line(text: str) -> str:
    """Return *text* as `plain` does, in one line: a second one would look like ours."""
    return plain(text).replace("\n", " ")


def _controls(char: str) -> bool:
    """Tell if a terminal takes *char* for a command, an end of line, a new order."""
    return (
        unicodedata.category(char) in {"Cc", "Zl", "Zp"}
        or unicodedata.bidirectional(char) in _ORDERS
    )


def finish_output() -> None:
    """
    Flush the output.

    Raises:
        OutputError: it cannot be written.
    """
    sys.stdout.flush()
    with contextlib.suppress(ValueError):
        sys.stderr.flush()


def reader_ended(seconds: float) -> bool:
    """Wait; return early, and true, once standard output is a pipe without a reader."""
    poll = select.poll()
    poll.register(1, 0)
    return any(what & select.POLLERR for _, what in poll.poll(seconds * 1000))
