# SPDX-License-Identifier: BSD-3-Clause
"""
What the faulty server may do: its events' commands, the actions, and when they apply.

For a connection the events are, in order:

    connect      it was accepted, nothing was said
    export       the handshake is done but for its last answer

and for each command, with its kind (read, write, flush, trim, zero):

    header       all but the last 4 bytes of its header were read
    payload      half of a write's data was read
    received     all of it was read, nothing was done
    applied      it was carried out, not answered
    answered     its answer was sent

Actions are functions of the command; several may be taken at one event, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from e2e.lib.faulty import Faulty

__all__ = [
    "Action",
    "Command",
    "Dropped",
    "Rule",
    "delay",
    "drop",
    "error",
    "freeze",
    "garbage",
    "half",
    "keep",
    "silent",
    "twice",
    "unknown_cookie",
]

REPLY_MAGIC = 0x67446698


class Dropped(Exception):  # noqa: N818 - not an error: it ends a connection
    """The connection is to end, or has."""


@dataclass
class Command:
    """A command on its way, or a connection's handshake: what actions act upon."""

    server: Faulty
    epoch: int
    kind: str = "connection"
    flags: int = 0
    cookie: int = 0
    offset: int = 0
    length: int = 0
    payload: bytes = b""
    # What actions change.
    error: int = 0
    skip: bool = False  # is not carried out
    answers: int = 1
    magic: int = REPLY_MAGIC
    cut: int | None = None  # of the answer, so many bytes are sent; then it drops


Action = Callable[[Command], object]


def drop(_: Command) -> None:
    """Close the connection."""
    raise Dropped


def error(number: int) -> Action:
    """Answer with an error, and do nothing."""

    def act(command: Command) -> None:
        command.error, command.skip = number, True

    return act


def silent(command: Command) -> None:
    """Never answer it; others are."""
    command.answers = 0


def twice(command: Command) -> None:
    """Answer it twice."""
    command.answers = 2


def unknown_cookie(command: Command) -> None:
    """Answer to a command that was never sent."""
    command.cookie ^= 1 << 63


def garbage(command: Command) -> None:
    """Answer what is no NBD."""
    command.magic = 0x0BADF00D


def half(command: Command) -> None:
    """Send half an answer, and close the connection."""
    command.cut = 7


def keep(command: Command) -> None:
    """Neither carry it out nor answer it now; `late()` carries it out."""
    command.skip, command.answers = True, 0
    command.server.kept.append(command)


def freeze(command: Command) -> None:
    """Stop here until `thaw()`, then go on as if nothing had been."""
    command.server.pause_here(command, None)


def delay(seconds: float) -> Action:
    """Stop here for some time."""
    return lambda command: command.server.pause_here(command, seconds)


@dataclass
class Rule:
    """What happens at an event, the *nth* time and *times* times from there."""

    event: str
    kind: str
    actions: tuple[Action, ...]
    nth: int
    times: int
    at: int | None
    seen: int = 0

    def applies(self, event: str, command: Command) -> bool:
        """Tell whether it is this one's turn; counts those that match."""
        if (event, command.kind) != (self.event, self.kind):
            return False
        if self.at is not None and command.offset != self.at:
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times
