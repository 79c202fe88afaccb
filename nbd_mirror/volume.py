# SPDX-License-Identifier: BSD-3-Clause
"""
The volume a server serves: the one control object behind all doors.

It ties the engine to a keeper a disk, the control socket and a maintenance thread,
and brings them up and down in the one order that is safe. A door only opens it before
any fork, starts it after, and stops it at the end; requests never pass here.
"""

from __future__ import annotations

import os
import shlex
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from . import config as _config
from .control import ControlServer, control_path
from .core import Engine
from .errors import ConfigError, MetadataFailedError, MirrorError, UnsupportedError
from .keeper import Keeper, RemotePolicy
from .local_keeper import LocalKeeper
from .model import VolumeStatus
from .policy import switch_policy
from .process import exit_after, log, on_signal, outlive_parent
from .report import explain, local_dict, remote_dict
from .state import volume_state

__all__ = ["Volume"]

MAINTENANCE_S = 2.0
COOL_S = 60.0  # an extent idle for longer goes cold
JOIN_S = 10.0  # beyond two deadlines
GRACE_S = 2.0  # for clients to go away once everything is stopped
LOCAL = "local"  # the local disk's name where else a remote's stands


class Volume:
    """
    An open volume. Made by `open`; `serve` after any fork; `stop` ends it.

    Args:
        config: the volume's.
        door: "direct", "native" or "python", for status.
        shutdown: asks the server to end; called from a thread of ours.
    """

    def __init__(
        self, config: _config.VolumeConfig, door: str, shutdown: Callable[[], None]
    ) -> None:
        self._config = config
        self._door = door
        self._shutdown = shutdown
        self.engine = Engine(_config.to_params(config))
        self._local = self._make_local_keeper()
        self._keepers = self._make_keepers()
        self._control = ControlServer(control_path(config.state), self.handle)
        self._ending = threading.Event()
        self._closed = threading.Event()
        self._maintenance = threading.Thread(
            target=self._maintain, name="maintenance", daemon=True
        )
        self._halt_lock = threading.Lock()  # guards _clean and the order of the end
        self._clean: bool | None = None  # None: not halted yet
        self._said: set[str] = set()  # what maintenance said once

    @classmethod
    def open(cls, path: str, door: str, shutdown: Callable[[], None]) -> Volume:
        """
        Read the configuration at *path*, lock and load the volume; start no thread.

        Raises:
            MirrorError: of any class; the volume is not served, and nothing is lost.
        """
        return cls(_config.load(path), door, shutdown)

    def _make_local_keeper(self) -> LocalKeeper:
        config = self._config
        keeper = LocalKeeper(
            self.engine,
            config.local,
            len(config.remotes),
            log,
            asked=shlex.quote(os.fspath(config.source)),
        )
        why = keeper.why_not_used()
        if why:
            # Also to who types `serve`, which repeats a start's warnings.
            text = f"the local disk is not used: {why}"
            log("warning", f"volume {config.name}: {text}")
        return keeper

    def _make_keepers(self) -> list[Keeper]:
        status = self.engine.status()
        if status.reason:
            log("warning", f"volume {self._config.name}: {status.reason}")
        return [
            Keeper(
                self.engine,
                index,
                RemotePolicy(
                    name=remote.name,
                    uri=remote.uri,
                    deadline_s=remote.deadline,
                    hold_s=self._config.hold,
                    late_window_s=self._config.late_write_window,
                ),
                log,
            )
            for index, remote in enumerate(self._config.remotes)
        ]

    def serve(self) -> None:
        """
        Start every thread and answer commands; signals stop the volume from now on.

        Must be called on the process's main thread, before it has others.

        Raises:
            MirrorError: a thread or the control socket could not be made.
        """
        outlive_parent()
        on_signal(self._end)
        self.engine.start()
        self._control.start()
        for keeper in self._threads():
            keeper.start()
        self._maintenance.start()
        log("info", f"volume {self._config.name}: served, {self._door} door")

    def _threads(self) -> list[Keeper | LocalKeeper]:
        return [self._local, *self._keepers]

    def stop(self) -> bool:
        """
        Stop cleanly and close everything. Blocks, bounded by the deadlines.

        Again: no effect.

        Returns:
            Whether the next start has nothing to recover.
        """
        clean = self._halt()
        self._control.close()  # joins its threads: one may still send an answer
        threads_ended = all(keeper.join(0) for keeper in self._threads())
        if threads_ended and not self._maintenance.is_alive():
            self.engine.close()
        self._closed.set()
        return clean

    def _end(self) -> bool:
        """Stop cleanly, and have nbdkit end; clients that stay do not keep us."""
        clean = self._halt()
        exit_after(self._closed, GRACE_S, 0 if clean else MetadataFailedError.exit_code)
        self._shutdown()
        return clean

    def _halt(self) -> bool:
        """End the policy threads, then the engine; requests are refused from then."""
        with self._halt_lock:
            if self._clean is None:
                self._ending.set()
                for keeper in self._threads():
                    keeper.end()
                self.engine.wake()
                self._join()
                self._clean = self._stop_engine()
            return self._clean

    def _join(self) -> None:
        timeout_s = 2 * max(r.deadline for r in self._config.remotes) + JOIN_S
        for keeper in self._threads():
            if not keeper.join(timeout_s):
                log("error", "a keeper does not end; the engine is stopped without it")
        if self._maintenance.ident is not None:
            self._maintenance.join(timeout_s)

    def _stop_engine(self) -> bool:
        name = self._config.name
        try:
            self.engine.stop()
        except MirrorError as error:
            log("error", f"volume {name}: {error}; the next start recovers")
            return False
        log("info", f"volume {name}: stopped cleanly")
        return True

    # --- maintenance ---

    def _maintain(self) -> None:
        while not self._ending.wait(MAINTENANCE_S):
            try:
                status = self.engine.status()
                self._tell(status)
                if not status.failed:
                    self.engine.cool(COOL_S)
            except MirrorError as error:
                self._say_once("warning", f"volume {self._config.name}: {error}")
            except Exception:
                self._say_once("error", f"maintenance: {traceback.format_exc()}")

    def _tell(self, status: VolumeStatus) -> None:
        name = self._config.name
        if status.failed:
            text = f"volume {name}: failed: {status.reason}"
            self._say_once("error", f"{text}; writes get EIO until it is served anew")

    def _say_once(self, level: str, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log(level, text)

    # --- commands ---

    def handle(self, command: str, args: Mapping[str, Any]) -> object:
        """
        Carry out a command of the control socket.

        Raises:
            MirrorError: it cannot be done, or is not known.
        """
        match command:
            case "ping":
                return {"volume": self._config.name, "pid": os.getpid()}
            case "status":
                return self.status()
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
        raise UnsupportedError(f'the server does not know the command "{command}"')

    def _each(self, args: Mapping[str, Any], act: Callable[[int], None]) -> object:
        """Do it to the remote that *args* names, else to all."""
        name = args.get("remote")
        if name is not None:
            self._config.remote(name)  # raises if there is none
        names = [remote.name for remote in self._config.remotes]
        chosen = [i for i, one in enumerate(names) if name in (None, one)]
        for index in chosen:
            act(index)
        return {"remotes": [names[i] for i in chosen]}

    def _invalidate(self, args: Mapping[str, Any]) -> object:
        """Overwrite a remote, or with the name "local" a replaced local disk."""
        if not args.get("remote"):
            raise ConfigError("invalidate needs the name of a remote, or local")
        if args["remote"] == LOCAL:
            self._local.replace(_config.load(self._config.source).local)
            return {"remotes": [LOCAL]}

        def invalidate(index: int) -> None:
            # The operator has seen why it did not work: what counts is what comes now.
            self._keepers[index].forget_error()
            self.engine.invalidate(index)

        return self._each(args, invalidate)

    def _pause(self, index: int) -> None:
        self.engine.pause(index, paused=True)

    def _resume(self, args: Mapping[str, Any]) -> object:
        """
        Lift the pause and check a failed disk again, where it is by now.

        The configuration is read again, so that correcting a uri, or the path of the
        local disk, needs no restart.
        """
        found = _config.load(self._config.source)
        if args.get("remote") == LOCAL:
            self._local.resume(found.local)
            return {"remotes": [LOCAL]}
        uris = {one.name: one.uri for one in found.remotes}

        def resume(index: int) -> None:
            remote = self._config.remotes[index]
            self._keepers[index].retry_now(uris.get(remote.name, remote.uri))
            self.engine.reset(index)
            self.engine.pause(index, paused=False)  # also wakes the keeper

        return self._each(args, resume)

    def _stop_command(self) -> object:
        # The answer still reaches the client: `stop` joins this thread first.
        if not self._end():
            raise MetadataFailedError(
                f"volume {self._config.name} was stopped, but not all of its logs "
                "could be persisted: the next start recovers as after a crash"
            )
        return {"clean": True}

    # --- status ---

    def status(self) -> dict[str, Any]:
        """Report everything, as `nbd-mirror status --json` prints it."""
        volume = self.engine.status()
        views = [keeper.view() for keeper in self._keepers]
        remotes = [remote_dict(view, volume) for view in views]
        local = local_dict(self._local.view())
        word = volume_state(
            [view.facts.state for view in views],
            failed=volume.failed,
            fenced=volume.fenced,
            local=volume.local.state,
        )
        reason, hint = explain(volume, word, self._config.state, local, remotes)
        return {
            "volume": self._config.name,
            "uuid": volume.uuid,
            "size": volume.size,
            "state": word,
            "reason": reason,
            "hint": hint,
            "local": local,
            "door": self._door,
            "pid": os.getpid(),
            "clients": volume.clients,
            "inflight": volume.inflight,
            "active_extents": volume.active_extents,
            "persists": {
                "activity": volume.activity_persists,
                "superblock": volume.superblock_persists,
                "dirty": volume.dirty_persists,
            },
            "policy": volume.policy,
            "fenced_reads": volume.fenced_reads,
            "region_size": volume.region_size,
            "generation": volume.generation,
            "remotes": remotes,
        }
