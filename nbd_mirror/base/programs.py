# SPDX-License-Identifier: BSD-3-Clause
"""
Find and run other programs: nbdkit, nbd-client, modprobe.

Most are in /usr/sbin, which is not on every user's PATH; that must not count as "not
installed".
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from typing import NamedTuple

from .errors import UnsupportedError

__all__ = [
    "LIMIT_HINT",
    "Ended",
    "cannot_start",
    "clean_environment",
    "find_program",
    "run",
]

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

LIMIT_HINT = (
    "raise `ulimit -n` and `ulimit -u`, or LimitNOFILE= and TasksMax= of the unit"
)
_HELP = {
    errno.EAGAIN: LIMIT_HINT,
    errno.EMFILE: LIMIT_HINT,
    errno.EINVAL: LIMIT_HINT,  # for a descriptor beyond the limit
    errno.E2BIG: "unset long environment variables",
}

# In these lists an empty part means the current folder; a relative one lies in it.
_SEARCHED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")


def clean_environment() -> dict[str, str]:
    """
    Return the environment for a program, in which nothing leads to the current folder.

    That folder may belong to another user, and contain a program, a library or a module
    that root must not run.
    """
    environment = dict(os.environ)
    for name in _SEARCHED:
        if name in environment:
            environment[name] = _absolute(environment[name])
            if not environment[name]:
                del environment[name]
    environment["PYTHONSAFEPATH"] = "1"
    return environment


def _absolute(path: str) -> str:
    return ":".join(part for part in path.split(":") if part.startswith("/"))


def find_program(name: str, package: str) -> str:
    """
    Return the path of a program.

    Args:
        name: of the program.
        package: the Debian package to name where it is missing.
    Raises:
        UnsupportedError: it is not installed.
    """
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"
    found = shutil.which(name, path=_absolute(path))
    if found is None:
        raise UnsupportedError(f"{name} is not installed", f"apt-get install {package}")
    return found


def cannot_start(program: str, error: OSError) -> UnsupportedError:
    """Return the error for a program that the kernel does not start."""
    # For a script, a missing interpreter is reported as an error of the script.
    return UnsupportedError(
        f"{program} cannot be started: {error.strerror or error}",
        _HELP.get(error.errno or 0, ""),
    )


class Ended(NamedTuple):
    """
    A program that has ended.

    Attributes:
        status: its exit status, negative for a signal; 124 if its time was over.
        said: its output, standard error last, in one line.
        pid: its process, as long as it ran.
    """

    status: int
    said: str
    pid: int


def run(*command: str, timeout_s: float = 30.0, apart: bool = False) -> Ended:
    """
    Run a program to its end, without input.

    Args:
        command: the program and its arguments.
        timeout_s: it is killed when this time is over.
        apart: in a session of its own, so that the terminal's Ctrl-C and its end do
            not reach it.
    Raises:
        UnsupportedError: it cannot be started.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=clean_environment(),
            start_new_session=apart,
        )
    except OSError as error:
        raise cannot_start(command[0], error) from None
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            said = f"{command[0]} did not end within {timeout_s:g}s"
            return Ended(124, said, process.pid)
        except BaseException:
            process.kill()
            raise
    said = " ".join(f"{out}\n{err}".split())
    return Ended(process.returncode, said, process.pid)
