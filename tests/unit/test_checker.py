# SPDX-License-Identifier: BSD-3-Clause
"""
The register checker against an oracle: it excuses and accuses exactly as it should.

A checker that is blind proves nothing, one that cries wolf is switched off. So small
random histories are judged twice, by it and by trying every order of the requests;
and long ones made by a register that works never bring a complaint.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scripts.soak.checker import Checker
from scripts.soak.register import BLOCK, KEPT, NEVER, TORN, ZERO, Op, decode, encode

RUN = 77
OLD = bytes(BLOCK)


def write(checker: Checker, *, fua: bool = False, outcome: str = "ok") -> bytes:
    """Write block 0 from begin to end; return its content."""
    op = checker.begin_write("write", 0, 1, fua=fua)
    assert not checker.end_write(op, outcome)
    return checker.content(op)


# --- the content of a block ---


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 50), st.integers(0, (1 << 63) - 1))
def test_content_names_its_write(block: int, seq: int, run: int) -> None:
    """A block identifies its write, its place and the run."""
    content = encode(block, seq, run)
    assert BLOCK == len(content)
    assert (block, seq, run) == decode(content)


@given(st.integers(1, BLOCK - 1), st.integers(1, 1000), st.integers(1, 1000))
def test_mixture_is_torn(cut: int, one: int, other: int) -> None:
    """The beginning of one write and the end of another are no block."""
    left, right = encode(5, one, RUN), encode(5, other, RUN)
    mixed = left[:cut] + right[cut:]
    assert mixed in (left, right) or decode(mixed)[1] == TORN


def test_zeroes_are_zero() -> None:
    """A block of zeroes is the value zero, one with a single bit is not."""
    assert ZERO == decode(OLD)[1]
    assert TORN == decode(OLD[:-1] + b"\1")[1]


def test_foreign_blocks_are_found() -> None:
    """A whole block of another place or run is no content of this one."""
    checker = Checker(2, RUN)
    op = checker.begin_write("write", 0, 2, fua=False)
    checker.end_write(op, "ok")
    first, second = encode(0, op.seq, RUN), encode(1, op.seq, RUN)
    assert not checker.judge(0, first + second, "disk")
    assert [0, 1] == [v.block for v in checker.judge(0, second + first, "disk")]
    (verdict,) = checker.judge(0, encode(0, op.seq, RUN + 1), "disk")
    assert "of run" in verdict.found


# --- the oracle: every order is tried ---


@dataclass
class Event:
    """One request of a history."""

    kind: str  # write or read
    value: int
    start: int
    end: int = NEVER
    surely: bool = True  # a write that was not answered may be left out


def linearizable(events: list[Event], held: int = ZERO) -> bool:
    """Tell whether some order of *events* explains every read."""
    if not any(one.surely for one in events):
        return True
    for i, one in enumerate(events):
        rest = events[:i] + events[i + 1 :]
        if any(other.end < one.start for other in rest if other.surely):
            continue  # that one ended before this one began
        if one.kind == "read" and one.value != held:
            continue
        # An event that may be left out and ended before this is left out for ever.
        left = [o for o in rest if o.end >= one.start]
        if linearizable(left, one.value if one.kind == "write" else held):
            return True
    return False


@dataclass
class Played:
    """A random history in the form of the checker, and in that of the oracle."""

    events: list[Event] = field(default_factory=list)
    complained: bool = False


def play(draw: random.Random, steps: int, *, zeroes: bool) -> Played:
    """Let clients do anything, and reads return anything that was ever sent."""
    checker, played, clock = Checker(1, RUN), Played(), 0
    writes: list[tuple[Op, Event]] = []
    reads: list[tuple[int, Event]] = []
    values = [ZERO]
    for clock in range(1, steps + 1):
        what = draw.choice(["write", "write", "read", "end", "end", "end", "crash"])
        if what == "write":
            kind = "zero" if zeroes and draw.random() < 0.4 else "write"
            op = checker.begin_write(kind, 0, 1, fua=draw.random() < 0.5)
            value = ZERO if kind == "zero" else op.seq
            event = Event("write", value, clock, surely=False)
            writes.append((op, event))
            played.events.append(event)
            values.append(value)
        elif what == "read":
            reads.append((checker.begin_read(), Event("read", ZERO, clock)))
        elif what == "crash":
            checker.server_ended("crash")
            for op, event in writes:
                checker.end_write(op, "lost")
                event.end = clock
            writes.clear()
        elif reads and (not writes or draw.random() < 0.6):
            begun, event = reads.pop(draw.randrange(len(reads)))
            event.value, event.end = draw.choice(values[-4:]), clock
            played.events.append(event)
            data = encode(0, event.value, RUN) if event.value else OLD
            if checker.end_read(begun, 0, data):
                played.complained = True
                return played
        elif writes:
            op, event = writes.pop(draw.randrange(len(writes)))
            event.end, event.surely = clock, draw.random() < 0.8
            checker.end_write(op, "ok" if event.surely else "error")
    return played


@settings(max_examples=1500)
@given(st.integers(0, 1 << 32), st.integers(4, 18))
def test_judges_as_the_oracle_does(seed: int, steps: int) -> None:
    """A history is complained of exactly if no order of its requests explains it."""
    played = play(random.Random(seed), steps, zeroes=False)
    assert played.complained == (not linearizable(played.events))


@settings(max_examples=800)
@given(st.integers(0, 1 << 32), st.integers(4, 18))
def test_complains_of_zeroes_with_reason(seed: int, steps: int) -> None:
    """Zeroes do not identify their write: fewer complaints, but no wrong one."""
    played = play(random.Random(seed), steps, zeroes=True)
    assert not (played.complained and linearizable(played.events))


# --- a register that works ---


@settings(max_examples=150)
@given(st.integers(0, 1 << 32))
@example(0)
def test_working_register_is_never_accused(seed: int) -> None:
    """Long histories with crashes, flushes and forgetting: never a complaint."""
    draw, checker = random.Random(seed), Checker(1, RUN)
    held, durable = OLD, OLD
    under_way: list[tuple[Op, bytes, bool]] = []  # whether it took effect
    reads: list[tuple[int, bytes | None]] = []
    for _ in range(400):
        what = draw.choice(["write", "effect", "effect", "end", "read", "see", "flush"])
        if draw.random() < 0.02:
            checker.server_ended("crash")
            for op, _, _ in under_way:
                checker.end_write(op, "lost")
            under_way.clear()
            assert not checker.judge(0, held, "disk")
            assert not checker.judge_copy(0, held, "copy")
            assert not checker.judge_lost(0, durable, "lost")
        elif what == "write" and len(under_way) < 4:
            kind = draw.choice(["write", "write", "zero"])
            op = checker.begin_write(kind, 0, 1, fua=False)
            content = checker.content(op) if kind == "write" else OLD
            under_way.append((op, content, False))
        elif what in ("effect", "end") and under_way:
            op, content, done = under_way.pop(draw.randrange(len(under_way)))
            if not done:
                held = content
            if what == "end":
                assert not checker.end_write(op, draw.choice(["ok", "ok", "error"]))
            else:
                under_way.append((op, content, True))
        elif what == "read" and len(reads) < 3:
            reads.append((checker.begin_read(), None))
        elif what == "see" and reads:
            begun, content_seen = reads.pop()
            if content_seen is None:
                reads.append((begun, held))
            else:
                assert not checker.end_read(begun, 0, content_seen)
        elif what == "flush":
            begun = checker.begin_flush()
            durable = held
            checker.end_flush(begun)
    assert checker.checked > 0


# --- rule by rule ---


def test_lost_write_is_found() -> None:
    """An answered write that is not there is found, with its history."""
    checker = Checker(1, RUN)
    old = write(checker)
    write(checker)
    checker.server_ended("the primary was killed")
    (verdict,) = checker.judge(0, old, "local disk")
    text = str(verdict)
    assert "found:   write 1" in text
    assert "allowed: write 3" in text
    assert "the primary was killed" in text
    assert "1 write of blocks 0-0, ok at 2" in text


@pytest.mark.parametrize("outcome", ["lost", "error"])
def test_unanswered_write_may_be_there_or_not(outcome: str) -> None:
    """Either is right, until one was seen: then it does not change any more."""
    for first, second in ((0, 1), (1, 0)):
        checker = Checker(1, RUN)
        contents = [write(checker), write(checker, outcome=outcome)]
        checker.server_ended("crash")
        assert not checker.judge(0, contents[first], "disk")
        assert not checker.judge(0, contents[first], "disk")
        assert checker.judge(0, contents[second], "disk")


def test_lost_write_may_come_while_its_server_lives() -> None:
    """A write whose connection is gone may come later, until its server is dead."""
    checker = Checker(1, RUN)
    lost = write(checker, outcome="lost")
    answered = write(checker)
    assert not checker.judge(0, answered, "read")
    assert not checker.judge(0, lost, "read")
    checker = Checker(1, RUN)
    lost = write(checker, outcome="lost")
    checker.server_ended("crash")
    write(checker)
    assert checker.judge(0, lost, "read")


def test_late_answer_of_a_dead_server_counts() -> None:
    """An answer that is taken after the death was given before it."""
    checker = Checker(1, RUN)
    op = checker.begin_write("write", 0, 1, fua=False)
    checker.server_ended("crash")
    assert not checker.end_write(op, "ok")
    assert checker.judge(0, OLD, "disk")
    checker = Checker(1, RUN)
    op = checker.begin_write("write", 0, 1, fua=False)
    checker.server_ended("crash")
    assert not checker.judge(0, OLD, "disk"), "the answer is not known yet"
    (verdict,) = checker.end_write(op, "ok")
    assert "earlier read" in verdict.where


def test_torn_only_beside_a_write() -> None:
    """A read may be torn beside a write, a quiet disk never."""
    checker = Checker(1, RUN)
    left, right = write(checker), write(checker)
    mixed = left[:2048] + right[2048:]
    assert checker.judge(0, mixed, "disk")
    begun = checker.begin_read()
    write(checker)
    assert not checker.end_read(begun, 0, mixed)
    assert 1 == checker.torn


def test_copy_holds_what_was_answered_and_binds_nobody() -> None:
    """An in-sync copy may have an unanswered write that local has not."""
    checker = Checker(1, RUN)
    first = write(checker)
    answered = write(checker)
    maybe = write(checker, outcome="lost")
    checker.server_ended("crash")
    assert checker.judge_copy(0, first, "dr")
    assert not checker.judge_copy(0, maybe, "dr")
    assert not checker.judge(0, answered, "local"), "no client saw the copy"
    assert not checker.judge_copy(0, maybe, "dr"), "nor is it bound by local"


def test_copy_may_miss_what_only_local_has() -> None:
    """An unanswered write that clients read from local need not be on the copy."""
    checker = Checker(1, RUN)
    answered = write(checker)
    maybe = write(checker, outcome="lost")
    assert not checker.judge(0, maybe, "read by a client")
    checker.server_ended("crash")
    assert not checker.judge_copy(0, answered, "dr")


def test_copy_has_what_an_earlier_crash_left() -> None:
    """What was unanswered two primaries ago was made equal since: local's part."""
    checker = Checker(1, RUN)
    answered = write(checker)
    maybe = write(checker, outcome="lost")
    checker.server_ended("crash")
    assert not checker.judge(0, answered, "local")
    checker.server_ended("crash")
    assert checker.judge_copy(0, maybe, "dr")
    assert not checker.judge_copy(0, answered, "dr")


