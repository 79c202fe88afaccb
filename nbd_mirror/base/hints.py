# SPDX-License-Identifier: BSD-3-Clause
"""
Commands in hints, in a form that a user can paste.

The code that raises an error does not know the user's name of the volume, so its hint
says CONFIG. The code that prints the hint replaces it by the user's word, and adds the
options of the user's own command if the hint repeats that command.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass

__all__ = ["ASKED_VARIABLE", "Asked", "quote"]

# Passes this on to the server that a command starts, which may print a hint too.
ASKED_VARIABLE = "NBD_MIRROR_ASKED"

_OPTION = r"--[a-z-]+(?: [a-z0-9]+)?"
# As a word, and only in a command of ours: a path may contain the same letters.
_COMMAND = re.compile(
    rf"(?P<user>sudo (?:-u \S+ )?)?nbd-mirror (?P<command>[a-z-]+) CONFIG(?![\w./-])"
    rf"(?P<options>(?: {_OPTION})*)"
)
# Behind a command that is for another host: "(on beta)", "(on the primary)".
_ELSEWHERE = re.compile(r" \(on (?:(?P<node>[^ )]+)\)|the )")
_EXCLUSIVE = {"--force", "--without-local"}


def quote(word: str) -> str:
    """
    Return *word* as a shell reads it.

    A terminal shows no bytes that are not UTF-8, and not every character. Such a word
    is written as $'...', which bash, zsh and ksh read, with those bytes in octal.
    """
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escape, word))}'"


def _escape(char: str) -> str:
    if char in "'\\":
        return f"\\{char}"
    if char.isprintable():
        return char
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(char))


@dataclass(frozen=True)
class Asked:
    """
    The user's command, with each word quoted for a shell.

    Args:
        config: the user's name of the volume, and of the node if there was one.
        anywhere: another name of it that means the same to any user.
        command: the user's, or "".
        options: those that the user gave, by their names, such as "--door".
        node: the end of *config* and *anywhere* that names this host's node, or "".
    """

    config: str
    anywhere: str
    command: str = ""
    options: Mapping[str, str] | None = None
    node: str = ""  # the end of *config* that says which node this host is

    def name(self, hint: str) -> str:
        """Return *hint* with commands that can be pasted."""
        return _COMMAND.sub(self._name, hint)

    def _name(self, found: re.Match[str]) -> str:
        user, command = found["user"] or "", found["command"]
        config = self.anywhere if user else self.config
        there = _ELSEWHERE.match(found.string, found.end())
        if there is not None and self.node:
            # The other host is another node, and needs to be told as this one was.
            node = f" --node {there['node']}" if there["node"] else ""
            config = config.removesuffix(self.node) + node
        given = set(found["options"].split())
        if given & _EXCLUSIVE:
            given |= _EXCLUSIVE
        words = [f"{user}nbd-mirror {command}", config]
        if command == self.command:
            options = self.options or {}
            words += [text for name, text in options.items() if name not in given]
        return " ".join(words) + found["options"]

    def dump(self) -> dict[str, str]:
        """Return the environment variable that passes this on to a started program."""
        return {ASKED_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def load(cls) -> Asked | None:
        """Return what the program that started this one passed on, or None."""
        try:
            return cls(**json.loads(os.environ[ASKED_VARIABLE]))
        except (KeyError, TypeError, ValueError):
            return None
