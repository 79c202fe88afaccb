# SPDX-License-Identifier: BSD-3-Clause
"""The volume of the state machine: its files, its servers, its engine in a child."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import support
from e2e.lib.clients import regions_of
from e2e.lib.engine_child import EngineChild, EngineError, Nursery
from e2e.lib.machine_model import BLOCK, Model, Pending
from e2e.lib.oracle import (
    EXTENT,
    REGION,
    SIZE,
    active_regions,
    open_slots,
    page_cache_lived,
    stopped_cleanly,
)
from e2e.lib.servers import Secondary
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
)

from nbd_mirror.rules.pace import Plan
from nbd_mirror.rules.state import LocalState
from nbd_mirror.server.keeper import RemotePolicy
from nbd_mirror.volume import core
from nbd_mirror.volume.mapview import open_map
from nbd_mirror.volume.model import LOCAL, Disk, disk_of

HOLD_MS, DEADLINE_MS = 300, 1000
LATE_S = 0.7
IN_SYNC_S = 60.0
POLICIES = ("degrade", "stop")

# Where requests go: few places, so that they meet. The volume's begin, the border of
# two extents, its end.
PLACES = (0, (EXTENT - 2 * REGION) // BLOCK, SIZE // BLOCK - 32)
BLOCKS = st.tuples(st.sampled_from(PLACES), st.integers(0, 31), st.integers(1, 32)).map(
    lambda one: (one[0] + one[1], min(one[2], 32 - one[1]))
)
REMOTE = st.integers(0, 1)


def running(machine: MachineSite) -> bool:
    """Tell whether the primary runs: a precondition of rules."""
    return machine.child is not None


class MachineSite(RuleBasedStateMachine):
    """One volume with one or two remotes, its processes and files."""

    folder: Path
    processes: support.Processes
    nursery: Nursery
    numbers: Iterator[int]
    steps = 0
    in_sync = 0
    interrupted = 0
    local_failed = 0

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.child: EngineChild | None = None
        self.pending: list[Pending] = []
        self.stamp = 0
        self.servers: list[Secondary] = []
        self.frozen: set[int] = set()
        self.case = self.folder / str(next(self.numbers))
        self.policy = POLICIES[0]
        self.assume = False
        self.local_fails = False

    # --- the site ---

    @initialize(
        remotes=st.integers(1, 2),
        policy=st.sampled_from(POLICIES),
        assume=st.sampled_from((True, True, False)),
        local_fails=st.sampled_from((0, 3, 10)),
    )
    def bring_up(
        self, remotes: int, policy: str, assume: bool, local_fails: int
    ) -> None:
        """Make the volume; its disks are all zeroes, so they may be taken for equal."""
        self.case.mkdir()
        (self.case / "state").mkdir()
        self.policy = policy
        for i in range(remotes):
            server = Secondary(self.processes, self.case, f"r{i}", "nbdkit")
            server.image.write_bytes(b"")
            os.truncate(server.image, SIZE)
            self.serve(server)
            self.servers.append(server)
        self.local.write_bytes(b"")
        os.truncate(self.local, SIZE)
        child = self.nursery.child()
        self.assume = assume
        child.call("create", self.params)
        child.kill()
        self.open_failing(local_fails)

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.case / "state"

    @property
    def local(self) -> Path:
        """The local image."""
        return self.case / "local.img"

    @property
    def params(self) -> core.Params:
        """The volume's."""
        return core.Params(
            name="v",
            local=str(self.local),
            state_dir=str(self.state),
            size=SIZE,
            region_size=REGION,
            policy=self.policy,
            hold_ms=HOLD_MS,
            remotes=tuple(
                core.RemoteParams(server.name, DEADLINE_MS, self.assume)
                for server in self.servers
            ),
        )

    def open(self, fault: str = "") -> None:
        """Start the engine and its keepers."""
        self.child = self.nursery.child(fault)
        policies = [
            RemotePolicy(
                server.name, server.uri, DEADLINE_MS / 1000, HOLD_MS / 1000, LATE_S
            )
            for server in self.servers
        ]
        self.child.call("open", self.params, policies)

    def open_failing(self, local_fails: int) -> None:
        """
        Open it so that writes to local fail, the how manieth, and later ones; 0: none.

        One that fails while no remote is in sync is an error to the client, no more.
        """
        self.local_fails = self.local_fails or local_fails > 0
        times = [local_fails * n for n in (1, 2, 4, 8, 12)] if local_fails else []
        self.open(",".join(f"local_write:{time}=error" for time in times))

    def local_is_ok(self) -> bool:
        """Tell whether the local disk misses nothing."""
        assert self.child
        return bool(self.child.call("status").local.state is LocalState.OK)

    def bring_local_back(self) -> None:
        """Attach the same disk, if it failed, and copy back what can be now."""
        assert self.child
        with contextlib.suppress(EngineError):  # it has not failed, or is in use
            self.child.call("local_attach", str(self.local), replaced=False)
            self.child.call("admit", LOCAL)
        with contextlib.suppress(EngineError):  # no remote has it just now
            self.child.call("resync", LOCAL, 0, SIZE, 0.0, Plan(1, 0))

    def running(self) -> bool:
        """Tell whether the primary runs."""
        return running(self)

    def disk(self, remote: int) -> Disk:
        """Return a remote's disk number."""
        return disk_of(remote % len(self.servers))

    def serve(self, server: Secondary) -> None:
        """Start a server that loses what was not flushed when it is killed."""
        server.start("--filter=cache", "cache=writeback")

    def up(self, server: Secondary) -> bool:
        """Tell whether a server runs; one that aborted does not: see Secondary."""
        return bool(server.pids())

    def dirty(self, server: Secondary) -> set[int]:
        """Return what may differ: dirty or unflushed, now or after a start."""
        with open_map(self.state / f"dirty.{server.name}") as maps:
            found = set(regions_of(maps.dirty))
            found.update(*(regions_of(one) for one in maps.unflushed))
        with open_map(self.state / "dirty.local") as maps:
            found.update(regions_of(maps.dirty))  # what local misses differs too
        if self.child is None and not stopped_cleanly(self.state):
            exact = page_cache_lived(self.state)
            # A start that ended early may have taken the slots into the maps already.
            found |= open_slots(self.state) if exact else active_regions(self.state)
        return found
