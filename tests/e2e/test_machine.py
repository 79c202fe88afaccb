# SPDX-License-Identifier: BSD-3-Clause
"""
A state machine over a whole volume, against a model of a few lines.

Hypothesis chooses what happens: requests of every kind, servers that die, freeze and
come back, kills of the primary, lost power, clean stops, starts that end early, one
after the other, a local disk that fails and comes back, what operators do. The engine
and its keepers run in a child process, the remotes are real nbdkits that
lose what they have not flushed. The model knows for every block what it may hold: what
was last answered, or also what was asked for since and not answered. After each step
the rules are checked: reads agree with the model, what differs is dirty or unflushed,
in sync means no region is dirty and in the end equal disks, every state says why, and
nothing hangs.

A failure prints what to put above `Run` to repeat it; a race may need some runs.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import support
from e2e.lib.clients import differing_regions
from e2e.lib.engine_child import Died, EngineError, Nursery
from e2e.lib.machine_model import BLOCK, Pending, bytes_of
from e2e.lib.machine_site import (
    BLOCKS,
    IN_SYNC_S,
    POLICIES,
    REMOTE,
    MachineSite,
    running,
)
from e2e.lib.oracle import (
    REGION,
    SIZE,
    active_regions,
    lose_power,
    open_slots,
    stopped_cleanly,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from nbd_mirror.rules.reasons import describe
from nbd_mirror.rules.state import LocalState, RemoteState
from nbd_mirror.volume import core

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("timed")]

BUDGET_S = 60.0

# Where a start may end: each point that is passed on the way of any, at which those
# that can fail do.
START_POINTS = (
    "superblock_settle",
    "open_local_flushed",
    "maps_unsealed",
    "recover_lost",
    "open_recovered",
    "activity_set_sync",
    "log_header_write",
    "log_header_sync",
    "dirty_map_sync",
    "begin_set",
    "begin_slots",
    "begin_maps",
    "superblock_write",
    "superblock_sync",
    "superblock_synced",
    "open_begun",
)


class Machine(MachineSite):
    """One volume with one or two remotes, and all that may happen to it."""

    # --- requests ---

    def ask(self, name: str, blocks: range, stamp: int, *arguments: Any) -> None:
        """Make a request and wait; under policy stop it may be refused."""
        assert self.child
        self.land(blocks)
        self.model.begin(blocks, stamp)
        try:
            self.child.call(name, *arguments)
        except EngineError as error:
            self.refused(error)
        else:
            self.model.answered(blocks, stamp)

    def refused(self, error: EngineError) -> None:
        """Judge an error: nothing here but the fence and local's failure gives one."""
        assert error.errno == errno.EIO, str(error)
        if self.local_fails:
            return
        assert self.policy == "stop", str(error)
        assert "policy stop" in str(error) or "every disk" in str(error), str(error)

    def may_be_unread(self, error: EngineError) -> None:
        """Judge an error of a read: the only disk that has it may be away."""
        assert error.errno == errno.EIO, str(error)
        assert not self.local_is_ok(), str(error)

    def only_copy(self, error: EngineError) -> None:
        """Judge an operator's command that was refused."""
        assert error.errno == errno.EBUSY, str(error)
        assert self.local_fails, str(error)

    def land(self, blocks: range) -> None:
        """Wait for pending writes of these blocks: the model has no order for two."""
        for one in list(self.pending):
            if one.blocks.start < blocks.stop and blocks.start < one.blocks.stop:
                self.finish(one)

    def finish(self, one: Pending) -> None:
        """Wait for a pending write."""
        assert self.child
        self.pending.remove(one)
        try:
            self.child.result(one.number)
        except EngineError as error:
            self.refused(error)
        else:
            self.model.answered(one.blocks, one.stamp)

    def new_stamp(self) -> int:
        """Return a number that was never written."""
        self.stamp += 1
        return self.stamp

    @precondition(running)
    @rule(where=BLOCKS, fua=st.booleans())
    def write(self, where: tuple[int, int], fua: bool) -> None:
        """Write, and wait for the answer."""
        first, count = where
        stamp = self.new_stamp()
        data = bytes_of(stamp, count)
        blocks = range(first, first + count)
        flags = core.FUA if fua else 0
        self.ask("pwrite", blocks, stamp, data, first * BLOCK, flags)

    @precondition(running)
    @rule(
        where=st.lists(BLOCKS, min_size=1, max_size=4),
        then=st.sampled_from(("cut", "freeze", "flush", "")),
        remote=REMOTE,
    )
    def write_some(self, where: list[tuple[int, int]], then: str, remote: int) -> None:
        """Write here and there, and then lose what a remote has not flushed."""
        for one in where:
            self.write(one, False)
        if then == "flush":
            self.flush()
        elif then:
            getattr(self, then)(remote)

    @precondition(running)
    @rule(where=BLOCKS)
    def begin_write(self, where: tuple[int, int]) -> None:
        """Write, and go on before the answer."""
        assert self.child
        first, count = where
        blocks, stamp = range(first, first + count), self.new_stamp()
        self.land(blocks)
        self.model.begin(blocks, stamp)
        data = bytes_of(stamp, count)
        number = self.child.submit("pwrite", data, first * BLOCK)
        self.pending.append(Pending(number, blocks, stamp))

    @precondition(lambda self: self.pending)
    @rule()
    def finish_all(self) -> None:
        """Wait for every answer."""
        for one in list(self.pending):
            self.finish(one)

    @precondition(running)
    @rule(where=BLOCKS, name=st.sampled_from(("trim", "zero")), fua=st.booleans())
    def zero(self, where: tuple[int, int], name: str, fua: bool) -> None:
        """Trim or zero."""
        first, count = where
        blocks = range(first, first + count)
        flags = core.FUA if fua else 0
        self.ask(name, blocks, 0, count * BLOCK, first * BLOCK, flags)

    @precondition(running)
    @rule()
    def flush(self) -> None:
        """Flush."""
        self.ask("flush", range(0), 0)

    @precondition(running)
    @rule(where=BLOCKS)
    def read(self, where: tuple[int, int]) -> None:
        """Read: what was answered, nothing else."""
        assert self.child
        first, count = where
        blocks = range(first, first + count)
        self.land(blocks)
        try:
            content = self.child.call("read", first * BLOCK, count * BLOCK)
        except EngineError as error:
            self.may_be_unread(error)
        else:
            self.model.check(blocks, content)

    # --- the remotes ---

    @precondition(running)
    @rule()
    def catch_up(self) -> None:
        """Have everything well again, until all are in sync."""
        self.resume_all()
        self.finish_all()
        self.wait_in_sync()

    @rule(remote=REMOTE)
    def cut(self, remote: int) -> None:
        """Kill a server."""
        server = self.servers[remote % len(self.servers)]
        if self.up(server):
            server.kill()
            self.frozen.discard(self.servers.index(server))

    @rule(remote=REMOTE)
    def freeze(self, remote: int) -> None:
        """Stop a server from running; its connections stay."""
        server = self.servers[remote % len(self.servers)]
        if self.up(server) and self.servers.index(server) not in self.frozen:
            server.freeze()
            self.frozen.add(self.servers.index(server))

    @rule(remote=REMOTE, at_once=st.booleans())
    def heal(self, remote: int, at_once: bool) -> None:
        """Have a server run again; perhaps an operator is there to say so."""
        index = remote % len(self.servers)
        if index in self.frozen:
            self.servers[index].thaw()
            self.frozen.discard(index)
        elif not self.up(self.servers[index]):
            self.serve(self.servers[index])
        if at_once and self.child:
            self.child.call("resume", self.disk(index))

    # --- the primary ---

    def forget_child(self) -> None:
        """Kill what is left of the primary; nothing pending was answered."""
        assert self.child
        self.child.kill()
        self.child = None
        self.pending.clear()

    @precondition(running)
    @rule(
        under_way=st.lists(BLOCKS, max_size=3),
        frozen=st.booleans(),
        power=st.booleans(),
    )
    def kill(self, under_way: list[tuple[int, int]], frozen: bool, power: bool) -> None:
        """
        Kill the primary with writes under way.

        Args:
            frozen: no remote answers these.
            power: the next start sees another boot.
        """
        if frozen:
            for i, _ in enumerate(self.servers):
                self.freeze(i)
        for where in under_way:
            self.begin_write(where)
        self.forget_child()
        if power:
            lose_power(self.state)

    @precondition(running)
    @rule()
    def stop(self) -> None:
        """Stop cleanly, whatever the remotes do; what is pending is answered first."""
        assert self.child
        self.finish_all()
        self.child.call("stop")
        self.forget_child()
        assert stopped_cleanly(self.state)
        assert not open_slots(self.state)
        assert not active_regions(self.state)

    @precondition(lambda self: not self.running())
    @rule(
        policy=st.sampled_from(POLICIES),
        interrupted=st.lists(
            st.tuples(st.sampled_from(START_POINTS), st.integers(1, 3)), max_size=3
        ),
        power=st.booleans(),
        local_fails=st.sampled_from((0, 0, 0, 1, 4, 12)),
    )
    def start(
        self,
        policy: str,
        interrupted: list[tuple[str, int]],
        power: bool,
        local_fails: int,
    ) -> None:
        """
        Start again, perhaps with another policy.

        Args:
            interrupted: where starts before it end, and the how manieth time there.
            power: it is lost with the last of them.
            local_fails: the how manieth write to it does; 0: none.
        """
        self.policy = policy
        for point, nth in interrupted:
            self.start_that_ends(f"{point}:{nth}")
        if power and interrupted:
            lose_power(self.state)
        self.open_failing(local_fails)

    @precondition(running)
    @rule(where=BLOCKS)
    def lose_local(self, where: tuple[int, int]) -> None:
        """Have the local disk fail under a write, while all are in sync."""
        self.catch_up()
        self.stop()
        self.policy = "degrade"
        self.open_failing(1)
        self.wait_in_sync()
        self.write(where, False)

    @precondition(running)
    @rule()
    def local_back(self) -> None:
        """Bring the local disk back; it may still miss something then."""
        self.bring_local_back()

    def start_that_ends(self, point: str) -> None:
        """Start it, and have it killed or fail at *point*, or else once it is open."""
        name = point.partition(":")[0]
        action = "error" if core.fault_points()[name] else "kill"
        child = self.nursery.child(f"{point}={action}")
        with contextlib.suppress(Died, EngineError):
            child.call("open", self.params)
        child.kill()
        type(self).interrupted += 1

    # --- operators ---

    @precondition(running)
    @rule(remote=REMOTE)
    def pause(self, remote: int) -> None:
        """Pause resync."""
        assert self.child
        self.child.call("pause", self.disk(remote), paused=True)

    @precondition(running)
    @rule(remote=REMOTE)
    def resume(self, remote: int) -> None:
        """Resume it, and connect at once."""
        assert self.child
        self.child.call("resume", self.disk(remote))

    @precondition(running)
    @rule(remote=REMOTE)
    def invalidate(self, remote: int) -> None:
        """Make everything dirty; refused while it may be the only copy."""
        assert self.child
        try:
            self.child.call("invalidate", self.disk(remote))
        except EngineError as error:
            self.only_copy(error)

    @precondition(running)
    @rule(policy=st.sampled_from(POLICIES))
    def change_policy(self, policy: str) -> None:
        """Change the policy while it runs; pending writes may see either."""
        assert self.child
        self.finish_all()
        self.child.call("set_policy", policy, "serve")
        self.policy = policy

    # --- the rules ---

    @invariant()
    def what_differs_is_dirty(self) -> None:
        """Compare the images, while nothing is under way."""
        if self.pending or not self.servers:
            return
        for server in self.servers:
            # While this reads, resync clears bits and a lost connection sets some: no
            # region does both without a request.
            before = self.dirty(server)
            differing = set(differing_regions(self.local, server.image, REGION, SIZE))
            missed = differing - before - self.dirty(server)
            assert not missed, f"{server.name}: not dirty: {sorted(missed)}"

    @invariant()
    def states_say_why(self) -> None:
        """Ask for every state and its reason."""
        type(self).steps += 1
        if self.child is None:
            return
        volume = self.child.call("status")
        assert not volume.failed, volume.reason
        type(self).local_failed += volume.local.state is LocalState.FAILED
        for i in range(len(self.servers)):
            facts, status = self.child.call("view", self.disk(i))
            reason, _ = describe(facts)
            assert status.state is not RemoteState.FAILED, reason
            assert reason or (status.state is RemoteState.IN_SYNC and status.admitted)
            if status.state is RemoteState.IN_SYNC:
                assert status.dirty_regions == 0

    def teardown(self) -> None:
        """Mend everything: all must come to be in sync, and equal."""
        try:
            if self.servers and sys.exception() is None:
                self.mend()
        finally:
            if self.child is not None:
                self.child.kill()
            for server in self.servers:
                if self.up(server):
                    server.kill()

    def resume_all(self) -> None:
        """Heal every server, and lift every pause."""
        for i, _ in enumerate(self.servers):
            self.heal(i, at_once=True)

    def wait_in_sync(self) -> None:
        """Wait until every remote is in sync; one that aborts is started again."""
        assert self.child
        child = self.child

        def in_sync() -> bool:
            if not self.local_is_ok():
                self.bring_local_back()
                return False
            for i, server in enumerate(self.servers):
                if not self.up(server):
                    self.serve(server)
                status = child.call("remote_status", self.disk(i))
                if status.state is not RemoteState.IN_SYNC or not status.admitted:
                    child.call("resume", self.disk(i))
                    return False
            return True

        support.wait_until(in_sync, "all to be in sync", timeout_s=IN_SYNC_S)
        type(self).in_sync += 1

    def mend(self) -> None:
        """Heal all, wait, stop; the disks are equal and as the model has them."""
        if not self.running():
            self.open()
        self.catch_up()
        self.what_differs_is_dirty()
        assert self.child
        every = range(SIZE // BLOCK)
        self.model.check(every, self.child.call("read", 0, SIZE))
        self.child.call("stop")
        for server in self.servers:
            differing = differing_regions(self.local, server.image, REGION, SIZE)
            assert not list(differing), f"{server.name} differs after a clean stop"
        self.model.check(every, self.local.read_bytes())


@pytest.mark.timeout(400)
def test_machine(run_dir: Path, processes: support.Processes) -> None:
    """Whatever happens in whatever order: no rule is broken."""

    class Run(Machine):
        folder = run_dir
        numbers = itertools.count()

    Run.processes = processes
    Run.nursery = Nursery(processes, run_dir)
    until = time.monotonic() + float(os.environ.get("NBDM_MACHINE_S", BUDGET_S))
    while time.monotonic() < until:
        run_machine(
            Run,
            settings=settings(
                max_examples=5,
                stateful_step_count=40,
                print_blob=True,
                database=None,
                # No shrinking: it would repeat a run of seconds hundreds of times.
                phases=[Phase.explicit, Phase.reuse, Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    print(
        f"{Run.steps} steps, {Run.in_sync} times in sync, "
        f"{Run.interrupted} starts that ended early, "
        f"{Run.local_failed} steps with local failed"
    )
    assert Run.in_sync > 0
