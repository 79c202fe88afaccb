# SPDX-License-Identifier: BSD-3-Clause
"""
Open a volume's engine with the operator's choice for its local disk; if it cannot be
opened, give the hint that fits.
"""

from __future__ import annotations

import dataclasses
import errno
import os

from ..base.errors import MirrorError
from ..base.files import is_there
from ..volume import config as _config
from ..volume.core import Engine
from ..volume.model import Params
from .process import log

__all__ = ["open_engine"]

_OTHER = (
    "correct `local`; or, if a remote has the right content, nbd-mirror serve CONFIG "
    "--without-local\n"
    "or, if this disk has it, nbd-mirror serve CONFIG --force (every remote is "
    "overwritten with a full copy of it)"
)
_LOST = (
    "correct `local`; or, if the disk is lost and a remote was in sync, nbd-mirror "
    "serve CONFIG --without-local, then nbd-mirror invalidate CONFIG local"
)
_NO_SYNC = "bring back the local disk; its state still tells what the remotes miss"


def open_engine(config: _config.VolumeConfig) -> Engine:
    """
    Open the engine.

    Raises:
        MirrorError: of any class, with a hint if something helps.
    """
    choice = os.environ.pop(_config.CHOICE_VARIABLE, "")
    params = dataclasses.replace(_config.to_params(config), local_choice=choice)
    grant = os.environ.pop(_config.GRANT_VARIABLE, "") if config.node else ""
    try:
        if grant:
            return _open_granted(params, int(grant))
        return Engine(params)
    except MirrorError as error:
        error.hint = error.hint or _hint(error, config)
        raise


def _open_granted(params: Params, epoch: int) -> Engine:
    """Open as primary; as secondary, if another node was promoted in the meantime."""
    try:
        return Engine(dataclasses.replace(params, primary=True, epoch=epoch))
    except MirrorError as error:
        if error.errno != errno.EPERM:
            raise
        log("warning", f"volume {params.name}: not primary: {error}")
    return Engine(params)


def _hint(error: MirrorError, config: _config.VolumeConfig) -> str:
    match error.errno:
        case errno.EMEDIUMTYPE:
            return _OTHER
        case errno.ENOMEDIUM:
            return _LOST
        case errno.ENOENT if not is_there(config.local):
            return _LOST
        case errno.ENOTCONN:
            return _NO_SYNC
        case errno.EROFS:
            return (
                "find out why it is read-only: a failing disk often becomes so; then "
                "remount its file system, or blockdev --setrw its device"
            )
    return ""
