# SPDX-License-Identifier: BSD-3-Clause
"""
Files in a directory that another user may have prepared.

When root runs `nbd-mirror attach` for a volume of another user, the command works in
that user's directory. So it looks names up in the opened directory, follows and writes
through no link, waits for no special file, and replaces a file by writing a new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import AccessError
from .hints import quote

__all__ = [
    "check_private",
    "is_there",
    "open_plain",
    "opened_folder",
    "place_file",
    "read_plain",
    "replace_file",
    "user_name",
]

# FIFOs are opened without waiting for their other end, and then refused.
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextlib.contextmanager
def opened_folder(folder: Path) -> Iterator[int]:
    """Yield a descriptor of *folder*, for names in it; raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def open_plain(
    name: str | Path, flags: int, dir_fd: int | None = None, mode: int = 0o600
) -> int:
    """
    Open a file that must be a regular one with a single name.

    Raises:
        OSError: ELOOP if it is a link, a FIFO or a device.
    """
    fd = os.open(name, flags | _PLAIN, mode, dir_fd=dir_fd)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.ELOOP, "is no plain file", os.fspath(name))
    return fd


def read_plain(folder: Path, name: str, most: int) -> tuple[bytes, int]:
    """
    Read at most *most* bytes of a regular file in *folder*.

    Returns:
        The content, and the uid of its owner.
    """
    with opened_folder(folder) as dir_fd:
        fd = open_plain(name, os.O_RDONLY, dir_fd)
        with open(fd, "rb") as file:
            return file.read(most), os.fstat(fd).st_uid


def replace_file(folder: Path, name: str, content: bytes, mode: int = 0o600) -> None:
    """
    Write a new file and give it the name, whatever has the name now.

    Args:
        mode: of the file, before the umask.
    Raises:
        OSError: it cannot be written; then the name is unchanged.
    """
    new = f".{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with opened_folder(folder) as dir_fd:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new, dir_fd=dir_fd)  # left by a process that was killed
        try:
            with open(open_plain(new, flags, dir_fd, mode), "wb") as file:
                file.write(content)
            os.rename(new, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=dir_fd)
            raise


def place_file(
    path: Path, content: bytes, *, mode: int = 0o600, force: bool = False
) -> None:
    """
    Make a file that appears with all its content or not at all, and stays.

    Args:
        mode: of the file, whatever the umask is.
        force: replace a file that is there.
    Raises:
        FileExistsError: there is one. OSError: it cannot be written.
    """
    new = f".{path.name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with opened_folder(path.parent) as folder:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new, dir_fd=folder)  # left by a process that was killed
        try:
            with open(open_plain(new, flags, folder), "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # A link fails if there is a file, also one that was made just now.
            place = os.rename if force else os.link
            place(new, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=folder)
        os.fsync(folder)


def is_there(path: str | Path) -> bool:
    """
    Say whether a file is seen there, by any user.

    `Path.exists` raises where this user may not look, but the caller needs an answer.
    """
    return os.path.exists(path)  # noqa: PTH110


def check_private(folder: Path, command: str) -> None:
    """
    Check that no other user can put a link or a lock into the state directory.

    Only files that a command writes as one user in another user's directory can do
    harm.

    Args:
        folder: the state directory; other checks handle a missing one.
        command: the refused one, for the hint.
    Raises:
        AccessError: it is another user's, or others may write in it.
    """
    try:
        status = folder.stat()
    except OSError:
        return
    if status.st_uid != os.geteuid():
        owner, us = user_name(status.st_uid), user_name(os.geteuid())
        sudo = "sudo " if os.geteuid() else ""
        raise AccessError(
            f"the state directory {folder} belongs to user {owner}, and this is {us}: "
            "nothing in it is touched",
            f"sudo -u {quote(owner)} nbd-mirror {command} CONFIG\n"
            f"or, if {us} is to serve the volume: "
            f"{sudo}chown -R {us.removeprefix('#')} {quote(os.fspath(folder))}",
        )
    if status.st_mode & 0o022 and stat.S_ISDIR(status.st_mode):
        raise AccessError(
            f"other users may write in the state directory {folder}: its files cannot "
            "be trusted",
            f"chmod go-w {quote(os.fspath(folder))}",
        )


def user_name(uid: int) -> str:
    """Return the user's name, or #UID where none is known."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"
