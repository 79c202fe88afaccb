# SPDX-License-Identifier: BSD-3-Clause
"""
The engine as a node: its record, role and maps, and the generations that it begins.

The rules in nbd_mirror/rules/ are the oracle: what the engine stores by itself has to
equal what the rule gives.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from unit.volumes import REGION, make_params

from nbd_mirror.base.errors import AccessError, ConfigError, WrongDiskError
from nbd_mirror.rules.generation import Lineage, Peer, begin
from nbd_mirror.rules.node_side import Crash, Role
from nbd_mirror.rules.state import RemoteState
from nbd_mirror.volume import core
from nbd_mirror.volume.mapview import DirtyMaps
from nbd_mirror.volume.model import NodeMap, disk_of
from nbd_mirror.volume.node_record import NodeRecord

BETA, PLAIN = disk_of(0), disk_of(1)


def node_params(folder: Path, *, plain: bool = False) -> core.Params:
    """Describe node alpha, whose other node is beta, and create it."""
    params = make_params(folder, hold_ms=0)
    beta = replace(params.remotes[0], name="beta", is_node=True)
    remotes = (beta, replace(beta, name="plain", is_node=False, assume_in_sync=True))
    params = replace(params, node="alpha", remotes=remotes[: 1 + plain])
    core.create(params)
    return params


@contextmanager
def opened(params: core.Params) -> Iterator[core.Engine]:
    """Open a node, and stop it cleanly at the end."""
    with core.Engine(params) as engine:
        engine.start()
        yield engine
        engine.stop()


def change(engine: core.Engine, **fields: object) -> NodeRecord:
    """Store a record with other *fields*; return it."""
    before = engine.node_get()
    after = replace(before, **fields)  # type: ignore[arg-type]
    assert engine.node_store(before, after)
    return after


def promote(
    params: core.Params, lineage: Lineage | None = None, epoch: int = 1
) -> core.Params:
    """Store, as a promotion does, what lets the node be primary in *epoch*."""
    lineage = lineage or Lineage(1000, (), (Peer("beta"),))
    with opened(params) as engine:
        change(engine, lineage=lineage, epoch=epoch, leader="alpha", role=Role.PRIMARY)
    return replace(params, primary=True, epoch=epoch)


def regions(bits: bytes) -> set[int]:
    """Give the regions of a map."""
    return {
        8 * at + i for at, byte in enumerate(bits) for i in range(8) if byte >> i & 1
    }


def bits_of(engine: core.Engine, *marked: int) -> bytes:
    """Make a map with these regions."""
    bits = bytearray(len(engine.node_map(BETA, NodeMap.DIRTY)))
    for region in marked:
        bits[region // 8] |= 1 << region % 8
    return bytes(bits)


def dirty(engine: core.Engine) -> set[int]:
    """Give the regions that beta misses."""
    return regions(engine.node_map(BETA, NodeMap.DIRTY))


def doubts(engine: core.Engine) -> set[int]:
    """Give the regions that this node doubts towards beta."""
    return regions(engine.node_map(BETA, NodeMap.DOUBTS))


class TestRole:
    """Which role an open gives."""

    def test_a_node_opens_as_secondary_without_a_grant(self, run_dir: Path) -> None:
        """Also if its record says that it was primary."""
        params = promote(node_params(run_dir))
        with opened(replace(params, primary=False)) as engine:
            assert engine.status().role is Role.SECONDARY
            assert engine.node_get().role is Role.PRIMARY

    def test_a_grant_of_the_stored_promotion_opens_as_primary(
        self, run_dir: Path
    ) -> None:
        """And the record keeps what the promotion stored."""
        with opened(promote(node_params(run_dir))) as engine:
            assert engine.status().role is Role.PRIMARY
            record = engine.node_get()
        assert (record.epoch, record.leader) == (1, "alpha")
        assert record.lineage == Lineage(1000, (), (Peer("beta"),))

    @pytest.mark.parametrize("fields", [{"epoch": 2}, {"leader": "beta"}])
    def test_any_other_grant_is_refused(
        self, run_dir: Path, fields: dict[str, object]
    ) -> None:
        """The node learned of a later promotion, or it is another node's."""
        params = promote(node_params(run_dir))
        with opened(replace(params, primary=False)) as engine:
            change(engine, **fields)
        before = core.peek(params.state_dir)
        with pytest.raises(AccessError, match="not the primary of promotion 1"):
            core.Engine(params)
        assert core.peek(params.state_dir) == before

    def test_a_node_without_data_is_no_primary(self, run_dir: Path) -> None:
        """There is no generation that its writes could be of."""
        params = node_params(run_dir)
        with opened(params) as engine:
            change(engine, epoch=1, leader="alpha")
        with pytest.raises(AccessError, match="no data"):
            core.Engine(replace(params, primary=True, epoch=1))

    def test_other_parameters_are_refused(self, run_dir: Path) -> None:
        """A state belongs to one node of one volume, whose nodes are all known."""
        params = node_params(run_dir)
        plain = replace(params.remotes[0], name="other", is_node=False)
        for wrong in (
            replace(params, node="beta"),
            replace(params, node=""),
            replace(params, remotes=()),
            replace(params, remotes=(replace(params.remotes[0], is_node=False),)),
            replace(params, remotes=(*params.remotes, replace(plain, is_node=True))),
        ):
            with pytest.raises(ConfigError):
                core.Engine(wrong)
        with opened(params):
            pass

    def test_a_volume_without_nodes_is_none(self, run_dir: Path) -> None:
        """It has no record, and its parameters name no node."""
        params = make_params(run_dir)
        core.create(params)
        with opened(params) as engine:
            assert engine.status().role is None
            with pytest.raises(ConfigError, match="no nodes"):
                engine.node_get()
        node = replace(params.remotes[0], is_node=True)
        for wrong in (replace(params, node="alpha"), replace(params, remotes=(node,))):
            with pytest.raises(ConfigError, match="without nodes"):
                core.Engine(wrong)


