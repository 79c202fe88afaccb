# SPDX-License-Identifier: BSD-3-Clause
"""
The Python interface of the engine: the only package that calls C.

One method is one C call; CFFI releases the GIL around each. This package has no policy,
and no state except the handle. Buffers are borrowed for the call and never copied.
"""

from __future__ import annotations

from ..model import Params, RemoteParams
from .boundary import Buffer, lib
from .engine import FAST_ZERO, FUA, MAY_TRIM, Engine
from .log import (
    bound_log,
    flush_log,
    hand_on_log,
    log_counts,
    start_log,
    write_log,
    write_text,
)
from .node_calls import CALL_LEN, TEXT_LEN, Call, CallKind, ListenerKind, call, fetch
from .server import Server, check_certificate
from .state import create, fault_points, peek, peek_logs, peek_map, reach

__all__ = [
    "CALL_LEN",
    "FAST_ZERO",
    "FUA",
    "MAX_REMOTES",
    "MAX_REQUEST",
    "MAY_TRIM",
    "PREFERRED_BLOCK",
    "TEXT_LEN",
    "Buffer",
    "Call",
    "CallKind",
    "Engine",
    "ListenerKind",
    "Params",
    "RemoteParams",
    "Server",
    "bound_log",
    "call",
    "check_certificate",
    "create",
    "fault_points",
    "fetch",
    "flush_log",
    "hand_on_log",
    "log_counts",
    "peek",
    "peek_logs",
    "peek_map",
    "reach",
    "start_log",
    "write_log",
    "write_text",
]

MAX_REMOTES: int = lib.NBDM_MAX_REMOTES
MAX_REQUEST: int = lib.NBDM_MAX_REQUEST  # bytes
PREFERRED_BLOCK: int = lib.NBDM_PREFERRED_BLOCK  # bytes
