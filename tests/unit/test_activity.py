# SPDX-License-Identifier: BSD-3-Clause
"""
The activity log against a model of the set, and against lost power.

Lost power leaves the file as it was, in the middle of a write with any of its
sectors on disk and the others not: every extent the log called durable must be
found in it.  A sector cut in its middle must be refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from errno import EAGAIN, EBUSY, EINPROGRESS, EUCLEAN
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from unit import cmodules
from unit.activity_model import Model

ffi, lib = cmodules.load("activity")

UUID = b"a volume's uuid."
PAGE, SECTOR = 4096, 512
EXTENT_SIZE = 1 << 22


class Log:
    """The C log in a folder."""

    def __init__(self, folder: Path, nr_entries: int, nr_extents: int) -> None:
        self.nr_entries, self.nr_extents = nr_entries, nr_extents
        self.dirfd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.c: Any = ffi.new("struct activity *")

    def create(self, session: int) -> None:
        """Make the file."""
        r = lib.activity_create(self.dirfd, UUID, session, self.nr_entries, EXTENT_SIZE)
        assert r == 0

    def open(self, session: int) -> tuple[int, bool]:
        """Open the file; return the result, and whether it was clean."""
        clean = ffi.new("bool *")
        r = lib.activity_open(
            self.c,
            self.dirfd,
            UUID,
            session,
            self.nr_entries,
            EXTENT_SIZE,
            self.nr_extents,
            clean,
        )
        return r, bool(clean[0])

    def list(self) -> list[int]:
        """Return the set, latest used first."""
        extents = ffi.new("uint64_t[]", self.nr_entries)
        count = lib.activity_list(self.c, extents, self.nr_entries)
        assert count == lib.activity_count(self.c)
        return list(extents[0:count])

    def close(self) -> None:
        """Close the file and the folder."""
        lib.activity_close(self.c)
        os.close(self.dirfd)


class ActivityMachine(RuleBasedStateMachine):
    """Requests hold and release extents; the log is written, cools, is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="nbdm-activity-"))
        self.log: Log | None = None
        self.model = Model(0, [])
        self.holds: list[range] = []
        self.batch: Any = None
        self.batch_on_disk = False
        self.session = 1
        self.now = 1

    @initialize(
        nr_entries=st.one_of(st.integers(1, 8), st.sampled_from([62, 63, 65, 130])),
        more=st.integers(1, 8),
    )
    def make(self, nr_entries: int, more: int) -> None:
        """Begin with an empty set, smaller than the volume."""
        self.log = Log(self.folder, nr_entries, nr_entries + more)
        self.log.create(self.session)
        self.start(clean=True)

    def teardown(self) -> None:
        """Remove the folder."""
        self.forget_batch()
        if self.log:
            self.log.close()
        shutil.rmtree(self.folder)

    @property
    def c_log(self) -> Log:
        """The log, once made."""
        assert self.log
        return self.log

    def start(self, *, clean: bool) -> None:
        """Open the log as the next session, with what stands in the file."""
        assert (0, clean) == self.c_log.open(self.session)
        self.session += 1
        assert lib.activity_begin(self.c_log.c, self.session) == 0
        # The first in the file count as the longest unused.
        self.model = Model(self.c_log.nr_entries, self.c_log.list()[::-1])
        self.holds = []

    def forget_batch(self) -> None:
        """Free the batch, as the end of the process does."""
        if self.batch is not None:
            lib.activity_discard(self.batch)
        self.batch, self.batch_on_disk = None, False

    def draw_range(self, data: st.DataObject) -> range:
        """Draw a range, mostly short, now and then too wide."""
        last = self.c_log.nr_extents - 1
        first = data.draw(st.integers(0, last))
        width = data.draw(
            st.sampled_from([1, 1, 2, 3, self.c_log.nr_entries // 2 + 1, last + 1])
        )
        return range(first, min(first + width, last + 1))

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """Hold a range of extents."""
        self.hold_range(self.draw_range(data))

    def hold_range(self, wanted: range) -> int:
        """Hold a range; return what the log said."""
        got: int = lib.activity_hold(self.c_log.c, wanted[0], wanted[-1])
        assert self.model.hold(wanted) == got
        if got in (0, -EINPROGRESS):
            self.holds.append(wanted)
        return got

    @rule(data=st.data(), count=st.integers(1, 10))
    def use(self, data: st.DataObject, count: int) -> None:
        """Serve requests one after another, as the engine does."""
        for _ in range(count):
            wanted = self.draw_range(data)
            got = self.hold_range(wanted)
            if got == -EAGAIN:
                self.cool(len(wanted))
                got = self.hold_range(wanted)
            if got == -EINPROGRESS and self.batch is None:
                self.write_changes()
            if got in (0, -EINPROGRESS):
                self.release_nth(-1)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Release one hold."""
        self.release_nth(data.draw(st.integers(0, len(self.holds) - 1)))

    @rule()
    def release_all(self) -> None:
        """Release every hold, as when the clients are idle."""
        while self.holds:
            self.release_nth(0)

    def release_nth(self, nth: int) -> None:
        """Release one hold."""
        held = self.holds.pop(nth)
        self.now += 1
        self.model.release(held, self.now)
        lib.activity_release(self.c_log.c, held[0], held[-1], self.now)

    @precondition(lambda self: self.batch is None)
    @rule()
    def stage(self) -> None:
        """Copy the changed sectors for a write."""
        pending = [e for e in self.model.set.values() if not e.durable]
        batch = ffi.new("struct activity_batch *")
        got = lib.activity_stage(self.c_log.c, batch)
        assert got in (0, 1)
        assert got == 1 or not pending
        if got == 1:
            self.batch = batch
            for entry in pending:
                entry.staged = True

    @precondition(lambda self: self.batch is not None and not self.batch_on_disk)
    @rule()
    def write(self) -> None:
        """Write them."""
        assert lib.activity_write(self.c_log.c, self.batch) == 0
        self.batch_on_disk = True

    @precondition(lambda self: self.batch_on_disk)
    @rule()
    def written(self) -> None:
        """Let the requests that waited for the write go on."""
        lib.activity_written(self.c_log.c, self.batch)
        self.batch, self.batch_on_disk = None, False
        for entry in self.model.set.values():
            entry.durable = entry.durable or entry.staged
            entry.staged = False

    @precondition(lambda self: self.batch is None)
    @rule(data=st.data())
    def newcomer_while_writing(self, data: st.DataObject) -> None:
        """Do all of a write; another request comes while it is under way."""
        self.stage()
        self.hold(data)
        self.finish_write()

    def write_changes(self) -> None:
        """Do all of a write."""
        self.stage()
        self.finish_write()

    def finish_write(self) -> None:
        """Write what was staged, if anything was."""
        if self.batch is not None:
            self.write()
            self.written()

    @rule(most=st.integers(0, 140), back=st.integers(-1, 3))
    def pick(self, most: int, back: int) -> None:
        """Pick extents to go cold; the flush comes after it."""
        before = max(self.now - back, 0)
        expected = self.model.pick(most, before)
        assert expected == lib.activity_pick(self.c_log.c, most, before)

    @rule()
    def drop(self) -> None:
        """Drop those that no request has taken since; the flush has succeeded."""
        assert self.model.drop() == lib.activity_drop(self.c_log.c)

    @rule(most=st.integers(1, 140))
    def cool(self, most: int) -> None:
        """Let idle extents go cold; no request comes in between."""
        self.pick(most, -1)
        self.drop()

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        """Stop cleanly or lose power, and start again."""
        if clean and self.batch is None:
            self.stop()
        else:
            self.lose_power()

    def stop(self) -> None:
        """Stop cleanly, which needs every extent free, and start again."""
        if self.holds:
            assert -EBUSY == lib.activity_finish(self.c_log.c)
            return
        assert lib.activity_finish(self.c_log.c) == 0
        assert self.c_log.list() == []
        lib.activity_close(self.c_log.c)
        self.start(clean=True)
        assert self.c_log.list() == []

    def lose_power(self) -> None:
        """Find every durable extent in the file, and go on from there."""
        durable = self.model.durable()
        self.forget_batch()
        lib.activity_close(self.c_log.c)
        self.start(clean=False)
        assert durable <= set(self.model.set)

    def load_copy(self, content: bytes) -> tuple[int, list[int]]:
        """Open *content* as the file; return the result and the set in it."""
        with tempfile.TemporaryDirectory(prefix="nbdm-lost-") as name:
            (Path(name) / "activity").write_bytes(content)
            copy = Log(Path(name), self.c_log.nr_entries, self.c_log.nr_extents)
            r, clean = copy.open(self.session)
            found = [] if r < 0 else copy.list()
            assert r < 0 or not clean
            copy.close()
            return r, found

    def sectors_under_way(self) -> list[tuple[int, bytes]]:
        """Return where the batch's sectors go in the file, and what they are."""
        return [
            (
                PAGE + SECTOR * self.batch.index[i],
                bytes(ffi.buffer(self.batch.sectors + i, SECTOR)),
            )
            for i in range(self.batch.count)
        ]

    @precondition(lambda self: self.batch is not None and not self.batch_on_disk)
    @rule(data=st.data())
    def power_lost_in_write(self, data: st.DataObject) -> None:
        """Find every durable extent, whichever sectors reached the disk."""
        content = bytearray((self.folder / "activity").read_bytes())
        for offset, sector in self.sectors_under_way():
            if data.draw(st.booleans()):
                content[offset : offset + SECTOR] = sector
        r, found = self.load_copy(bytes(content))
        assert r == 0
        assert self.model.durable() <= set(found)

    @precondition(lambda self: self.batch is not None and not self.batch_on_disk)
    @rule(data=st.data(), cut=st.integers(1, SECTOR - 1))
    def sector_torn(self, data: st.DataObject, cut: int) -> None:
        """Refuse the file when a sector is half the old and half the new one."""
        content = bytearray((self.folder / "activity").read_bytes())
        offset, new = data.draw(st.sampled_from(self.sectors_under_way()))
        old = bytes(content[offset : offset + SECTOR])
        content[offset : offset + cut] = new[:cut]
        torn = content[offset : offset + SECTOR] not in (old, new)
        r, _ = self.load_copy(bytes(content))
        assert (-EUCLEAN if torn else 0) == r

    @invariant()
    def same_set(self) -> None:
        """Hold the same extents in the same order, durable or not."""
        if self.log is None:
            return
        assert list(self.model.set)[::-1] == self.log.list()
        durable = {
            extent
            for extent in range(self.log.nr_extents)
            if lib.activity_durable(self.log.c, extent, extent)
        }
        assert self.model.durable() == durable


ActivityMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=60)
TestActivityModel = ActivityMachine.TestCase