class TestRecord:
    """Compare and swap."""

    def test_a_stored_record_is_got_again_and_survives(self, run_dir: Path) -> None:
        """Whatever is stored, in this session and in the next one."""
        params = node_params(run_dir)
        lineage = Lineage(7, tuple(range(100, 132)), (Peer("beta", (1, 2, 3, 4)),))
        with opened(params) as engine:
            stored = change(
                engine,
                lineage=lineage,
                epoch=3,
                leader="beta",
                handed="beta",
                crash=Crash.SESSION,
                inconsistent=True,
                zero=True,
                own_session=5,
                replaced=2,
            )
            assert engine.node_get() == stored
            assert core.peek(params.state_dir).node == stored
        kept = replace(stored, crash=Crash.NONE, zero=False)  # no doubts, and data
        with opened(params) as engine:
            assert engine.node_get() == kept

    def test_a_disk_that_no_longer_reads_as_zeroes_has_lost_the_proof(
        self, run_dir: Path
    ) -> None:
        """No lock was on it since `create`, and no sample was taken yet."""
        params = node_params(run_dir)
        node = core.peek(params.state_dir).node
        assert node is not None
        assert node.zero
        with open(params.local, "r+b") as file:
            file.seek(REGION)
            file.write(b"x")
        with opened(params) as engine:
            assert not engine.node_get().zero

    def test_another_record_than_expected_is_left(self, run_dir: Path) -> None:
        """The caller's rule was applied to what is no longer so."""
        params = node_params(run_dir)
        with opened(params) as engine:
            before = engine.node_get()
            stored = change(engine, own_session=4)
            assert not engine.node_store(before, replace(before, own_session=9))
            assert engine.node_get() == stored

    def test_what_no_rule_gives_is_refused(self, run_dir: Path) -> None:
        """A bug of the caller does not reach the disk."""
        params = node_params(run_dir)
        with opened(params) as engine:
            lineage = Lineage(5, (), (Peer("beta"),))
            before = change(engine, epoch=2, leader="beta", lineage=lineage)
            for wrong in (
                replace(before, node="gamma"),
                replace(before, id=uuid.UUID(int=1)),
                replace(before, epoch=1),
                replace(before, leader="alpha"),
                replace(before, lineage=Lineage(0, (), (Peer("beta"),))),
                replace(
                    before,
                    lineage=Lineage(5, (), (Peer("gamma"),)),
                    peers=(replace(before.peers[0], node="gamma"),),
                ),
            ):
                with pytest.raises(ConfigError):
                    engine.node_store(before, wrong)
            assert engine.node_get() == before


