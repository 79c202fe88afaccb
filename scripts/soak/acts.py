# SPDX-License-Identifier: BSD-3-Clause
"""
Acts of the soak's nemesis on links, starts and logs, and of operators.

Each act gets the nemesis and a secondary, and draws all its choices before it looks at
the site, so that the same seed gives the same acts. If an act promises more than the
checker judges, it checks that itself: see docs/testing.md.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .far import Far
from .load import ViolationError
from .plan import HOLD_S

if TYPE_CHECKING:
    from .nemesis import Nemesis

__all__ = ["ACTS", "starts_in_vain"]

Act = Callable[["Nemesis", Far], None]

KBIT = 1000 / 8
# Of links, bytes a second: 256 kbit/s to 1 Gbit/s. The slowest is used only if a whole
# buffer of a unix socket passes within the deadline, because it counts as one step.
SPEEDS = (256 * KBIT, 1e3 * KBIT, 4e3 * KBIT, 16e3 * KBIT, 128e3 * KBIT, 1e6 * KBIT)
STEP = 62 << 10  # bytes
NOTICED_S = 10.0  # a dead link without a client
STARTS = (
    *("open_loaded", "open_local_flushed", "open_recovered", "activity_set_write"),
    *("activity_set_sync", "log_header_write", "log_header_sync", "begin_set"),
    *("begin_slots", "begin_maps", "begin_superblock", "open_begun"),
)
FAILING_STARTS = (
    *("activity_set_write", "activity_set_sync", "log_header_write"),
    "log_header_sync",
)


# --- links ---------------------------------------------------------------


def slow_link(n: Nemesis, far: Far) -> None:
    """Slow the link down, and switch its speed: slow is not dead."""
    field, draw = n.field, n.draw
    fair = [one for one in SPEEDS if one * field.plan.deadline_s >= 2 * STEP]
    speeds = [draw.choice(fair) for _ in range(draw.randint(1, 3))]
    times = [draw.uniform(0.5, 3.0) for _ in speeds]
    # Only alone: data of an earlier connection would arrive later than a late write
    # may.
    if n.depth or far.link_broken or far.broken or not field.serving:
        return
    words = ", ".join(f"{speed / KBIT:.0f} kbit/s" for speed in speeds)
    n.say(f"slow the link to {far.name} down: {words}")
    far.link_broken += 1
    field.counts["slow links"] += 1
    before = _timed_out(field.site.log, far)
    log = field.site.log_path
    for speed, seconds in zip(speeds, times, strict=True):
        far.speed(f"{speed:.0f}", f"{speed:.0f}")
        field.rest(seconds)
    after = _timed_out(field.site.log, far)
    far.speed("-", "-")
    far.link_broken -= 1
    if after > before and log == field.site.log_path:
        raise ViolationError(
            f"{far.name}, slow and not dead, was given up:\n{field.tail()}"
        )
    n.hurry(far)


def _timed_out(log: str, far: Far) -> int:
    """Count the connections that were given up because no answer came in time."""
    return len(re.findall(rf"{far.name}: disconnect: .*not answered", log))


def deaf(n: Nemesis, far: Far) -> None:
    """Make the secondary's end read nothing more, and answer what it has."""
    field = n.field
    away = 2 * field.plan.deadline_s + HOLD_S + n.draw.uniform(2.0, 4.0)
    if far.link_broken or far.broken or not field.serving:
        return
    n.say(f"{far.name} reads nothing for {away:.1f} s")
    far.link_broken += 1
    field.counts["secondaries that read nothing"] += 1
    far.speed("0", "-")
    field.rest(away)
    longest = field.load.longest_wait()
    far.speed("-", "-")
    far.link_broken -= 1
    if longest > away and n.depth == 0:
        raise ViolationError(f"a client waits for {far.name} for {longest:.1f} s")
    n.hurry(far)


def early_answer(n: Nemesis, far: Far) -> None:
    """Make it answer a long write after its header, and read nothing more."""
    field = n.field
    away = 2 * field.plan.deadline_s + HOLD_S + n.draw.uniform(3.0, 5.0)
    if n.depth or far.link_broken or far.broken or not field.serving:
        return
    n.heal()
    n.say(f"{far.name} answers early for {away:.1f} s")
    far.link_broken += 1
    field.counts["secondaries that answer early"] += 1
    far.speed("early", "-")
    field.rest(away)
    longest = field.load.longest_wait()
    far.speed("-", "-")
    # The withheld part of the write must not count as executed.
    far.signal_link(signal.SIGKILL)
    far.start_link()
    far.link_broken -= 1
    if longest > away:
        raise ViolationError(f"a client waits for {far.name} for {longest:.1f} s")
    n.hurry(far)


