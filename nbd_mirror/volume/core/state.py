# SPDX-License-Identifier: BSD-3-Clause
"""A state directory without an engine: make one, read one, and the fault points."""

from __future__ import annotations

import os

from ..model import LOCAL, Params, Peek, disk_of, remote_status, volume_status
from ..node_record import node_record
from .boundary import check, ffi, lib, make_params, text_of


def create(params: Params, *, force: bool = False) -> None:
    """
    Format the state directory; the local disk is not changed.

    Blocks while the logs are allocated and synced.

    Raises:
        ExistsError: it holds a volume and *force* is not given. BusyError: in use.
        SpaceError: no room for the logs. ConfigError: the parameters do not fit.
    """
    c_params, _alive = make_params(params)
    check(lib.nbdm_create(c_params, int(force)), "create")


def peek(state_dir: str) -> Peek:
    """
    Read a superblock without locking or changing anything, even beside a server.

    Raises:
        MissingError: there is none. FormatError: it is garbled.
    """
    name = ffi.new("char[]", lib.NBDM_NAME_LEN)
    status = ffi.new("struct nbdm_status *")
    disks = ffi.new("struct nbdm_disk_status[]", lib.NBDM_MAX_DISKS)
    node = ffi.new("struct nbdm_node *")
    folder = os.fsencode(state_dir)
    check(lib.nbdm_peek(folder, name, status, disks, node), "peek")
    volume = volume_status(status, disks[LOCAL], text_of)
    nr: int = status.nr_remotes
    remotes = tuple(remote_status(disks[disk_of(i)], text_of) for i in range(nr))
    return Peek(text_of(name), volume, remotes, node_record(node, text_of))


def peek_map(state_dir: str, disk: str) -> None:
    """
    Check a disk's dirty map as a start does; see `peek`.

    Raises:
        MissingError: there is none. FormatError: a start would not trust it.
    """
    rc = lib.nbdm_peek_map(os.fsencode(state_dir), os.fsencode(disk))
    check(rc, f"dirty.{disk}")


def peek_logs(state_dir: str) -> None:
    """
    Check the headers of the logs that cover all disks; see `peek_map`.

    Raises:
        MissingError, FormatError: a start would take all regions as dirty.
    """
    check(lib.nbdm_peek_logs(os.fsencode(state_dir)), "the logs")


def fault_points() -> dict[str, bool]:
    """Return every point that NBDM_FAULT knows, and whether it can be made to fail."""
    fails = ffi.new("int *")
    found: dict[str, bool] = {}
    while (name := lib.nbdm_fault_point(len(found), fails)) != ffi.NULL:
        found[text_of(name)] = bool(fails[0])
    return found


def reach(point: str) -> None:
    """Pass a fault point of the control of nodes."""
    lib.nbdm_reach(point.encode())
