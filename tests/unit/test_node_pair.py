# SPDX-License-Identifier: BSD-3-Clause
"""
Two nodes as two engines: each serves its disk by the direct door, and the rules decide.

The control between them is this test: it takes both records and maps, asks the rules,
and stores what they give, as the control threads of two servers do.
"""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import wait_until
from unit.volumes import REGION, SIZE

from nbd_mirror.base.errors import MirrorError
from nbd_mirror.rules.generation import NO_DATA, adopt, create, offer, settle, share
from nbd_mirror.rules.node_handshake import decide
from nbd_mirror.rules.node_side import Action, Crash, Extent, Plan, Role, Side
from nbd_mirror.rules.pace import Plan as Pace
from nbd_mirror.rules.state import RemoteState
from nbd_mirror.volume import core
from nbd_mirror.volume.model import NodeMap, disk_of
from nbd_mirror.volume.node_record import NodeRecord

OTHER = disk_of(0)
REGIONS = SIZE // REGION
EVERYTHING = b"\xff" * (REGIONS // 8)


class Half:
    """One node: its engine in a role, and a door to its disk while it is secondary."""

    def __init__(self, folder: Path, name: str, other: str) -> None:
        folder.mkdir()
        (folder / "state").mkdir()
        self.name = name
        self.disk = folder / "disk"
        self.disk.write_bytes(b"")
        with self.disk.open("ab") as file:
            file.truncate(SIZE)
        self._socket = folder / "sock"
        self._params = core.Params(
            name="v",
            local=str(self.disk),
            state_dir=str(folder / "state"),
            size=SIZE,
            region_size=REGION,
            policy="degrade",
            hold_ms=0,
            remotes=(core.RemoteParams(other, 5000, is_node=True),),
            node=name,
        )
        core.create(self._params)
        self._engine: core.Engine | None = None
        self._server: core.Server | None = None

    @property
    def engine(self) -> core.Engine:
        """The open engine."""
        assert self._engine is not None
        return self._engine

    @property
    def record(self) -> NodeRecord:
        """Its record, as it is now."""
        return self.engine.node_get()

    def follow(self) -> None:
        """Open as secondary, and serve the disk."""
        self._engine = core.Engine(self._params)
        self._engine.start()
        self._socket.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._socket))
        self._listener.listen()
        self._server = core.Server(self._engine, [self._listener.fileno()])
        self._server.start()
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()

    def lead(self) -> None:
        """Be promoted: store it durably, and open as primary."""
        before = self.record
        if before.lineage.generation == NO_DATA:
            lineage = create(before.lineage, random.getrandbits(63) | 1)
        else:
            lineage = share(before.lineage)
        epoch = before.epoch + 1
        self.store(lineage=lineage, epoch=epoch, leader=self.name, role=Role.PRIMARY)
        self.stop()
        self._engine = core.Engine(replace(self._params, primary=True, epoch=epoch))
        self._engine.start()

    def store(self, **fields: object) -> None:
        """Store a record with other *fields*."""
        before = self.record
        assert self.engine.node_store(before, replace(before, **fields))  # type: ignore[arg-type]

    def shut(self) -> None:
        """Serve the disk no more: a link that is cut."""
        if self._server is not None:
            self._server.end()
            self._thread.join()
            self._server.close()
            self._listener.close()
        self._server = None

    def stop(self) -> None:
        """End cleanly."""
        self.shut()
        self.engine.stop()
        self.kill()

    def kill(self) -> None:
        """End as a killed process does."""
        self.shut()
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def dirty(self, which: NodeMap = NodeMap.DIRTY) -> int:
        """Return the regions of a map, as bits of a number."""
        return int.from_bytes(self.engine.node_map(OTHER, which), "little")

    def marks(self) -> int:
        """Return all that may differ as far as it knows."""
        return self.dirty() | self.dirty(NodeMap.DOUBTS) | self.dirty(NodeMap.MISSED)

    def side(self) -> Side:
        """Show itself, as in the handshake."""
        record = self.record
        (peer,) = record.lineage.peers
        role = self.engine.status().role
        assert role is not None
        return Side(
            volume="v",
            node=self.name,
            size=SIZE,
            generation=record.lineage.generation,
            history=record.lineage.history,
            bases=peer.bases,
            dirty=self.dirty().bit_count(),
            doubts=self.dirty(NodeMap.DOUBTS).bit_count(),
            missed=self.dirty(NodeMap.MISSED).bit_count(),
            crash=record.crash,
            inconsistent=record.inconsistent,
            role=role,
            epoch=record.epoch,
            leader=record.leader,
        )

    @property
    def uri(self) -> str:
        """The address of its disk."""
        return f"nbd+unix:///?socket={self._socket}"


