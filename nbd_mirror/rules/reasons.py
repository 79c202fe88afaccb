# SPDX-License-Identifier: BSD-3-Clause
"""
Why a disk is in its state, and which command helps: pure rules, in words.

Every state except in_sync has a reason; in_sync has one too while it is not proven or
not connected. `describe` never returns an empty reason for the other states.
"""

from __future__ import annotations

import math

from .state import STALLED_S, Facts, LocalFacts, LocalState, RemoteState

__all__ = ["describe", "describe_local", "describe_stored"]

_ASSUMED = "assumed: in sync on the operator's word, no full resync has proven it"


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
    return facts.reason or _why_stored(facts), ""


def _why_stored(facts: Facts) -> str:
    """Return why a remote is not in sync that has no reason of its own."""
    if facts.state is RemoteState.IN_SYNC:
        return ""
    if facts.late_bytes > 0:
        return (
            "writes of a lost connection may still be carried out in "
            f"{_size(facts.late_bytes)}: the next server copies that again afterwards"
        )
    return f"resync had not ended: {_size(facts.dirty_bytes)} left to copy"


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
