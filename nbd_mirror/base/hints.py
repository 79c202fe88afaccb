# SPDX-License-Identifier: BSD-3-Clause
"""
The commands in hints, as a user can paste them.

Where an error arises nobody knows what the user calls the volume: a hint says CONFIG
there. Who prints it puts the user's word in that place, and the options of the user's
own command where the hint is to give that command again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

__all__ = ["ASKED_VARIABLE", "Asked"]

# How a command tells the server that it starts, which may end with a hint.
ASKED_VARIABLE = "NBD_MIRROR_ASKED"

_OPTION = r"--[a-z-]+(?: [a-z0-9]+)?"
# As a word, and only of a command of ours: a path may hold the same letters.
_COMMAND = re.compile(
    rf"(?P<user>sudo (?:-u \S+ )?)?nbd-mirror (?P<command>[a-z]+) CONFIG(?![\w./-])"
    rf"(?P<options>(?: {_OPTION})*)"
)
_EXCLUSIVE = {"--force", "--without-local"}


@dataclass(frozen=True)
class Asked:
    """
    What the user asked for, each word quoted for a shell.

    Args:
        config: what the user calls the volume.
        anywhere: another word for it, that means the same to any user.
        command: the user's, or "".
        options: those that the user gave it, by their names, such as "--door".
    """

    config: str
    anywhere: str
    command: str = ""
    options: Mapping[str, str] | None = None

    def name(self, hint: str) -> str:
        """Return *hint* with commands that can be pasted."""
        return _COMMAND.sub(self._name, hint)

    def _name(self, found: re.Match[str]) -> str:
        user, command = found["user"] or "", found["command"]
        given = set(found["options"].split())
        if given & _EXCLUSIVE:
            given |= _EXCLUSIVE
        words = [f"{user}nbd-mirror {command}", self.anywhere if user else self.config]
        if command == self.command:
            options = self.options or {}
            words += [text for name, text in options.items() if name not in given]
        return " ".join(words) + found["options"]

    def dump(self) -> dict[str, str]:
        """Return what hands this on to a program that is started."""
        return {ASKED_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def load(cls) -> Asked | None:
        """Return what the program that started this one has handed on, if it has."""
        try:
            return cls(**json.loads(os.environ[ASKED_VARIABLE]))
        except (KeyError, TypeError, ValueError):
            return None
