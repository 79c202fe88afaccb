# SPDX-License-Identifier: BSD-3-Clause
"""
The keeper of another node, on a primary: a remote's keeper with a handshake.

It proves by the handshake what a plain remote's keeper proves by a sample: that the
other disk holds what this node believes. The claim has fenced that disk, so there is no
late-write window. And it counts the node, once nothing is dirty there.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..base.errors import MirrorError
from ..rules.state import RemoteState
from ..volume.model import Disk, RemoteStatus
from .disk_keeper import Log
from .keeper import MIN_CONNECT_S, Keeper, RemotePolicy

if TYPE_CHECKING:
    from ..volume.core import Engine
    from .node_meeting import Meeting

__all__ = ["NodeKeeper"]

CLAIM_S = 6.0  # to connect: the other node may wait for requests of an earlier session


class NodeKeeper(Keeper):
    """
    Keeps another node.

    Args:
        meeting: how the two meet.
        options: as those of Keeper.
    """

    def __init__(
        self,
        engine: Engine,
        disk: Disk,
        policy: RemotePolicy,
        log: Log,
        meeting: Meeting,
        **options: Any,
    ) -> None:
        policy = dataclasses.replace(policy, late_window_s=0.0)
        super().__init__(engine, disk, policy, log, **options)
        self._title = f"node {policy.name}"
        self._meeting = meeting
        self._copies = False  # the other node has stored that regions are copied to it
        self.hint = ""  # what helps if it does not connect; whole values alone

    @property
    def why(self) -> str:
        """Why the node is not connected or not in sync, or ""."""
        with self._lock:
            return self._error

    def _look_and_act(self) -> None:
        status = self._engine.remote_status(self._disk)
        if self._is_copied(status):
            self._count()
        super()._look_and_act()

    def _is_copied(self, status: RemoteStatus) -> bool:
        """Tell whether nothing is left to copy, and the node does not know it yet."""
        done = status.admitted and status.dirty_regions == 0
        return done and not self._meeting.is_settled()

    def _count(self) -> None:
        try:
            if self._meeting.settle(lambda: not self._engine.node_whole(self._disk)):
                self._copies = False
        except MirrorError as error:
            # Its session may have ended there, and nothing here says so.
            self._engine.drop(self._disk, f"not in sync yet: {error}")
            raise

    def _resync(self) -> None:
        if self._copies:
            super()._resync()
        else:  # it has not stored that its image is of no instant while it is copied to
            self._engine.drop(self._disk, "it lacks a region that it was not told of")

    def _connect_to(self, uri: str, status: RemoteStatus) -> None:
        timeout_s = max(self._policy.deadline_s, CLAIM_S)
        if status.state is RemoteState.HOLDING:
            timeout_s = max(min(timeout_s, self._policy.hold_s), MIN_CONNECT_S)
        try:
            agreed = self._meeting.agree()
            self._meeting.claim(
                agreed,
                lambda claimed: self._engine.connect(self._disk, claimed, timeout_s),
            )
        except MirrorError as error:
            self.hint = error.hint
            self._explain(f"{uri}: {error}")
            return
        try:
            self._copies = self._meeting.begin(agreed) > 0
            self.hint = ""
            self._admit(uri, 0)
        except MirrorError as error:
            words = f"{uri}: connected, but not usable: {error}"
            self._engine.drop(self._disk, words)
            self._explain(words)
        except Exception as error:
            # After a bug of ours no connection may stay that no thread uses or ends.
            self._engine.drop(self._disk, f"internal error: {error!r}")
            raise

    def _use(self) -> None:
        """Use the connection, unless the node would lack what it was not told of."""
        if self._copies:
            self._engine.admit(self._disk)
        else:
            self._engine.node_admit(self._disk)
