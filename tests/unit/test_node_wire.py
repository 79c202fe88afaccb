# SPDX-License-Identifier: BSD-3-Clause
"""The calls between nodes: what is sent arrives, and no bytes do harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbd_mirror.base.errors import FormatError
from nbd_mirror.rules.claim import NUMBER_MAX, Claim
from nbd_mirror.rules.generation import BASES, HISTORY
from nbd_mirror.rules.node_handshake import decide
from nbd_mirror.rules.node_identity import Known
from nbd_mirror.rules.node_side import Crash, Role, Side
from nbd_mirror.volume import node_wire as wire

NUMBERS = st.integers(0, NUMBER_MAX)
NAMES = st.from_regex(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,62})?", fullmatch=True)
SIDES = st.builds(
    Side,
    volume=NAMES,
    node=NAMES,
    size=NUMBERS,
    generation=NUMBERS,
    history=st.lists(NUMBERS, max_size=HISTORY).map(tuple),
    bases=st.lists(NUMBERS, max_size=BASES).map(tuple),
    dirty=NUMBERS,
    doubts=NUMBERS,
    missed=NUMBERS,
    crash=st.sampled_from(Crash),
    inconsistent=st.booleans(),
    zero=st.booleans(),
    role=st.sampled_from(Role),
    epoch=NUMBERS,
    leader=NAMES,
    handed=NAMES,
    identities=st.lists(
        st.builds(Known, NAMES, st.integers(0, (1 << 128) - 1), st.integers(0, 9)),
        max_size=8,
    ).map(tuple),
)
SIDE = Side("pg", "alpha", 1 << 30, 7, (6, 5), (6,), identities=(Known("alpha", 1),))
OTHER = replace(SIDE, node="beta", generation=6, history=(5,), bases=())
CLAIM = Claim(2, "alpha", 3, "0" * 32)


def message(body: Any) -> wire.Message:
    """Put a call into its envelope."""
    return wire.Message(
        v=wire.VERSIONS, volume="pg", sender="alpha", id="a" * 32, to="beta", body=body
    )


def fields(body: Any) -> dict[str, Any]:
    """Give the JSON object of a call, to be spoilt."""
    found: dict[str, Any] = json.loads(wire.encode(message(body)))
    return found


MEET = wire.Meet(side=wire.SideWords.of(SIDE))
CALLS = (
    MEET,
    wire.Begin(
        side=wire.SideWords.of(SIDE),
        plan=wire.plan_words(decide(SIDE, OTHER)),
        claim=wire.ClaimWords.of(CLAIM),
        regions=3,
    ),
    wire.Adopt(claim=wire.ClaimWords.of(CLAIM), generation=7, history=(6, 5)),
    wire.Consent(epoch=9),
    wire.Token(generation=7, epoch=2),
)


@given(SIDES)
def test_a_side_arrives_as_it_was_sent(side: Side) -> None:
    """Any numbers and names."""
    sent = wire.Message(
        v=(1, 1),
        volume="pg",
        sender="alpha",
        id="a" * 32,
        to="beta",
        body=wire.Meet(side=wire.SideWords.of(side)),
    )
    got = wire.decode_call(wire.encode(sent)).body
    assert isinstance(got, wire.Meet)
    assert got.side.side() == side


@pytest.mark.parametrize("body", CALLS, ids=lambda body: body.call)
def test_a_call_arrives_as_it_was_sent(body: Any) -> None:
    """Each kind of call."""
    assert wire.decode_call(wire.encode(message(body))) == message(body)


def test_the_longest_call_fits() -> None:
    """Numbers of 64 bits and names of 63 bytes, as many as a record has."""
    name = "n" * 63
    known = tuple(Known(name, (1 << 128) - 1, wire.REPLACED_MAX) for _ in range(9))
    side = Side(
        name, name, NUMBER_MAX, NUMBER_MAX, (NUMBER_MAX,) * HISTORY, identities=known
    )
    assert len(wire.encode(message(wire.Meet(side=wire.SideWords.of(side))))) < 10_000


def test_a_plan_is_the_same_on_both_sides() -> None:
    """It is compared after it went over the wire."""
    plan = decide(SIDE, OTHER)
    assert plan == decide(OTHER, SIDE)
    assert json.loads(json.dumps(wire.plan_words(plan))) == wire.plan_words(plan)


@pytest.mark.parametrize(
    ("offered", "version"),
    [((1, 1), 1), ((0, 5), 1), ((1, 9), 1), ((2, 3), None), ((0, 0), None)],
)
def test_the_highest_common_version_counts(
    offered: tuple[int, int], version: int | None
) -> None:
    """A newer node speaks the old version too, or the error says what to do."""
    assert wire.version_of(offered) == version
    call = fields(MEET) | {"v": list(offered), "news": {"of": "a later release"}}
    if version is None:
        with pytest.raises(FormatError, match="speaks versions"):
            wire.decode_call(json.dumps(call).encode())
    else:
        assert wire.decode_call(json.dumps(call).encode()).body == MEET


def test_an_answer_of_text_cannot_write_on_a_terminal() -> None:
    """A reason of another node is shown as plain text."""
    answer = wire.Answer(v=1, sender="beta", id="a" * 32, ok=False, why="\x1b[2J\n")
    assert answer.why == "?[2J?"


def told_of(step: Callable[[], object]) -> str:
    """Give the text of the one error that a step may raise, as bytes for the log."""
    try:
        step()
    except FormatError as error:
        return error.message.encode().decode()
    return ""


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["meet", "begin", "adopt", "consent", "token", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.binary(max_size=300))
@example(b"[" * 60_000)
@example(b"9" * 60_000)
@example(b"{" * 70_000)
@example(b'{"v": [1, 1], "body": {"call": "\\ud800"}}')
def test_any_bytes_are_a_call_or_one_error(words: bytes) -> None:
    """No bytes raise anything else."""
    for decode in (wire.decode_call, wire.decode_answer):
        assert "\n" not in told_of(lambda: decode(words))  # noqa: B023


@given(st.sampled_from(CALLS), st.data())
def test_a_spoilt_call_is_a_call_or_one_error(body: Any, data: st.DataObject) -> None:
    """One value anywhere in a right call is replaced by another, or is missing."""
    call = fields(body)
    at: Any = call
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else [0]))
        inner = at[key]
        if data.draw(st.booleans()) or not isinstance(inner, dict | list) or not inner:
            break
        at = inner
    if isinstance(at, dict) and data.draw(st.booleans()):
        del at[key]
    else:
        at[key] = data.draw(JSON)
    words = json.dumps(call).encode()
    try:
        got = wire.decode_call(words)
    except FormatError as error:
        error.message.encode()
    else:
        assert wire.decode_call(wire.encode(got)) == got
