# SPDX-License-Identifier: BSD-3-Clause
"""
The calls between nodes: one JSON object each way, over the export NAME.meta.

A call says which versions its sender speaks, and the answer is in the highest one that
both do. Today there is version 1. Both carry the name and the id of their sender, and
the name of the node that they are meant for. A shared key
proves only that the sender belongs to the volume; a certificate must be the sender's.

The other node may be hostile or broken. So a decoder takes any bytes, and raises
nothing but FormatError. Keys that it does not know are ignored, so a later release may
add some to version 1.

    call      asks the other node to
    --------  -------------------------------------------------------------
    meet      show itself, and say what the two nodes do (decide)
    begin     store what the two nodes agreed on, before the first copy
    adopt     take this node's generation, at the end of a resync
    consent   store the term of this node's promotion, or refuse it
    token     take the role of a primary that demoted itself
    choose    store that an operator keeps it, and not this node, in a split brain
    give_up   save what it alone has, and give it up for this node

A release that knows the last two says so in its answer to `meet` (`features`), and no
node sends them to one that does not.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..base.errors import FormatError
from ..rules.claim import NONCE_DIGITS, NUMBER_MAX, Claim
from ..rules.generation import BASES, HISTORY
from ..rules.node_identity import Known
from ..rules.node_side import Crash, Plan, Role, Side

__all__ = [
    "FEATURES",
    "MAX_BYTES",
    "REPLACED_MAX",
    "RESOLVE",
    "TEXT_MAX",
    "VERSIONS",
    "Adopt",
    "Answer",
    "Begin",
    "Body",
    "Choose",
    "ClaimWords",
    "Consent",
    "GiveUp",
    "JobWords",
    "KnownWords",
    "Meet",
    "Message",
    "SideWords",
    "Token",
    "decode_answer",
    "decode_call",
    "encode",
    "new_nonce",
    "plan_words",
    "version_of",
]

VERSIONS = (1, 1)  # the lowest and the highest that this program speaks
RESOLVE = "resolve"  # feature: it knows `choose` and `give_up`
FEATURES = (RESOLVE,)
MAX_BYTES = 64 << 10  # of a call, and of an answer
_MOST_NODES = 9  # of a volume, with room for a later release
REPLACED_MAX = (1 << 32) - 1  # a record has 32 bits for it
TEXT_MAX = 2000  # characters of a reason
_SHOWN = 500  # characters of a text from another node


def _plain(text: str) -> str:
    """Return a text for the log and the terminal: the other node may be hostile."""
    return "".join(char if char.isprintable() else "?" for char in text)


Number = Annotated[int, Field(strict=True, ge=0, le=NUMBER_MAX)]
# As a configuration allows it, or "": a name is stored, logged and shown.
Name = Annotated[
    str, Field(strict=True, pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,62})?$")
]
Text = Annotated[str, Field(strict=True, max_length=TEXT_MAX), AfterValidator(_plain)]
Flag = Annotated[bool, Field(strict=True)]
Id = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")]
Nonce = Annotated[str, Field(strict=True, pattern=rf"^[0-9a-f]{{{NONCE_DIGITS}}}$")]


class _Words(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class KnownWords(_Words):
    """What a node knows of the identity of a node: `Known`."""

    node: Name
    id: Annotated[int, Field(strict=True, ge=0, lt=1 << 128)]
    replaced: Annotated[int, Field(strict=True, ge=0, le=REPLACED_MAX)]


class SideWords(_Words):
    """A node as it shows itself: `Side`."""

    volume: Name
    node: Name
    size: Number
    generation: Number
    history: Annotated[tuple[Number, ...], Field(max_length=HISTORY)]
    bases: Annotated[tuple[Number, ...], Field(max_length=BASES)]
    dirty: Number
    doubts: Number
    missed: Number
    crash: Literal[0, 1, 2, 3]
    inconsistent: Flag
    zero: Flag
    role: Literal["primary", "secondary"]
    epoch: Number
    leader: Name
    handed: Name
    identities: Annotated[tuple[KnownWords, ...], Field(max_length=_MOST_NODES)]

    @classmethod
    def of(cls, side: Side) -> SideWords:
        """Put a side into words."""
        words = {
            field.name: getattr(side, field.name) for field in dataclasses.fields(side)
        }
        words["crash"], words["role"] = side.crash.value, side.role.value
        words["identities"] = tuple(
            KnownWords(node=one.node, id=one.id, replaced=one.replaced)
            for one in side.identities
        )
        return cls.model_validate(words)

    def side(self) -> Side:
        """Return the side that the words stand for."""
        words = {name: getattr(self, name) for name in type(self).model_fields}
        words["crash"], words["role"] = Crash(self.crash), Role(self.role)
        words["identities"] = tuple(
            Known(one.node, one.id, one.replaced) for one in self.identities
        )
        return Side(**words)


class ClaimWords(_Words):
    """One session of one promoted node: `Claim`."""

    epoch: Number
    node: Name
    session: Number
    nonce: Nonce

    @classmethod
    def of(cls, claim: Claim) -> ClaimWords:
        """Put a claim into words."""
        return cls.model_validate(dataclasses.asdict(claim))

    def claim(self) -> Claim:
        """Return the claim that the words stand for."""
        return Claim(self.epoch, self.node, self.session, self.nonce)


PlanWords = dict[Name, Text | Number | Flag]
JobWords = dict[Name, Text | Number | Flag]


class Meet(_Words):
    """Show yourself; I am *side*."""

    call: Literal["meet"] = "meet"
    side: SideWords


class Begin(_Words):
    """
    Store what we agreed on: *plan* is `decide` of *side* and what you showed.

    *claim* is the session that does it; *regions* are to be copied to you.
    """

    call: Literal["begin"] = "begin"
    side: SideWords
    plan: Annotated[PlanWords, Field(max_length=32)]
    claim: ClaimWords
    regions: Number


class Adopt(_Words):
    """Take my generation: the session *claim* has copied all that you lacked."""

    call: Literal["adopt"] = "adopt"
    claim: ClaimWords
    generation: Number
    history: Annotated[tuple[Number, ...], Field(max_length=HISTORY)]


class Consent(_Words):
    """Store the promotion of the sender in *epoch*, or refuse it."""

    call: Literal["consent"] = "consent"
    epoch: Number


class Token(_Words):
    """Take the role of the sender, if you hold *generation* in this term."""

    call: Literal["token"] = "token"
    generation: Number
    epoch: Number


class Choose(_Words):
    """
    An operator keeps you: store a later term, and begin a generation.

    *plan* is `resolve` of what you show and *side*, the sender, which is given up.
    """

    call: Literal["choose"] = "choose"
    side: SideWords
    plan: Annotated[PlanWords, Field(max_length=32)]


class GiveUp(_Words):
    """
    An operator keeps me: save what you alone have, and give it up.

    *dry_run*: only say what you would do; *job*: only say how far this one is.
    """

    call: Literal["give_up"] = "give_up"
    dry_run: Flag = False
    job: Name = ""


Body = Meet | Begin | Adopt | Consent | Token | Choose | GiveUp


class Message(_Words):
    """
    A call with its envelope.

    *v*: the lowest and highest version that the sender speaks; *sender*, *id*: its name
    and id; *to*: the node it is meant for.
    """

    v: tuple[Number, Number]
    volume: Name
    sender: Name
    id: Id
    to: Name
    body: Annotated[Body, Field(discriminator="call")]


class Answer(_Words):
    """
    The answer to a call; *ok* is false if it was refused: *why* and *hint* say more.

    *side* and *plan* answer `meet`; *side* also `begin`, `consent` and `choose`, as it
    is after them. *generation* answers `adopt`: the one that the node holds now.
    *session* answers `meet`: the highest claimed one of the caller's promotion; 0:
    none, or the node does not say. *job* answers `give_up`. *features* are in each
    answer to `meet`.
    """

    v: Number
    sender: Name
    id: Id
    ok: Flag
    why: Text = ""
    hint: Text = ""
    side: SideWords | None = None
    plan: Annotated[PlanWords, Field(max_length=32)] | None = None
    generation: Number = 0
    session: Number = 0
    job: Annotated[JobWords, Field(max_length=32)] | None = None
    features: Annotated[tuple[Name, ...], Field(max_length=32)] = ()


def plan_words(plan: Plan) -> PlanWords:
    """Put a plan into words, so that two nodes compare theirs."""
    words = dataclasses.asdict(plan)
    words["action"], words["extent"] = plan.action.value, plan.extent.value
    return words


def version_of(offered: tuple[int, int]) -> int | None:
    """Return the highest version that both nodes speak; None: there is none."""
    highest = min(offered[1], VERSIONS[1])
    return highest if highest >= max(offered[0], VERSIONS[0]) else None


def encode(message: Message | Answer) -> bytes:
    """
    Return the bytes of a call or an answer.

    Raises:
        FormatError: they are more than the other node takes.
    """
    text = json.dumps(message.model_dump(mode="json", exclude_none=True))
    if len(text) > MAX_BYTES:
        raise FormatError(f"a call between nodes has {len(text)} bytes")
    return text.encode()


def decode_call(words: bytes) -> Message:
    """
    Read a call.

    Raises:
        FormatError: it is none, or no version of it is known here.
    """
    fields = _object(words)
    offered = _range(fields.get("v"))
    if offered is not None and version_of(offered) is None:
        raise FormatError(
            f"the other node speaks versions {offered[0]} to {offered[1]} of the calls "
            f"between nodes, this one {VERSIONS[0]} to {VERSIONS[1]}",
            "install the same release of nbd-mirror on both nodes",
        )
    return _checked(Message, fields)


def decode_answer(words: bytes) -> Answer:
    """
    Read an answer, without the NULs behind it.

    Raises:
        FormatError: it is none.
    """
    return _checked(Answer, _object(words.rstrip(b"\0")))


_Model = TypeVar("_Model", bound=BaseModel)


def _object(words: bytes) -> dict[str, Any]:
    if len(words) > MAX_BYTES:
        raise FormatError(f"a call between nodes has {len(words)} bytes")
    try:
        found = json.loads(words)
    except (ValueError, RecursionError):  # the first also of no UTF-8, and of huge ints
        raise FormatError("the other node sent no JSON") from None
    if not isinstance(found, dict):
        raise FormatError("the other node sent no JSON object")
    return found


def _range(offered: object) -> tuple[int, int] | None:
    if not isinstance(offered, list) or len(offered) != 2:
        return None
    low, high = offered
    if type(low) is int and type(high) is int and 0 <= low <= high <= NUMBER_MAX:
        return low, high
    return None


def _checked(model: type[_Model], fields: Mapping[str, Any]) -> _Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        text = f"{where}: {first['msg']}".encode(errors="replace").decode()
        raise FormatError(
            f"the other node sent a call that is wrong: {text[:_SHOWN]}"
        ) from None


def new_nonce() -> str:
    """Return a random number that no other session has."""
    return uuid.uuid4().hex
