# SPDX-License-Identifier: BSD-3-Clause
"""
The site that the soak breaks: a real one, with a link before each secondary.

The tests' own site does most of the work. This module adds what a run of hours needs:
it restarts servers that may die by themselves (nbdkit 1.32 fails an assertion when a
client vanishes with requests in flight), as their units would; and it checks all disks
once a server is dead or the site is quiet.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import support
from e2e.lib.harness import Site

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.volume import config as config_module
from nbd_mirror.volume import control
from nbd_mirror.volume.offline import stopped_status
from nbd_mirror.volume.status import Status

from .acts_local import frozen_mount, unmount
from .checker import Checker
from .far import Far
from .judge import Judge, complain
from .load import Load, ViolationError, read_all
from .net import Network, possible
from .plan import HOLD_S, LATE_S, Plan
from .register import BLOCK

__all__ = ["BLOCKS", "SIZE", "Field"]

ASSERTION = "raw_send_socket"  # of nbdkit 1.32
SIZE = 16 << 20  # bytes
BLOCKS = SIZE // BLOCK
NBDKITS = {"volatile": "nbdkit", "slow-disk": "nbdkit"}
HEALED_S = 90.0  # limit until in sync once nothing is broken


class Field:
    """
    One episode's site.

    Args:
        folder: with a short path.
        plan: of the episode.
        counts: of the whole run; added to.
        tick: called often during a wait.
    """

    def __init__(
        self, folder: Path, plan: Plan, counts: Counter[str], tick: Callable[[], None]
    ) -> None:
        self.plan, self.counts, self._tick = plan, counts, tick
        logs = folder / "logs"
        logs.mkdir(parents=True)
        self._mount = frozen_mount(folder, plan, SIZE)
        self.processes = support.Processes(logs)
        self.site = Site(
            folder,
            self.processes,
            size=SIZE,
            remotes=[NBDKITS.get(kind, kind) for kind in plan.kinds],
            region_size=plan.region_size,
            policy=plan.policy,
            hold=f"{HOLD_S}s",
            late_write_window=f"{LATE_S}s",
            local=str((self._mount or folder) / "local.img"),
        )
        self.site.deadline = f"{plan.deadline_s}s"
        self.fars = [
            Far(folder, one, kind, plan.disk_rate, self._network())
            for one, kind in zip(self.site.secondaries, plan.kinds, strict=True)
        ]
        self.site.write_config()
        self.checker = Checker(BLOCKS, plan.run)
        self.judge = Judge(self.site.local, BLOCKS, self.checker, counts)
        self.load = Load(self.site.uri, BLOCKS, self.checker, plan.name, clients=5)
        self._log_fails = False
        self.serving = False  # whether the primary should be up
        self._logs_read: dict[Path, int] = {}

    def _network(self) -> Network | None:
        """Make a network for a link if planned and possible."""
        if not (self.plan.network and possible()):
            return None
        self.counts["links over a network"] += 1
        return Network()

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

    def serve(self, fault: str = "", output: Path | None = None) -> None:
        """
        Start the primary; return once it answers and all blocks were judged.

        Args:
            fault: of its local disk, for NBDM_FAULT; gone if it dies by itself.
            output: the file for its log, if that is to fail.
        """
        self._log_fails = output is not None
        while True:
            self.site.serve(self.plan.door, fault=fault, ready=False, output=output)
            fault = ""
            self._wait_for_answer()
            if not self.site.alive:
                self._died()
                continue
            self.serving = True
            if self.read_all():
                return
            # Its connection ended during the reads; a server that is alive must answer.
            support.wait_until(lambda: not self.site.alive, "the server to be gone")
            self._died()

    def read_all(self) -> bool:
        """Read and judge every block; False if the server went away."""
        verdicts = read_all(self.site.uri, BLOCKS, self.checker)
        complain(verdicts or [])
        return verdicts is not None

    def start_in_vain(self, fault: str) -> None:
        """Start the primary with a fault that ends it; if it does not end, kill it."""
        self.counts["starts in vain"] += 1
        self.site.serve(self.plan.door, fault=fault, ready=False)
        self._wait_for_answer()
        self.kill_primary()

    def refused_start(self, why: str) -> None:
        """Start the primary, which must refuse with a specific exit code."""
        self.site.serve(self.plan.door, ready=False)
        self._wait_for_answer()
        if self.site.alive:
            self.site.kill()
            raise ViolationError(f"it was served {why}")
        code = self.site.ended()
        if code <= 1 or "nbd-mirror: " not in self.site.log:
            raise ViolationError(f"exit code {code} {why}:\n{self.tail()}")

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
        """Stop it cleanly; a disk that is stored as in sync must be equal."""
        self.serving = False
        try:
            answer = control.call(self.site.state, "stop", 60.0)
        except MirrorError as error:
            if not self.site.alive:
                self._died()
                return
            raise ViolationError(f"stop failed: {error}") from None
        code = self.site.ended(60)
        if code == -signal.SIGABRT:
            self._died()
            return
        if answer != {"clean": True} or code != 0:
            raise ViolationError(f"stop: {answer}, exit code {code}\n{self.tail()}")
        self.counts["clean stops"] += 1
        self._ended("the primary was stopped")
        for far in self.fars:
            if self.stored_in_sync(far):
                self.judge.compare(far, "after a clean stop")

    def _died(self) -> None:
        """Treat the primary's own death as a kill, if it is the known one."""
        self.serving = False
        code = self.site.ended()
        known = ASSERTION in self.site.log
        known |= self._log_fails and self.plan.door != "direct"
        if code != -signal.SIGABRT or not known:
            raise ViolationError(
                f"the primary ended by itself, exit code {code}:\n{self.tail()}"
            )
        self.counts["aborts of nbdkit"] += 1
        self._ended("the primary's nbdkit aborted")

    def _ended(self, text: str) -> None:
        """Judge the local disk of a dead primary."""
        self.checker.server_ended(text)
        self._scan_log()
        if self._stored().local.state != "ok":
            return  # it misses data that the secondaries have
        self.judge.disk(self.site.local, self.checker.judge, f"local disk, {text}")

    def tail(self) -> str:
        """Return the end of the server's log."""
        return self.site.log[-3000:]

    # --- the disks ---

    def stored_in_sync(self, far: Far) -> bool:
        """Return whether the dead primary's logs say that *far* is a copy."""
        remotes = self._stored().remotes
        stored = next(one for one in remotes if one.name == far.name)
        return stored.state == "in_sync" and stored.dirty_bytes == 0

    def _stored(self) -> Status:
        return stopped_status(config_module.load(self.site.config))

    def fail_over(self, far: Far) -> None:
        """Judge a secondary as the only remaining disk; the primary is dead."""
        if far.broken:
            return
        in_sync = self.stored_in_sync(far)
        far.broken += 1
        far.kill()
        self.counts["kills of a secondary"] += 1
        self.checker.note(f"{far.name} was killed")
        if in_sync:
            self.counts["failovers judged"] += 1
            how = self.checker.judge_lost if far.volatile else self.checker.judge_copy
            kind = "volatile" if far.volatile else "in sync"
            self.judge.disk(
                far.server.image, how, f"{far.name}, {kind}, after a failover"
            )
        far.start()
        far.broken -= 1

    # --- watching ---

    def watch(self) -> None:
        """Restart servers that died; raise ViolationError for other deaths."""
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
        """Send pause, resume or invalidate, unless the server has died."""
        with contextlib.suppress(MirrorError):
            self.site.tell(what, far.name)

    def switch_policy(self, policy: str) -> None:
        """Switch the policy of a running primary."""
        with contextlib.suppress(MirrorError):
            control.call(self.site.state, "policy", 30.0, policy=policy)
            self.counts["policy switches"] += 1

    def remote(self, far: Far) -> dict[str, Any]:
        """Return a remote's part of the status; nothing without an answer."""
        with contextlib.suppress(MirrorError):
            return self.site.remote(far.name)
        return {}

    def local_reason(self) -> str:
        """Return the status's reason of the local disk; "" without an answer."""
        with contextlib.suppress(MirrorError):
            return str(self.site.status()["local"]["reason"])
        return ""

    def local_state(self) -> str:
        """Return local's state; or "failed volume", or "" without an answer."""
        with contextlib.suppress(MirrorError):
            status = self.site.status()
            failed = status["state"] == "failed" and status["local"]["state"] == "ok"
            return "failed volume" if failed else str(status["local"]["state"])
        return ""

    def tell_local(self, *, replaced: bool) -> None:
        """Send resume for the local disk, or invalidate if it was replaced."""
        with contextlib.suppress(MirrorError):
            self.site.tell("invalidate" if replaced else "resume", "local")
            self.counts["local disks brought back"] += 1

    def bring_local_back(self, *, replaced: bool) -> None:
        """Copy back what the local disk misses; the remotes must be well."""
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
        """With no request under way and all in sync, check that all disks are equal."""
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
        self.judge.disk(self.site.local, self.checker.judge, "local disk, quiet")
        for far in self.fars:
            self.judge.compare(far, "when quiet")
        self.load.go_on()

    def _scan_log(self) -> None:
        """Count what the server reports in its log; it has ended."""
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
        for far in self.fars:
            if far.network is not None:
                far.network.close()
        if self._mount is not None:
            unmount(self._mount)
        self.load.add_up(self.counts)
