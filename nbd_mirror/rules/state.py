# SPDX-License-Identifier: BSD-3-Clause
"""
The states of a remote, their reasons, and the keeper's next step: pure rules.

No I/O, clock or thread: facts go in as plain values and decisions come out, so that
every combination can be tested. The engine makes the transitions (mechanism); this
file names them, explains them and decides the keeper's next step.

    state        means                            leaves to     when
    -----------  -------------------------------  ------------  ---------------------
    in_sync      nothing dirty, writes go to      holding       connection lost
                 both; kept over a clean stop     out_of_sync   error, deadline over
    holding      requests wait, the connection    in_sync       connected, all known
                 is retried                       resyncing     connected, late ranges
                                                  out_of_sync   the hold is over
    out_of_sync  local alone; the dirty map       resyncing     connected, some dirty
                 tells what the remote misses     in_sync       connected, none dirty
                                                  failed        not the disk that was
    resyncing    connected; dirty regions are     in_sync       none dirty, none late
                 copied                           out_of_sync   connection lost
                                                  paused        by an operator
    paused       nothing is copied; while         resyncing     an operator resumes
                 connected, clean regions are     out_of_sync   the same, but not
                 still mirrored                                 connected
    failed       its log or disk cannot be        out_of_sync   an operator resumes
                 trusted: never connected                       or invalidates it

Every state except in_sync has a reason; in_sync has one too while it is not proven or
not connected. `describe` never returns an empty reason for the other states.

The local disk has its own states. It has no connection, so it has fewer:

    state        means                            leaves to     when
    -----------  -------------------------------  ------------  ---------------------
    ok           misses nothing                   failed        it gave an error that a
                                                                remote makes up for
                                                  resyncing     a read failed: a sector
    failed       not used at all; in-sync         resyncing     an operator resumes or
                 remotes serve reads and writes                 invalidates it
    resyncing    written to; what it missed is    ok            nothing is missed
                 copied back from a remote        failed        it gave an error again
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

__all__ = [
    "Action",
    "Facts",
    "LocalFacts",
    "LocalState",
    "RemoteState",
    "Step",
    "backoff_s",
    "describe",
    "describe_local",
    "describe_stored",
    "hold_retry_s",
    "next_step",
    "volume_state",
]

BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 30.0
SILENT_S = 5.0  # a flush may take as long; a disk that takes longer counts as hanging
STALLED_S = 10.0  # a resync that finished no region for longer must give a reason
_ASSUMED = "assumed: in sync on the operator's word, no full resync has proven it"


class RemoteState(Enum):
    """A remote's state; the values are the words in status, log and metrics."""

    IN_SYNC = "in_sync"
    HOLDING = "holding"
    OUT_OF_SYNC = "out_of_sync"
    RESYNCING = "resyncing"
    PAUSED = "paused"
    FAILED = "failed"

    @classmethod
    def from_c(cls, value: int) -> RemoteState:
        """
        Translate enum nbdm_remote_state.

        Raises:
            ValueError: the engine and this file have different versions.
        """
        if not 1 <= value <= len(_BY_C_VALUE):
            raise ValueError(f"the engine reports the unknown remote state {value}")
        return _BY_C_VALUE[value - 1]


class LocalState(Enum):
    """The local disk's state; the values are the words in status and log."""

    OK = "ok"
    FAILED = "failed"
    RESYNCING = "resyncing"

    @classmethod
    def from_c(cls, value: int) -> LocalState:
        """
        Translate enum nbdm_local_state, which has the same order.

        Raises:
            ValueError: the engine and this file have different versions.
        """
        if not 1 <= value <= len(cls):
            raise ValueError(f"the engine reports the unknown local state {value}")
        return list(cls)[value - 1]


# In the order of enum nbdm_remote_state, which starts at 1.
_BY_C_VALUE = (
    RemoteState.IN_SYNC,
    RemoteState.HOLDING,
    RemoteState.OUT_OF_SYNC,
    RemoteState.RESYNCING,
    RemoteState.PAUSED,
    RemoteState.FAILED,
)

# Best first: a volume's state is that of its worst remote.
_SEVERITY = (
    RemoteState.IN_SYNC,
    RemoteState.HOLDING,
    RemoteState.RESYNCING,
    RemoteState.PAUSED,
    RemoteState.OUT_OF_SYNC,
    RemoteState.FAILED,
)


@dataclass(frozen=True, slots=True)
class Facts:
    """
    A remote at one moment: the engine's report and its keeper's memory.

    Times are seconds counted from that moment, so the rules need no clock.
    """

    name: str
    state: RemoteState
    paused: bool = False
    assumed: bool = False
    admitted: bool = False
    dirty_bytes: int = 0
    late_bytes: int = 0
    outstanding: int = 0  # commands sent and not answered
    reason: str = ""  # the engine's
    last_error: str = ""  # of connecting or copying, since it last worked
    connecting: bool = False  # an attempt is under way
    retry_s: float = 0.0  # until the next attempt may begin
    late_s: float = 0.0  # left of the late-write window
    stalled_s: float = 0.0  # since resync last finished a region
    volume_failed: bool = False  # final: no remote is used any more


