# SPDX-License-Identifier: BSD-3-Clause
"""
The kinds of request that fault points are looped over: scripts, and their files.

A script does what leads up to the request, marks, and makes the request. It is
deterministic as far as the points it passes go, or the loop could not find the same
ones again: so no keeper runs, and each step is a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import support
from e2e.lib.bench import DR, EXTENT, REGION, SIZE, Bench
from e2e.lib.engine_child import Died, EngineError
from e2e.lib.oracle import active_regions, lose_power, span

from nbd_mirror.rules.state import RemoteState
from nbd_mirror.volume import core

__all__ = ["KINDS", "MAKERS", "Case", "Kind", "make_clean"]

BEHIND = (0, 3 * REGION), (20 * REGION, 2 * REGION), (100 * REGION, REGION)


@dataclass
class Case:
    """One run of a script."""

    bench: Bench
    fault: str = ""
    count_dir: Path | None = None
    allowed: set[int] = field(default_factory=set)
    allowed_power: set[int] = field(default_factory=set)
    before: dict[str, int] = field(default_factory=dict)
    marked: bool = False
    local_failed: bool = False

    def open(self, hold_ms: int = 10_000) -> None:
        """Open the volume in a child with the fault."""
        self.bench.hold_ms = hold_ms
        self.bench.open(self.fault)

    def open_in_sync(self, hold_ms: int = 10_000) -> None:
        """Open it and connect the remote, which is in sync."""
        self.open(hold_ms)
        self.bench.connect()

    def mark(self, *ranges: tuple[int, int]) -> None:
        """Say that from here on points count; *ranges* may become dirty."""
        bench = self.bench
        self.allowed = bench.owed().union(*(span(*one) for one in ranges))
        touched = {n for one in ranges for n in span(*one, EXTENT)}
        extents = {n * EXTENT for n in touched}
        self.allowed_power = self.allowed.union(*(span(n, EXTENT) for n in extents))
        self.allowed_power |= active_regions(bench.state)
        self.before = self.counts()
        self.marked = True

    def counts(self) -> dict[str, int]:
        """Return how often each point was passed."""
        if self.count_dir is None:
            return {}
        return {
            path.stem: path.stat().st_size for path in self.count_dir.glob("*.reached")
        }


# --- the kinds ---------------------------------------------------------------

BEFORE = (8 * REGION, 4096)  # answered and not flushed when the request comes
ACROSS = (EXTENT - REGION - 1536, 2 * REGION + 3072)  # three regions, two extents
MIXED = (2 * REGION - 512, 2 * REGION)  # dirty, dirty, clean


def write(case: Case) -> None:
    """Write in sync, into a new extent too."""
    case.open_in_sync()
    case.bench.write(*BEFORE)
    case.mark(ACROSS)
    case.bench.write(*ACROSS)


def write_fua(case: Case) -> None:
    """Write with FUA."""
    case.open_in_sync()
    case.bench.write(*BEFORE)
    case.mark(ACROSS)
    case.bench.write(*ACROSS, fua=True)


def write_mixed(case: Case) -> None:
    """Write across dirty and clean regions, connected."""
    case.open_in_sync()
    case.mark(MIXED)
    case.bench.write(*MIXED)


def write_alone(case: Case) -> None:
    """Write as the first that an absent remote misses."""
    case.open(hold_ms=1)
    case.bench.wait_state(RemoteState.OUT_OF_SYNC)
    case.mark(ACROSS)
    case.bench.write(*ACROSS)


def trim(case: Case) -> None:
    """Trim, unaligned, across dirty and clean regions."""
    case.open_in_sync()
    case.mark(MIXED)
    case.bench.zero("trim", *MIXED)


def zero_fua(case: Case) -> None:
    """Zero with FUA, in sync."""
    case.open_in_sync()
    case.bench.write(*BEFORE)
    case.mark(ACROSS)
    case.bench.zero("zero", *ACROSS, core.FUA)


def flush(case: Case) -> None:
    """Flush what was answered."""
    case.open_in_sync()
    case.bench.write(*BEFORE)
    case.bench.write(*ACROSS)
    case.mark()
    assert case.bench.child
    case.bench.child.call("flush")


def lost(case: Case) -> None:
    """Lose the server for ever, with answers unflushed and a write under way."""
    bench = case.bench
    case.open_in_sync(hold_ms=50)
    child = bench.child
    assert child
    bench.write(*BEFORE)
    case.mark(ACROSS)
    # Frozen first: a write that begins after the hold is none of this remote's.
    bench.server.freeze()
    bench.new, bench.new_at = bytes([7]) * ACROSS[1], ACROSS[0]
    try:
        number = child.submit("pwrite", bench.new, bench.new_at)
        bench.wait(lambda: child.call("status").inflight, "the write to be under way")
    finally:
        bench.server.kill()
    child.result(number)
    bench.answered()


def sent_again(case: Case) -> None:
    """Lose the server and find it again within the hold; then catch up."""
    bench = case.bench
    case.open_in_sync()
    assert bench.child
    bench.write(*BEFORE)
    case.mark(ACROSS)
    bench.server.kill()
    bench.new, bench.new_at = bytes([7]) * ACROSS[1], ACROSS[0]
    number = bench.child.submit("pwrite", bench.new, bench.new_at)
    bench.wait_state(RemoteState.HOLDING)
    bench.server.start()
    bench.connect()
    bench.child.result(number)
    bench.answered()
    bench.catch_up()


def resync(case: Case) -> None:
    """Copy what is dirty: data and a hole."""
    case.open()
    case.mark()
    case.bench.connect()
    case.bench.catch_up()


def cool(case: Case) -> None:
    """Let every extent go cold."""
    case.open_in_sync()
    case.bench.write(*BEFORE)
    case.bench.write(*ACROSS)
    case.mark()
    assert case.bench.child
    case.bench.child.call("cool", 0.0)


def stop(case: Case) -> None:
    """Stop cleanly while resyncing, with answers unflushed."""
    case.open_in_sync()
    case.bench.write(*ACROSS)
    case.mark()
    assert case.bench.child
    case.bench.child.call("stop")


def start(case: Case) -> None:
    """Start, whatever the files are."""
    case.mark()
    case.open()


def create(case: Case) -> None:
    """Create anew over a volume."""
    case.mark((0, SIZE))
    bench = case.bench
    bench.child = bench.nursery.child(case.fault)
    bench.child.call("create", bench.params, force=True)


def invalidate(case: Case) -> None:
    """Make everything dirty."""
    case.open_in_sync()
    case.mark((0, SIZE))
    assert case.bench.child
    case.bench.child.call("invalidate", DR)


def fail_and_reset(case: Case) -> None:
    """Find it to be another disk; then an operator takes it back."""
    case.open_in_sync()
    case.bench.write(*BEFORE)
    case.mark()
    assert case.bench.child
    case.bench.child.call("fail", DR, "it is another disk")
    case.bench.child.call("reset", DR)


def local_fails(case: Case) -> None:
    """Write what local refuses: the remote takes its place."""
    case.open_in_sync()
    case.bench.write(*BEFORE)
    case.mark(ACROSS)
    case.bench.write(*ACROSS)


def takeover_lost(case: Case) -> None:
    """Lose the remote, too, before it is flushed to take local's place."""
    bench = case.bench
    gate = bench.folder / "gate"
    reached = bench.folder / "gate.reached"
    gate.unlink(missing_ok=True)
    reached.unlink(missing_ok=True)
    case.fault += f",takeover_marked=wait:{gate}"
    case.open_in_sync(hold_ms=50)
    child = bench.child
    assert child
    bench.write(*BEFORE)
    case.mark(ACROSS)
    bench.new, bench.new_at = bytes([7]) * ACROSS[1], ACROSS[0]
    number = child.submit("pwrite", bench.new, bench.new_at)
    support.wait_until(
        lambda: child.done(number) or reached.exists(), "the takeover to begin"
    )
    bench.server.kill()
    gate.touch()
    with pytest.raises(EngineError):
        child.result(number)


