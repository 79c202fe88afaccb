# SPDX-License-Identifier: BSD-3-Clause
"""
The [hooks] table: programs of the operator that run when a node's role changes.

A program is named by its absolute path, because a server has no search path that its
operator sees. It is not looked for here: the file is checked on all nodes, and a
program may lie on a disk that is mounted later. The server checks it before each run.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from . import config_values as values

__all__ = ["HooksConfig"]

MAX_WORDS = 100


def _parse_command(value: object) -> object:
    """Return the words of a command, from a list or from the program's path alone."""
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not 0 < len(words) <= MAX_WORDS:
        raise ValueError(f"must be {values.HOOK_RULE}")
    if not all(isinstance(word, str) and "\0" not in word for word in words):
        raise ValueError(f"must be {values.HOOK_RULE}")
    if not words[0].startswith("/"):
        raise ValueError(f"must be {values.HOOK_RULE}")
    return tuple(words)


Command = Annotated[tuple[str, ...], BeforeValidator(_parse_command)]


class HooksConfig(BaseModel):
    """The words of each command, none for no hook, and how long each may run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    promoting: Command = Field(default=())
    promoted: Command = Field(default=())
    demoting: Command = Field(default=())
    demoted: Command = Field(default=())
    timeout: Annotated[float, values.between("timeout", 1, 600)] = 60.0

    @property
    def limit_s(self) -> float:
        """How long a change of role may wait: for a hook that runs, and for its own."""
        used = self.promoting or self.promoted or self.demoting or self.demoted
        return 2 * self.timeout if used else 0.0
