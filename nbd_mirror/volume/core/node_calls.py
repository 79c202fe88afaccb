# SPDX-License-Identifier: BSD-3-Clause
"""
Calls between nodes: making one, and what arrives at the door of one.

C moves the bytes (docs/PROTOCOL.md). `Server` in server.py beside this module takes and
answers the calls of other nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .boundary import check, ffi, lib, whole_ms

__all__ = ["CALL_LEN", "TEXT_LEN", "Call", "CallKind", "ListenerKind", "call", "fetch"]

CALL_LEN: int = lib.NBDM_CALL_LEN  # bytes of a request or a reply, at most
TEXT_LEN: int = lib.NBDM_TEXT_LEN - 1  # bytes of a refusal's text, at most


class ListenerKind(Enum):
    """What the clients of a listening socket get."""

    CLIENTS = lib.NBDM_CLIENTS  # the volume
    NODES = lib.NBDM_NODES  # other nodes: calls, maps, claims
    CLOSED = lib.NBDM_CLOSED  # a text that says why not


class CallKind(Enum):
    """What another node asks; the comments on enum nbdm_call_kind say it exactly."""

    CLAIM = lib.NBDM_CALL_CLAIM  # `text` is the claim: rules/claim.py
    META = lib.NBDM_CALL_META  # `words` is a request
    DIRTY = lib.NBDM_CALL_DIRTY  # it wants to read this node's map
    SESSION_ENDED = lib.NBDM_CALL_SESSION_ENDED  # `text` is the claim; no answer


@dataclass(frozen=True, slots=True)
class Call:
    """One call of another node."""

    number: int  # for the answer
    kind: CallKind
    words: bytes
    clean: bool  # SESSION_ENDED: all of the session's connections said goodbye

    @property
    def text(self) -> str:
        """The words as text; hostile bytes become replacement characters."""
        return self.words.decode(errors="replace")


def make_call(taken: object) -> Call:
    """Make a Call of a struct nbdm_call."""
    c = ffi.cast("struct nbdm_call *", taken)
    words = bytes(ffi.buffer(c.words, c.size))
    return Call(int(c.number), CallKind(c.kind), words, bool(c.clean))


def call(uri: str, request: bytes, timeout_s: float) -> bytes:
    """
    Make one call to another node, on a connection of its own.

    Blocks up to *timeout_s*, and while a host's name is resolved.

    Args:
        uri: of its export NAME.meta.
        request: up to CALL_LEN bytes, without a NUL at its end.
    Returns:
        The reply.
    Raises:
        RemoteError: it cannot be reached, refuses (with its text), or is not in time.
    """
    reply = bytearray(CALL_LEN)
    room = ffi.from_buffer("uint8_t[]", reply, require_writable=True)
    rc = lib.nbdm_call(
        uri.encode(), request, len(request), room, CALL_LEN, whole_ms(timeout_s)
    )
    size = check(rc, "call")
    return bytes(reply[:size])


def fetch(uri: str, size: int, timeout_s: float) -> bytes:
    """
    Read the map of another node, on a connection of its own.

    Blocks as `call` does.

    Args:
        uri: of its export NAME.dirty.
        size: the bytes that it must have.
    Raises:
        RemoteError: as for `call`; or the map has another size.
    """
    bits = bytearray(size)
    room = ffi.from_buffer("uint8_t[]", bits, require_writable=True)
    check(lib.nbdm_fetch(uri.encode(), room, size, whole_ms(timeout_s)), "fetch")
    return bytes(bits)
