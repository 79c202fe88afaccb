# SPDX-License-Identifier: BSD-3-Clause
"""
The command line, `nbd-mirror`.

A command reads the configuration, calls one function that does the work, and prints.
Errors are the exceptions of errors.py; ending.py handles them.
"""

from __future__ import annotations

import contextlib
import sys
from typing import NoReturn

from ..base.errors import OutputError
from ..base.interrupt import INTERRUPTED, end_at_once, raise_it
from .cli_app import app, command
from .cli_device import attach, detach
from .cli_nodes import init, key, nodes
from .cli_remote import invalidate, pause, resume
from .cli_roles import demote, promote, replace, switchover
from .cli_server import create, policy, serve, stop
from .cli_show import inspect, status, wait, watch
from .cli_split import keep, resolve
from .ending import run
from .output import finish_output, guard_output, keep_descriptors

__all__ = ["app", "main"]

# In the order of the help and the manual.
for _function in (
    *(init, key, nodes),
    *(create, serve, stop),
    *(status, wait, watch),
    *(promote, demote, switchover, replace),
    *(resolve, keep),
    *(pause, resume, invalidate, policy),
    *(attach, detach, inspect),
):
    command(_function)


def main() -> NoReturn:
    """Run the command line, and exit with a code that errors.py documents."""
    keep_descriptors()
    guard_output()
    try:
        raise_it()
        code = run(app)
        end_at_once()
    except KeyboardInterrupt:  # over the words of an error
        end_at_once()
        code = INTERRUPTED
    with contextlib.suppress(OutputError):
        finish_output()
    sys.exit(code)
