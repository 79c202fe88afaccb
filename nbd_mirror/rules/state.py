# SPDX-License-Identifier: BSD-3-Clause
"""
The states of a remote and of the local disk, and the keeper's next step: pure rules.

No I/O, clock or thread: facts go in as plain values and decisions come out, so that
every combination can be tested. The engine makes the transitions (mechanism); this
file names them and decides the keeper's next step; reasons.py explains them.

    state        means                            leaves to     when
    -----------  -------------------------------  ------------  ---------------------
    in_sync      nothing dirty, writes go to      holding       connection lost
                 both; kept over a clean stop     out_of_sync   error, deadline over
    holding      requests wait, the connection    in_sync       connected, all known
                 is retried                       resyncing     connected, late ranges
                                                  out_of_sync   the hold is over
    out_of_sync  local alone; the dirty map       resyncing     connected, some dirty
                 tells what the remote misses     in_sync       connected, none dirty
                                                  failed        it is another disk
    resyncing    connected; dirty regions are     in_sync       none dirty, none late
                 copied                           out_of_sync   connection lost
                                                  paused        by an operator
    paused       nothing is copied; while         resyncing     an operator resumes
                 connected, clean regions are     out_of_sync   the same, but not
                 still mirrored                                 connected
    failed       its log or disk cannot be        out_of_sync   an operator resumes
                 trusted: never connected                       or invalidates it

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
    "hold_retry_s",
    "next_step",
    "volume_state",
]

BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 30.0
SILENT_S = 5.0  # a flush may take as long; a disk that takes longer counts as hanging
STALLED_S = 10.0  # a resync that finished no region for longer must give a reason


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
