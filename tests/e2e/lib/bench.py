# SPDX-License-Identifier: BSD-3-Clause
"""
A volume for crash tests: its files, what they say, and a recovery that is checked.

What the files say is dirty, unflushed, open or active (oracle.py) must be dirty after a
crash, exactly that, and every difference of the disks with it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import support
from e2e.lib.clients import regions_of
from e2e.lib.engine_child import EngineChild, EngineError, Nursery
from e2e.lib.oracle import (
    ALL,
    EXTENT,
    REGION,
    SIZE,
    active_regions,
    open_slots,
    page_cache_lived,
    stopped_cleanly,
)
from e2e.lib.servers import Secondary

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.rules.pace import Plan
from nbd_mirror.rules.state import LocalState, RemoteState
from nbd_mirror.volume import core
from nbd_mirror.volume.mapview import open_map
from nbd_mirror.volume.model import LOCAL, disk_of

__all__ = ["DR", "EXTENT", "REGION", "SIZE", "Bench", "Failed"]

DR = disk_of(0)  # the only remote


class Failed(Exception):  # noqa: N818  what an error test waits for
    """The volume has failed while a script waited for something else."""


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file's data, leaving its holes."""
    with source.open("rb") as old, target.open("wb") as new:  # empties it
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:  # no data behind
                return
            end = os.lseek(old.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += os.copy_file_range(old.fileno(), new.fileno(), end - at, at, at)


def copy_tree(source: Path, target: Path) -> None:
    """
    Make *target* what *source* is: the images and the state.

    Images that are there stay the same files, by which a start may know them.
    """
    shutil.rmtree(target / "state", ignore_errors=True)
    (target / "state").mkdir(parents=True)
    for name in ("local.img", "dr.img"):
        copy_sparse(source / name, target / name)
    for one in (source / "state").iterdir():
        shutil.copyfile(one, target / "state" / one.name)


# --- the bench ---------------------------------------------------------------


class Bench:
    """
    A volume with one remote in *folder*/case, and saved states of it beside.

    *old* is the local disk's content as answered; *new* are the bytes of the one
    request that is under way, and *new_at* where they belong.
    """

    def __init__(self, folder: Path, processes: support.Processes) -> None:
        self.folder = folder
        self.case = folder / "case"
        self.case.mkdir()
        self.nursery = Nursery(processes, folder)
        self.server = Secondary(processes, self.case, "dr", "nbdkit")
        self.server.socket = folder / "dr.sock"
        self.server.uri = f"nbd+unix:///disk?socket={self.server.socket}"
        self.old = bytearray(SIZE)
        self.new, self.new_at = b"", 0
        self.child: EngineChild | None = None
        self.hold_ms = 10_000
        self.assume = False
        self._saved: dict[str, tuple[bytes, bytes, int]] = {}

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.case / "state"

    @property
    def params(self) -> core.Params:
        """The volume's."""
        return core.Params(
            name="v",
            local=str(self.case / "local.img"),
            state_dir=str(self.state),
            size=SIZE,
            region_size=REGION,
            policy="degrade",
            hold_ms=self.hold_ms,
            remotes=(core.RemoteParams("dr", 5000, assume_in_sync=self.assume),),
        )

    def save(self, name: str) -> None:
        """Keep the case as it is now."""
        copy_tree(self.case, self.folder / name)
        self._saved[name] = bytes(self.old), self.new, self.new_at

    def restore(self, name: str) -> None:
        """Go back to what was saved."""
        copy_tree(self.folder / name, self.case)
        old, self.new, self.new_at = self._saved[name]
        self.old[:] = old

    # --- driving the engine ---

    def open(self, fault: str = "") -> EngineChild:
        """Open the volume in a new child."""
        self.child = self.nursery.child(fault)
        self.child.call("open", self.params)
        return self.child

    def connect(self) -> None:
        """Connect the remote and use it."""
        assert self.child
        self.child.call("connect", DR, self.server.uri, 10.0)
        self.child.call("admit", DR)

    def write(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Write random bytes and remember them."""
        assert self.child
        data = os.urandom(length)
        self.new, self.new_at = data, offset
        self.child.call("pwrite", data, offset, core.FUA if fua else 0)
        self.answered()

    def zero(self, name: str, offset: int, length: int, flags: int = 0) -> None:
        """Trim or zero a range, and remember it."""
        assert self.child
        self.new, self.new_at = bytes(length), offset
        self.child.call(name, length, offset, flags)
        self.answered()

    def answered(self) -> None:
        """Note that what was under way was answered."""
        self.old[self.new_at : self.new_at + len(self.new)] = self.new
        self.new = b""

    def wait(self, holds: Callable[[], object], what: str) -> None:
        """Wait for something, unless the volume fails first."""
        child = self.child
        assert child

        def held_or_failed() -> bool:
            if child.call("status").failed:
                raise Failed
            return bool(holds())

        support.wait_until(held_or_failed, what, interval_s=0.005)

    def wait_state(self, state: RemoteState) -> None:
        """Wait for the remote's state."""
        child = self.child
        assert child
        self.wait(
            lambda: child.call("remote_status", DR).state is state, f"state {state}"
        )

    def catch_up(self) -> int:
        """Copy until in sync; returns the bytes copied."""
        child = self.child
        assert child
        copied: int = 0
        for _ in range(50):
            child.call("release_late", DR)
            batch = child.call("resync", DR, 0, 32 << 20, 0.0, Plan(16, 0))
            copied += batch.copied_bytes
            status = child.call("remote_status", DR)
            if status.state is RemoteState.IN_SYNC:
                return copied
            assert status.reason or status.dirty_regions
            if child.call("status").failed or batch.error:
                raise Failed
        raise AssertionError(f"resync does not end: {status}")

    def bring_local_back(self) -> None:
        """Use the local disk again, and copy to it what it misses, if it failed."""
        child = self.child
        assert child
        try:
            child.call("local_attach", str(self.case / "local.img"), replaced=False)
        except EngineError as error:
            if error.errno != errno.EALREADY:
                raise
        else:
            child.call("admit", LOCAL)
        for _ in range(50):
            if child.call("status").local.state is LocalState.OK:
                return
            child.call("resync", LOCAL, 0, 32 << 20, 0.0, Plan(1, 0))
        raise AssertionError("copying back does not end")

    # --- judging ---

    def serve(self) -> None:
        """Have the server run, and no client connected to it."""
        if not self.server.pids():
            self.server.start()
        self.settle()

    def settle(self) -> None:
        """Wait until the server has carried out what dead connections left."""
        (pid,) = self.server.pids()
        tasks = Path(f"/proc/{pid}/task")
        support.wait_until(
            lambda: not tasks.exists() or len(list(tasks.iterdir())) == 1,
            "the server to be rid of its clients",
            interval_s=0.002,
        )
        if not self.server.pids():  # it aborted over a client that went: see Secondary
            self.server.start()

    def differing(self) -> set[int]:
        """Return the regions in which the two images differ."""
        local = (self.case / "local.img").read_bytes()
        remote = (self.case / "dr.img").read_bytes()
        if local == remote:
            return set()
        return {
            region
            for region in ALL
            if local[region * REGION : (region + 1) * REGION]
            != remote[region * REGION : (region + 1) * REGION]
        }

    def maps(self) -> tuple[set[int], set[int], set[int]]:
        """Return what is dirty, unflushed and late."""
        with open_map(self.state / "dirty.dr") as maps:
            unflushed = {n for one in maps.unflushed for n in regions_of(one)}
            return set(regions_of(maps.dirty)), unflushed, set(regions_of(maps.late))

    def owed(self) -> set[int]:
        """Return what a start must find dirty, and no more, by the files."""
        if self.log_lost():
            return set(ALL)
        dirty, unflushed, _ = self.maps()
        if stopped_cleanly(self.state):
            return dirty
        exact = page_cache_lived(self.state)
        more = open_slots(self.state) if exact else active_regions(self.state)
        return dirty | unflushed | more

    def log_lost(self) -> bool:
        """Tell whether a log cannot be believed, so that nothing is known."""
        try:
            self.maps()
        except MirrorError:
            return True
        return not all((self.state / one).exists() for one in ("inflight", "activity"))

    def may_come_late(self, owed: set[int]) -> set[int]:
        """Return what a start must hold back: what may have been under way."""
        if self.log_lost():
            return owed
        if stopped_cleanly(self.state):
            return set()
        return open_slots(self.state) if page_cache_lived(self.state) else owed

    def recover_local_and_check(self) -> None:
        """Open what a crash left of a volume whose local disk had failed; mend it."""
        self.serve()
        child = self.open()
        self.connect()
        assert child.call("remote_status", DR).state is not RemoteState.FAILED
        self.check_content(child.call("read", 0, SIZE))
        self.bring_local_back()
        if child.call("remote_status", DR).state is not RemoteState.IN_SYNC:
            self.catch_up()
        child.call("flush")
        assert self.differing() == set(), "in sync, and yet not equal"
        self.check_content()

    def check_content(self, content: bytes = b"") -> None:
        """Fail unless local holds every answered byte, old or new where under way."""
        local = bytearray(content or (self.case / "local.img").read_bytes())
        start, end = self.new_at, self.new_at + len(self.new)
        for at in range(start, end, 512):
            old, new = self.old[at : at + 512], self.new[at - start :][:512]
            assert local[at : at + 512] in (old, new)
        local[start:end] = self.old[start:end]
        assert local == self.old, "an answered write was lost"

    def recover_and_check(self, allowed: set[int]) -> None:
        """
        Open what a crash left, and fail unless each rule holds, until in sync.

        Args:
            allowed: what may be dirty: what was so before, unflushed, or requested.
        """
        self.serve()
        self.check_content()
        owed = self.owed()
        assert owed <= allowed, f"too much is dirty: {sorted(owed - allowed)}"
        expect_late = self.may_come_late(owed)
        self.hold_ms = 10_000
        child = self.open()
        if child.call("remote_status", DR).state is RemoteState.FAILED:
            child.call("reset", DR)  # an operator's
        dirty, unflushed, late = self.maps()
        assert dirty == owed, f"dirty: {sorted(dirty)}, owed: {sorted(owed)}"
        assert not unflushed
        assert expect_late <= late, "what was under way may still arrive late"
        differing = self.differing()
        assert differing <= dirty, f"not dirty: {sorted(differing - dirty)}"
        assert child.call("remote_status", DR).state is not RemoteState.IN_SYNC
        self.connect()
        in_sync = child.call("remote_status", DR).state is RemoteState.IN_SYNC
        assert in_sync == (not dirty), "in sync with regions dirty, or not without"
        copied = 0 if in_sync else self.catch_up()
        assert copied == len(dirty) * REGION
        assert self.differing() == set(), "in sync, and yet not equal"
        self.check_content()

    def end(self) -> None:
        """Kill the child that is left."""
        if self.child is not None:
            self.child.kill()
            self.child = None
