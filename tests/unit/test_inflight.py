# SPDX-License-Identifier: BSD-3-Clause
"""
The in-flight log against a dict of open slots.

A process that is killed leaves the mapping as it is, so closing and opening
again without a clean stop is what a start after SIGKILL sees: exactly the open
slots.  A file that something garbled may be refused, never believed to hold
fewer slots than were open.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from errno import EAGAIN, EBUSY, EUCLEAN
from pathlib import Path
from typing import Any, NamedTuple

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

ffi, lib = cmodules.load("inflight")

UUID = b"a volume's uuid."
SIZE = 1 << 50
PAGE = 4096
SLOT = 64


class Slot(NamedTuple):
    """What an open slot says."""

    sequence: int
    offset: int
    length: int
    kind: int
    flags: int


class Log:
    """The C log in a folder."""

    def __init__(self, folder: Path, nr_slots: int) -> None:
        self.nr_slots = nr_slots
        self.dirfd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.c: Any = ffi.new("struct inflight *")

    def create(self, session: int) -> None:
        """Make the file."""
        assert lib.inflight_create(self.dirfd, UUID, session, self.nr_slots) == 0

    def open(self, session: int) -> tuple[int, bool]:
        """Open the file; return the result, and whether it was clean."""
        clean = ffi.new("bool *")
        r = lib.inflight_open(self.c, self.dirfd, UUID, session, self.nr_slots, clean)
        return r, bool(clean[0])

    def replay(self) -> tuple[int, list[Slot]]:
        """Replay; return the result and what was shown."""
        shown = []

        def show(_opaque: Any, view: Any) -> None:
            shown.append(
                Slot(view.sequence, view.offset, view.length, view.kind, view.flags)
            )

        # Held for as long as C may call it.
        visit = ffi.callback("void(void *, const struct slot_view *)", show)
        return lib.inflight_replay(self.c, SIZE, visit, ffi.NULL), shown

    def close(self) -> None:
        """Close the file and the folder."""
        lib.inflight_close(self.c)
        os.close(self.dirfd)


class InflightMachine(RuleBasedStateMachine):
    """Requests come and go, the process dies, the volume is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="nbdm-inflight-"))
        self.opened: dict[int, Slot] = {}  # by index
        self.sequence = self.next = 0
        self.session = 1
        self.log: Log | None = None

    @initialize(nr_slots=st.one_of(st.integers(1, 9), st.just(70)))
    def make(self, nr_slots: int) -> None:
        """Begin with an empty log; 70 slots take more than a page."""
        self.log = Log(self.folder, nr_slots)
        self.log.create(self.session)
        self.start(clean=True)

    def teardown(self) -> None:
        """Remove the folder."""
        if self.log:
            self.log.close()
        shutil.rmtree(self.folder)

    @property
    def c_log(self) -> Log:
        """The log, once made."""
        assert self.log
        return self.log

    def start(self, *, clean: bool) -> None:
        """Open the log as the next session."""
        assert (0, clean) == self.c_log.open(self.session)
        self.session += 1
        assert lib.inflight_begin(self.c_log.c, self.session) == 0
        self.next = 0

    def first_free(self) -> int:
        """Return the slot the next request must get."""
        count = self.c_log.nr_slots
        places = [(self.next + i) % count for i in range(count)]
        return next(place for place in places if place not in self.opened)

    @rule(
        offset=st.one_of(st.integers(0, 2**20), st.integers(0, SIZE - 1)),
        length=st.one_of(st.integers(1, 2**25), st.just(SIZE)),
        kind=st.integers(1, 3),
        flags=st.integers(0, 255),
    )
    def reserve(self, offset: int, length: int, kind: int, flags: int) -> None:
        """Log a request, unless every slot is open."""
        length = min(length, SIZE - offset)
        got = lib.inflight_reserve(self.c_log.c, offset, length, kind, flags)
        if len(self.opened) == self.c_log.nr_slots:
            assert got == -EAGAIN
            return
        assert self.first_free() == got
        self.sequence += 1
        self.opened[got] = Slot(self.sequence, offset, length, kind, flags)
        self.next = (got + 1) % self.c_log.nr_slots

    @precondition(lambda self: self.opened)
    @rule(data=st.data(), legs=st.integers(0, 511))
    def note(self, data: st.DataObject, legs: int) -> None:
        """Note what legs were sent and answered."""
        slot = data.draw(st.sampled_from(sorted(self.opened)))
        lib.inflight_issued(self.c_log.c, slot, legs)
        lib.inflight_done(self.c_log.c, slot, legs)

    @precondition(lambda self: self.opened)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        """Free a slot."""
        slot = data.draw(st.sampled_from(sorted(self.opened)))
        lib.inflight_retire(self.c_log.c, slot)
        del self.opened[slot]

    @rule(replay=st.booleans())
    def process_killed(self, replay: bool) -> None:
        """Start again without a clean stop; perhaps be killed before the replay."""
        lib.inflight_close(self.c_log.c)
        self.start(clean=False)
        if replay:
            expected = [self.opened[slot] for slot in sorted(self.opened)]
            assert (0, expected) == self.c_log.replay()
            assert (0, []) == self.c_log.replay()
            self.opened = {}

    @rule()
    def stop(self) -> None:
        """Stop cleanly, which needs every slot free, and start again."""
        if self.opened:
            assert -EBUSY == lib.inflight_finish(self.c_log.c)
            return
        assert lib.inflight_finish(self.c_log.c) == 0
        lib.inflight_close(self.c_log.c)
        self.start(clean=True)

    @rule(data=st.data(), change=st.integers(1, 255))
    def garbled_copy(self, data: st.DataObject, change: int) -> None:
        """Never show fewer slots than were open, whichever byte is garbled."""
        content = bytearray((self.folder / "inflight").read_bytes())
        slots = range(PAGE, PAGE + SLOT * self.c_log.nr_slots)
        where = data.draw(
            st.one_of(
                st.sampled_from(slots),
                st.sampled_from(range(len(content))),
                st.sampled_from(sorted(self.opened) or [0]).flatmap(
                    lambda slot: st.sampled_from(slots[slot * SLOT :][:40])
                ),
            )
        )
        content[where] ^= change
        with tempfile.TemporaryDirectory(prefix="nbdm-garbled-") as name:
            (Path(name) / "inflight").write_bytes(content)
            copy = Log(Path(name), self.c_log.nr_slots)
            r, _ = copy.open(self.session)
            if r == 0:
                r, shown = copy.replay()
                assert r == 0 or not shown
                assert r < 0 or set(self.opened.values()) <= set(shown)
            assert r in (0, -EUCLEAN)
            copy.close()

    @invariant()
    def counts_are_right(self) -> None:
        """Know how many slots are open, and the last sequence."""
        if self.log:
            assert len(self.opened) == self.log.c.nr_open
            assert self.sequence == self.log.c.sequence


InflightMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestInflightModel = InflightMachine.TestCase