@dataclass(frozen=True, slots=True)
class LocalFacts:
    """The local disk at one moment, as `Facts` is for a remote."""

    state: LocalState
    dirty_bytes: int = 0  # what it misses
    sources: int = 0  # remotes that are connected and in use
    reason: str = ""  # the engine's
    last_error: str = ""  # of copying, since it last worked
    stalled_s: float = 0.0  # since a region was last copied back
    silent_s: float = 0.0  # how long the oldest request has had no answer

    @property
    def silent(self) -> bool:
        """Whether requests wait for the disk, without a known end."""
        return self.state is not LocalState.FAILED and self.silent_s >= SILENT_S


class Action(Enum):
    """An action of a keeper."""

    CONNECT = "connect"
    RELEASE_LATE = "release_late"
    RESYNC = "resync"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Step:
    """An action; a WAIT ends after *wait_s*; None: only when something changes."""

    action: Action
    wait_s: float | None = None


def next_step(facts: Facts) -> Step:
    """
    Decide what a remote's keeper does next.

        failed, or the volume is    wait for an operator
        not admitted, too early     wait for the time of the next attempt
        not admitted                connect, check the sample, admit; while paused too:
                                    clean regions are mirrored, copying is paused
        late, the window is over    release them; while paused too
        not resyncing, or paused    wait; if regions are late, for the window's end
        too early                   wait: a copy failed, or found all regions busy
        only late ones are dirty    wait for the window's end
        else                        copy a batch; with none dirty it ends the resync
    """
    if facts.state is RemoteState.FAILED or facts.volume_failed:
        return Step(Action.WAIT)
    if not facts.admitted:
        if facts.retry_s > 0:
            return Step(Action.WAIT, facts.retry_s)
        return Step(Action.CONNECT)
    if facts.late_bytes > 0 and facts.late_s <= 0:
        return Step(Action.RELEASE_LATE)
    window = Step(Action.WAIT, facts.late_s if facts.late_bytes > 0 else None)
    if facts.state is not RemoteState.RESYNCING or facts.paused:
        return window
    if facts.retry_s > 0:
        return Step(Action.WAIT, facts.retry_s)
    if 0 < facts.dirty_bytes <= facts.late_bytes:
        return window
    return Step(Action.RESYNC)


def backoff_s(attempt: int, random: float) -> float:
    """
    Return the seconds to wait after failed attempt *attempt*, counted from 1.

    They double; jitter keeps many volumes from retrying at the same time.

    Args:
        random: in [0, 1).
    """
    mean_s = min(BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 32), BACKOFF_LAST_S)
    return mean_s * (0.75 + 0.5 * random)


def hold_retry_s(random: float) -> float:
    """Return the seconds between attempts while requests wait: the hold is short."""
    return 0.05 + 0.15 * random


def volume_state(
    remotes: Iterable[RemoteState],
    *,
    failed: bool,
    fenced: bool,
    local: LocalState,
    silent: bool = False,
) -> str:
    """
    Return the volume's state: that of its worst disk.

    Args:
        failed: metadata could not be persisted; final.
        fenced: policy stop refuses writes, so it is at best out_of_sync.
        local: the local disk's; while it is copied back it counts like a resyncing
            remote.
        silent: requests wait for the local disk, as they would for a remote.
    """
    if failed or local is LocalState.FAILED:
        return RemoteState.FAILED.value
    states = [RemoteState.IN_SYNC, *remotes]
    if silent:
        states.append(RemoteState.HOLDING)
    if local is LocalState.RESYNCING:
        states.append(RemoteState.RESYNCING)
    if fenced:
        states.append(RemoteState.OUT_OF_SYNC)
    return max(states, key=_SEVERITY.index).value


def describe(facts: Facts, config_name: str = "CONFIG") -> tuple[str, str]:
    """
    Return why a remote is in its state, and which command helps.

    Args:
        config_name: the operator's name of the volume; the command line replaces
            "CONFIG" by it.

    Returns:
        The reason, empty only for a connected remote that is in sync and proven;
        the hint, empty if no command helps and waiting does.
    """
    invalidate = f"nbd-mirror invalidate {config_name} {facts.name}"
    resume = f"nbd-mirror resume {config_name} {facts.name}"
    if facts.state is RemoteState.FAILED:
        reason = facts.reason or facts.last_error or "its log cannot be trusted"
        full_copy = f"if local is right, {invalidate} (overwrites it with a full copy)"
        return reason, f"{resume}, once local and the uri are checked; or, {full_copy}"
    if facts.volume_failed:
        return "the volume has failed: nothing is sent to its remotes any more", ""
    if facts.state is RemoteState.IN_SYNC:
        return _describe_in_sync(facts, invalidate)
    if facts.state is RemoteState.HOLDING:
        words = facts.last_error or facts.reason or "no answer yet"
        return f"requests wait while the lost connection is retried: {words}", ""
    if facts.state is RemoteState.PAUSED or facts.paused:
        left = _size(facts.dirty_bytes)
        reason = f"resync was paused by an operator; {left} wait to be copied"
        if not facts.admitted:
            reason += f"; {_why_not_connected(facts)}"
        return reason, resume
    if not facts.admitted:
        return _why_not_connected(facts), f"{resume} (connects again at once)"
    if facts.state is RemoteState.OUT_OF_SYNC:
        # The engine leaves this state when it admits; a status may come just before.
        return facts.reason or "connected; resync begins", ""
    return _describe_resyncing(facts), ""


