# SPDX-License-Identifier: BSD-3-Clause
"""
What can go wrong, as one tree of exceptions.

Each class stands for one thing an operator can do about it, and so for one
exit code.  A message says what happened and what it means; a hint, where there
is one, is the command that helps.  Nothing else may reach a user.

Exit status of `nbd-mirror`:

====  ==================================================================
code  meaning
====  ==================================================================
0     done
1     a bug in nbd_mirror: please report it
2     wrong usage of the command line
3     wrong configuration
4     a file, device or volume is not there
5     in use by another program
6     there already: refused without --force
7     a log or superblock is garbled, another volume's or another version's
8     no room for the logs
9     a remote cannot be reached, is no NBD server, is too small
10    no server answers for this volume
11    the time was over before the wanted state was reached
12    a log could not be persisted: the volume is failed
13    a disk gave an error
14    this machine cannot do it (kernel or program missing)
15    not permitted
16    the output could not be written
17    the local disk is not the same as before, or has become too small
18    a node may not have that role now, or only with --force
130   interrupted (Ctrl-C)
====  ==================================================================
"""

from __future__ import annotations

import errno as _errno

__all__ = [
    "EXIT_CODES",
    "AccessError",
    "BusyError",
    "ConfigError",
    "ExistsError",
    "FormatError",
    "MetadataFailedError",
    "MirrorError",
    "MirrorIOError",
    "MissingError",
    "NotRunningError",
    "OutputError",
    "RemoteError",
    "RoleError",
    "SpaceError",
    "UnsupportedError",
    "WaitTimeoutError",
    "WrongDiskError",
    "from_errno",
    "from_name",
]


class MirrorError(Exception):
    """
    The base of all errors of this package; never raised itself.

    Args:
        message: what happened and what it means for the data, without the
            program's name in front.
        hint: the command, or the one thing, that helps; or empty.
    """

    exit_code = 1
    meaning = "a bug in nbd_mirror: please report it"
    # Positive, if it came from C: the error that a door answers a client with.
    errno: int | None = None

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class ConfigError(MirrorError):
    """The configuration, or a parameter made from it, is wrong."""

    exit_code = 3
    meaning = "wrong configuration"


class MissingError(MirrorError):
    """A file, a device or a volume is not there."""

    exit_code = 4
    meaning = "a file, device or volume is not there"


class BusyError(MirrorError):
    """It is in use by a second server, a mount or another program."""

    exit_code = 5
    meaning = "in use by another program"


class ExistsError(MirrorError):
    """Something is there already that would be overwritten."""

    exit_code = 6
    meaning = "there already: refused without --force"


class FormatError(MirrorError):
    """A superblock or a log is garbled, another volume's or another version's."""

    exit_code = 7
    meaning = "a log or superblock is garbled, another volume's or another version's"


class SpaceError(MirrorError):
    """There is no room for the logs."""

    exit_code = 8
    meaning = "no room for the logs"


class RemoteError(MirrorError):
    """A remote cannot be reached, does not speak NBD, or is too small."""

    exit_code = 9
    meaning = "a remote cannot be reached, is no NBD server, is too small"


class NotRunningError(MirrorError):
    """No server answers for this volume, or it is just stopping."""

    exit_code = 10
    meaning = "no server answers for this volume"


class WaitTimeoutError(MirrorError):
    """The time was over before the wanted state was reached."""

    exit_code = 11
    meaning = "the time was over before the wanted state was reached"


class MetadataFailedError(MirrorError):
    """A log could not be persisted; the volume is failed until an operator acts."""

    exit_code = 12
    meaning = "a log could not be persisted: the volume is failed"


class MirrorIOError(MirrorError, OSError):
    """A disk gave an error; `errno` says which."""

    exit_code = 13
    meaning = "a disk gave an error"

    def __init__(
        self, message: str, hint: str = "", errno: int | None = _errno.EIO
    ) -> None:
        super().__init__(message, hint)
        self.errno = errno


class UnsupportedError(MirrorError):
    """The machine cannot do it: a kernel feature or a program is missing."""

    exit_code = 14
    meaning = "this machine cannot do it (kernel or program missing)"


class AccessError(MirrorError):
    """The caller has no permission."""

    exit_code = 15
    meaning = "not permitted"


class OutputError(MirrorError):
    """
    The command's output cannot be written, but the command was executed.

    Args:
        quiet: the reader ended early, so no message is needed.
    """

    exit_code = 16
    meaning = "the output could not be written"

    def __init__(self, message: str, hint: str = "", *, quiet: bool = False) -> None:
        super().__init__(message, hint)
        self.quiet = quiet


