# SPDX-License-Identifier: BSD-3-Clause
"""
The volume that a server serves: the one control object behind all doors.

It connects the engine with a keeper per disk, the control socket and a maintenance
thread, and starts and ends them in the only safe order. A door opens it before any
fork, starts it after, and stops it at the end. Requests never pass through it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..base.errors import (
    ConfigError,
    MetadataFailedError,
    MirrorError,
    RoleError,
    UnsupportedError,
)
from ..base.hints import quote
from ..base.threads import begin, keep_going
from ..device.attach import RECONNECT_S, attached_device, let_go, take_back
from ..volume import config as _config
from ..volume import core
from ..volume.config_tables import Copy
from ..volume.control import control_path
from ..volume.core import bound_log, log_counts, start_log
from ..volume.loops import own_address
from ..volume.model import VolumeStatus, disk_of
from ..volume.report import Server, report
from ..volume.status import Status
from .control_server import ControlServer
from .keeper import Keeper, RemotePolicy
from .local_keeper import LocalKeeper
from .node_role import GRANT_VARIABLE
from .node_server import NodeControl
from .opening import open_engine
from .policy import switch_policy
from .process import End, execute_again, log, on_signal

__all__ = ["Volume"]

MAINTENANCE_S = 2.0
COOL_S = 60.0  # an extent idle for longer goes cold
SAMPLE_S = 60.0  # between two checks that a start could identify local
SAMPLES = 32  # that a start can compare, of 64
JOIN_S = 10.0  # in addition to two deadlines
GRACE_S = 2.0  # for clients to disconnect once everything is stopped
MAX_LOGGED = 100  # texts that maintenance remembers as logged
LOCAL = "local"  # the local disk's name in place of a remote's


class Volume:
    """
    An open volume. `open` makes it, `serve` starts it after any fork, `stop` ends it.

    Args:
        config: the volume's.
        door: "direct" or "python", for status.
        shutdown: asks the server to end; called from a thread of ours.
        drain: answers the server's clients and disconnects them, before the engine
            refuses requests; called from a thread of ours, and must end in time.
    """

    def __init__(
        self,
        config: _config.VolumeConfig,
        door: str,
        shutdown: Callable[[], None],
        drain: Callable[[], object] = lambda: None,
    ) -> None:
        self._config = config
        self._door = door
        self._shutdown = shutdown
        self._drain = drain
        self.max_clients: int | None = None  # of the direct door
        self.engine = open_engine(config)
        self._logged: set[str] = set()  # texts logged once
        self._lock = threading.Lock()  # of the next two
        # What the server executes itself again with, or None: it ends.
        self._again: dict[str, str] | None = None
        self._for_good = False
        self._leaves = threading.Event()
        self._leaver = threading.Thread(target=self._leave, name="leave", daemon=True)
        self.node = (
            NodeControl(config, self.engine, log, self._leave_with)
            if config.node
            else None
        )
        self._local = self._make_local_keeper()
        self._keepers = self._make_keepers()
        self._control = ControlServer(
            control_path(config.state),
            self.handle,
            log=log,
            prepare=log_counts,  # CFFI has a variable for each thread that calls C
        )
        self._ending = threading.Event()
        self._exit = End(config.name, config.stop_limit_s, GRACE_S, self.execute_again)
        self._rest_s = 0.0  # before the next turn of maintenance
        self._sample_at = 0.0  # when to take samples of local again
        self._maintenance = threading.Thread(
            target=self._maintain, name="maintenance", daemon=True
        )
        self._halt_lock = threading.Lock()  # guards _clean and the order of the end
        self._clean: bool | None = None  # None: not halted yet

    @classmethod
    def open(
        cls,
        path: str,
        door: str,
        shutdown: Callable[[], None],
        drain: Callable[[], object] = lambda: None,
    ) -> Volume:
        """
        Read the configuration at *path*, lock and load the volume; start no thread.

        Raises:
            MirrorError: of any class; the volume is not served, and nothing is lost.
        """
        return cls(_config.load(path), door, shutdown, drain)

    @property
    def config(self) -> _config.VolumeConfig:
        """The configuration that it was opened with."""
        return self._config

    def _make_local_keeper(self) -> LocalKeeper:
        config = self._config
        keeper = LocalKeeper(
            self.engine,
            config.local,
            0 if self.node and not self.node.local.primary else len(config.copies),
            log,
            asked=quote(os.fspath(config.source)),
        )
        note = self.engine.status().local.note
        if note:
            log("warning", f"volume {config.name}: {note}")
        why = keeper.why_not_used()
        if why:
            # `serve` repeats a start's warnings to the operator.
            text = f"the local disk is not used: {why}"
            log("warning", f"volume {config.name}: {text}")
        return keeper

    def _make_keepers(self) -> list[Keeper]:
        self._log_status(self.engine.status())
        if self.node and not self.node.local.primary:
            return []  # only a primary connects to other copies
        return [
            self._make_keeper(index, copy)
            for index, copy in enumerate(self._config.copies)
        ]

    def _make_keeper(self, index: int, copy: Copy) -> Keeper:
        policy = RemotePolicy(
            name=copy.name,
            uri=copy.uri,
            deadline_s=copy.deadline,
            hold_s=self._config.hold,
            late_window_s=self._config.late_write_window,
        )
        if copy.is_node:
            assert self.node is not None
            return self.node.make_keeper(self.engine, disk_of(index), policy)
        return Keeper(
            self.engine,
            disk_of(index),
            policy,
            log,
            refuse=lambda uri: own_address(uri, self._config.listen),
        )

    def serve(self, start_door: Callable[[], None] = lambda: None) -> None:
        """
        Start every thread and answer commands; from now on signals stop the volume.

        Must be called on the process's main thread, before it has others.

        Args:
            start_door: starts the threads that the door needs.
        Raises:
            MirrorError: a thread or the control socket could not be made.
        """
        start_log()
        bound_log(self._config.state)
        on_signal(self._end)
        self._exit.start()
        self.engine.start()
        self._control.bind()
        for keeper in self._threads():
            keeper.start()
        begin(self._maintenance)
        begin(self._leaver)
        start_door()
        if self.node:
            self.node.start()
        log("info", f"volume {self._config.name}: served, {self._door} door")
        if self.node is None or self.node.local.primary:
            # It waits for the door, so it needs a thread; no thread joins it at the
            # end.
            begin(threading.Thread(target=self._take_back, name="device", daemon=True))
        # Last: an answer tells `serve` that the start did not fail.
        self._control.start()

    def _take_back(self) -> None:
        """Serve the kernel device of an earlier server of this volume again."""
        try:
            if os.geteuid() == 0 and take_back(self._config):
                log("info", f"{attached_device(self._config)} has this server now")
        except MirrorError as error:
            text = f"{error}; programs that use it get errors in {RECONNECT_S} s"
            log("warning", f"volume {self._config.name}: {text}")

    def _threads(self) -> list[Keeper | LocalKeeper]:
        return [self._local, *self._keepers]

    def stop(self) -> bool:
        """
        Stop cleanly and close everything. Blocks, bounded by the deadlines.

        Calling it again has no effect.

        Returns:
            True: the next start has nothing to recover.
        """
        clean = self._halt()
        self._control.close()  # joins its threads: one may still send an answer
        threads_ended = all(keeper.join(0) for keeper in self._threads())
        if self.node and not self.node.join(0):
            threads_ended = False
        if threads_ended and not self._maintenance.is_alive():
            self.engine.close()
        self._exit.closed()
        return clean

    def _end(self) -> bool:
        """Stop cleanly, and ask nbdkit to end, whatever clients remain."""
        with self._lock:
            self._again, self._for_good = None, True
        return self._end_server()

    def _end_server(self) -> bool:
        clean = self._halt()
        self._shutdown()
        return clean

    # --- another role: the server executes itself again ---

    def _leave_with(self, environment: Mapping[str, str]) -> None:
        """Have the server end and start again; called from any thread of a node."""
        with self._lock:
            if self._for_good:
                return  # a stop came first
            self._again = dict(environment)
        self._leaves.set()

    def _leave(self) -> None:
        self._leaves.wait()
        if self.node:
            self.node.hand_on()
        self._end_server()

    def execute_again(self, code: int) -> None:
        """
        Replace this process by a server in the new role, if that was asked for.

        Args:
            code: with which it would exit; after an unclean stop it exits.
        """
        with self._lock:
            again = self._again
        if again is not None and code == 0:
            if GRANT_VARIABLE in again:
                core.reach("promotion_left")
            else:
                core.reach("demotion_left")
            execute_again(again)

    def _halt(self) -> bool:
        """End the policy threads, then the engine, which then refuses requests."""
        self._exit.begin()
        with self._halt_lock:
            if self._clean is None:
                if self.node:
                    self.node.close()
                self._ending.set()
                for keeper in self._threads():
                    keeper.end()
                self.engine.wake()
                self._join()
                self._clean = self._stop_engine()
            self._exit.stopped(0 if self._clean else MetadataFailedError.exit_code)
            return self._clean

    def _join(self) -> None:
        deadlines = [copy.deadline for copy in self._config.copies]
        timeout_s = 2 * max(deadlines) + JOIN_S
        timeout_s += self._config.local_deadline
        for keeper in self._threads():
            self._exit.doing = f"the thread {keeper.name} is at work"
            if not keeper.join(timeout_s):
                log("error", "a keeper does not end; the engine is stopped without it")
        if self._maintenance.ident is not None:
            self._maintenance.join(timeout_s)

    def _stop_engine(self) -> bool:
        name = self._config.name
        self._exit.doing = "requests are finished, disks flushed and logs closed"
        if os.geteuid() == 0:
            let_go(self._config)
        self._drain()
        stored = self._stop_node(self.node) if self.node else True
        try:
            self.engine.stop()
        except MirrorError as error:
            log("error", f"volume {name}: {error}; the next start recovers")
            return False
        log("info", f"volume {name}: stopped cleanly")
        return stored

    def _stop_node(self, node: NodeControl) -> bool:
        """Store what the end changes of a node, end its threads; whether it could."""
        stored = True
        try:
            node.before_stop()
        except MirrorError as error:
            log("error", f"node {self._config.node}: its role is as before: {error}")
            stored = False
        node.end()
        if not node.join(JOIN_S):
            log("error", "a thread of the node does not end; the stop goes on")
        return stored

    # --- maintenance ---

    def _maintain(self) -> None:
        keep_going(
            self._look_after,
            self._nap,
            self._log_once,
            "maintenance",
        )

    def _nap(self) -> bool:
        """Rest, except before the first turn; return whether the end has come."""
        rest_s, self._rest_s = self._rest_s, MAINTENANCE_S
        return self._ending.wait(rest_s)

    def _look_after(self) -> None:
        try:
            status = self.engine.status()
            self._log_status(status)
            if not status.failed:
                self.engine.cool(COOL_S)
            if time.monotonic() >= self._sample_at:
                self._sample_at = time.monotonic() + SAMPLE_S
                self.engine.local_sample(SAMPLES)
        except MirrorError as error:
            self._log_once("warning", f"volume {self._config.name}: {error}")

    def _log_status(self, status: VolumeStatus) -> None:
        name = self._config.name
        if status.failed:
            text = f"volume {name}: failed: {status.reason}"
            self._log_once("error", f"{text}; writes get EIO until it is served again")
        elif status.reason:
            # The status shows it only until the server ends; the log keeps it.
            self._log_once("warning", f"volume {name}: {status.reason}")

    def _log_once(self, level: str, text: str) -> None:
        if text not in self._logged:
            if len(self._logged) >= MAX_LOGGED:
                self._logged.clear()
            self._logged.add(text)
            log(level, text)

    # --- commands ---

    def handle(self, command: str, args: Mapping[str, Any]) -> object:
        """
        Execute a command of the control socket.

        Raises:
            MirrorError: it cannot be done, or the command is not known.
        """
        match command:
            case "ping":
                return {"volume": self._config.name, "pid": os.getpid()}
            case "status":
                return self.status().dump()
            case "pause":
                return self._each(args, self._pause)
            case "resume":
                return self._resume(args)
            case "invalidate":
                return self._invalidate(args)
            case "policy":
                return switch_policy(self.engine, args, self._config.name)
            case "stop":
                return self._stop_command()
            case "promote" | "demote" | "switchover" | "replace" | "resolve" if (
                self.node
            ):
                return self.node.handle(command, args)
        raise UnsupportedError(f'the server does not know the command "{command}"')

    def _each(self, args: Mapping[str, Any], act: Callable[[int], None]) -> object:
        """Call *act* for the remote that *args* names, else for all remotes."""
        name = args.get("remote")
        if name is not None:
            self._config.copy_called(name)  # raises if there is none
        self._check_has_copies()
        names = [copy.name for copy in self._config.copies]
        chosen = [i for i, one in enumerate(names) if name in (None, one)]
        for index in chosen:
            act(index)
        return {"remotes": [names[i] for i in chosen]}

    def _check_has_copies(self) -> None:
        """Refuse what is about other copies on a secondary, which connects to none."""
        if self.node and not self.node.local.primary:
            raise RoleError(
                f"{self._config.node} is secondary, and connects to no other copy",
                "the same command on the primary",
            )

    def _invalidate(self, args: Mapping[str, Any]) -> object:
        """Overwrite a remote, or, for the name "local", a replaced local disk."""
        if not args.get("remote"):
            raise ConfigError("invalidate needs the name of a remote, or local")
        if args["remote"] == LOCAL:
            self._local.replace(_config.load(self._config.source).local)
            return {"remotes": [LOCAL]}

        def invalidate(index: int) -> None:
            # The operator has seen the old reason; only new errors count.
            keeper = self._keepers[index]
            keeper.forget_error()
            self.engine.invalidate(disk_of(index))
            # An attempt that began since then may already have found a difference.
            keeper.forget_error()
            self.engine.reset(disk_of(index))

        return self._each(args, invalidate)

    def _pause(self, index: int) -> None:
        self.engine.pause(disk_of(index), paused=True)

    def _resume(self, args: Mapping[str, Any]) -> object:
        """
        End the pause and check a failed disk again, at its current address.

        The configuration is read again, so that a corrected uri or path of the local
        disk needs no restart.
        """
        found = _config.load(self._config.source)
        if args.get("remote") == LOCAL:
            self._local.resume(found.local)
            return {"remotes": [LOCAL]}
        uris = {one.name: one.uri for one in found.copies}

        def resume(index: int) -> None:
            remote = self._config.copies[index]
            self._keepers[index].retry_now(uris.get(remote.name, remote.uri))
            self.engine.reset(disk_of(index))
            self.engine.pause(disk_of(index), paused=False)  # wakes the keeper

        return self._each(args, resume)

    def _stop_command(self) -> object:
        # The client still gets the answer: `stop` joins this thread first.
        if not self._end():
            raise MetadataFailedError(
                f"volume {self._config.name} was stopped, but not all of its logs "
                "could be persisted: the next start recovers as after a crash"
            )
        return {"clean": True}

    # --- status ---

    def status(self) -> Status:
        """Return the whole status."""
        return report(
            self._config,
            self.engine.status(),
            self._local.view(),
            [keeper.view() for keeper in self._keepers],
            server=Server(self._door, os.getpid(), self.max_clients, *log_counts()),
            node=self.node.status() if self.node else None,
        )
