# SPDX-License-Identifier: BSD-3-Clause
"""
What the soak breaks: a real site, with a link before each secondary.

The tests' own site does the work. Here is what a run of hours needs besides: servers
that may die by themselves (nbdkit 1.32 fails an assertion when a client vanishes with
requests in flight) and are then started again as their units would, and the looks at
all disks once a server is dead or the site is quiet.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import support
from e2e.harness import Site
from soak_far import Far
from soak_load import Load, ViolationError, read_all

from nbd_mirror import config as config_module
from nbd_mirror import control
from nbd_mirror.checker import Checker, Verdict
from nbd_mirror.errors import MirrorError
from nbd_mirror.offline import stopped_status
from nbd_mirror.register import BLOCK

__all__ = ["Field", "Plan"]

KINDS = ("nbdkit", "qemu-nbd", "nbd-server", "volatile")
ASSERTION = "raw_send_socket"  # of nbdkit 1.32
SIZE = 16 << 20  # bytes
BLOCKS = SIZE // BLOCK
HOLD_S, DEADLINE_S, LATE_S = 0.5, 1.0, 1.5
HEALED_S = 90.0  # until in sync once nothing is broken any more
CHUNK = 1 << 20  # bytes


class Plan:
    """What an episode is made of, all of it drawn from its seed."""

    def __init__(self, seed: int, episode: int, doors: list[str]) -> None:
        self.name = f"seed {seed} episode {episode}"
        self.random = random.Random(self.name)
        draw = self.random
        self.run = draw.getrandbits(63)
        self.door = doors[episode % len(doors)]
        self.kinds = [KINDS[episode % len(KINDS)]]
        if draw.random() < 0.4:
            self.kinds.append(draw.choice(KINDS))
        self.policy = draw.choice(("degrade", "degrade", "stop"))
        self.region_size = draw.choice(("4KiB", "16KiB", "64KiB"))
        self.acts = draw.randint(4, 8)

    def __str__(self) -> str:
        return (
            f"{self.name}: door {self.door}, {' and '.join(self.kinds)}, "
            f"policy {self.policy}, regions of {self.region_size}"
        )


class Field:
    """
    One episode's site.

    Args:
        folder: with a short path.
        plan: of the episode.
        counts: of the whole run; added to.
        tick: called often while something is waited for.
    """

    def __init__(
        self, folder: Path, plan: Plan, counts: Counter[str], tick: Callable[[], None]
    ) -> None:
        self.plan, self.counts, self._tick = plan, counts, tick
        logs = folder / "logs"
        logs.mkdir(parents=True)
        self.processes = support.Processes(logs)
        self.site = Site(
            folder,
            self.processes,
            size=SIZE,
            remotes=["nbdkit" if k == "volatile" else k for k in plan.kinds],
            region_size=plan.region_size,
            policy=plan.policy,
            hold=f"{HOLD_S}s",
            late_write_window=f"{LATE_S}s",
        )
        self.site.deadline = f"{DEADLINE_S}s"
        self.fars = [
            Far(folder, one, volatile=kind == "volatile")
            for one, kind in zip(self.site.secondaries, plan.kinds, strict=True)
        ]
        self.site.write_config()
        self.checker = Checker(BLOCKS, plan.run)
        self.load = Load(self.site.uri, BLOCKS, self.checker, plan.name, clients=5)
        self.serving = False  # whether the primary should be up
        self._logs_read: dict[Path, int] = {}

    # --- the primary ---

    def bring_up(self) -> None:
        """Start everything; return once all remotes are in sync."""
        for far in self.fars:
            far.start()
            far.start_link()
        self.site.create()
        self.serve()
        self.wait_in_sync()
        self.load.start()

    def serve(self, fault: str = "") -> None:
        """
        Start the primary; return once it answers and all blocks were judged.

        Args:
            fault: of its local disk, for NBDM_FAULT; gone if it dies by itself.
        """
        while True:
            self.site.serve(self.plan.door, fault=fault, ready=False)
            fault = ""
            self._wait_for_answer()
            if not self.site.alive:
                self._died()
                continue
            self.serving = True
            verdicts = read_all(self.site.uri, BLOCKS, self.checker)
            if verdicts is not None:
                complain(verdicts)
                return
            # Its connection ended amid the reads; who is alive must answer.
            support.wait_until(lambda: not self.site.alive, "the server to be gone")
            self._died()

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + 60
        while self.site.alive and not self.site.answers():
            if time.monotonic() > deadline:
                raise ViolationError(f"no answer after its start:\n{self.tail()}")
            self._tick()
            time.sleep(0.02)

    def kill_primary(self) -> None:
        """Kill the primary, and judge its disk."""
        self.serving = False
        if self.site.alive:
            self.site.kill()
        self.counts["kills of the primary"] += 1
        self._ended("the primary was killed")

    def stop_primary(self) -> None:
        """Stop it cleanly; what is stored as in sync must be equal."""
        self.serving = False
        try:
            answer = control.call(self.site.state, "stop", 60.0)
        except MirrorError as error:
            if not self.site.alive:
                self._died()
                return
            raise ViolationError(f"stop failed: {error}") from None
        code = self.site.ended(60)
        if code == -signal.SIGABRT and ASSERTION in self.site.log:
            self._died()
            return
        if answer != {"clean": True} or code != 0:
            raise ViolationError(f"stop: {answer}, exit code {code}\n{self.tail()}")
        self.counts["clean stops"] += 1
        self._ended("the primary was stopped")
        for far in self.fars:
            if self.stored_in_sync(far):
                self.compare(far, "after a clean stop")

    def _died(self) -> None:
        """Take the primary's own death as a kill, if it is the known one."""
        self.serving = False
        code = self.site.ended()
        if code != -signal.SIGABRT or ASSERTION not in self.site.log:
            raise ViolationError(
                f"the primary ended by itself, exit code {code}:\n{self.tail()}"
            )
        self.counts["aborts of nbdkit"] += 1
        self._ended("the primary's nbdkit aborted")

    def _ended(self, text: str) -> None:
        """Judge the local disk of a dead primary."""
        self.checker.server_ended(text)
        self._scan_log()
        if self._stored()["local"]["state"] != "ok":
            return  # it misses what the secondaries have
        self._judge(self.site.local, self.checker.judge, f"local disk, {text}")

    def tail(self) -> str:
        """Return the end of the server's log."""
        return self.site.log[-3000:]

    # --- the disks ---

    def _judge(
        self, image: Path, judge: Callable[..., list[Verdict]], where: str
    ) -> None:
        with image.open("rb") as file:
            for first in range(0, BLOCKS, CHUNK // BLOCK):
                complain(judge(first, file.read(CHUNK), where))

    def stored_in_sync(self, far: Far) -> bool:
        """Tell whether the dead primary's logs say that *far* is a copy."""
        remotes = self._stored()["remotes"]
        stored = next(one for one in remotes if one["name"] == far.name)
        return stored["state"] == "in_sync" and stored["dirty_bytes"] == 0

    def _stored(self) -> dict[str, Any]:
        return stopped_status(config_module.load(self.site.config))

    def fail_over(self, far: Far) -> None:
        """Judge a secondary as the one disk that is left, the primary being dead."""
        if far.broken:
            return
        in_sync = self.stored_in_sync(far)
        far.broken += 1
        far.kill()
        self.counts["kills of a secondary"] += 1
        self.checker.note(f"{far.name} was killed")
        if in_sync:
            self.counts["failovers judged"] += 1
            judge = self.checker.judge_lost if far.volatile else self.checker.judge_copy
            kind = "volatile" if far.volatile else "in sync"
            self._judge(
                far.server.image, judge, f"{far.name}, {kind}, after a failover"
            )
        far.start()
        far.broken -= 1

    def compare(self, far: Far, when: str) -> None:
        """Raise ViolationError unless the images are equal."""
        self.counts["comparisons"] += 1
        with self.site.local.open("rb") as one, far.server.image.open("rb") as other:
            for first in range(0, BLOCKS, CHUNK // BLOCK):
                left, right = one.read(CHUNK), other.read(CHUNK)
                if left != right:
                    self._differ(far, when, first, left, right)

    def _differ(
        self, far: Far, when: str, first: int, left: bytes, right: bytes
    ) -> None:
        blocks = [
            first + at // BLOCK
            for at in range(0, len(left), BLOCK)
            if left[at : at + BLOCK] != right[at : at + BLOCK]
        ]
        at = (blocks[0] - first) * BLOCK
        ours = self.checker.explain(blocks[0], left[at : at + BLOCK], "local")
        theirs = self.checker.explain(blocks[0], right[at : at + BLOCK], far.name)
        raise ViolationError(
            f"{far.name} differs from local {when} though it is in sync, in "
            f"{len(blocks)} blocks of the first MiB that does: {blocks[:20]}\n"
            f"{ours}\n{theirs}"
        )

    # --- watching ---

    def watch(self) -> None:
        """Start again what died by itself; raise ViolationError for what may not be."""
        self._tick()
        self.load.check()
        if self.serving and not self.site.alive:
            self._died()
            self.serve()
        for far in self.fars:
            if far.died:
                if far.death != -signal.SIGABRT:
                    raise ViolationError(f"{far.name} died by itself: {far.death}")
                self.counts["aborts of nbdkit"] += 1
                self.checker.note(f"{far.name} aborted")
                far.start()

    def rest(self, seconds: float) -> None:
        """Let time pass, watching."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.watch()
            time.sleep(min(left, 0.05))

    def tell(self, what: str, far: Far) -> None:
        """Send pause, resume or invalidate; a server that has died gets none."""
        with contextlib.suppress(MirrorError):
            self.site.tell(what, far.name)

    def switch_policy(self, policy: str) -> None:
        """Switch the policy of the primary while it runs, if it does."""
        with contextlib.suppress(MirrorError):
            control.call(self.site.state, "policy", 30.0, policy=policy)
            self.counts["policy switches"] += 1

    def local_state(self) -> str:
        """Tell the local disk's state; or "failed volume", or "" without an answer."""
        with contextlib.suppress(MirrorError):
            status = self.site.status()
            failed = status["state"] == "failed" and status["local"]["state"] == "ok"
            return "failed volume" if failed else str(status["local"]["state"])
        return ""

    def tell_local(self, *, replaced: bool) -> None:
        """Say that the local disk works again, or that it is another one."""
        with contextlib.suppress(MirrorError):
            self.site.tell("invalidate" if replaced else "resume", "local")
            self.counts["local disks brought back"] += 1

    def bring_local_back(self, *, replaced: bool) -> None:
        """Have what the local disk misses copied back; the remotes must be well."""
        deadline = time.monotonic() + HEALED_S
        while (state := self.local_state()) != "ok":
            self.watch()
            if state == "failed volume":
                self.kill_primary()
                self.serve()
            elif state == "failed":
                self.tell_local(replaced=replaced)
            if time.monotonic() > deadline:
                raise ViolationError(f"local is {state} still\n{self.tail()}")
            time.sleep(0.05)

    def wait_in_sync(self) -> None:
        """Return once all disks are in sync; nothing may be broken."""
        deadline = time.monotonic() + HEALED_S
        remotes: list[dict[str, Any]] = []
        while True:
            self.watch()
            with contextlib.suppress(MirrorError):
                status = self.site.status()
                remotes = status["remotes"]
                if status["local"]["state"] == "ok" and all(
                    one["state"] == "in_sync"
                    and one["connected"]
                    and one["dirty_bytes"] == 0
                    for one in remotes
                ):
                    return
            for one in remotes:
                if one["state"] == "failed":
                    raise ViolationError(f"a remote failed: {one}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ViolationError(
                    f"not in sync {HEALED_S:g} s after all was healed: {remotes}\n"
                    f"{self.tail()}"
                )
            time.sleep(0.05)

    def settle(self) -> None:
        """With no request under way and all in sync: all disks are equal and right."""
        self.load.pause(self.watch)
        while True:
            self.wait_in_sync()
            try:
                handle = self.site.client()
                begun = self.checker.begin_flush()
                handle.flush()
                self.checker.end_flush(begun)
                handle.shutdown()
                break
            except Exception as error:
                # Only a death of its own excuses it; watch() judges that.
                if self.site.alive and "abort" not in str(error):
                    time.sleep(0.5)
                    if self.site.alive:
                        raise ViolationError(
                            f"a flush in sync failed: {error}"
                        ) from error
        self._judge(self.site.local, self.checker.judge, "local disk, quiet")
        for far in self.fars:
            self.compare(far, "when quiet")
        self.load.go_on()

    def _scan_log(self) -> None:
        """Count what the server said that it did; it has ended."""
        if self.site.log_path in self._logs_read:
            return
        self._logs_read[self.site.log_path] = 1
        text = self.site.log
        self.counts["connects of the primary"] += len(re.findall(r": connect: ", text))
        self.counts["resyncs"] += len(re.findall(r": resync_done: ", text))

    def close(self) -> None:
        """End everything and add up."""
        self.load.ending = True
        self.processes.close()
        self.load.stop()
        checker, load = self.checker, self.load
        for name, count in (
            ("writes sent", checker.sent),
            ("writes answered", checker.answered),
            ("writes durable", checker.flushed),
            ("writes answered by an error", checker.failed),
            ("writes lost with a server", checker.lost),
            ("reads checked", load.reads),
            ("blocks checked", checker.checked),
            ("torn beside a write", checker.torn),
            ("flushes", load.flushes),
            ("connects of clients", load.connects),
        ):
            self.counts[name] += count


def complain(verdicts: list[Verdict]) -> None:
    """Raise ViolationError if there are any."""
    if verdicts:
        more = f"\n... and {len(verdicts) - 10} more" if len(verdicts) > 10 else ""
        raise ViolationError("\n".join(map(str, verdicts[:10])) + more)