def meet(leader: Half, follower: Half) -> Plan:
    """Do what the rules decide, up to in sync."""
    plan = decide(leader.side(), follower.side())
    assert plan == decide(follower.side(), leader.side())
    assert plan.action is not Action.STOP, plan.reason
    assert plan.source in ("", leader.name)
    if plan.action is Action.IN_SYNC:
        for half, other in ((leader, follower), (follower, leader)):
            line = half.record.lineage
            line = share(settle(line, other.name, line.generation))
            half.store(lineage=line)
        connect(leader, follower)
    else:
        follower.store(inconsistent=True)
        resync(leader, follower, plan)
    follower.store(epoch=leader.record.epoch, leader=leader.name, role=Role.SECONDARY)
    assert leader.engine.remote_status(OTHER).state is RemoteState.IN_SYNC
    return plan


def connect(leader: Half, follower: Half) -> None:
    """Use the follower's disk."""
    leader.engine.connect(OTHER, follower.uri, 5)
    leader.engine.admit(OTHER)


def resync(leader: Half, follower: Half, plan: Plan) -> None:
    """Copy, offer, adopt, settle."""
    bits = EVERYTHING
    if plan.extent is Extent.MARKED:
        bits = (leader.marks() | follower.marks()).to_bytes(REGIONS // 8, "little")
    leader.engine.node_mark(OTHER, NodeMap.DIRTY, bits)
    connect(leader, follower)
    while leader.dirty():
        leader.engine.release_late(OTHER)
        batch = leader.engine.resync(OTHER, 0, 64 << 20, 0.0, Pace(8, 0))
        assert batch.error is None
    if leader.engine.remote_status(OTHER).state is RemoteState.IN_SYNC:
        held = leader.record.lineage.peer(follower.name)
        assert held.shared  # it was counted all the time
        assert not held.bases
    leader.store(lineage=offer(leader.record.lineage, follower.name))
    line = leader.record.lineage
    taken = adopt(follower.record.lineage, line)
    follower.store(lineage=taken, inconsistent=False, crash=Crash.NONE)
    follower.engine.node_clear(OTHER)
    leader.store(lineage=settle(leader.record.lineage, follower.name, line.generation))


def write(half: Half, *regions: int) -> None:
    """Write random bytes into regions."""
    for region in regions:
        half.engine.pwrite(random.randbytes(REGION), region * REGION)


def notice(leader: Half) -> None:
    """Wait until the primary has noticed that its follower is gone."""
    wait_until(
        lambda: not leader.engine.remote_status(OTHER).connected, "the lost link"
    )


def lose(leader: Half, follower: Half) -> None:
    """Cut the link; both notice, and the follower doubts what was under way."""
    follower.shut()
    follower.engine.node_session_lost()
    notice(leader)


def assert_equal(leader: Half, follower: Half) -> None:
    """Both disks hold the same."""
    leader.engine.flush()
    assert leader.disk.read_bytes() == follower.disk.read_bytes()


@pytest.fixture
def pair(run_dir: Path) -> Iterator[tuple[Half, Half]]:
    """Give alpha as primary and beta as its secondary, in sync."""
    alpha = Half(run_dir / "a", "alpha", "beta")
    beta = Half(run_dir / "b", "beta", "alpha")
    alpha.follow()
    beta.follow()
    alpha.lead()
    write(alpha, 1, 2, 200)
    plan = meet(alpha, beta)
    assert plan.row == "2 no data"
    yield alpha, beta
    alpha.kill()
    beta.kill()


def test_a_new_pair_is_in_sync_and_stays_so(pair: tuple[Half, Half]) -> None:
    """Every write is on both disks, and no generation begins."""
    alpha, beta = pair
    before = alpha.record
    write(alpha, 3, 77)
    assert alpha.record == before
    assert_equal(alpha, beta)
    assert beta.record.lineage.generation == before.lineage.generation
    assert beta.marks() == 0


def test_an_outage_copies_what_was_missed(pair: tuple[Half, Half]) -> None:
    """The primary goes on alone, in a generation that the other one cannot hold."""
    alpha, beta = pair
    lose(alpha, beta)
    write(alpha, 5, 6)
    assert alpha.record.lineage.generation != beta.record.lineage.generation
    beta.stop()
    beta.follow()
    plan = meet(alpha, beta)
    assert (plan.row, plan.extent) == ("9 base", Extent.MARKED)
    assert_equal(alpha, beta)


def test_failover_and_return(pair: tuple[Half, Half]) -> None:
    """The primary is killed; the other one serves; it comes back, and is made equal."""
    alpha, beta = pair
    write(alpha, 10, 11)
    alpha.kill()
    beta.shut()
    beta.engine.node_session_lost()
    answered = beta.disk.read_bytes()
    beta.lead()
    assert beta.record.lineage.peer("alpha").bases  # its doubts were settled
    assert beta.disk.read_bytes() == answered
    write(beta, 11, 12)
    alpha.follow()
    plan = meet(beta, alpha)
    assert plan.row == "9 base"
    assert_equal(beta, alpha)
    assert alpha.record.role is Role.SECONDARY
    assert alpha.record.epoch == 2


def test_failover_without_a_write_and_return(pair: tuple[Half, Half]) -> None:
    """No client wrote, and nothing that was answered is lost."""
    alpha, beta = pair
    write(alpha, 10)
    alpha.engine.flush()
    expect = alpha.disk.read_bytes()
    alpha.kill()
    beta.shut()
    beta.engine.node_session_lost()
    beta.lead()
    alpha.follow()
    meet(beta, alpha)
    assert_equal(beta, alpha)
    assert beta.disk.read_bytes() == expect


def test_switchover_copies_nothing(pair: tuple[Half, Half]) -> None:
    """Both sessions are closed cleanly: equal generations, empty maps."""
    alpha, beta = pair
    write(alpha, 20, 21)
    generation = alpha.record.lineage.generation
    alpha.stop()
    beta.shut()
    beta.engine.cool(0)
    beta.lead()
    alpha.follow()
    plan = meet(beta, alpha)
    assert plan.action is Action.IN_SYNC
    assert beta.record.lineage.generation == generation
    assert beta.engine.remote_status(OTHER).copied_bytes == 0
    write(beta, 22)
    assert_equal(beta, alpha)


def test_both_primary_apart_is_a_split_brain(pair: tuple[Half, Half]) -> None:
    """Each answered writes alone: an operator has to choose."""
    alpha, beta = pair
    lose(alpha, beta)
    write(alpha, 30)
    beta.lead()
    write(beta, 31)
    plan = decide(alpha.side(), beta.side())
    assert plan.action is Action.STOP
    assert plan.split
    with pytest.raises(MirrorError) as refused:
        alpha.engine.node_clear(OTHER)
    assert refused.value.errno == errno.EPERM


@pytest.mark.parametrize("seed", range(3))
def test_lives_at_random_end_equal(pair: tuple[Half, Half], seed: int) -> None:
    """Writes, cut links, killed and stopped nodes, failovers: each meeting heals."""
    leader, follower = pair
    dice = random.Random(seed)
    for _ in range(6):
        write(leader, *(dice.randrange(REGIONS) for _ in range(3)))
        event = dice.choice(["cut", "kill follower", "kill leader", "switch over"])
        if event == "cut":
            lose(leader, follower)
            write(leader, *(dice.randrange(REGIONS) for _ in range(dice.randrange(3))))
            follower.stop()
            follower.follow()
        elif event == "kill follower":
            follower.kill()
            notice(leader)
            write(leader, *(dice.randrange(REGIONS) for _ in range(dice.randrange(3))))
            follower.follow()
        else:
            if event == "kill leader":
                leader.kill()
                follower.shut()
                follower.engine.node_session_lost()
            else:
                leader.stop()
                follower.shut()
                follower.engine.cool(0)
            need = follower.disk.read_bytes()
            leader, follower = follower, leader
            leader.lead()
            assert leader.disk.read_bytes() == need
            follower.follow()
        meet(leader, follower)
        assert_equal(leader, follower)
