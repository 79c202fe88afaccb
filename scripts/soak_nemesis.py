# SPDX-License-Identifier: BSD-3-Clause
"""
The nemesis: breaks a site in every way there is a signal or a command for.

An act breaks one thing, lets time pass, and mends it; while it is broken another act
may begin, so that faults overlap. Every choice comes from the episode's seed alone
and none depends on what the site does: the same seed gives the same acts in the same
order. The machine decides only how far the clients have come by then.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from soak_far import Far
from soak_site import DEADLINE_S, HOLD_S, Field

__all__ = ["Nemesis"]

DEEPEST = 2  # faults within one another


class Nemesis:
    """The acts of one episode on *field*."""

    def __init__(self, field: Field, told: Callable[[str], None]) -> None:
        self._field = field
        self._random = field.plan.random
        self._told = told
        self._depth = 0
        self._acts: list[tuple[int, Callable[[Far], None]]] = [
            (4, self._kill_primary),
            (3, self._fail_over),
            (2, self._stop_primary),
            (4, self._kill_secondary),
            (3, self._freeze_secondary),
            (3, self._cut),
            (2, self._silence),
            (2, self._pause),
            (1, self._invalidate),
            (1, self._switch_policy),
            (2, self._kill_both),
            (1, self._flap),
            (3, self._fail_local),
        ]

    def play(self) -> None:
        """Run the episode's acts, then see to it that all is well again."""
        field = self._field
        for _ in range(field.plan.acts):
            field.rest(self._random.uniform(0.1, 0.9))
            self._act()
            if self._random.random() < 0.2:
                self._settle("amid the acts")
        self._settle("at the end")

    def _act(self) -> None:
        weights = [weight for weight, _ in self._acts]
        ((_, act),) = self._random.choices(self._acts, weights)
        act(self._random.choice(self._field.fars))

    def _settle(self, when: str) -> None:
        self._say(f"heal, in sync, compare {when}")
        for far in self._field.fars:
            self._field.tell("resume", far)
        # With the clients going on first: in sync must be reached under load too.
        if self._random.random() < 0.5:
            self._field.wait_in_sync()
        self._field.settle()

    def _say(self, text: str) -> None:
        self._field.checker.note(text)
        self._told(text)

    def _pass(self, seconds: float) -> None:
        """Let time pass while something is broken, perhaps breaking more."""
        self._depth += 1
        first = self._random.uniform(0.0, seconds)
        more = self._random.random() < 0.35 and self._depth < DEEPEST
        self._field.rest(first)
        if more:
            self._act()
        self._field.rest(seconds - first)
        self._depth -= 1

    def _around(self, limit_s: float) -> float:
        """Draw a duration that is clearly less than the limit, or more."""
        draw = self._random
        if draw.random() < 0.5:
            return limit_s * draw.uniform(0.1, 0.6)
        return limit_s * draw.uniform(1.3, 2.5)

    # --- acts ---

    def _kill_primary(self, _: Far) -> None:
        field, away = self._field, self._random.uniform(0.0, 0.5)
        if not field.serving:  # an act around this one has stopped it
            return
        self._say("kill the primary")
        field.kill_primary()
        self._pass(away)
        field.serve()

    def _fail_over(self, far: Far) -> None:
        field, moment = self._field, self._random.uniform(0.0, 0.2)
        if not field.serving:
            return
        if self._depth == 0:  # nothing is broken: under load it gets in sync
            for one in field.fars:
                field.tell("resume", one)
            field.wait_in_sync()
            field.rest(moment)
        self._say(f"kill the primary under load, fail over to {far.name}")
        field.kill_primary()
        field.fail_over(far)
        field.serve()

    def _stop_primary(self, _: Far) -> None:
        away = self._random.uniform(0.0, 0.5)
        if not self._field.serving:
            return
        self._say("stop the primary")
        self._field.stop_primary()
        self._pass(away)
        self._field.serve()

    @contextlib.contextmanager
    def _secondary_dead(self, far: Far) -> Iterator[None]:
        field = self._field
        far.broken += 1
        if far.broken == 1:
            far.kill()
            field.counts["kills of a secondary"] += 1
            if far.volatile:
                field.counts["caches lost"] += 1
        yield
        far.broken -= 1
        if not far.broken:
            far.start()

    def _kill_secondary(self, far: Far) -> None:
        away = self._around(HOLD_S)
        self._say(f"kill {far.name} for {away:.2f} s")
        with self._secondary_dead(far):
            self._pass(away)
        self._hurry(far)

    def _kill_both(self, far: Far) -> None:
        field, draw = self._field, self._random
        first, second = draw.uniform(0, 0.3), draw.uniform(0, 0.6)
        primary_back_first = draw.random() < 0.5
        if not field.serving:
            return
        self._say(f"kill the primary and {far.name}")
        field.kill_primary()
        with self._secondary_dead(far):
            field.rest(first)
            if primary_back_first:
                field.serve()
                field.rest(second)
        if not primary_back_first:
            field.serve()
        self._hurry(far)

    def _freeze_secondary(self, far: Far) -> None:
        away = self._around(DEADLINE_S)
        if far.broken:
            return
        self._say(f"freeze {far.name} for {away:.2f} s")
        far.signal(signal.SIGSTOP)
        self._field.counts["freezes"] += 1
        self._pass(away)
        far.signal(signal.SIGCONT)
        self._hurry(far)

    def _cut(self, far: Far) -> None:
        away = self._around(HOLD_S)
        if far.link_broken:
            return
        self._say(f"cut the link to {far.name} for {away:.2f} s")
        far.link_broken += 1
        far.signal_link(signal.SIGKILL)
        self._field.counts["cuts"] += 1
        self._pass(away)
        far.start_link()
        far.link_broken -= 1
        self._hurry(far)

    def _silence(self, far: Far) -> None:
        away = self._around(DEADLINE_S)
        if far.link_broken:
            return
        self._say(f"silence the link to {far.name} for {away:.2f} s")
        far.link_broken += 1
        far.signal_link(signal.SIGSTOP)
        self._field.counts["silences"] += 1
        self._pass(away)
        far.signal_link(signal.SIGCONT)
        far.link_broken -= 1
        self._hurry(far)

    def _flap(self, far: Far) -> None:
        times = self._random.randint(3, 6)
        gaps = [self._random.uniform(0.05, 0.4) for _ in range(times)]
        if far.link_broken:
            return
        self._say(f"cut the link to {far.name} {times} times")
        for gap in gaps:
            far.signal_link(signal.SIGKILL)
            self._field.counts["cuts"] += 1
            far.start_link()
            self._field.rest(gap)
        self._hurry(far)

    def _pause(self, far: Far) -> None:
        away = self._random.uniform(0.1, 1.0)
        self._say(f"pause {far.name}")
        self._field.tell("pause", far)
        self._field.counts["pauses"] += 1
        self._pass(away)
        self._field.tell("resume", far)

    def _invalidate(self, far: Far) -> None:
        self._say(f"invalidate {far.name}")
        self._field.tell("invalidate", far)
        self._field.counts["invalidates"] += 1

    def _switch_policy(self, _: Far) -> None:
        policy = self._random.choice(("degrade", "stop"))
        self._say(f"policy {policy}")
        self._field.switch_policy(policy)

    def _fail_local(self, far: Far) -> None:
        """
        Let the local disk fail, and the secondaries take its place.

        Alone, and never beside a link that holds bytes back: a secondary that is the
        only source has nobody to repair what it is sent late.
        """
        field, draw = self._field, self._random
        point = draw.choice(("local_write", "local_write", "local_flush", "local_read"))
        fault = f"{point}:{draw.randint(3, 60)}=error"
        away, gap = draw.uniform(0.1, 1.0), self._around(HOLD_S)
        meanwhile = draw.choice(("", "kill the primary", f"kill {far.name}"))
        replaced, in_the_middle = draw.random() < 0.4, draw.random() < 0.4
        if self._depth or not field.serving:
            return
        self._say(f"{fault}, and {meanwhile or 'nothing else'}")
        for one in field.fars:
            field.tell("resume", one)
        field.wait_in_sync()
        field.kill_primary()
        field.serve(fault)
        field.switch_policy("degrade")
        field.rest(away)
        if field.local_state() == "failed":
            field.counts["local disks failed"] += 1
        armed = True  # the fault may be still to come, until the next start
        if meanwhile == "kill the primary":
            self._restart()
            armed = False
        elif meanwhile:
            with self._secondary_dead(far):
                field.rest(gap)
        for one in field.fars:
            field.tell("resume", one)
        if in_the_middle:
            field.tell_local(replaced=replaced)
            self._restart()
            armed = False
        field.bring_local_back(replaced=replaced)
        if armed:
            self._restart()
            field.bring_local_back(replaced=replaced)

    def _restart(self) -> None:
        self._field.kill_primary()
        self._field.serve()

    def _hurry(self, far: Far) -> None:
        """Mostly have it connected at once: the back-off alone would take the time."""
        if self._random.random() < 0.7:
            self._field.tell("resume", far)
