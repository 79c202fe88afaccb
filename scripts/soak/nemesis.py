# SPDX-License-Identifier: BSD-3-Clause
"""
The nemesis: breaks a site with every signal and command that there is.

An act breaks one thing, lets time pass, and repairs it. While it is broken another act
may begin, so that faults overlap. Every choice comes from the episode's seed alone and
none depends on what the site does: the same seed gives the same acts in the same order.
The machine only decides how far the clients are by then.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator, Sequence

from .acts import ACTS, starts_in_vain
from .acts_local import LOCAL_ACTS
from .far import Far
from .field import Field
from .plan import HOLD_S

__all__ = ["Nemesis"]

DEEPEST = 2  # faults inside one another


def _name(act: Callable[..., None]) -> str:
    """Return an act's name for the option --acts."""
    function = act.func if isinstance(act, functools.partial) else act
    return str(function.__name__).lstrip("_")


class Nemesis:
    """
    The acts of one episode on *field*.

    Attributes, for acts that are elsewhere: *field*; *draw*, of all choices; *depth*,
    how many faults there are around the act.
    """

    def __init__(
        self, field: Field, told: Callable[[str], None], acts: list[str] | None = None
    ) -> None:
        self.field = field
        self.draw = field.plan.random
        self._told = told
        self.depth = 0
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
            *(
                (weight, functools.partial(act, self))
                for weight, act in (*ACTS, *LOCAL_ACTS)
            ),
        ]
        if acts:
            chosen = [act for _, act in self._acts if _name(act) in acts]
            self._acts = [(1, act) for act in chosen]

    def play(self) -> None:
        """Run the episode's acts, then check that all is well again."""
        field = self.field
        for _ in range(field.plan.acts):
            field.rest(self.draw.uniform(0.1, 0.9))
            self._act()
            if self.draw.random() < 0.2:
                self._settle("amid the acts")
        self._settle("at the end")

    def _act(self) -> None:
        weights = [weight for weight, _ in self._acts]
        ((_, act),) = self.draw.choices(self._acts, weights)
        act(self.draw.choice(self.field.fars))

    def heal(self) -> None:
        """Return once all disks are in sync; nothing may be broken."""
        for far in self.field.fars:
            self.field.tell("resume", far)
        self.field.wait_in_sync()

    def _settle(self, when: str) -> None:
        self.say(f"heal, in sync, compare {when}")
        for far in self.field.fars:
            self.field.tell("resume", far)
        # First let the clients continue: in sync must be reached under load too.
        if self.draw.random() < 0.5:
            self.field.wait_in_sync()
        self.field.settle()

    def say(self, text: str) -> None:
        """Add the act to the histories and show it."""
        self.field.checker.note(text)
        self._told(text)

    def pass_time(self, seconds: float) -> None:
        """Let time pass while something is broken, and perhaps break more."""
        self.depth += 1
        first = self.draw.uniform(0.0, seconds)
        more = self.draw.random() < 0.35 and self.depth < DEEPEST
        self.field.rest(first)
        if more:
            self._act()
        self.field.rest(seconds - first)
        self.depth -= 1

    def around(self, limit_s: float) -> float:
        """Draw a duration that is clearly shorter than the limit, or longer."""
        draw = self.draw
        if draw.random() < 0.5:
            return limit_s * draw.uniform(0.1, 0.6)
        return limit_s * draw.uniform(1.3, 2.5)

    # --- acts ---

    def _kill_primary(self, _: Far) -> None:
        field, away = self.field, self.draw.uniform(0.0, 0.5)
        if not field.serving:  # an act around this one has stopped it
            return
        self.say("kill the primary")
        field.kill_primary()
        self.pass_time(away)
        field.serve()

    def _fail_over(self, far: Far) -> None:
        field, moment = self.field, self.draw.uniform(0.0, 0.2)
        if not field.serving:
            return
        if self.depth == 0:  # nothing is broken: it gets in sync under load
            self.heal()
            field.rest(moment)
        self.say(f"kill the primary under load, fail over to {far.name}")
        field.kill_primary()
        field.fail_over(far)
        field.serve()

    def _stop_primary(self, _: Far) -> None:
        away = self.draw.uniform(0.0, 0.5)
        if not self.field.serving:
            return
        self.say("stop the primary")
        self.field.stop_primary()
        self.pass_time(away)
        self.field.serve()

    @contextlib.contextmanager
    def secondary_dead(self, far: Far) -> Iterator[None]:
        """Keep a secondary dead inside the context."""
        field = self.field
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
        away = self.around(HOLD_S)
        self.say(f"kill {far.name} for {away:.2f} s")
        with self.secondary_dead(far):
            self.pass_time(away)
        self.hurry(far)

    def _kill_both(self, far: Far) -> None:
        field, draw = self.field, self.draw
        first, second = draw.uniform(0, 0.3), draw.uniform(0, 0.6)
        primary_back_first = draw.random() < 0.5
        if not field.serving:
            return
        self.say(f"kill the primary and {far.name}")
        field.kill_primary()
        with self.secondary_dead(far):
            field.rest(first)
            if primary_back_first:
                field.serve()
                field.rest(second)
        if not primary_back_first:
            field.serve()
        self.hurry(far)

    def _freeze_secondary(self, far: Far) -> None:
        away = self.around(self.field.plan.deadline_s)
        if far.broken:
            return
        self.say(f"freeze {far.name} for {away:.2f} s")
        far.signal(signal.SIGSTOP)
        self.field.counts["freezes"] += 1
        self.pass_time(away)
        far.signal(signal.SIGCONT)
        self.hurry(far)

    def _cut(self, far: Far) -> None:
        away = self.around(HOLD_S)
        if far.link_broken:
            return
        self.say(f"cut the link to {far.name} for {away:.2f} s")
        far.link_broken += 1
        far.signal_link(signal.SIGKILL)
        self.field.counts["cuts"] += 1
        self.pass_time(away)
        far.start_link()
        far.link_broken -= 1
        self.hurry(far)

    def _silence(self, far: Far) -> None:
        away = self.around(self.field.plan.deadline_s)
        if far.link_broken:
            return
        self.say(f"silence the link to {far.name} for {away:.2f} s")
        far.link_broken += 1
        far.signal_link(signal.SIGSTOP)
        self.field.counts["silences"] += 1
        self.pass_time(away)
        far.signal_link(signal.SIGCONT)
        far.link_broken -= 1
        self.hurry(far)

    def _flap(self, far: Far) -> None:
        times = self.draw.randint(3, 6)
        gaps = [self.draw.uniform(0.05, 0.4) for _ in range(times)]
        if far.link_broken:
            return
        self.say(f"cut the link to {far.name} {times} times")
        for gap in gaps:
            far.signal_link(signal.SIGKILL)
            self.field.counts["cuts"] += 1
            far.start_link()
            self.field.rest(gap)
        self.hurry(far)

    def _pause(self, far: Far) -> None:
        away = self.draw.uniform(0.1, 1.0)
        self.say(f"pause {far.name}")
        self.field.tell("pause", far)
        self.field.counts["pauses"] += 1
        self.pass_time(away)
        self.field.tell("resume", far)

    def _invalidate(self, far: Far) -> None:
        self.say(f"invalidate {far.name}")
        self.field.tell("invalidate", far)
        self.field.counts["invalidates"] += 1

    def _switch_policy(self, _: Far) -> None:
        policy = self.draw.choice(("degrade", "stop"))
        self.say(f"policy {policy}")
        self.field.switch_policy(policy)

    def _fail_local(self, far: Far) -> None:
        """
        Let the local disk fail, and the secondaries take its place.

        Only alone, and never beside a link that holds bytes back: a secondary that is
        the only source has no other disk to repair late writes from.
        """
        field, draw = self.field, self.draw
        point = draw.choice(("local_write", "local_write", "local_flush", "local_read"))
        fault = f"{point}:{draw.randint(3, 60)}=error"
        away, gap = draw.uniform(0.1, 1.0), self.around(HOLD_S)
        meanwhile = draw.choice(("", "kill the primary", f"kill {far.name}"))
        vain = starts_in_vain(draw) if draw.random() < 0.4 else []
        replaced, in_the_middle = draw.random() < 0.4, draw.random() < 0.4
        if self.depth or not field.serving:
            return
        self.say(f"{fault}, and {meanwhile or 'nothing else'}")
        self.heal()
        field.kill_primary()
        field.serve(fault)
        field.switch_policy("degrade")
        field.rest(away)
        if field.local_state() == "failed":
            field.counts["local disks failed"] += 1
        armed = True  # the fault may still come, until the next start
        if meanwhile == "kill the primary":
            self.restart(vain)
            armed = False
        elif meanwhile:
            with self.secondary_dead(far):
                field.rest(gap)
        for one in field.fars:
            field.tell("resume", one)
        if in_the_middle:
            field.tell_local(replaced=replaced)
            self.restart(vain)
            armed = False
        field.bring_local_back(replaced=replaced)
        if armed:
            self.restart(vain)
            field.bring_local_back(replaced=replaced)

    def restart(self, in_vain: Sequence[str] = ()) -> None:
        """Kill the primary and serve it again, perhaps after failing starts."""
        self.field.kill_primary()
        for fault in in_vain:
            self.field.start_in_vain(fault)
        self.field.serve()

    def hurry(self, far: Far) -> None:
        """Usually make it connect at once: otherwise the back-off takes the time."""
        if self.draw.random() < 0.7:
            self.field.tell("resume", far)
