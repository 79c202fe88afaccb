# SPDX-License-Identifier: BSD-3-Clause
"""
Calls of a node that has the key and lies: each is answered, and spoils no record.

The node is a real engine, and its control is what the server has. Only the wire is left
out: the bytes are given to it directly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.test_node_engine import node_params, opened

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.rules.claim import Claim
from nbd_mirror.rules.node_handshake import decide
from nbd_mirror.rules.node_identity import Known
from nbd_mirror.rules.node_side import Role, Side
from nbd_mirror.server.node_calls import NodeCalls, RefusedError, Wishes
from nbd_mirror.server.node_local import (
    REPLACED_MOST,
    LocalNode,
    announced,
    ids_of,
    why_side_incredible,
)
from nbd_mirror.server.node_others import Others, Wire
from nbd_mirror.volume import core
from nbd_mirror.volume import node_wire as wire
from nbd_mirror.volume.node_wire import REPLACED_MAX

NUMBER_MAX = (1 << 64) - 1
ID = "b" * 32
CLAIM = Claim(1, "beta", 1, "0" * 32)


class NoSessions:
    """A door without sessions."""

    def fence(self, timeout_s: float, keep: Any = None) -> int:
        """Cut nothing."""
        del timeout_s, keep
        return 0


class Victim:
    """The node alpha, which beta calls."""

    def __init__(self, engine: core.Engine) -> None:
        self.engine = engine
        self.local = LocalNode(engine, "v", ["beta"], primary=False)
        self.said: list[str] = []
        self.wishes: list[object] = []
        self.others = Others(self.local, Wire(core.call, core.fetch), _no_uri)
        self.calls = NodeCalls(
            self.local,
            self.others,
            NoSessions(),
            Wishes(
                demote=self.wishes.append, token=lambda *one: self.wishes.append(one)
            ),
            lambda _, text: self.said.append(text),
        )

    def side(self) -> Side:
        """Give what beta shows if it tells the truth: it is primary, with the data."""
        own = self.local.side("beta")
        return Side(
            "v",
            "beta",
            own.size,
            1000,
            role=Role.PRIMARY,
            epoch=1,
            leader="beta",
            identities=(
                Known("beta", int(ID, 16)),
                Known("alpha", own.identities[0].id),
            ),
        )

    def call(self, body: Any, **envelope: Any) -> wire.Answer:
        """Call it as beta does."""
        message = wire.Message(
            v=wire.VERSIONS, volume="v", sender="beta", id=ID, to="alpha", body=body
        )
        words = json.loads(wire.encode(message)) | envelope
        return self.send(json.dumps(words).encode())

    def send(self, words: bytes) -> wire.Answer:
        """Send any bytes."""
        return wire.decode_answer(self.calls.meta(words))

    def grant(self, claim: Claim = CLAIM) -> None:
        """Grant beta the disk."""
        name = f"v@{claim.epoch}.{claim.node}.{claim.session}.{claim.nonce}"
        self.calls.claim(name, None, lambda: True)

    def begin(self, side: Side | None = None) -> wire.Begin:
        """Give the call that begins the copy to alpha."""
        side = side or self.side()
        return wire.Begin(
            side=wire.SideWords.of(side),
            plan=wire.plan_words(decide(self.local.side("beta"), side)),
            claim=wire.ClaimWords.of(CLAIM),
            regions=4,
        )

    def bodies(self) -> dict[str, Any]:
        """Give each call as beta would make it."""
        return {
            "meet": wire.Meet(side=wire.SideWords.of(self.side())),
            "begin": self.begin(),
            "adopt": wire.Adopt(
                claim=wire.ClaimWords.of(CLAIM), generation=1000, history=()
            ),
            "consent": wire.Consent(epoch=2),
            "token": wire.Token(generation=1000, epoch=1),
        }


def _no_uri(name: str, export: str) -> str:
    raise AssertionError(f"{name}/{export} is called")


@contextmanager
def granted(folder: Path) -> Iterator[Victim]:
    """Give a node without data, which has granted its disk to beta."""
    folder.mkdir()
    with opened(node_params(folder)) as engine:
        found = Victim(engine)
        found.grant()
        yield found


LIES: tuple[Any, ...] = (
    -1,
    1 << 32,
    1 << 63,
    NUMBER_MAX,
    1 << 128,
    True,
    None,
    "x\0y",
    "\x1b[2J",
    "\u202e",
    "\N{PILE OF POO}" * 63,
    "gamma",
    "x" * 63,
    [],
)


def leaves(found: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the path of each value of a JSON object."""
    yield path
    if isinstance(found, dict):
        for key in found:
            yield from leaves(found[key], (*path, key))
    if isinstance(found, list):
        for at in range(len(found)):
            yield from leaves(found[at], (*path, at))


def spoilt(call: Any, path: tuple[Any, ...], lie: Any) -> bytes:
    """Put a lie at a path."""
    words = json.loads(json.dumps(call))
    if not path:
        return json.dumps(lie).encode()
    inner = words
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = lie
    return json.dumps(words).encode()


@pytest.mark.parametrize("kind", ["meet", "begin", "adopt", "consent", "token"])
def test_no_lie_in_any_field_raises_or_spoils_the_record(
    kind: str, run_dir: Path
) -> None:
    """A record names nodes of the volume alone, and its terms leave room for more."""
    lies = [(path, lie) for path in paths_of(kind, run_dir) for lie in LIES]
    found: list[str] = []
    folder = 0
    while lies:
        folder += 1
        with granted(run_dir / str(folder)) as victim:
            start = victim.local.record()
            # A lie that was stored could hide what the next one does.
            while lies and victim.local.record() == start:
                path, lie = lies.pop()
                wrong = tell(victim, kind, path, lie)
                found += [f"{path} {lie!r:.30}: {text}" for text in wrong]
    assert not found, "\n".join(found)


