# SPDX-License-Identifier: BSD-3-Clause
"""
What the activity log's set must hold, in a few lines of Python.

It keeps which request holds what, what is durable, and in which order places are taken;
where a place is on disk it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EAGAIN, EINPROGRESS, EINVAL

__all__ = ["Entry", "Model"]


@dataclass
class Entry:
    """One extent of the set."""

    users: int = 0
    used: int = 0
    durable: bool = False
    staged: bool = False
    cooling: bool = False


class Model:
    """The set, least lately used first, and the spare places in their order."""

    def __init__(self, nr_entries: int, loaded: list[int]) -> None:
        self.set = {extent: Entry(durable=True) for extent in loaded}
        self.spare: list[int | None] = [None] * (nr_entries - len(loaded))

    def touch(self, extent: int) -> Entry:
        """Make an extent the latest used."""
        entry = self.set[extent] = self.set.pop(extent)
        return entry

    def hold(self, wanted: range) -> int:
        """Hold what is wanted; return what the log must say."""
        missing = [extent for extent in wanted if extent not in self.set]
        if len(wanted) > len(self.set) + len(self.spare):
            return -EINVAL
        if len(missing) > len(self.spare):
            return -EAGAIN
        for extent in [extent for extent in missing if extent in self.spare]:
            self.spare.remove(extent)
            self.set[extent] = Entry(durable=True)
        for extent in wanted:
            if extent not in self.set:
                self.spare.pop(0)
                self.set[extent] = Entry()
        entries = [self.touch(extent) for extent in wanted]
        for entry in entries:
            entry.users += 1
            entry.cooling = False
        return 0 if all(entry.durable for entry in entries) else -EINPROGRESS

    def release(self, held: range, now: int) -> None:
        """Give up one hold."""
        for extent in held:
            entry = self.touch(extent)
            entry.users -= 1
            entry.used = now

    def pick(self, most: int, before: int) -> int:
        """Pick what may go cold; return how many."""
        idle = [
            entry
            for entry in self.set.values()
            if entry.durable and entry.users == 0 and entry.used < before
        ][:most]
        for entry in self.set.values():
            entry.cooling = any(entry is other for other in idle)
        return len(idle)

    def drop(self) -> int:
        """Drop what was picked and not taken; return how many."""
        cold = [extent for extent, entry in self.set.items() if entry.cooling]
        for extent in cold:
            del self.set[extent]
        self.spare += cold
        return len(cold)

    def durable(self) -> set[int]:
        """Return the extents whose writes may start."""
        return {extent for extent, entry in self.set.items() if entry.durable}
