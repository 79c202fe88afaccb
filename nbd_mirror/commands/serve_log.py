# SPDX-License-Identifier: BSD-3-Clause
"""
The serve.log of a server in the background, as its start uses it.

The start opens the file, keeps it short, and repeats to the user what the server wrote.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..base.errors import MirrorError, from_errno
from ..base.files import open_plain, opened_folder

__all__ = [
    "LOG_ROOM",
    "MAX_LOG_BYTES",
    "last_words",
    "open_log",
    "pass_on_warnings",
    "said_since",
]

MAX_LOG_BYTES = 1 << 20  # a start sets a longer serve.log aside as serve.log.1
_ERROR = "nbd-mirror: "  # the first characters of an error's lines
_HINT = "  try: ", "       "  # of those that follow it
_WARNING = re.compile(r"\S+Z warning volume (.*)")
LOG_ROOM = 4096  # bytes that must be free in serve.log
FALLOC_FL_KEEP_SIZE = 1  # <linux/falloc.h>


def said_since(fd: int, begin: int) -> list[str]:
    """Return the lines written since *begin* into this file, even if it was renamed."""
    # Not splitlines: a remote's words may hold what ends a line for Python alone.
    lines = os.pread(fd, 64 << 10, begin).decode(errors="replace").split("\n")
    return lines if lines[-1] else lines[:-1]


def pass_on_warnings(said: list[str]) -> None:
    """
    Repeat on standard error the warnings of the start about the volume itself.

    A remote's words stand in other lines, and may look like such a warning.
    """
    for line in said:
        found = _WARNING.fullmatch(line)
        if found:
            sys.stderr.write(f"nbd-mirror: warning: volume {found[1]}\n")


@contextlib.contextmanager
def open_log(log: Path) -> Iterator[int]:
    """
    Open the log to append to it; the lines of a running server stay.

    This start does not know yet whether one runs: a socket may have been removed.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    try:
        with opened_folder(log.parent) as dir_fd:
            _put_aside(log.name, dir_fd)
            try:
                fd = open_plain(log.name, flags, dir_fd)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                # Another user may have put a link there: do not follow it.
                os.unlink(log.name, dir_fd=dir_fd)
                fd = open_plain(log.name, flags | os.O_EXCL, dir_fd)
    except OSError as error:
        raise _log_error(log, error) from None
    try:
        _check_room(log, fd)
        yield fd
    finally:
        os.close(fd)


def _put_aside(name: str, dir_fd: int) -> None:
    """
    Begin a new log if the old one is long, unless a server has the volume.

    A server does it itself, but only while the name leads to its file.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_size <= MAX_LOG_BYTES:
            return
        with _volume_lock(dir_fd) as ours:
            for older, newer in ((".2", ".1"), (".1", "")) if ours else ():
                with contextlib.suppress(FileNotFoundError):
                    os.rename(
                        name + newer, name + older, src_dir_fd=dir_fd, dst_dir_fd=dir_fd
                    )


@contextlib.contextmanager
def _volume_lock(dir_fd: int) -> Iterator[bool]:
    """Take the volume's lock for a moment; yield whether that was possible."""
    with contextlib.ExitStack() as stack:
        try:
            # If it is missing, or a link, the server makes one or reports it.
            fd = open_plain("lock", os.O_RDWR, dir_fd)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _check_room(log: Path, fd: int) -> None:
    """
    Check that this log has room for the message that a disk is too full for the logs.

    It allocates room beyond the end of the file, whose length does not change. So
    nothing has to be undone, and no line of another process can be cut off.
    """
    end = os.lseek(fd, 0, os.SEEK_END)
    libc = ctypes.CDLL(None, use_errno=True)
    off_t = ctypes.c_int64
    if libc.fallocate64(fd, FALLOC_FL_KEEP_SIZE, off_t(end), off_t(LOG_ROOM)) == 0:
        return
    number = ctypes.get_errno()
    if number in {errno.EOPNOTSUPP, errno.ENOSYS}:
        found = os.fstatvfs(fd)
        # ramfs reports no blocks at all.
        full = found.f_blocks > 0 and found.f_bavail * found.f_frsize < LOG_ROOM
        number = errno.ENOSPC if full else 0
    if number:
        raise _log_error(log, OSError(number, os.strerror(number)))


def _log_error(log: Path, error: OSError) -> MirrorError:
    hint = f"make room in {log.parent}" if error.errno == errno.ENOSPC else ""
    text = f"cannot write {log}: {error.strerror}"
    return from_errno(error.errno or errno.EIO, text, hint)


def last_words(log: Path, said: list[str]) -> str:
    """
    Return the server's last lines before it ended: its errors, if there are any.

    A hint follows its error at once. Other such lines may be a remote's words, whose
    lines are indented in the log.
    """
    ours: list[str] = []
    follows = False
    for line in said:
        follows = line.startswith(_ERROR) or (follows and line.startswith(_HINT))
        if follows:
            ours.append(line)
    words = "\n".join(ours or said[-3:])
    return words or f"nbd-mirror: the server ended without a message; see {log}"
