# SPDX-License-Identifier: BSD-3-Clause
"""
The hooks of a node: programs of the operator that run when its role changes.

`promoting` and `demoting` are asked, before anything is stored, by the process that is
to change its role: if one fails, the role stays. `promoted` and `demoted` are told, by
the process that has the new role. A role change is a start, and a server may be killed
at any time, so they are not tied to a change: each start of a server runs one of them,
as soon as its role is settled. So services find the right state after every kill.

One hook runs at a time, and none decides more than yes or no. A hook that still runs
when the server ends, or when a later primary overrules this one, is killed.

The server runs a hook with its own rights, so neither the program nor the configuration
that names it may be another user's.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from ..base.bounded import run_bounded
from ..base.errors import AccessError, MirrorError, RoleError, from_errno
from ..base.files import user_name
from ..base.hints import quote
from ..base.programs import clean_environment
from ..device.attach import attached_device
from ..device.devices import name_of, user_of
from ..rules.node_side import Role
from ..volume.config import CHOICE_VARIABLE, VolumeConfig
from .node_local import LocalNode
from .node_standing import was_primary

__all__ = ["Hook", "HookError", "Hooks"]

# What the server has from the program that started it, and no hook may use.
_OWN = (
    *(CHOICE_VARIABLE, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"),
    *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "NBDM_FAULT"),
)


class Hook(Enum):
    """When it runs."""

    PROMOTING = "promoting"
    PROMOTED = "promoted"
    DEMOTING = "demoting"
    DEMOTED = "demoted"


class HookError(RoleError):
    """A hook failed, so the role stays as it is."""


class Hooks:
    """
    Runs the hooks of this node.

    Args:
        log: gets what they say, and which one failed.
    """

    def __init__(
        self,
        config: VolumeConfig,
        local: LocalNode,
        log: Callable[[str, str], object],
    ) -> None:
        self._config = config
        self._local = local
        self._log = log
        self._turn = threading.Lock()  # held while a hook runs; guards the next one
        self._told: Role | None = None
        self._lock = threading.Lock()  # of the next two
        self._stop = -1  # stops the hook that runs
        self._closed = False
        self.failed = ""  # which hook failed, for the status

    def command(self, hook: Hook) -> tuple[str, ...]:
        """Return the words of a hook's command; none: there is no such hook."""
        words: tuple[str, ...] = getattr(self._config.hooks, hook.value)
        return words

    def ask(self, hook: Hook) -> bool:
        """
        Run a hook before a change of role.

        Returns:
            False: there is no such hook.
        Raises:
            HookError: it failed, and the role must not change.
        """
        if not self.command(hook):
            return False
        with self._turn:
            why = self._run(hook)
            # If the change does not come about, what the hook stopped starts again.
            self._told = None
        if why:
            raise HookError(f"the hook {hook.value} {why}")
        return True

    def ask_demoting(self, command: str, *, force: bool) -> bool:
        """
        Run `demoting` for an operator's *command*, while clients are still served.

        Args:
            force: go on if it fails; the log says so.
        Returns:
            False: there is no such hook.
        Raises:
            HookError: it failed; the message names what uses the volume.
        """
        try:
            return self.ask(Hook.DEMOTING)
        except HookError as error:
            if force:
                return True
            parts = (error.message, self._users(), "this node stays primary")
            raise HookError(
                "; ".join(part for part in parts if part),
                f"correct that; or nbd-mirror {command} CONFIG --force",
            ) from None

    def tell(self, changing: Callable[[], bool]) -> None:
        """
        Run `promoted` or `demoted`, once the role of this process is settled.

        Args:
            changing: says whether a change of role is under way.
        """
        with self._turn:
            role = None if changing() else self._settled()
            if role is None or role is self._told:
                return
            self._told = role
            hook = Hook.PROMOTED if role is Role.PRIMARY else Hook.DEMOTED
            if self.command(hook):
                why = self._run(hook)
                self.failed = f"{hook.value} {why}" if why else ""

    def _settled(self) -> Role | None:
        local = self._local
        with local.lock:
            if local.leaving or local.asks:
                return None
            if local.primary:
                return Role.PRIMARY
            # The last primary resumes, if no other node was promoted.
            return None if was_primary(local.record()) else Role.SECONDARY

    def cancel(self) -> None:
        """Kill the hook that runs now, with its process group."""
        with self._lock:
            if self._stop >= 0:
                os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """Run no hook any more: the server ends."""
        with self._lock:
            self._closed = True
        self.cancel()

    def _users(self) -> str:
        """Return what uses this volume's kernel device, or ""."""
        try:
            device = attached_device(self._config)
            user = user_of(name_of(device)) if device else ""
        except (OSError, MirrorError):
            return ""
        return f"{device} is in use: {user}" if user else ""

    def _run(self, hook: Hook) -> str:
        """Run a hook, in turn; return why it failed, or ""."""
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            with self._lock:
                if self._closed:
                    return "was not run, because the server ends"
                self._stop = stop
            why = self._run_checked(hook, stop)
        finally:
            with self._lock:
                self._stop = -1
            os.close(stop)
        if why:
            self._log("warning", f"hook {hook.value}: {why}")
        return why

    def _run_checked(self, hook: Hook, stop: int) -> str:
        command = self.command(hook)
        self._log("info", f"hook {hook.value}: {quote(command[0])} begins")
        try:
            check_program(command[0], self._config.source)
            return run_bounded(
                command,
                self._environment(hook),
                self._config.hooks.timeout,
                lambda line: self._log("info", f"hook {hook.value}: {line}"),
                stop,
            )
        except MirrorError as error:
            return f"was not run: {error}"

    def _environment(self, hook: Hook) -> dict[str, str]:
        config, record = self._config, self._local.record()
        environment = clean_environment()
        for name in _OWN:
            environment.pop(name, None)
        role = Role.PRIMARY if self._local.primary else Role.SECONDARY
        return {
            **environment,
            "NBD_MIRROR_HOOK": hook.value,
            "NBD_MIRROR_VOLUME": config.name,
            "NBD_MIRROR_NODE": config.node,
            "NBD_MIRROR_ROLE": role.value,
            "NBD_MIRROR_EPOCH": str(record.epoch),
            "NBD_MIRROR_OTHER_NODES": " ".join(self._local.others),
            "NBD_MIRROR_URI": config.listen.uri,
            "NBD_MIRROR_CONFIG": os.fspath(config.source),
        }


