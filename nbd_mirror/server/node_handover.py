# SPDX-License-Identifier: BSD-3-Clause
"""
A switchover after the demotion: the role goes from one node to another by a token.

The demoted node starts again with the name of the node that takes the role. It stores
that it hands the role over, and sends the token until the other node is promoted. It
takes the role back if that does not come about within the time. The other node is
promoted at once with the token, which it stores nowhere: if it is killed before, the
demoted node sends it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..base.errors import MirrorError, RoleError
from ..rules.node_handshake import decide
from ..rules.node_side import Side
from ..rules.promotion import may_hand_over
from ..volume.node_record import NodeRecord
from .node_local import LocalNode, Term, term_of
from .node_others import Others
from .node_standing import Promotion

__all__ = ["HAND_OVER_S", "HandOver", "Means"]

HAND_OVER_S = 15.0  # then a demoted node takes its role back, without hooks
HAND_OVER_REST_S = 0.2
AFTER_S = 1.0  # from the end of a switchover to the next turn

Token = tuple[int, Term]


@dataclass(frozen=True, slots=True)
class Means:
    """
    What a switchover needs of the role.

    *promote* makes this node primary; *wait* notes why it is not, and a hint.
    """

    promote: Callable[[Promotion, Token | None], object]
    wait: Callable[[str, str], object]
    log: Callable[[str, str], object]
    clock: Callable[[], float]


class HandOver:
    """
    Gives the role away, or takes it.

    Args:
        to: the node that this one, just demoted, gives its role to, or "".
        wait_s: after that time it takes its role back.
    """

    def __init__(
        self,
        local: LocalNode,
        others: Others,
        to: str,
        role: Means,
        wait_s: float = HAND_OVER_S,
    ) -> None:
        self._local = local
        self._others = others
        self._role = role
        self._started = role.clock()
        self._wait_s = wait_s
        self.to = to
        self.token: Token | None = None  # that another node has sent

    def give(self) -> float:
        """
        Give the token to the other node, or take the role back in the end.

        Returns:
            The seconds until it is called again.
        """
        local = self._local
        record = local.record()
        if record.leader != record.node:
            self.to = ""  # the other node is promoted
            return 0.0
        if self._role.clock() - self._started > self._wait_s:
            self._take_back()
            return AFTER_S
        try:
            self._send()
        except MirrorError as error:
            self._role.wait(f"its role goes to {self.to}: {error.message}", error.hint)
        return HAND_OVER_REST_S

    def _send(self) -> None:
        local, target = self._local, self.to
        mine, side, _ = self._others.meet(target)
        if not may_hand_over(mine, side):
            raise RoleError(f"{target} cannot take the role: {decide(mine, side).row}")
        local.reach("handover_met")
        local.change(lambda record: _handed(record, mine, target))
        local.reach("handover_stored")
        self._others.token(target, mine.generation, mine.term)
        local.reach("token_sent")

    def _take_back(self) -> None:
        """End a switchover that does not come about; both nodes must agree to it."""
        target, self.to = self.to, ""
        log = self._role.log
        log("warning", f"node {target} did not take the role within the time")
        try:
            self._role.promote(Promotion.ASKED, None)
        except MirrorError as error:
            self._role.wait(error.message, error.hint)

    def take_over(self) -> float:
        """
        Take the role that the token is good for.

        Returns:
            The seconds until the next turn.
        """
        token, self.token = self.token, None
        try:
            self._role.promote(Promotion.TOKEN, token)
        except MirrorError as error:
            why = f"the role was handed to it: {error.message}"
            self._role.wait(why, error.hint)
        return AFTER_S


def _handed(record: NodeRecord, mine: Side, target: str) -> NodeRecord:
    if (record.lineage.generation, term_of(record)) != (mine.generation, mine.term):
        raise RoleError("another node was promoted in the meantime")
    return replace(record, handed=target)
