# SPDX-License-Identifier: BSD-3-Clause
"""
The end of every error of a command: a message on standard error, and an exit code.

An error is one line `nbd-mirror: what happened`, perhaps a line `  try: ` with the
command that helps, and the exit code of its class. A traceback is shown only with
NBD_MIRROR_DEBUG=1.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable

from ..base.errors import MirrorError, OutputError, UnsupportedError
from ..base.interrupt import INTERRUPTED
from ..base.programs import LIMIT_HINT
from .output import finish_output, plain
from .serve import ServerEndedError

__all__ = ["report", "run"]

_USED_UP = {errno.EMFILE, errno.ENFILE}


def report(error: MirrorError) -> None:
    """Print an error for the user, on standard error."""
    lines = [f"nbd-mirror: {line}" for line in error.message.splitlines()]
    if isinstance(error, ServerEndedError):
        lines = error.message.splitlines()
    first, *rest = error.hint.splitlines() or [""]
    if first:
        lines += [f"  try: {first}", *(f"       {line}" for line in rest)]
    sys.stderr.write(plain("\n".join(lines)) + "\n")


def run(app: Callable[..., object]) -> int:
    """Run the command line *app*; print any error, and return the exit code."""
    try:
        _run_app(app)
        finish_output()
    except OutputError as error:
        if error.quiet:
            return 0
        report(error)
        return error.exit_code
    except MirrorError as error:
        if os.environ.get("NBD_MIRROR_DEBUG") == "1":
            traceback.print_exc()
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as ended:
        return int(ended.code or 0)
    except Exception as error:
        if os.environ.get("NBD_MIRROR_DEBUG") == "1":
            traceback.print_exc()
        return _tell(error)
    return 0


def _tell(error: Exception) -> int:
    """Print an error that no other code has handled; return the exit code."""
    # Any step may need a descriptor or memory, also an import of the interpreter's.
    if isinstance(error, OSError) and error.errno in _USED_UP:
        words = f"the command cannot go on: {error.strerror}"
        report(UnsupportedError(words, LIMIT_HINT))
        return UnsupportedError.exit_code
    sys.stderr.write(
        f"nbd-mirror: internal error: {type(error).__name__}: {error}; please "
        "report it, with the output that NBD_MIRROR_DEBUG=1 adds\n"
    )
    return 1


def _run_app(app: Callable[..., object]) -> None:
    """Run the command; click ends each with SystemExit."""
    try:
        app(prog_name="nbd-mirror")
    except SystemExit as ended:
        if ended.code:
            with contextlib.suppress(OutputError):
                finish_output()
            raise
