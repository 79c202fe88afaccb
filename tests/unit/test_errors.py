# SPDX-License-Identifier: BSD-3-Clause
"""The tree of errors: codes, errnos, and the way over the control socket."""

from __future__ import annotations

import errno
import re

import pytest

from nbd_mirror.base import errors
from nbd_mirror.base.errors import (
    EXIT_CODES,
    BusyError,
    ConfigError,
    ExistsError,
    FormatError,
    MirrorError,
    MirrorIOError,
    MissingError,
    NotRunningError,
    RemoteError,
    SpaceError,
    WrongDiskError,
    from_errno,
    from_name,
)


def _classes() -> list[type[MirrorError]]:
    found = [getattr(errors, name) for name in errors.__all__]
    return [one for one in found if isinstance(one, type) and one is not MirrorError]


def test_exit_code_of_each_class_is_its_own() -> None:
    """No two classes share a code, nor one with 0, 1, 2 or 130."""
    codes = [cls.exit_code for cls in _classes()]
    assert len(codes) == len(set(codes))
    assert not {0, 1, 2, 130} & set(codes)


def test_exit_code_table_in_the_docstring_is_the_real_one() -> None:
    """The documented table says what EXIT_CODES says."""
    rows = re.findall(r"^(\d+) +(.+)$", errors.__doc__ or "", re.MULTILINE)
    assert EXIT_CODES == {int(code): text for code, text in rows}
    assert {cls.exit_code for cls in _classes()} < set(EXIT_CODES)


@pytest.mark.parametrize(
    ("number", "cls"),
    [
        (errno.EBUSY, BusyError),
        (errno.ENOENT, MissingError),
        (errno.EUCLEAN, FormatError),
        (errno.EPROTONOSUPPORT, FormatError),
        (errno.EMEDIUMTYPE, WrongDiskError),
        (errno.ENOMEDIUM, WrongDiskError),
        (errno.ENOSPC, SpaceError),
        (errno.EINVAL, ConfigError),
        (errno.ELOOP, ConfigError),
        (errno.ENAMETOOLONG, ConfigError),
        (errno.EEXIST, ExistsError),
        (errno.ERANGE, RemoteError),
        (errno.ESHUTDOWN, NotRunningError),
        (errno.EIO, MirrorIOError),
    ],
)
def test_errno_gives_its_class_with_words_kept(
    number: int, cls: type[MirrorError]
) -> None:
    """An errno, of either sign, becomes its class; message and hint stay."""
    for rc in (number, -number):
        error = from_errno(rc, "what", "hint")
        assert cls is type(error)
        assert ("what", "hint", "what") == (error.message, error.hint, str(error))


def test_errno_unknown_becomes_io_error_with_that_errno() -> None:
    """An errno without a class of its own is an I/O error that carries it."""
    error = from_errno(-errno.ENOMEM, "no memory")
    assert isinstance(error, OSError)
    assert errno.ENOMEM == error.errno
    assert str(error) == "no memory"


@pytest.mark.parametrize("cls", _classes())
def test_name_gives_the_same_class_back(cls: type[MirrorError]) -> None:
    """Every class survives being named over a socket."""
    error = from_name(cls.__name__, "m", "h")
    assert (cls, "m", "h") == (type(error), error.message, error.hint)


def test_name_unknown_becomes_the_base() -> None:
    """A class of another version still arrives as an error."""
    assert type(from_name("NoSuchError", "m")) is MirrorError
