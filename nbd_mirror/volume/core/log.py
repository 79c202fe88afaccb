# SPDX-License-Identifier: BSD-3-Clause
"""The log, which the engine's lines and Python's share."""

from __future__ import annotations

import os

from .boundary import c_text, check, ffi, lib, whole_ms


def start_log() -> None:
    """
    From now on no line of the log blocks, not even on standard output and error.

    Call it after any fork, and before signals are blocked. Calling it again has no
    effect.

    Raises:
        MirrorError: no thread, or no descriptor.
    """
    check(lib.nbdm_log_start(), "start the log")


def bound_log(state_dir: str) -> None:
    """Limit the size of the directory's serve.log, if the output goes there."""
    check(lib.nbdm_log_rotate(os.fsencode(state_dir)), "the log")


def write_log(level: str, text: str) -> None:
    """Write a line; never raises, and never blocks once the log is started."""
    lib.nbdm_log(lib.NBDM_LOG_OWN, level.encode(), c_text(text))


def write_text(text: str) -> None:
    """Write whole lines unchanged, like `write_log`."""
    lib.nbdm_log_raw(c_text(text))


def flush_log(timeout_s: float) -> None:
    """Wait until all lines were written, at most *timeout_s*."""
    lib.nbdm_log_flush(whole_ms(timeout_s))


def hand_on_log() -> None:
    """Give the output back, for a program that this process executes."""
    lib.nbdm_log_hand_on()


def log_counts() -> tuple[int, int]:
    """Return how many lines could not be written, and how many were left out."""
    lost, left_out = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    lib.nbdm_log_counts(lost, left_out)
    return int(lost[0]), int(left_out[0])