@pytest.mark.parametrize("by", ["flush", "fua"])
def test_disk_that_lost_its_cache_has_what_was_flushed(by: str) -> None:
    """What was answered and not flushed may be gone, what was flushed may not."""
    checker = Checker(1, RUN)
    before = write(checker)
    durable = write(checker, fua=by == "fua")
    if by == "flush":
        checker.end_flush(checker.begin_flush())
    behind = checker.begin_flush()
    late = write(checker)
    checker.end_flush(behind)  # begun before that write was answered
    for content in (durable, late):
        assert not checker.judge_lost(0, content, "dr")
    assert checker.judge_lost(0, before, "dr")
    assert checker.judge_lost(0, OLD, "dr")
    mixed = durable[:2048] + late[2048:]
    assert checker.judge_lost(0, mixed, "dr"), "each of them was answered"
    write(checker, outcome="error")
    assert not checker.judge_lost(0, mixed, "dr")


def test_history_is_forgotten_but_not_its_lesson() -> None:
    """Memory stays bounded; what was overwritten long ago is still wrong."""
    checker = Checker(1, RUN)
    contents = [write(checker) for _ in range(50)]
    assert 51 == len(checker._registers[0].claims), "kept while it may come back"
    checker.end_flush(checker.begin_flush())
    for _ in range(2000):
        last = write(checker, fua=True)
    assert len(checker._registers[0].claims) <= KEPT + 1
    assert checker.judge(0, contents[25], "disk")
    assert checker.judge(0, OLD, "disk")
    assert not checker.judge(0, last, "disk")


def test_read_under_way_keeps_what_it_may_return() -> None:
    """A read that began before many writes may still return the first of them."""
    checker = Checker(1, RUN)
    first = write(checker, fua=True)
    begun = checker.begin_read()
    for _ in range(100):
        write(checker, fua=True)
    assert not checker.end_read(begun, 0, first)
    assert checker.judge(0, first, "disk")


def test_late_sight_of_a_forgotten_write_still_counts() -> None:
    """What a read saw beside the durable write that replaces it binds the others."""
    checker = Checker(1, RUN)
    for _ in range(KEPT):
        write(checker)
    unanswered = checker.begin_write("write", 0, 1, fua=False)
    long = checker.begin_read()
    seen = write(checker)
    replacing = checker.begin_write("write", 0, 1, fua=True)
    assert not checker.end_read(long, 0, checker.content(unanswered))
    assert not checker.judge(0, seen, "read")
    checker.end_write(replacing, "ok")
    assert checker.judge(0, checker.content(unanswered), "read")