def call_of(victim: Victim, kind: str) -> Any:
    """Give the JSON object of an honest call."""
    body = victim.bodies()[kind]
    message = wire.Message(
        v=wire.VERSIONS, volume="v", sender="beta", id=ID, to="alpha", body=body
    )
    return json.loads(wire.encode(message))


def paths_of(kind: str, folder: Path) -> list[tuple[Any, ...]]:
    """Give the path of each value of a call."""
    with granted(folder / "0") as victim:
        return list(leaves(call_of(victim, kind)))


def tell(victim: Victim, kind: str, path: tuple[Any, ...], lie: Any) -> Iterator[str]:
    """Tell a lie, and yield what is wrong then."""
    words = spoilt(call_of(victim, kind), path, lie)
    if kind == "begin" and path[:2] != ("body", "plan"):
        words = replanned(victim, words)  # the liar has the rules too
    try:
        answer = victim.send(words)
    except Exception as error:
        yield f"raises {error!r:.200}"
        return
    record = victim.local.record()
    names = {record.leader, record.handed, record.claim.node if record.claim else ""}
    if not names <= {"", "alpha", "beta"}:
        yield f"stores {names}"
    if record.epoch > 1 << 40 or record.replaced > REPLACED_MOST + (1 << 20):
        yield f"stores {record.epoch} {record.replaced}"
    texts = [answer.why, answer.hint, *victim.said]
    for contact in victim.others.contacts.values():
        if contact.side:
            texts += [contact.side.leader, contact.side.handed]
    if not "".join(texts).isprintable():
        yield f"shows {texts}"


def replanned(victim: Victim, words: bytes) -> bytes:
    """Decide as the other node would, from the lies."""
    try:
        body = wire.decode_call(words).body
    except MirrorError:
        return words
    if not isinstance(body, wire.Begin):
        return words
    found = json.loads(words)
    plan = decide(victim.local.side("beta"), body.side.side())
    found["body"]["plan"] = wire.plan_words(plan)
    return json.dumps(found).encode()


@pytest.mark.parametrize("call", ["meet", "consent"])
def test_no_lie_in_an_answer_raises_or_is_shown(call: str, run_dir: Path) -> None:
    """A node that is called lies too, and a promotion reads its answers."""
    answers: list[bytes] = []
    with granted(run_dir / "0") as victim:
        others = Others(
            victim.local, Wire(lambda *_: answers.pop(), core.fetch), lambda *_: ""
        )
        plan = decide(victim.local.side("beta"), victim.side())
        honest = wire.Answer(
            v=1,
            sender="beta",
            id=ID,
            ok=True,
            side=wire.SideWords.of(victim.side()),
            plan=wire.plan_words(plan),
        )
        words = json.loads(wire.encode(honest))
        found = []
        for path in leaves(words):
            for lie in LIES:
                answers.append(spoilt(words, path, lie))
                told: list[object] = []
                try:
                    if call == "meet":
                        _, side, told_plan = others.meet("beta")
                        told += told_plan.values()
                    else:
                        side = others.consent("beta", 2)
                    told += [side.leader, side.handed]
                    wire.Consent(epoch=side.epoch + 1)  # the next promotion
                except MirrorError as error:
                    told += [error.message, error.hint]
                except Exception as error:
                    found.append(f"{path} {lie!r:.30}: raises {error!r:.200}")
                if not "".join(str(one) for one in told).isprintable():
                    found.append(f"{path} {lie!r:.30}: shows {told!r:.300}")
    assert not found, "\n".join(found)


def test_a_call_for_another_volume_is_refused(run_dir: Path) -> None:
    """Two volumes may have one key, and nodes of the same names."""
    with granted(run_dir / "0") as victim:
        before = victim.local.record()
        for body in victim.bodies().values():
            answer = victim.call(body, volume="w")
            assert not answer.ok
            assert "this is volume v, not w" in answer.why
        assert victim.local.record() == before


def test_a_claim_of_an_incredible_epoch_is_refused(run_dir: Path) -> None:
    """No promotion would follow it."""
    with granted(run_dir / "0") as victim:
        before = victim.local.record()
        with pytest.raises(RefusedError, match="too far after"):
            victim.grant(replace(CLAIM, epoch=NUMBER_MAX))
        assert victim.local.record() == before


def test_lies_about_replacements_can_be_outlived(run_dir: Path) -> None:
    """Whatever counts a liar has sent, nodes believe each other, and can announce."""
    with granted(run_dir / "0") as liar_met, granted(run_dir / "1") as honest:
        for count in (REPLACED_MAX, 1 << 16, 1 << 17, REPLACED_MOST, REPLACED_MAX):
            told = (
                Known("beta", int(ID, 16), count),
                Known("alpha", liar_met.local.record().id.int),
            )
            side = replace(liar_met.side(), identities=told)
            liar_met.call(liar_met.begin(side))
        for _ in range(2):
            liar_met.local.change(lambda record: announced(record, "beta"))
        # The new host of beta hears of it by alpha, and knows no replacement yet.
        shown = replace(honest.side(), identities=ids_of(liar_met.local.record()))
        assert why_side_incredible(honest.local.record(), shown) == ""
