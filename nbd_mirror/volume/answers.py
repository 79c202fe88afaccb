# SPDX-License-Identifier: BSD-3-Clause
"""
Checks of a server's answers.

A control socket may belong to another user, who may send anything to root, or to a
server of another version. So everything that a command relies on is checked once,
before use. A value of another type, or a number out of range, makes the whole answer
invalid. Unknown keys are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, Strict, ValidationError

from ..base.errors import FormatError

__all__ = [
    "Answer",
    "Disks",
    "Flag",
    "Number",
    "Ping",
    "Policy",
    "Text",
    "Unit",
    "Whole",
    "read",
]


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit or kind of a type's values, for the manual."""

    words: str


_MOST = 1 << 64
_bounds = Field(strict=True, gt=-_MOST, lt=_MOST)  # neither infinite nor NaN

# Any str: a path may hold bytes that are no UTF-8.
Text = Annotated[InstanceOf[str], Unit("text")]
Flag = Annotated[bool, Strict(), Unit("true or false")]
Whole = Annotated[int, _bounds]
Number = Annotated[float, _bounds]


class Answer(BaseModel):
    """An answer, or a part of one."""

    model_config = ConfigDict(frozen=True)


class Ping(Answer):
    """The identity that a server reports."""

    volume: Text
    pid: Annotated[int, Field(strict=True, gt=0, lt=1 << 31)]


class Disks(Answer):
    """The disks that a command was about, by name."""

    remotes: tuple[Text, ...]


class Policy(Answer):
    """What clients get when a remote is lost."""

    policy: Text
    fenced_reads: Literal["serve", "fail"]
    fenced: Flag


_Model = TypeVar("_Model", bound=Answer)


def read(model: type[_Model], answer: object) -> _Model:
    """
    Check a server's answer and return it as a model.

    Raises:
        FormatError: the answer is invalid.
    """
    try:
        return model.model_validate(answer)
    except ValidationError:
        raise FormatError(
            "the program on the control socket is no nbd-mirror server, or one of "
            "another version"
        ) from None