def local_back(case: Case) -> None:
    """Have the local disk back, and copy to it what it misses."""
    bench = case.bench
    case.open_in_sync()
    bench.write(*BEFORE)
    bench.write(*ACROSS)
    case.mark(ACROSS)
    bench.bring_local_back()


@dataclass(frozen=True)
class Kind:
    """
    A script, the files it begins with, and faults of its own.

    *local_failed*: the local disk may be missing something in the end.
    """

    script: Callable[[Case], None]
    files: str = "clean"
    extra: str = ""
    local_failed: bool = False


KINDS = {
    "write": Kind(write),
    "write fua": Kind(write_fua),
    "write across clean and dirty": Kind(write_mixed, "behind"),
    "write alone": Kind(write_alone),
    "trim across clean and dirty": Kind(trim, "behind"),
    "zero fua": Kind(zero_fua),
    "flush": Kind(flush),
    "remote lost": Kind(lost),
    "remote lost and back": Kind(sent_again),
    "resync": Kind(resync, "behind"),
    "cool": Kind(cool),
    "stop": Kind(stop, "behind"),
    "start after a kill": Kind(start, "killed"),
    "start after lost power": Kind(start, "power"),
    "start without logs": Kind(start, "no logs"),
    "start without a map": Kind(start, "no map"),
    "create": Kind(create, "behind"),
    "invalidate": Kind(invalidate),
    "fail and reset": Kind(fail_and_reset),
    "log not written": Kind(write, extra="activity_sync:2=error,"),
    "local fails": Kind(local_fails, extra="local_write:2=error,", local_failed=True),
    "local fails, and the remote": Kind(
        takeover_lost, extra="local_write:2=error,", local_failed=True
    ),
    "start after a killed takeover": Kind(start, "takeover", local_failed=True),
    "local is back": Kind(local_back, extra="local_write:2=error,", local_failed=True),
}