class WrongDiskError(MirrorError):
    """The local disk is another one than before; nothing was written to it."""

    exit_code = 17
    meaning = "the local disk is not the same as before, or has become too small"


class RoleError(MirrorError):
    """A node may not become primary or secondary now, or only by force."""

    exit_code = 18
    meaning = "a node may not have that role now, or only with --force"


_CLASSES: tuple[type[MirrorError], ...] = (
    ConfigError,
    MissingError,
    BusyError,
    ExistsError,
    FormatError,
    SpaceError,
    RemoteError,
    NotRunningError,
    WaitTimeoutError,
    MetadataFailedError,
    MirrorIOError,
    UnsupportedError,
    AccessError,
    OutputError,
    WrongDiskError,
    RoleError,
)

# All exit codes, for `nbd-mirror --help` and the manual.
EXIT_CODES: dict[int, str] = {
    0: "done",
    1: MirrorError.meaning,
    2: "wrong usage of the command line",
    **{cls.exit_code: cls.meaning for cls in _CLASSES},
    130: "interrupted (Ctrl-C)",
}

_BY_ERRNO: dict[int, type[MirrorError]] = {
    _errno.EINVAL: ConfigError,
    _errno.ENOENT: MissingError,
    _errno.ENODEV: MissingError,
    _errno.ENXIO: MissingError,
    _errno.ENOTDIR: MissingError,
    _errno.EISDIR: ConfigError,
    _errno.ELOOP: ConfigError,  # links in a circle, or where no link is allowed
    _errno.ENAMETOOLONG: ConfigError,
    _errno.EROFS: AccessError,
    _errno.EBUSY: BusyError,
    _errno.EALREADY: BusyError,  # the local disk has not failed: it is in use
    _errno.EADDRINUSE: BusyError,
    _errno.EEXIST: ExistsError,
    _errno.EUCLEAN: FormatError,
    _errno.ENOTRECOVERABLE: FormatError,  # nothing says which disk has the newest data
    _errno.EPROTONOSUPPORT: FormatError,
    _errno.EMEDIUMTYPE: WrongDiskError,
    _errno.ENOMEDIUM: WrongDiskError,
    _errno.ENOSPC: SpaceError,
    _errno.EDQUOT: SpaceError,
    _errno.EFBIG: SpaceError,
    _errno.ERANGE: RemoteError,
    _errno.ECONNREFUSED: RemoteError,
    _errno.ECONNRESET: RemoteError,
    _errno.EHOSTUNREACH: RemoteError,
    _errno.ENETUNREACH: RemoteError,
    _errno.ENOTCONN: RemoteError,
    _errno.EPIPE: RemoteError,
    _errno.ETIMEDOUT: RemoteError,
    _errno.ESHUTDOWN: NotRunningError,
    _errno.EOPNOTSUPP: UnsupportedError,
    _errno.ENOSYS: UnsupportedError,
    _errno.EACCES: AccessError,
    _errno.EPERM: AccessError,
}


_ROOM = "make room on the file system of `state`, then try again"

# The usual hints, if the caller has no better one.
_HINTS: dict[int, str] = {
    _errno.EUCLEAN: "nbd-mirror create CONFIG --force (new logs: all is copied again)",
    _errno.ENOTRECOVERABLE: (
        "put the maps back, if you have them; or choose the disk with the newest "
        'data: see "The maps are lost" in the manual'
    ),
    _errno.EPROTONOSUPPORT: "the nbd-mirror that wrote it last, or a newer one",
    _errno.ENOSPC: _ROOM,
    _errno.EDQUOT: _ROOM,
}


def from_errno(rc: int, message: str, hint: str = "") -> MirrorError:
    """
    Return the exception for an errno, without raising it.

    Args:
        rc: -errno as the C functions return it, or errno.
        message: what happened.
        hint: the command that helps; empty: the usual one for this errno.
    Returns:
        The class from the table above, else a MirrorIOError with that errno.
    """
    number = abs(rc)
    cls = _BY_ERRNO.get(number)
    if cls is None:
        return MirrorIOError(message, hint, errno=number)
    error = cls(message, hint or _HINTS.get(number, ""))
    error.errno = number
    return error


def from_name(name: str, message: str, hint: str = "") -> MirrorError:
    """
    Return the exception that a server named over the control socket.

    Args:
        name: the class's name; an unknown one (another version's) becomes a
            plain MirrorError, exit code 1.
        message: what happened.
        hint: the command that helps, or empty.
    """
    for cls in _CLASSES:
        if cls.__name__ == name:
            return cls(message, hint)
    return MirrorError(message, hint)
