# SPDX-License-Identifier: BSD-3-Clause
"""Follow an NBD client's requests, so that a link can answer in its server's place."""

from __future__ import annotations

import struct

__all__ = ["Requests", "simple_answer"]

FLAGS, OPTION, REQUEST = struct.Struct(">I"), struct.Struct(">8sII"), 28
OPTION_MAGIC, REQUEST_MAGIC, ANSWER_MAGIC = b"IHAVEOPT", 0x25609513, 0x67446698
EXPORT_NAME, GO = 1, 7
WRITE = 1


def simple_answer(cookie: bytes) -> bytes:
    """Return the answer for success."""
    return struct.pack(">II8s", ANSWER_MAGIC, 0, cookie)


class Requests:
    """The client's half of a connection, from its first byte on."""

    def __init__(self) -> None:
        self._seen = bytearray()
        self._skip = 0  # bytes of a payload that are still to come
        self._stage = "flags"

    def take(self, data: memoryview) -> list[tuple[bytes, int]]:
        """Return cookie and length of the writes whose headers end in *data*."""
        self._seen += data
        writes = []
        while self._stage != "lost":
            step = min(self._skip, len(self._seen))
            del self._seen[:step]
            self._skip -= step
            found = None if self._skip else self._step()
            if found is None:
                break
            writes += found
        if self._stage == "lost":
            self._seen.clear()
        return writes

    def _step(self) -> list[tuple[bytes, int]] | None:
        """Parse one header; None if it is not complete yet."""
        if self._stage == "flags":
            return self._cut(FLAGS.size, "options")
        if self._stage == "options":
            if len(self._seen) < OPTION.size:
                return None
            magic, option, length = OPTION.unpack_from(self._seen)
            self._skip = length
            last = option in (EXPORT_NAME, GO)
            stage = "requests" if last else "options"
            return self._cut(OPTION.size, stage if magic == OPTION_MAGIC else "lost")
        if len(self._seen) < REQUEST:
            return None
        magic, _, kind, cookie, _, length = struct.unpack_from(">IHH8sQI", self._seen)
        known = magic == REQUEST_MAGIC
        if kind != WRITE or not known:
            return self._cut(REQUEST, "requests" if known else "lost")
        self._skip = length
        self._cut(REQUEST, "requests")
        return [(cookie, length)]

    def _cut(self, count: int, stage: str) -> list[tuple[bytes, int]] | None:
        if len(self._seen) < count:
            return None
        del self._seen[:count]
        self._stage = stage
        return []