class TestSecondary:
    """What a secondary leaves alone."""

    def test_its_writes_enter_no_map_and_begin_nothing(self, run_dir: Path) -> None:
        """Its primary counts them."""
        lineage = Lineage(1000, (), (Peer("beta", shared=True),))
        params = replace(promote(node_params(run_dir), lineage), primary=False)
        with opened(params) as engine:
            before = engine.node_get()
            engine.pwrite(b"x" * REGION, 3 * REGION)
            engine.flush()
            assert dirty(engine) == set()
            assert doubts(engine) == set()
            assert engine.node_get() == before
            got = bytearray(REGION)
            engine.pread(got, 3 * REGION)
            assert bytes(got) == b"x" * REGION

    def test_it_connects_to_no_disk(self, run_dir: Path) -> None:
        """Two nodes that both wrote to one disk would not know of each other."""
        params = node_params(run_dir, plain=True)
        with opened(params) as engine:
            for disk in (BETA, PLAIN):
                with pytest.raises(AccessError, match="secondary"):
                    engine.connect(disk, "nbd://127.0.0.1:1", 1)

    def test_its_first_write_forgets_what_plain_remotes_have(
        self, run_dir: Path
    ) -> None:
        """A start alone does not: the last primary may resume."""
        params = node_params(run_dir, plain=True)
        with opened(params) as engine:
            assert engine.remote_status(PLAIN).dirty_regions == 0
        with opened(params) as engine:
            engine.pwrite(b"x" * 512, 0)
            status = engine.remote_status(PLAIN)
            everything = engine.status().size // REGION
            assert status.dirty_regions == status.late_regions == everything
        state = core.peek(params.state_dir).remotes[1].state
        assert state is RemoteState.OUT_OF_SYNC

    def test_no_policy_fences_it(self, run_dir: Path) -> None:
        """The other node is out of sync by definition."""
        params = replace(node_params(run_dir), policy="stop", fenced_reads="fail")
        with opened(params) as engine:
            engine.pwrite(b"x" * 512, 0)
            engine.flush()
            with pytest.raises(AccessError, match="secondary"):
                engine.set_policy("stop", "serve")


class TestGenerations:
    """Generations that a write begins."""

    def test_the_first_write_that_a_sharing_node_misses_begins_one(
        self, run_dir: Path
    ) -> None:
        """The record is what the rule gives, and the next write begins no other."""
        lineage = Lineage(1000, (900,), (Peer("beta", (900,), shared=True),))
        with opened(promote(node_params(run_dir), lineage)) as engine:
            engine.pwrite(b"x" * 512, 5 * REGION)
            after = engine.node_get().lineage
            assert after == begin(lineage, after.generation, ["beta"])
            assert engine.status().generation == after.generation
            engine.pwrite(b"x" * 512, 6 * REGION)
            assert engine.node_get().lineage == after
            assert dirty(engine) == {5, 6}

    def test_a_node_that_cannot_hold_it_begins_none(self, run_dir: Path) -> None:
        """It was never met, or it misses a write already."""
        for peer in (Peer("beta"), Peer("beta", (900,))):
            folder = run_dir / str(len(peer.bases))
            folder.mkdir()
            lineage = Lineage(1000, (900,), (peer,))
            with opened(promote(node_params(folder), lineage)) as engine:
                engine.pwrite(b"x" * 512, 0)
                assert engine.node_get().lineage == lineage
                assert dirty(engine) == {0}

    def test_a_plain_remote_begins_none(self, run_dir: Path) -> None:
        """It holds no generation that could be compared."""
        params = promote(node_params(run_dir, plain=True))
        with opened(params) as engine:
            lineage = engine.node_get().lineage
            assert engine.remote_status(PLAIN).dirty_regions == 0
            engine.pwrite(b"x" * 512, 0)
            assert engine.node_get().lineage == lineage
            assert engine.remote_status(PLAIN).dirty_regions == 1
        with opened(params) as engine:
            assert engine.remote_status(PLAIN).dirty_regions == 1


