# SPDX-License-Identifier: BSD-3-Clause
"""Stop a volume's server cleanly, and wait until its process has ended."""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path

from ..base import processes
from ..base.errors import (
    MetadataFailedError,
    MirrorError,
    NotRunningError,
    WaitTimeoutError,
)
from ..volume.client import ask, ask_process, ask_status
from ..volume.config import VolumeConfig
from ..volume.offline import read_superblock
from .listeners import remove_stale

__all__ = ["stop"]

STOP_SLACK_S = 10.0  # in addition to the server's own limit: for its last words
KEPT_S = 3  # how long only a thread in the kernel may be left


def stop(config: VolumeConfig) -> None:
    """
    Stop the server cleanly and wait until its process has ended.

    Raises:
        NotRunningError: there is none. WaitTimeoutError: it is still stopping.
        MetadataFailedError: it has ended, but could not persist everything.
    """
    server = ask_process(config)
    pid = server.pid if server.seen else 0
    limit_s = config.stop_limit_s + STOP_SLACK_S
    hangs = _what_hangs(config)
    process = -1  # of another process namespace, or it has just ended
    if pid > 0:
        with contextlib.suppress(OSError):
            process = os.pidfd_open(pid)
    unclean: MetadataFailedError | None = None
    answered = True
    try:
        try:
            ask(config, "stop", limit_s)
        except MetadataFailedError as error:
            unclean = error  # it ends even so
        except NotRunningError:
            # A signal has just ended it, or it was still stopping at its limit.
            answered = False
        except WaitTimeoutError:
            raise _still_there(config, pid, kept=False, hangs=hangs) from None
        if not _wait_gone(config, pid, process, limit_s):
            kept = answered and unclean is None and _is_kept(pid)
            raise _still_there(config, pid, kept=kept, hangs=hangs)
    finally:
        if process >= 0:
            os.close(process)
    if config.listen.path is not None:
        remove_stale(Path(config.listen.path))
    if unclean is not None:
        raise unclean
    if not answered and not read_superblock(config).volume.clean:
        raise MetadataFailedError(
            f"{_words_for(pid)[0]} ended without a clean stop: the next start recovers "
            "as after a crash"
        )


def _still_there(
    config: VolumeConfig, pid: int, *, kept: bool, hangs: str
) -> WaitTimeoutError:
    """Return the error for a server that is still there at its limit, with a hint."""
    words, kill = _words_for(pid)
    if kept:
        return WaitTimeoutError(
            f"volume {config.name} was stopped cleanly, but the kernel keeps a "
            f"thread of {words}, which ends when the local disk answers; "
            "the volume can be served again, without that disk until then",
        )
    limit_s = config.stop_limit_s + STOP_SLACK_S
    return WaitTimeoutError(
        f"{words} has not ended {limit_s:g}s after the request{hangs}; "
        "nothing that was answered is lost if it is killed: the next start "
        "recovers as after a crash",
        f"{kill}, then nbd-mirror serve CONFIG",
    )


def _words_for(pid: int) -> tuple[str, str]:
    """
    Return how to name a server, and how to kill it.

    Args:
        pid: from the kernel; 0 if it reports none. The number that the server
            reports may then belong to any process here.
    """
    if pid == 0:
        return "the server", "kill it in its own process namespace"
    return f"server {pid}", f"kill -KILL {pid}"


def _what_hangs(config: VolumeConfig) -> str:
    """Say that the local disk hangs, so that no signal ends the server; or ""."""
    try:
        local = ask_status(config, 5.0).local
    except NotRunningError:
        raise
    except MirrorError:
        # A server of another version can still be stopped, and so can one that waits
        # for a disk and gives no status.
        return ""
    if local.state != "silent":
        return ""
    return ": the local disk has not answered, and the process ends when it does"


def _is_kept(pid: int) -> bool:
    """Return whether only threads that no signal ends are left of the process."""
    try:
        return processes.stat_fields(pid)[processes.STATE] == "Z"
    except OSError:
        return False


def _wait_gone(config: VolumeConfig, pid: int, process: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    if process >= 0:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        kept = 0
        # A process that ends is a zombie for a moment, and its pidfd is readable after
        # that.
        while time.monotonic() < deadline and kept < KEPT_S:
            if poll.poll(1000):
                return True
            kept = kept + 1 if _is_kept(pid) else 0
        return False
    while time.monotonic() < deadline:
        try:
            ask_process(config, 1.0)
        except NotRunningError:
            return True
        except MirrorError:
            pass
        time.sleep(0.1)
    return False