def check_program(program: str, config: Path) -> None:
    """
    Check that no other user can change a hook, or choose another program for it.

    Raises:
        AccessError: one can. MirrorError of another class: it is not there.
    """
    try:
        paths = [Path(program).resolve(strict=True), config.resolve(strict=True)]
        places = [*paths, *(parent for path in paths for parent in path.parents)]
        found = [(path, path.stat()) for path in places]
    except OSError as error:
        raise from_errno(
            error.errno or 0, f"{error.filename}: {error.strerror}"
        ) from None
    for path, status in found:
        _check_place(path, status)
    if not stat.S_ISREG(found[0][1].st_mode) or not os.access(program, os.X_OK):
        raise AccessError(
            f"{program} is no program that this user may execute",
            f"chmod +x {quote(program)}",
        )


def _check_place(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise AccessError(
            f"{path} belongs to user {user_name(status.st_uid)}, so that user could "
            "choose what this server runs",
            f"chown {user_name(os.geteuid()).removeprefix('#')} {quote(str(path))}",
        )
    # In a folder with the sticky bit, such as /tmp, nobody replaces another's file.
    folder = stat.S_ISDIR(status.st_mode)
    sticky = folder and status.st_mode & stat.S_ISVTX
    # Debian lets a group write in /usr/local, which has no members by default.
    if status.st_mode & (0o002 if folder else 0o022) and not sticky:
        raise AccessError(
            f"other users may change {path}, and so choose what this server runs",
            f"chmod go-w {quote(str(path))}",
        )
