# SPDX-License-Identifier: BSD-3-Clause
"""
The command line's output: what fails there is one clear error, or none.

A command has done its work by the time it says so. A reader that has seen enough is no
error; a full disk is one, with an exit code of its own, and never a bug of ours. An
output that was closed is not wanted.
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

__all__ = ["finish_output", "guard_output", "keep_descriptors", "plain"]


class _Output(io.FileIO):
    """
    Standard output or error.

    The first write that fails is told, by the exception OutputError; from then on all
    is dropped, so that nothing is left to fail at the interpreter's end.
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
        # It gives None where another process that shares the file made it non-blocking.
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
    Open descriptors 0 to 2 where they are closed.

    Else a log of the volume, or its socket, gets the number, and an error message goes
    into it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free one, which is this.
            os.open("/dev/null", os.O_RDWR)
            os.set_inheritable(fd, True)


def guard_output() -> None:
    """Let no output fail but by OutputError; a character too many becomes '?'."""
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
    Return *text* with "?" for what commands a terminal.

    A server may be another user's, and what it says is shown to root.
    """
    return "".join(
        "?" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char
        for char in text
    )


def finish_output() -> None:
    """
    Write what is left.

    Raises:
        OutputError: it cannot be written.
    """
    sys.stdout.flush()
    with contextlib.suppress(ValueError):
        sys.stderr.flush()
