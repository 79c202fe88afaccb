# SPDX-License-Identifier: BSD-3-Clause
"""
What a server's answers must hold to be looked at.

A control socket may be that of another user, which says anything to root, or that of a
server of another version. So what a command takes for granted is checked once, before:
a value of another type, or a number beyond all bounds, makes an answer none. Keys that
are not known are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, Strict, ValidationError

from ..base.errors import FormatError

__all__ = [
    "Answer",
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
    """What the values of a type are, for whoever reads about them."""

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
    """Who a server says that it is."""

    volume: Text
    pid: Annotated[int, Field(strict=True, gt=0, lt=1 << 31)]


class Policy(Answer):
    """What clients get when a remote is lost."""

    policy: Text
    fenced_reads: Literal["serve", "fail"]
    fenced: Flag


_Model = TypeVar("_Model", bound=Answer)


def read(model: type[_Model], answer: object) -> _Model:
    """
    Take a server's answer for what it has to be.

    Raises:
        FormatError: it is not.
    """
    try:
        return model.model_validate(answer)
    except ValidationError:
        raise FormatError(
            "what answers on the control socket is no nbd-mirror server, or one of "
            "another version"
        ) from None
