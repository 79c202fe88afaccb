# SPDX-License-Identifier: BSD-3-Clause
"""
The Python door: nbdkit's callbacks under `nbdkit python`.

It is portable and easy to change. Each request is one C call with the GIL released, but
still passes through the interpreter, which limits it to about 22,000 requests/s. nbdkit
runs this file as `__main__`, so imports are absolute, and finds the callbacks by their
names. A connection has no state, so its handle is just true.
"""

from __future__ import annotations

from nbd_mirror.base.interrupt import end_by_signal
from nbd_mirror.base.parent import outlive_parent

# First of all: the imports take time, and nbdkit would show Ctrl-C as a traceback.
outlive_parent()
end_by_signal()

# ruff: noqa: E402
import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import nbdkit

from nbd_mirror.base.errors import ConfigError, MirrorError
from nbd_mirror.server.process import or_exit
from nbd_mirror.server.volume import Volume
from nbd_mirror.volume import core

API_VERSION = 2

_P = ParamSpec("_P")
_T = TypeVar("_T")

_config_path: str | None = None
_volume: Volume | None = None


def _engine() -> core.Engine:
    assert _volume is not None
    return _volume.engine


def _answer(request: Callable[_P, _T]) -> Callable[_P, _T]:
    """Pass a request's errno to the client; nbdkit logs the message."""

    @functools.wraps(request)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return request(*args, **kwargs)
        except (MirrorError, OSError) as error:
            nbdkit.set_error(error.errno or errno.EIO)
            # nbdkit logs the trace with the message, which already names the place in
            # C.
            raise error.with_traceback(None) from None

    return wrapped


def _flags(flags: int) -> int:
    return (
        (core.FUA if flags & nbdkit.FLAG_FUA else 0)
        | (core.MAY_TRIM if flags & nbdkit.FLAG_MAY_TRIM else 0)
        | (core.FAST_ZERO if flags & nbdkit.FLAG_FAST_ZERO else 0)
    )


def _refuse(message: str) -> None:
    raise ConfigError(message)


def thread_model() -> int:
    """Let requests run in parallel: the engine does its own locking."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    """Take the only parameter."""
    global _config_path  # noqa: PLW0603  nbdkit has one volume a process
    if key != "config":
        or_exit(lambda: _refuse(f"unknown parameter {key}: only config=FILE is known"))
    _config_path = str(Path(value).absolute())


def config_complete() -> None:
    """Check that the parameter was given."""
    if _config_path is None:
        or_exit(lambda: _refuse("config=FILE is needed: the volume's configuration"))


def get_ready() -> None:
    """Open the volume before any fork, or end the process with one clear line."""
    global _volume  # noqa: PLW0603
    path = _config_path or ""
    _volume = or_exit(lambda: Volume.open(path, "python", nbdkit.shutdown))


def after_fork() -> None:
    """Start the threads, which would not survive a fork."""
    assert _volume is not None
    or_exit(_volume.serve)


def cleanup() -> None:
    """Stop cleanly, after the last client has gone."""
    if _volume is not None:
        _volume.stop()


def open(readonly: bool) -> bool:  # noqa: A001, ARG001  nbdkit's name
    """Count a client in."""
    _engine().count_client(+1)
    return True


def close(h: bool) -> None:  # noqa: ARG001
    """Count a client out."""
    _engine().count_client(-1)


def export_description(h: bool) -> str:  # noqa: ARG001
    """Name the volumes behind this export, so that no volume mirrors onto itself."""
    return _engine().chain()


def get_size(h: bool) -> int:  # noqa: ARG001
    """Give the size in bytes."""
    return _engine().status().size


def block_size(h: bool) -> tuple[int, int, int]:  # noqa: ARG001
    """Give the smallest, the best and the largest request in bytes."""
    return _engine().min_block, core.PREFERRED_BLOCK, core.MAX_REQUEST


def _yes(h: bool) -> bool:  # noqa: ARG001
    return True


# A flush on one connection covers the answered writes of all, so multi-conn is true.
can_write = can_flush = can_trim = can_zero = can_fast_zero = _yes
can_extents = can_multi_conn = _yes


def is_rotational(h: bool) -> bool:  # noqa: ARG001
    """Tell clients that they need not sort their requests."""
    return False


def can_fua(h: bool) -> int:  # noqa: ARG001
    """Pass FUA on to the engine."""
    return int(nbdkit.FUA_NATIVE)


def can_cache(h: bool) -> int:  # noqa: ARG001
    """Pass cache requests on to the engine."""
    return int(nbdkit.CACHE_NATIVE)


@_answer
def pread(h: bool, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    """Read into nbdkit's own buffer."""
    _engine().pread(buf, offset)


@_answer
def pwrite(h: bool, buf: memoryview, offset: int, flags: int) -> None:  # noqa: ARG001
    """Write from nbdkit's own buffer."""
    _engine().pwrite(buf, offset, _flags(flags))


@_answer
def flush(h: bool, flags: int) -> None:  # noqa: ARG001
    """Flush all legs."""
    _engine().flush()


@_answer
def trim(h: bool, count: int, offset: int, flags: int) -> None:  # noqa: ARG001
    """Trim all legs."""
    _engine().trim(count, offset, _flags(flags))


@_answer
def zero(h: bool, count: int, offset: int, flags: int) -> None:  # noqa: ARG001
    """Zero all legs."""
    _engine().zero(count, offset, _flags(flags))


@_answer
def cache(h: bool, count: int, offset: int, flags: int) -> None:  # noqa: ARG001
    """Read ahead."""
    _engine().cache(count, offset)


@_answer
def extents(
    h: bool,  # noqa: ARG001
    count: int,
    offset: int,
    flags: int,
) -> list[tuple[int, int, int]]:
    """List the local disk's runs of data and holes."""
    limit = 1 if flags & nbdkit.FLAG_REQ_ONE else 512
    found = _engine().extents(count, offset, limit)
    return [(one.offset, one.length, one.type) for one in found]