class TestMaps:
    """Reading, marking and clearing maps."""

    def test_marked_regions_are_read_and_survive(self, run_dir: Path) -> None:
        """Each in its own map, and bits behind the last region are left out."""
        params = node_params(run_dir)
        with opened(params) as engine:
            engine.node_mark(BETA, NodeMap.DIRTY, bits_of(engine, 0, 9, 255))
            engine.node_mark(BETA, NodeMap.DOUBTS, bits_of(engine, 9, 10))
            engine.node_mark(BETA, NodeMap.DOUBTS, bits_of(engine, 11))
            assert engine.remote_status(BETA).doubts == 3
            with DirtyMaps(f"{params.state_dir}/dirty.beta") as maps:
                assert set(maps.dirty.search(1)) == {0, 9, 255}
                assert set(maps.doubts.search(1)) == {9, 10, 11}
                assert maps.doubted_regions == 3
            with DirtyMaps(f"{params.state_dir}/dirty.local") as maps:
                assert not maps.doubts.any()
                assert maps.doubted_regions == 0
        with opened(params) as engine:
            assert dirty(engine) == {0, 9, 255}
            assert doubts(engine) == {9, 10, 11}
            assert regions(engine.node_map(BETA, NodeMap.MISSED)) == set()

    def test_clear_empties_both(self, run_dir: Path) -> None:
        """The node adopted the generation of the other one."""
        params = node_params(run_dir)
        with opened(params) as engine:
            engine.node_mark(BETA, NodeMap.DIRTY, bits_of(engine, 1))
            engine.node_mark(BETA, NodeMap.DOUBTS, bits_of(engine, 2))
            engine.node_clear(BETA)
            assert dirty(engine) | doubts(engine) == set()
        with opened(params) as engine:
            assert dirty(engine) | doubts(engine) == set()

    def test_wrong_calls_are_refused(self, run_dir: Path) -> None:
        """A disk without such maps, a map of another size, a role that never clears."""
        params = node_params(run_dir, plain=True)
        with opened(params) as engine:
            with pytest.raises(ConfigError, match="no node"):
                engine.node_map(PLAIN, NodeMap.DIRTY)
            with pytest.raises(ConfigError, match="bytes"):
                engine.node_mark(BETA, NodeMap.DIRTY, b"\1")
            with pytest.raises(ConfigError, match="not marked"):
                engine.node_mark(BETA, NodeMap.MISSED, bits_of(engine, 1))
        with opened(promote(params)) as engine:
            with pytest.raises(AccessError, match="primary"):
                engine.node_clear(BETA)
            with pytest.raises(AccessError, match="primary"):
                engine.node_session_lost()

    def test_doubts_become_dirty_when_it_is_primary(self, run_dir: Path) -> None:
        """In a generation that the other node cannot hold."""
        params = node_params(run_dir)
        lineage = Lineage(1000, (), (Peer("beta", shared=True),))
        with opened(params) as engine:
            engine.node_mark(BETA, NodeMap.DOUBTS, bits_of(engine, 4, 5))
        with opened(promote(params, lineage)) as engine:
            after = engine.node_get()
            assert after.lineage == begin(lineage, after.lineage.generation, ["beta"])
            assert after.crash is Crash.NONE
            assert dirty(engine) == {4, 5}
            assert doubts(engine) == set()


class TestForcedDisk:
    """An operator chose a disk that is another one."""

    def test_it_is_doubted_and_never_the_better_source(self, run_dir: Path) -> None:
        """Dirty regions would make this node the source of the other one."""
        lineage = Lineage(1000, (), (Peer("beta", shared=True),))
        params = replace(promote(node_params(run_dir), lineage), primary=False)
        with opened(params) as engine:
            engine.pwrite(b"x" * REGION, 0)
        with open(params.local, "r+b") as file:
            file.write(b"y" * REGION)  # the latest write: it has a sample
        with pytest.raises(WrongDiskError):
            core.Engine(params)
        with opened(replace(params, local_choice="forced")) as engine:
            everything = set(range(engine.status().size // REGION))
            assert doubts(engine) == everything
            assert dirty(engine) == set()
            assert engine.node_get().crash is Crash.HOST
            assert engine.node_get().lineage == lineage

    def test_a_secondary_cannot_do_without_its_own(self, run_dir: Path) -> None:
        """No remote serves in its place."""
        params = replace(node_params(run_dir), local_choice="lost")
        with pytest.raises(ConfigError, match="no other disk"):
            core.Engine(params)


class TestCrashes:
    """What a node doubts after an unclean end."""

    def test_a_lost_session_doubts_what_is_active(self, run_dir: Path) -> None:
        """After a clean one the extents are forgotten, and nothing is doubted."""
        params = node_params(run_dir)
        with opened(params) as engine:
            engine.pwrite(b"x" * 512, 0)
            engine.cool(0)
            engine.node_session_lost()
            assert doubts(engine) == set()
            assert engine.node_get().crash is Crash.NONE
            engine.pwrite(b"x" * 512, 4 << 20)
            engine.node_session_lost()
            assert doubts(engine) == set(range(64, 128))
            assert engine.node_get().crash is Crash.SESSION
        with opened(params) as engine:
            assert doubts(engine) == set(range(64, 128))
            assert engine.node_get().crash is Crash.SESSION

    def test_a_killed_node_without_requests_doubts_nothing(self, run_dir: Path) -> None:
        """Its page cache has every write, and no slot is open."""
        params = node_params(run_dir)
        with core.Engine(params) as engine:
            engine.start()
            engine.pwrite(b"x" * 512, 0)
        with opened(params) as engine:
            assert doubts(engine) == set()
            assert engine.node_get().crash is Crash.NONE

    def test_a_host_that_went_down_doubts_every_active_extent(
        self, run_dir: Path
    ) -> None:
        """Its note says that the page cache is not to be believed."""
        params = node_params(run_dir, plain=True)
        with core.Engine(params) as engine:
            engine.start()
            engine.pwrite(b"x" * 512, 0)
        (Path(params.state_dir) / "failed").touch()
        with opened(params) as engine:
            assert doubts(engine) == set(range(64))
            assert dirty(engine) == set()
            assert engine.node_get().crash is Crash.HOST
