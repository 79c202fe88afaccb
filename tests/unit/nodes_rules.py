# SPDX-License-Identifier: BSD-3-Clause
"""The product's rules as the model's nodes use them; a test can leave one out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nbd_mirror.rules import (
    generation,
    node_handshake,
    node_identity,
    promotion,
    resolution,
)
from nbd_mirror.rules.generation import Lineage
from nbd_mirror.rules.node_identity import Known
from nbd_mirror.rules.node_side import Plan, Side
from nbd_mirror.rules.promotion import Standing, Verdict
from nbd_mirror.rules.resolution import GivenUp


@dataclass(frozen=True)
class Rules:
    """The functions under test; a test replaces one by a wrong one."""

    must_begin: Callable[..., bool] = generation.must_begin
    begin: Callable[..., Lineage] = generation.begin
    offer: Callable[..., Lineage] = generation.offer
    settle: Callable[..., Lineage] = generation.settle
    share: Callable[[Lineage], Lineage] = generation.share
    adopt: Callable[..., Lineage] = generation.adopt
    decide: Callable[[Side, Side], Plan] = node_handshake.decide
    resolve: Callable[[Side, Side], Plan] = node_handshake.resolve
    chosen: Callable[..., Lineage] = resolution.chosen
    given_up: Callable[..., GivenUp | None] = resolution.given_up
    may_resume: Callable[[Side, Side], bool] = promotion.may_resume
    may_hand_over: Callable[[Side, Side], bool] = promotion.may_hand_over
    learn: Callable[..., tuple[Known, ...]] = node_identity.learn
    marked: Callable[..., set[int]] = node_handshake.marked
    inherited: Callable[..., set[int]] = node_handshake.inherited
    may_promote: Callable[[Standing], Verdict] = promotion.may_promote
    # Orders and waits of the protocol that no function can hold.
    confirms: bool = True  # a new generation is confirmed before the answer
    keeps_active: bool = True  # a secondary keeps a region until its primary flushed
    flushes_source: bool = True  # a copied region is durable on both before a bit goes
    counts_doubts: bool = True  # a promotion with doubts begins a generation
    flushes_first: bool = True  # a node flushes its disk before it is promoted
    settles_thirds: bool = True  # equal to a node that is in sync with a third one
    consents: bool = True  # a promoted node's sessions store its term before its door
    asks_again: bool = True  # the answer still has to hold when all have consented
    # Checks of a promotion in steps (nodes_promotions.py).
    compares: bool = True  # what was judged is what is promoted
    asks_void: bool = True  # a node that has consented stores no promotion of its own
    grants: bool = True  # a start compares its grant with the record
    logs_first: bool = True  # the activity log is durable before the disk changes