def silent_and_idle(n: Nemesis, far: Far) -> None:
    """Silence the link while no client sends requests: it must be noticed."""
    field = n.field
    if n.depth or not field.serving:
        return
    n.heal()
    n.say(f"silence the link to {far.name}, and no client")
    field.load.pause(field.watch)
    far.link_broken += 1
    far.signal_link(signal.SIGSTOP)
    field.counts["silences without a client"] += 1
    try:
        _await_notice(n, far)
    finally:
        far.signal_link(signal.SIGCONT)
        far.link_broken -= 1
    field.load.go_on()
    n.hurry(far)


def _await_notice(n: Nemesis, far: Far) -> None:
    begun = time.monotonic()
    # One second more for a busy machine, and for the status.
    while (passed := time.monotonic() - begun) < NOTICED_S + 1.0:
        remote = n.field.remote(far)
        if remote and not (remote["state"] == "in_sync" and remote["connected"]):
            return
        if not n.field.site.alive:
            return  # watch() judges that
        n.field.rest(0.1)
    raise ViolationError(f"{far.name} is dead, and in sync for {passed:.1f} s")


# --- starts --------------------------------------------------------------


def starts_in_vain(draw: random.Random) -> list[str]:
    """Draw the ends of one to three starts in a row."""
    faults = []
    for _ in range(draw.randint(1, 3)):
        failing = draw.random() < 0.3
        point = draw.choice(FAILING_STARTS if failing else STARTS)
        faults.append(f"{point}={'error' if failing else 'kill'}")
    return faults


def interrupted_starts(n: Nemesis, _: Far) -> None:
    """Kill starts at their points, several in a row, or let them fail."""
    field, draw = n.field, n.draw
    clean, faults = draw.random() < 0.4, starts_in_vain(draw)
    if not field.serving:
        return
    n.say(f"{'stop' if clean else 'kill'} the primary, then {', '.join(faults)}")
    if clean:
        field.stop_primary()
    else:
        field.kill_primary()
    for fault in faults:
        field.start_in_vain(fault)
    field.serve()


# --- logs ----------------------------------------------------------------


@contextlib.contextmanager
def _reader(path: Path, lines: int) -> Iterator[None]:
    """Make a pipe that is read for so many lines; then its reader ends or stalls."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    ended, stalls = threading.Event(), lines % 2 == 0

    def read() -> None:
        with path.open("rb", buffering=0) as pipe:
            seen = 0
            while seen < lines and not ended.is_set():
                seen += pipe.read(64).count(b"\n")
            if stalls:
                ended.wait()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        ended.set()
        # Unblock a reader that still waits for a writer or for data.
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            with contextlib.suppress(OSError):
                os.write(fd, b"\n" * 64)
            reader.join(5)
            os.close(fd)
        path.unlink(missing_ok=True)


def broken_log(n: Nemesis, _: Far) -> None:
    """Serve with a log that fails: only the log is lost."""
    field, draw = n.field, n.draw
    full, lines = draw.random() < 0.4, draw.randint(1, 12)
    seconds = draw.uniform(0.5, 2.0)
    if n.depth or not field.serving:
        return
    pipe = field.site.folder / "log.pipe"
    output = Path("/dev/full") if full else pipe
    n.say(f"serve with a log {'on a full disk' if full else f'read for {lines} lines'}")
    field.counts["logs that fail"] += 1
    field.stop_primary()
    with contextlib.nullcontext() if full else _reader(pipe, lines):
        field.serve(output=output)
        n.pass_time(seconds)
        n.heal()
        field.stop_primary()
    field.serve()


# --- operators -----------------------------------------------------------


def operate(n: Nemesis, far: Far) -> None:
    """Let an operator act on remotes of different states, during faults."""
    field, draw = n.field, n.draw
    words = ("pause", "resume", "invalidate")
    acts = [(draw.choice(words), draw.choice(field.fars)) for _ in range(5)]
    gaps = [draw.uniform(0.0, 0.4) for _ in acts]
    kill_at = draw.randrange(len(acts))
    if not field.serving:
        return
    n.say(f"an operator acts while {far.name} is away")
    field.counts["operators amid faults"] += 1
    with n.secondary_dead(far):
        for number, ((word, one), gap) in enumerate(zip(acts, gaps, strict=True)):
            n.say(f"{word} {one.name}")
            field.tell(word, one)
            field.rest(gap)
            if number == kill_at and field.serving:
                n.restart()
    n.pass_time(draw.uniform(0.0, 0.5))
    for one in field.fars:
        field.tell("resume", one)


ACTS: list[tuple[int, Act]] = [
    (2, slow_link),
    (1, deaf),
    (1, early_answer),
    (1, silent_and_idle),
    (2, interrupted_starts),
    (1, broken_log),
    (1, operate),
]