# --- the files a kind begins with --------------------------------------------


def make_clean(bench: Bench) -> None:
    """Create a volume with equal disks, and stop it."""
    for at in (0, EXTENT - 2 * REGION, 2 * EXTENT, SIZE - 3 * REGION):
        content = bytes([1 + at // REGION % 255]) * (3 * REGION)
        bench.old[at : at + len(content)] = content
    for name in ("local.img", "dr.img"):
        (bench.case / name).write_bytes(bench.old)
    (bench.case / "state").mkdir()
    bench.serve()
    child = bench.nursery.child()
    bench.assume = True
    child.call("create", bench.params)
    bench.assume = False
    child.kill()
    child = bench.open()
    bench.connect()
    child.call("stop")
    bench.end()


def make_behind(bench: Bench) -> None:
    """Let the remote miss some writes, one of them a trim of whole regions."""
    bench.hold_ms = 1
    child = bench.open()
    bench.wait_state(RemoteState.OUT_OF_SYNC)
    for at, length in BEHIND:
        bench.write(at, length)
    bench.zero("trim", EXTENT - 2 * REGION, 2 * REGION)
    child.call("stop")
    bench.end()


def make_killed(bench: Bench) -> None:
    """Kill it with a write under way."""
    bench.hold_ms = 10_000
    bench.open("after_issue:2=kill")
    bench.connect()
    bench.write(*BEFORE)
    with pytest.raises(Died):
        bench.write(*ACROSS)
    bench.end()


def make_power(bench: Bench) -> None:
    """Kill it so, and have the power gone."""
    make_killed(bench)
    lose_power(bench.state)


def make_takeover(bench: Bench) -> None:
    """Kill it while the remote is to take local's place."""
    bench.hold_ms = 10_000
    bench.open("local_write:2=error,takeover_marked=kill")
    bench.connect()
    bench.write(*BEFORE)
    with pytest.raises(Died):
        bench.write(*ACROSS)
    bench.end()


def make_no_logs(bench: Bench) -> None:
    """Kill it so, and have one log gone and the other garbled."""
    make_killed(bench)
    (bench.state / "inflight").unlink()
    garble(bench.state / "activity", 4096 + 100)


def make_no_map(bench: Bench) -> None:
    """Kill it so, and have the dirty map garbled."""
    make_killed(bench)
    garble(bench.state / "dirty.dr", 0)


def garble(path: Path, at: int) -> None:
    """Turn over the bits of a byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


MAKERS = {
    "clean": lambda _bench: None,
    "behind": make_behind,
    "killed": make_killed,
    "power": make_power,
    "takeover": make_takeover,
    "no logs": make_no_logs,
    "no map": make_no_map,
}
