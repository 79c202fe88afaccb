# SPDX-License-Identifier: BSD-3-Clause
"""
The control of a node in its server: it connects the rules' users with engine and door.

It has three threads. The control thread takes the calls of other nodes from the door.
The role thread resumes, hands over and takes over (node_role.py). The third runs hooks,
which may take minutes. None of them touches a request of a client.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..base.errors import ConfigError, MirrorError, NotRunningError, RoleError
from ..base.listen import CLIENTS, NODES
from ..base.threads import begin, keep_going
from ..rules.node_side import Role
from ..volume import core
from ..volume.config import HAND_OVER_VARIABLE, VolumeConfig
from ..volume.core import Call, CallKind, ListenerKind
from ..volume.model import Disk
from ..volume.status import NodeStatus
from .disk_keeper import Log
from .keeper import RemotePolicy
from .node_calls import NodeCalls, RefusedError, Wishes
from .node_hooks import HookError, Hooks
from .node_keeper import NodeKeeper
from .node_local import LocalNode, Term
from .node_meeting import Meeting
from .node_others import Others, Wire, node_uri
from .node_resolve import NodeResolve, ResolveDoor, handle_resolve
from .node_role import NodeRole
from .node_status import Facts, node_status

if TYPE_CHECKING:
    from ..volume.core import Engine, Server

__all__ = ["NodeControl"]

CALL_S = 0.5  # between two looks whether the end has come
STOP_FENCE_S = 1.0
TELL_S = 0.2  # between two looks whether the role is settled


class NodeControl:
    """
    The control of this node.

    Args:
        leave: has the server end, and execute itself again with more variables in its
            environment; returns at once.
    """

    def __init__(
        self,
        config: VolumeConfig,
        engine: Engine,
        log: Log,
        leave: Callable[[Mapping[str, str]], object],
    ) -> None:
        self._config = config
        self._log = log
        self._server: Server | None = None
        self._client_sockets: list[int] = []
        self._shown = ""  # the text that clients of a secondary get
        self._ending = False
        self._ended = threading.Event()
        self._keepers: dict[str, NodeKeeper] = {}
        self.local = LocalNode(
            engine,
            config.name,
            [node.name for node in config.others],
            primary=engine.status().role is Role.PRIMARY,
            reach=core.reach,
        )
        self.others = Others(
            self.local, Wire(core.call, core.fetch), functools.partial(node_uri, config)
        )
        self.calls = NodeCalls(
            self.local,
            self.others,
            self,
            Wishes(
                # The role is made below, as it calls these calls.
                demote=self._overrule,
                token=self._take_token,
            ),
            log,
        )
        self._hooks = Hooks(config, self.local, log)
        self.role = NodeRole(
            self.local,
            self.others,
            self.calls,
            self,
            leave=leave,
            log=log,
            start_alone_s=config.start_alone,
            hand_over=os.environ.pop(HAND_OVER_VARIABLE, ""),
            hooks=self._hooks,
            hooks_s=config.hooks.limit_s if config.hooks.promoting else 0.0,
        )
        self.resolve = NodeResolve(
            config,
            self.local,
            self.others,
            ResolveDoor(self._turn_away, self._let_in, self.role.step_down),
            log,
        )
        self.calls.resolve = self.resolve
        self._threads = [
            threading.Thread(target=self._serve_calls, name="nodes", daemon=True),
            threading.Thread(target=self._turn, name="role", daemon=True),
            threading.Thread(target=self._tell, name="hooks", daemon=True),
        ]

    def _overrule(self, later: str) -> None:
        self.role.overrule(later)

    def _take_token(self, generation: int, term: Term) -> None:
        self.role.take_token(generation, term)

    # --- the door ---

    def attach(self, server: Server, names: Sequence[str]) -> None:
        """
        Tell *server* who connects to each of its sockets, by name.

        Raises:
            ConfigError: no socket is for the other nodes.
        """
        if NODES not in names:
            raise ConfigError(
                f"no socket is passed on for the other nodes of {self._config.name}",
                "nbd-mirror serve CONFIG",
            )
        self._server = server
        self._client_sockets = [i for i, name in enumerate(names) if name == CLIENTS]
        for listener, name in enumerate(names):
            if name == NODES:
                server.set_listener(listener, ListenerKind.NODES)
        self._say_who_is_primary()

    def hand_on(self) -> None:
        """Let new clients wait for the server that replaces this one."""
        if self._server is not None:
            self._server.hand_on()

    def fence(self, timeout_s: float, keep: Any = None) -> int:
        """Cut all sessions but that of the call *keep*, and wait for their requests."""
        if self._server is None:
            return 0
        return self._server.fence(timeout_s, keep)

    def _say_who_is_primary(self) -> None:
        """Have the door tell clients of a secondary where the volume is served."""
        if self.local.primary or self._server is None:
            return
        leader = self.local.record().leader
        here = f"{self._config.node} is secondary"
        if leader and leader != self._config.node:
            text = f"{leader} is primary: connect there"
        else:
            text = "no node is known to be primary"
        text = f"{here}; {text}; or nbd-mirror promote {self._config.source}"
        if text != self._shown:
            for listener in self._client_sockets:
                self._server.set_listener(listener, ListenerKind.CLOSED, text)
            self._shown = text

    def _turn_away(self, text: str) -> None:
        """Let no client of a primary in; those that are connected stay."""
        if self._server is not None:
            for listener in self._client_sockets:
                self._server.set_listener(listener, ListenerKind.CLOSED, text)

    def _let_in(self) -> None:
        if self._server is not None:
            for listener in self._client_sockets:
                self._server.set_listener(listener, ListenerKind.CLIENTS)

    # --- life ---

    def start(self) -> None:
        """Start the threads; the door must be started."""
        for thread in self._threads:
            begin(thread)

    def close(self) -> None:
        """Grant no claim any more, and change no role: the server ends."""
        self._hooks.close()
        with self.local.lock:
            self.local.leaving = True

    def end(self) -> None:
        """Tell the threads to end."""
        self._ending = True
        self._ended.set()
        self.role.wake()

    def join(self, timeout_s: float) -> bool:
        """Wait until the threads have ended; says whether they did."""
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(timeout_s)
        return not any(
            thread.is_alive()
            for thread in self._threads
            if thread is not threading.current_thread()
        )

    def before_stop(self) -> None:
        """Store what the stop changes: the clients are gone, the engine still runs."""
        if not self.local.primary:
            try:
                self.fence(STOP_FENCE_S)
            except MirrorError as error:
                # The engine's stop waits for them, too.
                self._log("warning", f"nodes: {error}")
        self.role.before_stop()

    # --- threads ---

    def _turn(self) -> None:
        keep_going(self._turn_once, lambda: self._ending, self._log, "role")

    def _turn_once(self) -> None:
        self._say_who_is_primary()
        seconds = self.role.turn()
        if not self._ending:
            self.role.rest(seconds)

    def _tell(self) -> None:
        keep_going(self._tell_once, self._end_has_come, self._log, "hooks")

    def _tell_once(self) -> None:
        self._hooks.tell(lambda: self.role.changing)

    def _end_has_come(self) -> bool:
        """Rest between two looks at the role, and say whether the end has come."""
        return self._ended.wait(TELL_S)

    def _serve_calls(self) -> None:
        keep_going(self._serve_one, lambda: self._ending, self._log, "nodes")

    def _serve_one(self) -> None:
        assert self._server is not None
        try:
            call = self._server.next_call(CALL_S)
        except NotRunningError:
            self._ending = True
            return
        if call is None:
            return
        try:
            self._take(self._server, call)
        except RefusedError as error:
            self._log("warning", f"nodes: refused: {error.why}")
            self._server.refuse(call, error.why)
        except MirrorError as error:
            self._log("warning", f"nodes: refused: {error}")
            self._refuse(self._server, call, str(error))
        except Exception:
            self._refuse(self._server, call, "internal error")
            raise

    def _refuse(self, server: Server, call: Call, text: str) -> None:
        if call.kind is not CallKind.SESSION_ENDED:
            server.refuse(call, text)

    def _take(self, server: Server, call: Call) -> None:
        names = {node.name: node.names for node in self._config.others}

        def speaks(node: str) -> str:
            # A name that no node has is refused later, with its own reason.
            return server.why_not_of(call, names[node]) if node in names else ""

        match call.kind:
            case CallKind.CLAIM:
                self.calls.claim(call.text, call, lambda: server.answer(call), speaks)
            case CallKind.META:
                server.answer(call, self.calls.meta(call.words, speaks))
            case CallKind.DIRTY:
                server.answer(call, self.calls.dirty(speaks))
            case CallKind.SESSION_ENDED:
                self.calls.session_ended(call.text, clean=call.clean)
        self._say_who_is_primary()

    # --- the rest of the server ---

    def make_keeper(
        self, engine: Engine, disk: Disk, policy: RemotePolicy
    ) -> NodeKeeper:
        """Make the keeper of another node; of a primary alone."""
        alone = len(self._config.copies) == 1
        meeting = Meeting(self.local, self.others, policy.name, alone=alone)
        keeper = NodeKeeper(engine, disk, policy, self._log, meeting)
        self._keepers[policy.name] = keeper
        return keeper

    def handle(self, command: str, args: Mapping[str, Any]) -> object:
        """
        Execute promote, demote, switchover, replace or resolve.

        Raises:
            RoleError: it may not be done now. MirrorError: it cannot be done.
        """
        if command == "resolve":
            return handle_resolve(self.resolve, args)
        force, node = args.get("force", False), args.get("node")
        if not isinstance(force, bool) or not isinstance(node, str | None):
            raise ConfigError(f"{command}: wrong arguments")
        try:
            return self._change_role(command, node, force=force)
        except HookError as error:
            # A command knows the classes of base/errors.py.
            raise RoleError(error.message, error.hint) from None

    def _change_role(self, command: str, node: str | None, *, force: bool) -> object:
        match command:
            case "promote":
                return self.role.promote(force=force)
            case "demote":
                return self.role.demote(force=force)
            case "switchover":
                return self.role.switchover(node, force=force)
            case "replace":
                return self.role.replace(node)
        raise RoleError(f"a node has no command {command}")

    def status(self) -> NodeStatus:
        """Return what this node reports."""
        return node_status(
            Facts(
                self._config,
                self.local,
                self.others,
                self.role.waits,
                self.role.verdict,
                self._why_not,
                time.time(),
                self._hooks.failed,
            )
        )

    def _why_not(self, name: str) -> tuple[str, str]:
        keeper = self._keepers.get(name)
        return (keeper.why, keeper.hint) if keeper else ("", "")