def describe_stored(facts: Facts, config_name: str = "CONFIG") -> tuple[str, str]:
    """Return the same for a remote that no server uses, from its log."""
    if facts.state is RemoteState.IN_SYNC and facts.assumed:
        hint = f"nbd-mirror invalidate {config_name} {facts.name} (copies it all)"
        return _ASSUMED, hint
    return facts.reason, ""


def describe_local(facts: LocalFacts, config_name: str = "CONFIG") -> tuple[str, str]:
    """
    Return why the local disk is in its state, and which command helps.

    Returns:
        The reason, empty only if it is ok; the hint, empty if waiting helps.
    """
    left = _size(facts.dirty_bytes)
    if facts.state is LocalState.FAILED:
        because = facts.reason or "it gave an error"
        if facts.silent_s > 0:
            because += " and still keeps a request"
        served = "the remotes serve reads and writes"
        if facts.sources == 0:
            served = "and no remote is connected: after the hold, requests get EIO"
        resume = f"nbd-mirror resume {config_name} local, if the same disk works again"
        full_copy = f"nbd-mirror invalidate {config_name} local (copies all to it)"
        return (
            f"{because}; {served}; it misses {left}",
            f"{resume}; or, if it was replaced, {full_copy}",
        )
    if facts.silent:
        return (
            f"it has not answered for {_seconds(facts.silent_s)}: requests wait for it",
            "check the disk and the kernel's log; requests continue when it answers",
        )
    if facts.state is LocalState.OK:
        return "", ""
    because = f" ({facts.reason})" if facts.reason else ""
    words = f"{left} left to copy back from the remotes{because}"
    if facts.sources == 0:
        return f"{words}: no remote is connected; waiting for one", ""
    if facts.last_error:
        return f"{words}; {facts.last_error}; the server tries again", ""
    if facts.stalled_s > STALLED_S:
        stalled = f"no region was copied for {_seconds(facts.stalled_s)}"
        return f"{words}; {stalled}: clients' requests hold the regions", ""
    return words, ""


def _describe_in_sync(facts: Facts, invalidate: str) -> tuple[str, str]:
    if not facts.admitted:
        return f"in sync when last seen; {_why_not_connected(facts)}", ""
    if facts.assumed:
        return _ASSUMED, f"{invalidate} (copies all of it)"
    return facts.reason, ""


def _describe_resyncing(facts: Facts) -> str:
    """Return what resync does or waits for; the first cause that holds counts."""
    left = _size(facts.dirty_bytes)
    if facts.retry_s > 0 and facts.last_error:
        failed = f"{left} left to copy; the last copy failed: {facts.last_error}"
        return f"{failed}; {_next_attempt(facts)}"
    # While it copies, commands that were sent and not answered are late as well.
    if 0 < facts.dirty_bytes <= facts.late_bytes and facts.late_s > 0:
        because = f"; before: {facts.last_error}" if facts.last_error else ""
        return (
            f"the last {left} are copied again in {_seconds(facts.late_s)}: until then "
            f"writes of the lost connection may still be carried out{because}"
        )
    if facts.stalled_s > STALLED_S:
        stalled = f"no region was copied for {_seconds(facts.stalled_s)}"
        return f"{stalled}: {_why_stalled(facts)}; {left} left"
    return f"{left} left to copy"


def _why_stalled(facts: Facts) -> str:
    if facts.outstanding > 0:
        return f"the remote has not answered {facts.outstanding} commands"
    return facts.last_error or "clients' requests hold the regions"


def _why_not_connected(facts: Facts) -> str:
    words = facts.last_error or facts.reason or "not connected yet"
    return f"{words}; {_next_attempt(facts)}"


def _next_attempt(facts: Facts) -> str:
    if facts.connecting or facts.retry_s <= 0:
        return "trying now"
    return f"next attempt in {_seconds(facts.retry_s)}"


def _seconds(seconds: float) -> str:
    """Format whole seconds, rounded up, so that "0 s" means now."""
    return f"{math.ceil(max(seconds, 0))} s"


def _size(count: int) -> str:
    """Format bytes for a sentence, rounded up: a region left must not read as 0."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= scale:
            return f"{math.ceil(count * 10 / scale) / 10:,.1f} {unit}"
    return f"{-(-count // 1024)} KiB"
