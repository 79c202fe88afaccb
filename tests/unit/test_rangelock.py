# SPDX-License-Identifier: BSD-3-Clause
"""
The range lock against queues, one a byte.

A request for a range goes to the end of the queue of each of its bytes, and
holds it while it is at the head of all of them.  That is what first come, first
served means, said without counting blockers as the C code does.

The C code looks at the list only if its counters of blocks cannot tell. So the same
is played with bytes of several widths: many in a block, a block each, ranges too wide
to be counted, and two halves whose blocks share their counters.
"""

from __future__ import annotations

from dataclasses import dataclass
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

ffi, lib = cmodules.load("rangelock")

NR_BYTES = 48
HALF = NR_BYTES // 2
BLOCK = 4096
FOLD = BLOCK << 10  # blocks so far apart share the counters, in another order


@dataclass(frozen=True, slots=True)
class Layout:
    """What a byte of the model stands for: bytes, and where the second half begins."""

    unit: int
    second_half: int

    def offset(self, byte: int) -> int:
        """Return where the model's byte begins."""
        half, number = divmod(byte, HALF)
        return half * self.second_half + number * self.unit


LAYOUTS = [
    Layout(unit := (1 << 64) // NR_BYTES, HALF * unit),  # the last ends at 2^64 nearly
    Layout(512, FOLD),
    Layout(BLOCK, FOLD),
    Layout(5 * BLOCK + 1, FOLD),
    Layout(24 << 10, FOLD << 10),  # of 16 units and of 256 KiB: some are wide
]


def ranges() -> st.SearchStrategy[range]:
    """Return ranges of the model's bytes, most of them short, each in one half."""
    return st.integers(0, NR_BYTES - 1).flatmap(
        lambda first: st.integers(1, min(16, HALF - first % HALF)).map(
            lambda length: range(first, first + length)
        )
    )


class RangelockMachine(RuleBasedStateMachine):
    """Ranges come and go; after each step C and the queues hold the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rl: Any = ffi.new("struct rangelock *")
        self.queues: list[list[int]] = [[] for _ in range(NR_BYTES)]
        self.wanted: dict[int, range] = {}  # by ticket, in the order they came
        self.c_range: dict[int, Any] = {}
        self.held_before: set[int] = set()
        self.next_ticket = 0
        self.layout = LAYOUTS[0]

    @initialize(layout=st.sampled_from(LAYOUTS))
    def lay_out(self, layout: Layout) -> None:
        """Choose what the model's bytes stand for."""
        self.layout = layout

    def new_range(self, wanted: range) -> Any:
        """Make the C struct for a range of the model."""
        return ffi.new(
            "struct range *",
            {
                "offset": self.layout.offset(wanted.start),
                "length": len(wanted) * self.layout.unit,
            },
        )

    def enqueue(self, wanted: range, c_range: Any) -> int:
        """Put a range at the end of its bytes' queues."""
        ticket = self.next_ticket
        self.next_ticket += 1
        self.wanted[ticket], self.c_range[ticket] = wanted, c_range
        for byte in wanted:
            self.queues[byte].append(ticket)
        return ticket

    def holds(self, ticket: int) -> bool:
        """Say whether the ticket is at the head of all its queues."""
        return all(self.queues[byte][0] == ticket for byte in self.wanted[ticket])

    @rule(wanted=ranges())
    def add(self, wanted: range) -> None:
        """Ask for a range, and wait if need be."""
        c_range = self.new_range(wanted)
        held = lib.rangelock_add(self.rl, c_range)
        assert self.holds(self.enqueue(wanted, c_range)) == held

    @rule(wanted=ranges())
    def try_add(self, wanted: range) -> None:
        """Ask for a range only if it is free at once."""
        c_range = self.new_range(wanted)
        free = all(not self.queues[byte] for byte in wanted)
        assert free == lib.rangelock_try(self.rl, c_range)
        if free:
            self.enqueue(wanted, c_range)

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Release a held range, or give up waiting for one."""
        ticket = data.draw(st.sampled_from(sorted(self.wanted)))
        lib.rangelock_remove(self.rl, self.c_range.pop(ticket))
        for byte in self.wanted.pop(ticket):
            self.queues[byte].remove(ticket)
        self.held_before.discard(ticket)

    @invariant()
    def held_by_those_at_the_head(self) -> None:
        """Hold what the queues say, and never take a range away again."""
        held = {t for t, c_range in self.c_range.items() if c_range.blockers == 0}
        assert {ticket for ticket in self.wanted if self.holds(ticket)} == held
        assert self.held_before <= held
        self.held_before = held

    @invariant()
    def nothing_is_counted_of_those_who_left(self) -> None:
        """Keep no count once the list is empty: it would be walked for ever."""
        if not self.wanted:
            assert (self.rl.nr_wide, sum(self.rl.counts)) == (0, 0)

    @invariant()
    def nobody_overlapping_is_held_together(self) -> None:
        """Give every byte one holder at most."""
        held = [byte for ticket in self.held_before for byte in self.wanted[ticket]]
        assert len(set(held)) == len(held)

    @invariant()
    def list_is_in_order_of_arrival(self) -> None:
        """Keep every range in the list once, in the order they came."""
        listed, c_range = [], self.rl.first
        while c_range != ffi.NULL:
            listed.append(c_range)
            c_range = c_range.next
        assert list(self.c_range.values()) == listed


RangelockMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=50)
TestRangelockModel = RangelockMachine.TestCase
