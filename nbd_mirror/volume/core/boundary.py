# SPDX-License-Identifier: BSD-3-Clause
"""
What the package's modules share at the boundary to C: the library, errors and texts.

Only this module imports *ffi* and *lib*. Strings go to C as UTF-8 and are copied there
before the call returns.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from nbd_mirror._core import ffi, lib

from ...base.errors import MirrorError, from_errno
from ..model import Params

__all__ = [
    "FOREVER_MS",
    "POLICIES",
    "Buffer",
    "c_reason",
    "c_text",
    "check",
    "error_of",
    "ffi",
    "lib",
    "make_params",
    "text_of",
    "whole_ms",
]

Buffer = bytes | bytearray | memoryview

FOREVER_MS = 0xFFFF_FFFF

_LOCAL_CHOICES = {
    "": lib.NBDM_LOCAL_CHECKED,
    "forced": lib.NBDM_LOCAL_FORCED,
    "lost": lib.NBDM_LOCAL_LOST,
}
POLICIES = {"degrade": lib.NBDM_DEGRADE, "stop": lib.NBDM_STOP}


def check(rc: int, what: str) -> int:
    """
    Return *rc* unless it is -errno.

    Must follow the C call at once, because it reads the thread's last message.

    Raises:
        MirrorError: of the class that fits the errno, with C's message, or with
            *what* if C set none. Its `errno` is the positive number.
    """
    if rc < 0:
        raise error_of(rc, what)
    return rc


def error_of(rc: int, what: str) -> MirrorError:
    """Make the error of a call that returned *rc*; must follow it at once."""
    words = text_of(lib.nbdm_last_error())
    return from_errno(rc, words or f"{what}: {os.strerror(-rc)}")


def make_params(params: Params) -> tuple[Any, list[Any]]:
    """Make struct nbdm_params. The list keeps its strings alive for the call."""
    if len(params.remotes) > lib.NBDM_MAX_REMOTES:
        raise from_errno(-errno.EINVAL, f"more than {lib.NBDM_MAX_REMOTES} remotes")
    alive = [ffi.new("char[]", params.name.encode())]
    alive.append(ffi.new("char[]", os.fsencode(params.local)))
    alive.append(ffi.new("char[]", os.fsencode(params.state_dir)))
    out = ffi.new("struct nbdm_params *")
    out.name, out.local, out.state_dir = alive
    if params.node:
        alive.append(ffi.new("char[]", params.node.encode()))
        out.node = alive[-1]
    out.size, out.region_size = params.size, params.region_size
    out.policy = POLICIES[params.policy]
    out.fail_fenced_reads = int(params.fenced_reads == "fail")
    out.local_choice = _LOCAL_CHOICES[params.local_choice]
    out.hold_ms = params.hold_ms
    out.local_deadline_ms = params.local_deadline_ms
    out.primary, out.epoch = int(params.primary), params.epoch
    out.nr_remotes = len(params.remotes)
    for entry, remote in zip(out.remotes, params.remotes, strict=False):
        alive.append(ffi.new("char[]", remote.name.encode()))
        entry.name = alive[-1]
        entry.deadline_ms = remote.deadline_ms
        entry.assume_in_sync = int(remote.assume_in_sync)
        entry.is_node = int(remote.is_node)
    return out, alive


def c_text(text: str) -> bytes:
    """Encode a text of any characters for C."""
    return text.encode(errors="replace").replace(b"\0", b"?")


def text_of(words: Any) -> str:
    """Decode C's UTF-8; a message cut inside a character stays readable."""
    return bytes(ffi.string(words)).decode(errors="replace")


def c_reason(words: str) -> bytes:
    """Encode a reason so that it fits its field without cutting a character."""
    room: int = lib.NBDM_REASON_LEN - 1
    return c_text(words)[:room].decode(errors="ignore").encode()


def whole_ms(seconds: float) -> int:
    """Return whole milliseconds, rounded up: a short wait must not become a spin."""
    return min(max(-int(-seconds * 1000 // 1), 0), FOREVER_MS - 1)
