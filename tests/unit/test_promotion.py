# SPDX-License-Identifier: BSD-3-Clause
"""Whether a node may be promoted: each line of the table, and every standing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from nbd_mirror.rules.node_side import Role
from nbd_mirror.rules.promotion import Answer, Contact, Standing, may_promote

CONNECTED = Contact("b", connected=True)
PROMOTIONS = {
    "connected and in sync": (Standing(others=(CONNECTED,)), Answer.YES),
    "the other is primary": (
        Standing(others=(replace(CONNECTED, role=Role.PRIMARY),)),
        Answer.NO,
    ),
    "the other is away": (Standing(others=(Contact("b"),)), Answer.FORCE),
    "one of two is away": (Standing(others=(CONNECTED, Contact("c"))), Answer.FORCE),
    "with the token": (Standing(token=True, others=(Contact("b"),)), Answer.YES),
    "behind": (Standing(behind=True, others=(CONNECTED,)), Answer.FORCE),
    "behind, with a token": (
        Standing(behind=True, token=True, others=(Contact("b"),)),
        Answer.FORCE,
    ),
    "half-way": (Standing(inconsistent=True, others=(CONNECTED,)), Answer.NO),
    "half-way, with an undo log": (
        Standing(inconsistent=True, undo=True, others=(Contact("b"),)),
        Answer.FORCE,
    ),
    "its disk misses regions": (Standing(missed=1, others=(CONNECTED,)), Answer.NO),
    "no data, the other has some": (
        Standing(has_data=False, others=(CONNECTED,)),
        Answer.NO,
    ),
    "no data, and the other is away": (
        Standing(has_data=False, others=(Contact("b"),)),
        Answer.FORCE,
    ),
    "no data on either": (
        Standing(has_data=False, others=(replace(CONNECTED, has_data=False),)),
        Answer.YES,
    ),
    "it lost power": (Standing(lost_power=True, others=(Contact("b"),)), Answer.FORCE),
}


@pytest.mark.parametrize("case", PROMOTIONS)
def test_promotion(case: str) -> None:
    """Each line of the table of `may_promote`."""
    standing, answer = PROMOTIONS[case]
    verdict = may_promote(standing)
    assert verdict.answer is answer
    assert verdict.reason


def test_a_reason_names_the_loss() -> None:
    """An operator that forces is told what may be lost."""
    away = (Contact("b"),)
    for node, words in (
        (Standing(lost_power=True, others=away), "not flushed"),
        (Standing(others=away), "gone on alone"),
        (Standing(behind=True, lost_power=True, others=away), "lacks writes"),
        (Standing(inconsistent=True, undo=True, others=away), "is older"),
    ):
        verdict = may_promote(node)
        assert verdict.answer is Answer.FORCE
        assert words in verdict.reason


@pytest.mark.parametrize("others", [1, 2])
def test_every_standing(others: int) -> None:
    """Check the rules that hold for any order of the table's lines."""
    flags = list(itertools.product((False, True), repeat=6))
    contacts = [
        Contact("b", connected, role, has_data)
        for connected in (False, True)
        for role in Role
        for has_data in (False, True)
    ]
    for has_data, behind, inconsistent, undo, power, token in flags:
        for met in itertools.product(contacts, repeat=others):
            for missed in (0, 1):
                node = Standing(
                    has_data, behind, inconsistent, undo, missed, power, token, met
                )
                judge_standing(node, may_promote(node).answer)


def judge_standing(node: Standing, answer: Answer) -> None:
    """Yes needs a whole, recent image and proof; a broken image is never promoted."""
    connected = [contact for contact in node.others if contact.connected]
    serving = any(contact.role is Role.PRIMARY for contact in connected)
    proof = node.token or len(connected) == len(node.others)
    if answer is Answer.YES:
        assert proof
        assert not any((serving, node.behind, node.inconsistent, node.missed))
        assert node.has_data or not any(contact.has_data for contact in connected)
    broken = node.missed or (node.inconsistent and not node.undo)
    if serving or broken:
        assert answer is Answer.NO
    if answer is Answer.NO:
        assert serving or broken or not node.has_data


def test_reported_23_a_survivor_does_not_know_what_the_other_has() -> None:
    """Without a session with every other node only an operator promotes."""
    alone = Standing(others=(Contact("b"), Contact("c", connected=True)))
    assert may_promote(alone).answer is Answer.FORCE


def test_reported_26_nobody_is_up_to_date() -> None:
    """An operator can always choose a whole image, and is told what it lacks."""
    verdict = may_promote(Standing(behind=True, others=(Contact("b"),)))
    assert verdict.answer is Answer.FORCE
    assert "lacks writes" in verdict.reason


def test_reported_27_a_node_boots_and_was_primary() -> None:
    """That it remembers it is no proof."""
    assert may_promote(Standing(others=(Contact("b"),))).answer is Answer.FORCE
